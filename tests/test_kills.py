"""Runs that are ended at random moments, by -9, TERM and INT: their records are those of a run that never was.

pytest --rest tests/test_kills.py --kills 50
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from test_training import RULES, start, without_times

from cimjax.training.run.folder import read_records

# Several epochs of each stage, each of them short.
FIELDS = (
    "--config.epochs=8.0",
    "--config.ideal_share=0.3",
    "--config.recalibrate_epochs=(5,)",
    f"--config.rules={RULES}",
)
ENDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def wait(process: subprocess.Popen[str], folder: Path, aim: str, rng: random.Random, seconds: float) -> None:
    """Until a random moment, or one at which a checkpoint or the records of an epoch are being written."""
    deadline = time.monotonic() + rng.uniform(0, seconds)
    metrics, size = folder / "metrics.jsonl", -1
    while process.poll() is None:
        now = time.monotonic() >= deadline
        if aim == "anywhere" and now:
            return
        if aim == "save" and now and any("tmp" in path.name for path in (folder / "checkpoints").glob("*")):
            return
        if aim == "epoch" and now and metrics.exists():
            if -1 < size < metrics.stat().st_size:
                return
            size = metrics.stat().st_size
        time.sleep(0.001)


@pytest.mark.full
def test_runs_ended_at_any_moment_lose_and_change_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rng, kills, seen, finished = random.Random(0), request.config.getoption("--kills") or 4, Counter[str](), 0
    for name in ("first", "whole"):  # the second takes the time of one whose programs were compiled before
        begin = time.monotonic()
        output, error = start(tmp_path / name, *FIELDS).communicate()
        assert "test accuracy" in output, error
    seconds, want = time.monotonic() - begin, without_times(read_records(tmp_path / "whole"))
    folder = tmp_path / "cut"
    while seen.total() < kills or finished == 0:
        process = start(folder, *FIELDS)
        if seen.total() < kills:
            aim, end = rng.choice(("anywhere", "anywhere", "save", "epoch")), rng.choice(ENDS)
            wait(process, folder, aim, rng, 0.9 * seconds)
            if process.poll() is None:
                process.send_signal(end)
                seen[f"{end.name} {aim}"] += 1
        output, error = process.communicate()
        assert "Traceback" not in error, error
        if process.returncode == 0:
            assert without_times(read_records(folder)) == want, dict(seen)
            shutil.rmtree(folder)
            finished += 1
    print(f"{seen.total()} ends ({dict(seen)}), {finished} runs finished")
