"""Runs that take over the epochs with ideal ADCs of another: what they come to, and what cannot be taken over."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import chex
import pytest
from test_training import RULES, config, quiet

import cimjax
from cimjax.cli import main
from cimjax.nn.parameters import stored_steps, trained_as
from cimjax.training.experiment import build
from cimjax.training.forking import _is_common
from cimjax.training.run.folder import RunFolderWarning, read_records

HALF = {"epochs": 2.0, "ideal_share": 0.5, "checkpoint_epochs": 1.0}


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The records of epochs, without times, and without what a run without ADCs does not record."""
    return [
        {name: value for name, value in record.items() if not name.startswith(("second", "image", "psum", "offset"))}
        for record in read_records(folder)
        if record["split"] in ("train", "test", "result")
    ]


@pytest.fixture(scope="module")
def ideal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without ADCs, which keeps its state of every epoch."""
    folder = tmp_path_factory.mktemp("ideal") / "run"
    cimjax.train(config("smoke,psum=none", **HALF), workdir=folder, display=quiet())
    return folder


@pytest.fixture(scope="module")
def with_adcs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with 3-bit ADCs in its second epoch, which keeps its state of every epoch."""
    folder = tmp_path_factory.mktemp("with_adcs") / "run"
    cimjax.train(config("smoke", **HALF), workdir=folder, display=quiet())
    return folder


