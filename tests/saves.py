"""How long training stands still for a save: python tests/saves.py FOLDER [--runs 5]

ResNet-18 with 1,000 classes and its momentum, as `configs/resnet18_imagenet.py` trains it, on small random images: the
state to save has its true size, and a step is short beside it, which is the worst case. In full precision: arrays would
make steps longer, and the state hardly larger.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from cimjax.data import Dataset
from cimjax.training.batches import batches_of
from cimjax.training.config.file import Override, load_config
from cimjax.training.experiment import build
from cimjax.training.programs import Programs
from cimjax.training.run.checkpoint import Checkpoints

CONFIG = Path(__file__).parents[1] / "configs" / "resnet18_imagenet.py"
# Steps that are timed after each save, or after none.
STEPS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 255, (64, 64, 64, 3), np.uint8), np.arange(64, dtype=np.int32)
    data = Dataset.from_arrays("random", images, labels, images[:8], labels[:8], classes=1000)
    fields = {"batch_size": 8, "epochs": 1000.0, "workers": 0, "steps_per_dispatch": 1}
    config = load_config(f"{CONFIG}:weight=none", [Override(name, str(value)) for name, value in fields.items()])
    experiment = build(config, dataset=data)
    programs = Programs(experiment, batches_of(data.train, experiment.preparation, experiment.devices))
    state, step = experiment.devices.put(experiment.first_state()[0]), 0
    print(f"{sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6:.0f} MB, {jax.devices()[0].device_kind}")
    checkpoints = Checkpoints(arguments.folder)
    waits: dict[str, list[float]] = {"none": [], "background": [], "waited for": []}
    steps: dict[str, list[float]] = {name: [] for name in waits}
    written: list[float] = []
    for run in range(arguments.runs + 1):
        for kind in waits:
            began = time.perf_counter()
            if kind == "background":
                checkpoints.save_in_background(step, state, {})
            elif kind == "waited for":
                checkpoints.save(step, state, {})
            waited = time.perf_counter() - began
            each = []
            for _ in range(STEPS):
                start = time.perf_counter()
                state, _ = jax.block_until_ready(programs(state, step, 1))
                each.append(time.perf_counter() - start)
                step += 1
            late = time.perf_counter()
            checkpoints.wait()
            if run:  # the first one compiles
                waits[kind].append(waited)
                steps[kind].append(statistics.mean(each))
                if kind == "background":
                    written.append(time.perf_counter() - late)
    for kind in waits:
        print(
            f"save {kind:<10}  stands still {1000 * statistics.median(waits[kind]):6.0f} ms, then "
            f"{1000 * statistics.median(steps[kind]):6.1f} ms a step"
        )
    print(f"still being written after {STEPS} steps: {1000 * statistics.median(written):.0f} ms more")


if __name__ == "__main__":
    main()
