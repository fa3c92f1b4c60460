"""The run folder: its lock, its options, its metrics, against real processes and real failures."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys

import numpy as np
import pytest

from cimjax.training.run.folder import LOCK, RunFolder, RunFolderError, read_config, read_records

CONFIG = {"seed": 0, "weight": {"bits": 4, "granularity": "column"}, "rules": [["stem", None]], "adc": None}

_HOLD = """
import sys, time
from cimjax.training.run.folder import RunFolder
with RunFolder.open(sys.argv[1], {"seed": 0}) as run:
    run.log({"step": 1})
    print("held", "jax" in sys.modules, flush=True)
    time.sleep(60)
"""


def refused(call, *parts):
    """The message of the `RunFolderError` that the call ends in; one line with every part in it."""
    with pytest.raises(RunFolderError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_a_second_process_waits_until_the_first_one_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held False\n"
        refused(
            lambda: RunFolder.open(tmp_path, {"seed": 0}), f"in use by process PID {holder.pid}", "another --workdir"
        )
        assert read_config(tmp_path) == {"seed": 0}
        assert read_records(tmp_path) == [{"step": 1}]
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    with RunFolder.open(tmp_path, {"seed": 0}) as run:
        assert run.records() == [{"step": 1}]
        refused(lambda: RunFolder.open(tmp_path, {"seed": 0}), f"PID {os.getpid()}")
    RunFolder.open(tmp_path, {"seed": 0}).close()


def test_options_are_kept_and_resumed(tmp_path):
    path = tmp_path / "new" / "run"
    config = {**CONFIG, "rules": (("stem", None),)}  # tuples are lists in the file, and no difference
    for _ in range(2):
        with RunFolder.open(path, config) as run:
            assert run.path == path
            assert run.config_path.parent == run.metrics_path.parent == run.checkpoints_path.parent == path
            assert read_config(path) == CONFIG
    assert sorted(file.name for file in path.iterdir()) == [LOCK, "config.json", "metrics.jsonl", "versions.json"]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"weight": {"bits": 3, "granularity": "column"}}, ["(weight.bits: 4 -> 3);"]),
        ({"weight": {"bits": 4}, "lr": 0.1}, ['weight.granularity: "column" -> absent, lr: absent -> 0.1);']),
        ({"adc": {"bits": 3}}, ['adc: null -> {"bits": 3}']),
        ({"seed": 1, "weight": {}, "rules": []}, ["seed: 0 -> 1, weight.bits: 4 -> absent", " and 1 more);"]),
    ],
)
def test_other_options_are_refused(tmp_path, change, parts):
    RunFolder.open(tmp_path, CONFIG).close()
    refused(lambda: RunFolder.open(tmp_path, {**CONFIG, **change}), *parts, "same options to resume", "--workdir")
    assert read_config(tmp_path) == CONFIG
    RunFolder.open(tmp_path, CONFIG).close()  # the refusal gave the lock back


def test_allowed_options_may_differ(tmp_path):
    RunFolder.open(tmp_path, CONFIG).close()
    new = {**CONFIG, "seed": 1, "weight": {"bits": 3}}
    refused(lambda: RunFolder.open(tmp_path, new, allow={"weight"}), "(seed: 0 -> 1);")
    RunFolder.open(tmp_path, new, allow={"weight", "seed"}).close()
    assert read_config(tmp_path) == new


def test_every_start_is_recorded(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.chdir(repository)
    RunFolder.open(tmp_path / "run", {}).close()
    subprocess.run(["git", "init", "-q"], check=True)
    (repository / "file").write_text("1")
    subprocess.run(["git", "add", "file"], check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "one"], check=True)
    RunFolder.open(tmp_path / "run", {}).close()
    (repository / "file").write_text("2")
    RunFolder.open(tmp_path / "run", {}).close()
    monkeypatch.setenv("PATH", "")
    RunFolder.open(tmp_path / "run", {}).close()
    starts = json.loads((tmp_path / "run" / "versions.json").read_text())
    commit = starts[1]["git"]["commit"]
    assert len(commit) == 40
    assert [start["git"] for start in starts] == [
        None,
        {"commit": commit, "dirty": False},
        {"commit": commit, "dirty": True},
        None,
    ]
    assert {"python", "cimjax", "jax", "jaxlib", "flax", "numpy"} <= starts[0]["versions"].keys()
    assert starts[0].keys() == {"time", "command", "platform", "versions", "git"}


def test_every_line_is_strict_json(tmp_path):
    with RunFolder.open(tmp_path, {}) as run:
        run.log({"step": np.int32(1), "loss": np.float32(math.nan), "drift": np.array([1, math.inf]), "split": "train"})
        run.log({"step": 2, "steps": {"a": (-math.inf, 0.1)}, "done": np.bool_(True), "none": None})
        expected = [
            {"step": 1, "loss": None, "drift": [1.0, None], "split": "train"},
            {"step": 2, "steps": {"a": [None, 0.1]}, "done": True, "none": None},
        ]
        assert run.records() == expected
        lines = run.metrics_path.read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == expected
    refused(lambda: run.log({}), "closed")


def test_a_torn_line_is_dropped_and_a_resumed_run_forgets(tmp_path):
    with RunFolder.open(tmp_path, {}) as run:
        for step in range(5):
            run.log({"step": step})
        run.log({"note": "no step"})
    with run.metrics_path.open("a") as file:
        file.write('{"step": 5, "lo')
    assert len(read_records(tmp_path)) == 6
    with RunFolder.open(tmp_path, {}) as run:
        run.log({"step": 6})
        assert [record.get("step") for record in run.records()] == [0, 1, 2, 3, 4, None, 6]
        run.forget_after(2)
        run.log({"step": 3})
        assert [record.get("step") for record in run.records()] == [0, 1, 2, None, 3]
        run.forget_after(-1)
        assert run.records() == [{"note": "no step"}]


def test_a_line_damaged_by_hand_is_named(tmp_path):
    RunFolder.open(tmp_path, {}).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    refused(lambda: read_records(tmp_path), "metrics.jsonl, line 2 is no JSON object")


def test_no_run_folder(tmp_path):
    refused(lambda: read_config(tmp_path / "absent"), "absent is no run folder")
    (tmp_path / "config.json").write_text('{"seed":')
    refused(lambda: read_config(tmp_path), "config.json is damaged")
    refused(lambda: RunFolder.open(tmp_path, {}), "config.json is damaged")
    assert read_records(tmp_path) == []


def test_nesting_beyond_pythons_depth_is_damage(tmp_path):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    refused(lambda: RunFolder.open(tmp_path / "new", {"rules": deep}), "`config` cannot be written as JSON")
    (tmp_path / "config.json").write_text('{"rules":' + 100_000 * "[")
    refused(lambda: read_config(tmp_path), "config.json is damaged")
    (tmp_path / "metrics.jsonl").write_text(100_000 * "[" + "\n")
    refused(lambda: read_records(tmp_path), "metrics.jsonl, line 1 is no JSON object")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    refused(lambda: RunFolder.open(tmp_path / "file", {}), "cannot create", "File exists", "another --workdir")
    refused(lambda: RunFolder.open(tmp_path / "file" / "run", {}), "cannot create", "Not a directory")
    refused(lambda: RunFolder.open("/proc/run", {}), "cannot create /proc/run")
    refused(lambda: RunFolder.open(tmp_path / "run", {"lr": math.inf}), "`config` cannot be written as JSON")
    refused(lambda: RunFolder.open(tmp_path / "run", {"lr": object()}), "`config` cannot be written as JSON")


def test_a_line_that_is_cut_by_a_full_disk_is_taken_back(tmp_path):
    with RunFolder.open(tmp_path, {}) as run:
        run.log({"step": 1})
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.metrics_path.stat().st_size + 5, limit[1]))
        try:
            refused(lambda: run.log({"step": 2}), "cannot write", "No space left on device")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        run.log({"step": 3})
        assert run.records() == [{"step": 1}, {"step": 3}]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk(tmp_path):
    with RunFolder.open(tmp_path / "run", {}) as run:
        run.metrics_path.unlink()
        run.metrics_path.symlink_to("/dev/full")
        refused(lambda: run.log({"step": 1}), "cannot write", "No space left on device")
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.json.tmp").symlink_to("/dev/full")
    refused(lambda: RunFolder.open(new, {}), "cannot write", "No space left on device")
    RunFolder.open(new, {}).close()
