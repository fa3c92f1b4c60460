"""ResNet-18 and ResNet-50 in whole, with 1,000 classes, from files, on one device, on several, and by processes.

    CIMJAX_SCALE=1 pytest --rest -s tests/test_scale.py           # 0.125: an eighth of the width

Each run takes minutes on two cores, most of them to compile, so that they are made only when they are asked for.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from photographs import write_folder
from test_processes import started

from cimjax.training.run.folder import read_records

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif("CIMJAX_SCALE" not in os.environ, reason="set CIMJAX_SCALE to a width: it takes half an hour"),
]
TRAIN = [sys.executable, "train.py"]
LAUNCH = [sys.executable, "-m", "cimjax", "launch", "--num_processes", "2", "--"]
# By name: what starts a run, and how many devices each of its processes has.
WAYS = {"one device": (TRAIN, 1), "four devices": (TRAIN, 4), "two processes": (LAUNCH, 1)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image to train on and one to test with of each of 1,000 classes."""
    folder = tmp_path_factory.mktemp("images")
    write_folder(folder, {"train": 1000, "val": 1000}, classes=1000)
    return folder


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_networks_of_1000_classes_train_from_files_on_devices_and_by_processes(
    network: str, images: Path, tmp_path: Path
) -> None:
    """Three steps and an evaluation in whole; all ways come to the same, but for the order of sums."""
    losses = []
    for name, (start, devices) in WAYS.items():
        folder, began = tmp_path / name.replace(" ", "-"), time.monotonic()
        fields = {
            "dataset": f"folder:{images}",
            "model.name": network,
            "model.width": float(os.environ["CIMJAX_SCALE"]),
            "image_size": 64,
            "batch_size": 8,
            "eval_batch_size": 40,
            "epochs": 0.024,
            "ideal_share": 0.0,
            "warmup_epochs": 0.0,
            "optimizer.learning_rate": 0.001,
            "calibration_images": 8,
            "workers": 1,
        }
        words = [f"--config.{field}={value}" for field, value in fields.items()]
        config = ["--config", "configs/resnet18_imagenet.py", "--workdir", str(folder)]
        process = started([*start, *config, *words], devices)
        output, errors = process.communicate()
        assert process.returncode == 0, errors[-2000:]
        records = {record["split"]: record for record in read_records(folder)}
        assert records["result"]["step"] == 3 and 0 <= records["test"]["accuracy"] <= 1, output[-2000:]
        losses.append((records["train"]["loss"], records["test"]["loss"]))
        print(f"{network}, {name}: {time.monotonic() - began:.0f} s, losses {losses[-1]}", flush=True)
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=5e-3)
