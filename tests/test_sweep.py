"""Sweeps: what is run, that nothing is run twice, and what the table says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cimjax.analysis.sweep import parse_axes, show, sweep, table
from cimjax.cli import main

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")


def test_axes_are_options_or_fields_and_commas_in_brackets_stay() -> None:
    axes = parse_axes(["psum=layer,column", "config.recalibrate_epochs=(),(1,2)", "config.epochs=1.0"])
    assert axes == {
        "psum": ["layer", "column"],
        "config.recalibrate_epochs": ["()", "(1,2)"],
        "config.epochs": ["1.0"],
    }
    for wrong in (["psum"], ["psum="], ["=1"], ["psum=layer", "psum=column"]):
        with pytest.raises(ValueError, match="give each option once, with its values"):
            parse_axes(wrong)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a sweep are commands to this process, which has imported and compiled what they need."""

    in_another = subprocess.run

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[:3] != [sys.executable, "-m", "cimjax"]:
            return in_another(command, **options)
        return subprocess.CompletedProcess(command, main(command[3:]), "", "")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.usefixtures("in_this_process")
def test_a_sweep_trains_what_is_missing_and_gathers_over_seeds(tmp_path: Path) -> None:
    axes = parse_axes(["seed=0,1", "config.optimizer.learning_rate=0.1,0.0"])
    fields = ["--config.epochs=0.5", "--config.model.width=4"]
    rows = sweep(f"{CONFIG}:smoke,weight=none", axes, tmp_path, fields=fields)
    assert [row["config.optimizer.learning_rate"] for row in rows] == ["0.1", "0.0", "0.1", "0.0"]
    assert all(row["moved"] == {} for row in rows)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert len(times) == 4
    assert {path.parent.name for path in times} == {
        f"seed={seed}-optimizer.learning_rate={rate}" for seed in (0, 1) for rate in ("0.1", "0.0")
    }
    assert sweep(f"{CONFIG}:smoke,weight=none", axes, tmp_path, fields=fields) == rows
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")} == times
    lines = table(rows, axes)
    assert [line["runs"] for line in lines] == [2, 2]
    assert lines[0]["mean"] == pytest.approx((rows[0]["accuracy"] + rows[2]["accuracy"]) / 2)
    assert "| 0.0 " in show(lines, ["config.optimizer.learning_rate"])


def test_a_run_that_fails_is_told_with_what_it_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"The run .*rows=8.* failed: cimjax: .* does not fit"):
        sweep(f"{CONFIG}:smoke", {"rows": ["8"]}, tmp_path)