def require_equal(found: list[dict[str, Any]], wanted: list[dict[str, Any]]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.pop("split") == other.pop("split")
        assert one.pop("moved", {}) == pytest.approx(other.pop("moved", {}), rel=1e-5)
        assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("options", ["adc_bits=2", pytest.param("psum=layer,offset=true", marks=pytest.mark.full)])
def test_a_fork_comes_to_what_a_run_by_itself_comes_to(options: str, with_adcs: Path, tmp_path: Path) -> None:
    """Of a run without ADCs to rounding alone, as its program is another: on one core XLA rounds otherwise in it."""
    chosen = config(f"smoke,{options}", **HALF)
    for name, fork in (("own", None), ("forked", with_adcs)):
        cimjax.train(chosen, workdir=tmp_path / name, fork=fork, display=quiet())
    forked = numbers(tmp_path / "forked")
    assert [record["split"] for record in forked] == ["train", "test", "train", "test", "result"]
    assert [record.get("ideal_adcs") for record in forked] == [None, True, None, None, None]
    require_equal(forked, numbers(tmp_path / "own"))


def test_steps_that_are_set_before_training_know_nothing_of_adcs_that_come_later() -> None:
    first = []
    for options in ("smoke,psum=none", "smoke", "smoke,adc_bits=1,psum=layer"):
        state, _ = build(config(options, rules=(), **HALF)).first_state()
        steps = stored_steps(state.params)
        first.append({name: step for name, step in steps.items() if trained_as(name) != "psum"})
    assert len(first[0]) == 6
    for other in first[1:]:
        chex.assert_trees_all_close(other, first[0], rtol=1e-6)


def test_a_fork_goes_on_by_itself(ideal: Path, tmp_path: Path) -> None:
    """Its first state is its own; of one with ADCs that has come further, and is no longer there, too."""
    chosen, folder = config("smoke", **HALF), tmp_path / "run"
    whole = cimjax.train(chosen, workdir=tmp_path / "whole", fork=ideal, display=quiet())
    cimjax.train(chosen, workdir=folder, fork=ideal, callbacks=[lambda *_: True], display=quiet())
    shutil.rmtree(folder / "checkpoints" / "000002_step_44")
    assert cimjax.train(chosen, workdir=folder, display=quiet()).accuracy == whole.accuracy
    other = config("smoke,adc_bits=1", **HALF)
    cimjax.train(other, workdir=tmp_path / "other", fork=tmp_path / "whole", display=quiet())
    wanted, *found = (len(read_records(tmp_path / name)) for name in ("whole", "run", "other"))
    assert found == [wanted, wanted]


@pytest.mark.parametrize(
    "options,fields,message",
    [
        ("smoke", {"seed": 1}, r"was trained otherwise, not only for other ADCs \(seed: 0 -> 1\)"),
        ("smoke,weight=layer", {}, "was trained otherwise, .*spec.weight.granularity"),
        ("smoke", {"epochs": 4.0}, "was trained otherwise, .*epochs: 2.0 -> 4.0"),
        ("smoke", {"ideal_share": 0.0}, "this run has no epochs with ideal ADCs to take over"),
        ("smoke,psum=none", {}, "this run has no epochs with ideal ADCs to take over"),
        ("smoke", {"ideal_share": 0.1, "epochs": 2.0}, "this run has no epochs with ideal ADCs"),
    ],
)
def test_what_cannot_be_taken_over_is_said_in_one_line(
    options: str, fields: dict[str, Any], message: str, ideal: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        cimjax.train(config(options, **HALF | fields), workdir=tmp_path / "run", fork=ideal, display=quiet())
    assert "\n" not in str(caught.value)


def test_a_run_with_adcs_too_soon_cannot_be_forked(tmp_path: Path) -> None:
    early = config("smoke", **HALF | {"epochs": 3.0, "ideal_share": 0.4})
    cimjax.train(early, workdir=tmp_path / "early", callbacks=[lambda *_: True], display=quiet())
    later = config("smoke", **HALF | {"epochs": 3.0, "ideal_share": 0.7})
    with pytest.raises(ValueError, match="has ideal ADCs until epoch 1 alone, and this run until 2"):
        cimjax.train(later, workdir=tmp_path / "later", fork=tmp_path / "early", display=quiet())


def test_a_state_that_is_gone_packed_or_of_other_images_cannot_be_taken_over(ideal: Path, tmp_path: Path) -> None:
    chosen = config("smoke", **HALF)
    gone = tmp_path / "gone"
    shutil.copytree(ideal, gone)
    shutil.rmtree(gone / "checkpoints" / "000001_step_22")
    packed = cimjax.training.restore.pack(ideal, tmp_path / "packed").parent
    for run, message in (
        (gone, r"keeps no state of epoch 1 \(step 22; it has 44\); .*--config.checkpoint_epochs=1 "),
        (packed, "holds a packed network"),
        (tmp_path / "none", "is no run folder"),
    ):
        with pytest.raises(ValueError, match=message):
            cimjax.train(chosen, workdir=tmp_path / "run", fork=run, display=quiet())
    digits = cimjax.data.load("digits")
    brighter = dataclasses.replace(digits, mean=tuple(value / 2 for value in digits.mean))
    with pytest.raises(ValueError, match="was trained on other images"):
        cimjax.train(chosen, workdir=tmp_path / "run", fork=ideal, dataset=brighter, display=quiet())
    with pytest.raises(ValueError, match="give one of them"):
        cimjax.train(chosen, workdir=tmp_path / "run", fork=ideal, variables=cimjax.load(ideal), display=quiet())


def test_a_state_before_its_adcs_are_set_is_measured_without_them(ideal: Path, tmp_path: Path) -> None:
    cimjax.train(config("smoke", **HALF), workdir=tmp_path, fork=ideal, display=quiet())
    shutil.rmtree(tmp_path / "checkpoints" / "000002_step_44")
    found, (record, *_) = cimjax.evaluate(tmp_path), [r for r in read_records(ideal) if r["split"] == "test"]
    assert found["ideal_adcs"] and found["accuracy"] == record["accuracy"]
    with pytest.warns(RunFolderWarning, match="stands in its epochs with ideal ADCs: their steps are not set yet"):
        cimjax.load(tmp_path)


def test_the_commands_fork(ideal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = [f"--config.{name}={value}" for name, value in HALF.items()]
    command = ["train", "--config", "configs/digits.py:smoke,adc_bits=2", "--config.model.width=4", *fields]
    command += [f"--config.rules={RULES}", "--workdir", str(tmp_path / "run"), "--fork", str(ideal)]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"forked from {ideal} after its first 1 epoch, with ideal ADCs" in out.replace("\n", " ")
    assert "epoch 2/2" in out and "epoch 1/2 " not in out
    sweep = ["sweep", *command[1:3], "--over", "adc_bits=1,3", *command[3:-4], "--workdir", str(tmp_path / "all")]
    sweep[2] = "configs/digits.py:smoke"
    assert main([*sweep, "--fork", str(ideal)]) == 0
    for run in ("adc_bits=1", "adc_bits=3"):
        assert numbers(tmp_path / "all" / run)[0] == numbers(ideal)[0]
    assert main([*command, "--from", str(ideal)]) == 2
    assert "--fork goes on from where it is; give one of them" in capsys.readouterr().err


def test_what_was_said_of_the_other_runs_adcs_is_not_taken_over() -> None:
    said = [{"split": split, "step": step} for split in ("calibration", "test") for step in (0, 22, 44)]
    kept = [(record["split"], record["step"]) for record in said if _is_common(record, 22)]
    assert kept == [("calibration", 0), ("test", 0), ("test", 22)]
