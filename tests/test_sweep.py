"""Sweeps: what is checked first, what is run and what is not, what a failure leaves, and what the table says."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest

from cimjax.analysis.executors import OUTPUT, Processes
from cimjax.analysis.progress import Progress
from cimjax.analysis.sweep import FAILED, sweep
from cimjax.analysis.sweep_plan import parse_axes, plan
from cimjax.analysis.sweep_table import show, table
from cimjax.cli import main
from cimjax.training.run.lock import give_back, take_lock
from cimjax.training.run.records import Records

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")
PLAIN = f"{CONFIG}:smoke,weight=none"
FIELDS = ["--config.epochs=0.5", "--config.model.width=2", "--config.subset.images=260"]


def test_axes_are_options_or_fields_and_commas_in_brackets_stay() -> None:
    axes = parse_axes(["psum=layer,column", "config.recalibrate_epochs=(),(1,2)", "config.rules=((('a',None),),),()"])
    assert axes == {
        "psum": ["layer", "column"],
        "config.recalibrate_epochs": ["()", "(1,2)"],
        "config.rules": ["((('a',None),),)", "()"],
    }
    for wrong in (["psum"], ["psum="], ["=1"], ["psum=layer", "psum=column"], ["seed=0,1,0"]):
        with pytest.raises(ValueError, match="give each option once, with its values"):
            parse_axes(wrong)


def test_all_combinations_are_checked_before_the_first_one_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    command = ["sweep", "--config", CONFIG, "--workdir", str(tmp_path / "new")]
    axes = ["--over", "weight=none,layer", "--over", "psum=layer,odd", "--over", "config.epochs=1,-1"]
    assert main([*command, *axes]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and line.startswith("cimjax: 7 of 8 combinations cannot be trained, so none was ")
    assert "weight=none psum=layer config.epochs=1, weight=none psum=layer config.epochs=-1: psum has no" in line
    assert "weight=layer psum=layer config.epochs=-1: `config.epochs` is -1" in line
    assert "weight=layer psum=odd config.epochs=1" in line and not (tmp_path / "new").exists()
    # What only some combinations have need not be in the config.
    assert len(plan(f"{CONFIG}:adc_step=fixed", {"full_scale": ["32", "64"]}, tmp_path)) == 2
    for wrong, message in (
        (["--over", "seed=a"], "none of the 1 combinations can be trained: seed is 'a'"),
        (["--over", "seed=0", "--jobs", "0"], "`jobs` is 0"),
        (["--over", "seed=0", "--workdir", CONFIG], "is a file, not a folder"),
        (
            ["--over", "seed=0,1", "--config.teacher=nowhere"],
            "none of the 2 combinations can be trained: nowhere is no",
        ),
        (["--over", "seed=0,1", "--fork", "nowhere"], "none of the 2 combinations can be trained: nowhere is no run"),
        (["--over", "config.data_dir=a b,a_b"], "another combination has the same folder"),
    ):
        assert main([*command, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_fewer_runs_than_one_at_a_time_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^`jobs` is 0; give the number of runs at a time, at least 1\.$"):
        Processes(0)


def test_nothing_imports_jax_to_check() -> None:
    code = f"from cimjax.analysis import sweep; sweep.plan({PLAIN!r}, {{'seed': ['0', '1']}}, 'x')"
    check = "import sys; assert not {'jax', 'flax', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; {check}"], check=True)


class Here:
    """A run of a sweep, as a command to this process, which has imported and compiled what it needs."""

    def __init__(self, command: list[str], *, stdout: IO[bytes], **_: Any) -> None:
        with (
            open(stdout.fileno(), "w", closefd=False) as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            self.returncode = main(command[3:])

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    class Anywhere(subprocess.Popen[Any]):
        def __new__(cls, command: Any, *words: Any, **options: Any) -> Any:
            ours = command[:3] == [sys.executable, "-m", "cimjax"]
            return Here(command, **options) if ours else super().__new__(cls)

    monkeypatch.setattr(subprocess, "Popen", Anywhere)


@pytest.mark.usefixtures("in_this_process")
def test_a_sweep_trains_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    axes = {"seed": ["1"], "config.optimizer.learning_rate": ["0.1", "0.0"]}
    rows = sweep(PLAIN, axes, tmp_path, fields=FIELDS)
    assert [row["config.optimizer.learning_rate"] for row in rows] == ["0.1", "0.0"]
    names = [
        f"{number} of 2: seed=1 config.optimizer.learning_rate={rate}" for number, rate in ((1, "0.1"), (2, "0.0"))
    ]
    ends = [f"{row['accuracy']:.2%}, {row['seconds']:.1f} s" for row in rows]
    lines = [line for name, end in zip(names, ends, strict=True) for line in (f"training {name}", f"{name}: {end}")]
    assert capsys.readouterr().err.splitlines() == ["2 runs: 0 finished, 2 to train", *lines]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")}
    assert {path.parent.name for path in times} == {f"seed=1-optimizer.learning_rate={rate}" for rate in ("0.1", "0.0")}
    # Finished runs are taken as they are; of other options, or of more epochs, they are never taken for these.
    assert sweep(PLAIN, axes, tmp_path, fields=FIELDS) == rows
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.jsonl")} == times
    with pytest.raises(ValueError, match=r"holds a run of other options \(batch_size: 64 -> 9\)"):
        sweep(PLAIN, axes, tmp_path, fields=[*FIELDS, "--config.batch_size=9"])
    axes["config.optimizer.learning_rate"] = ["0.1"]
    (longer,) = sweep(PLAIN, axes, tmp_path, fields=FIELDS[1:])
    assert Records(Path(longer["workdir"]) / "metrics.jsonl").epochs_done() == 2
    with pytest.raises(ValueError, match=r"other options \(epochs: 2.0 -> 0.5\)"):
        sweep(PLAIN, axes, tmp_path, fields=FIELDS)


@pytest.mark.usefixtures("in_this_process")
def test_a_run_that_fails_is_a_row_and_is_tried_again_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a b"
    command = ["sweep", "--config", PLAIN, *FIELDS, "--workdir", str(folder), "--over", "config.batch_size=9999,64"]
    failed, good = folder / "batch_size=9999", folder / "batch_size=64"
    for retry in (False, False, True):
        before = (failed / OUTPUT).stat().st_mtime_ns if failed.exists() else 0
        assert main([*command, *(["--retry"] if retry else [])]) == 2
        out, err = capsys.readouterr()
        assert (before == (failed / OUTPUT).stat().st_mtime_ns) == (not retry and before > 0)
        row = next(line for line in out.splitlines() if line.startswith("| 9999"))
        assert "| 0 of 1 " in row and "| failed: " in row and "9999" in row
        assert any(line.startswith("| 64 ") and "%" in line for line in out.splitlines())
        assert out.endswith(f"all runs: '{folder}/sweep.json'\n")
        assert err.endswith("cimjax: 1 of 2 runs failed; the same command with --retry tries them again.\n")
    rows = json.loads((folder / "sweep.json").read_text())
    assert rows[0]["failed"] == json.loads((failed / FAILED).read_text())["failed"]
    assert rows[1]["accuracy"] > 0 and not (good / FAILED).exists()
    # Of other fields it may succeed.
    rows = sweep(PLAIN, {"config.batch_size": ["9999"]}, folder, fields=[*FIELDS, "--config.calibration_images=9"])
    assert "failed" in rows[0] and "1 to train" in capsys.readouterr().err


def fake_runs(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Runs are processes of a few lines, which know their command as `sys.argv`."""
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **options: real([sys.executable, "-c", code, *command[3:]], **options),
    )


