"""Arrays of the user's own in one file: what a run makes of them, and every mistake in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_training import RULES

import cimjax
from cimjax.cli import main
from cimjax.data import DamagedDataError, DataError, load
from cimjax.data.loading import shape_and_classes
from cimjax.training.config.file import load_config
from cimjax.training.train import default_workdir


def arrays() -> dict[str, Any]:
    """The digits, named as Keras names such arrays."""
    digits = load("digits")
    return {
        "x_train": digits.train.images,
        "y_train": digits.train.labels,
        "x_test": digits.test.images,
        "y_test": digits.test.labels,
    }


def test_a_sweep_trains_on_a_file_as_on_the_same_data_by_name(tmp_path: Path) -> None:
    given = arrays()
    # Grey images without an axis for that, and labels with an axis too many, as files of Keras have them.
    given |= {name: given[name][..., 0] for name in ("x_train", "x_test")} | {"y_test": given["y_test"][:, None]}
    np.savez(tmp_path / "mine.npz", **given)
    command = ["sweep", "--config", "configs/digits.py:smoke", "--over", "adc_bits=3", "--config.epochs=0.5"]
    command += ["--config.model.width=4", f"--config.rules={RULES}"]
    own = [f"--config.dataset=npz:{tmp_path / 'mine.npz'}", "--workdir", str(tmp_path / "own")]
    assert main([*command, *own]) == main([*command, "--workdir", str(tmp_path / "named")]) == 0
    found = [cimjax.evaluate(tmp_path / name / "adc_bits=3") for name in ("own", "named")]
    assert found[0]["accuracy"] == found[1]["accuracy"] and found[0]["loss"] == pytest.approx(
        found[1]["loss"], rel=1e-5
    )


def test_what_is_in_a_file_is_told_without_a_run(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "mine.npz", **arrays())
    assert shape_and_classes("npz:mine.npz", tmp_path) == ((8, 8, 1), 10)
    config = load_config("configs/digits.py", [])
    with config.unlocked():
        config.dataset, config.data_dir = "npz:mine.npz", str(tmp_path)
    assert default_workdir(config) == Path("runs", "mine-small")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"y_test": None}, r"mine.npz has no y_test \(it has x_train, y_train, x_test\); name them so"),
        ({"x_train": np.zeros((4, 8, 8), np.float32)}, "mine.npz: .*uint8"),
        ({"y_train": np.zeros(3, int)}, "mine.npz: .*labels"),
        ({"y_train": np.full(1437, 0.5)}, "mine.npz: .*integer"),
        ({"x_test": np.zeros((360, 4, 4), np.uint8)}, "mine.npz: "),
        ({"y_test": np.array([{}] * 360)}, "cannot be read as a file of numpy.savez"),
    ],
    ids=str,
)
def test_arrays_that_are_no_data_set_are_said_in_one_line(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **{name: value for name, value in (arrays() | change).items() if value is not None})
    with pytest.raises(DataError, match=message) as caught:
        load("npz:mine.npz", tmp_path)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_of_numpys_are_said_in_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", **arrays())
    whole = (tmp_path / "mine.npz").read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "changed.npz").write_bytes(whole[:5000] + bytes(50) + whole[5050:])
    (tmp_path / "text.npz").write_text("images")
    (tmp_path / "empty.npz").write_bytes(b"")
    for name in ("one.npy", "cut.npz", "changed.npz", "text.npz", "empty.npz"):
        with pytest.raises(DamagedDataError, match=r"cannot be read as a file of numpy\.savez") as caught:
            load(f"npz:{name}", tmp_path)
        assert "\n" not in str(caught.value) and name in str(caught.value)
    for name in ("npz:", "npz:none.npz", f"npz:{tmp_path}"):
        with pytest.raises(DataError, match=r"is no file; `npz:PATH` wants one of numpy\.savez with x_train, "):
            load(name, tmp_path)