def test_whatever_ends_a_run_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """if 1:
        import os, sys
        print("last words")
        if "--config.seed=0" in sys.argv: os.kill(os.getpid(), 9)
        if "--config.seed=1" in sys.argv: raise MemoryError("no room for an array\\nof 3 x 3")
        if "--config.seed=2" in sys.argv: sys.exit()
        if "--config.seed=3" in sys.argv: os._exit(1)
    """
    fake_runs(monkeypatch, code)
    rows = sweep(PLAIN, {"config.seed": ["0", "1", "2", "3"]}, tmp_path, executor=Processes(2))
    assert [row["failed"] for row in rows] == [
        "killed by SIGKILL, as by a system without memory left; it printed last: last words",
        "MemoryError: no room for an array",
        "last words",
        "last words",
    ]
    text = show(table(rows, ["config.seed"]), ["config.seed"])
    assert "config.seed=1" in text and "| failed: MemoryError: no room for an array" in text


def test_a_sweep_that_is_stopped_stops_its_runs_and_shows_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """if 1:
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("saved"))
        print("ready", flush=True)
        time.sleep(60)
    """
    fake_runs(monkeypatch, code)
    folders = [tmp_path / f"seed={seed}" for seed in range(3)]

    def interrupt() -> None:
        for _ in range(600):
            if all((folder / OUTPUT).exists() and (folder / OUTPUT).read_text() for folder in folders[:2]):
                return os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    # A suite in the background may be born deaf to it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    command = ["sweep", "--config", PLAIN, "--over", "seed=0,1,2", "--workdir", str(tmp_path), "--jobs", "2"]
    try:
        assert main(command) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    out, err = capsys.readouterr()
    assert out.startswith("| test accuracy") and json.loads((tmp_path / "sweep.json").read_text())[2]["stopped"]
    assert "stopping as soon as all states are saved" in err and "1 of 3: seed=0: stopped\n" in err
    assert err.endswith("cimjax: stopped with 0 of 3 runs finished; the same command goes on.\n")
    assert (folders[0] / OUTPUT).read_text() == "ready\nsaved\n" and not folders[2].exists()
    assert not any((folder / FAILED).exists() for folder in folders)


def test_progress_is_live_on_a_terminal_and_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    said = {}
    for on_terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda on_terminal=on_terminal: on_terminal)
        with Progress(stream) as progress:
            progress.doing("one", "two")
            progress.doing("two", "three")
            progress.note("one is done")
            time.sleep(0.3 * on_terminal)
        said[on_terminal] = stream.getvalue()
    assert said[False] == "one\ntwo\nthree\none is done\n"
    assert "0:00:00  two" in said[True] and "one is done" in said[True] and "\x1b[2K" in said[True]
    assert said[True].count("one is done") == 1 and "\nthree" not in said[True]


def test_a_folder_that_another_process_uses_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "seed=1").mkdir()
    for lock, message in ((tmp_path, "is in use by"), (tmp_path / "seed=1", "1 of 2 .* seed=1: .* is in use by")):
        held = take_lock(lock / ".lock")
        with pytest.raises(ValueError, match=message):
            sweep(PLAIN, {"seed": ["0", "1"]}, tmp_path)
        give_back(held)


def test_the_table_has_mean_range_runs_seconds_and_failures() -> None:
    rows: list[dict[str, Any]] = [
        {"psum": "layer", "seed": "0", "accuracy": 0.5, "seconds": 10.0, "moved": {"psum_moved": 0.5}},
        {"psum": "layer", "seed": "1", "accuracy": 0.7, "seconds": 14.0, "moved": {"psum_moved": 0.3}},
        {"psum": "layer", "seed": "2", "failed": "no | room", "seconds": 1.0},
        {"psum": "column", "seed": "0", "stopped": True},
    ]
    head, _, *lines = show(table(rows, ["psum", "seed"]), ["psum", "seed"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *lines)]
    assert cells == [
        ["psum", "test accuracy", "lowest", "highest", "runs", "seconds", "steps moved", "remarks"],
        ["layer", "60.00%", "50.00%", "70.00%", "2 of 3", "12.0", "psum 0.4", ""],
        ["layer", "-", "-", "-", "seed=2", "-", "", "failed: no / room"],
    ]
