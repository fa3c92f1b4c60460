"""The run folder: its lock, its options, its metrics, against real processes and real failures."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import resource
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest

from cimjax.training.run import lock, writers
from cimjax.training.run.files import show_in_one_line
from cimjax.training.run.folder import LOCK, RunFolder, RunFolderError, RunFolderWarning, read_config, read_records
from cimjax.training.run.options import MAY_CHANGE

CONFIG = {"seed": 0, "weight": {"bits": 4, "granularity": "column"}, "rules": [["stem", None]], "adc": None}

_HOLD = """
import sys, time
from cimjax.training.run.folder import RunFolder
with RunFolder(sys.argv[1], {"seed": 0}) as run:
    run.log({"step": 1})
    print("held", "jax" in sys.modules, flush=True)
    time.sleep(60)
"""


def untimed(records):
    """Records without what differs from run to run."""
    return [{name: value for name, value in record.items() if "second" not in name} for record in records]


def warned(call, *parts):
    """The result of a call that gives one `RunFolderWarning`: one line with every part in it."""
    with pytest.warns(RunFolderWarning) as caught:
        result = call()
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return result


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
        refused(lambda: RunFolder(tmp_path, {"seed": 0}), f"in use by process PID {holder.pid}", "another --workdir")
        assert read_config(tmp_path) == {"seed": 0}
        assert untimed(read_records(tmp_path)) == [{"step": 1}]
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.communicate()
    with RunFolder(tmp_path, {"seed": 0}) as run:
        assert untimed(run.records.read()) == [{"step": 1}]
        refused(lambda: RunFolder(tmp_path, {"seed": 0}), f"PID {os.getpid()}")
    RunFolder(tmp_path, {"seed": 0}).close()


def test_options_are_kept_and_resumed(tmp_path):
    path = tmp_path / "new" / "run"
    config = {**CONFIG, "rules": (("stem", None),)}  # tuples are lists in the file, and no difference
    for _ in range(2):
        with RunFolder(path, config) as run:
            run.log({})
            assert run.path == path
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
    RunFolder(tmp_path, CONFIG).close()
    refused(lambda: RunFolder(tmp_path, {**CONFIG, **change}), *parts, "same options to resume", "--workdir")
    assert read_config(tmp_path) == CONFIG
    RunFolder(tmp_path, CONFIG).close()  # the refusal gave the lock back


def test_every_start_is_recorded(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    monkeypatch.chdir(repository)

    def start():
        with RunFolder(tmp_path / "run", {}) as run:
            run.log({})
            run.log({})

    start()
    subprocess.run(["git", "init", "-q"], check=True)
    (repository / "file").write_text("1")
    subprocess.run(["git", "add", "file"], check=True)
    subprocess.run(["git", *identity, "commit", "-qm", "one"], check=True)
    start()
    (repository / "file").write_text("2")
    start()
    monkeypatch.setenv("PATH", "")
    start()
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
    with RunFolder(tmp_path, {}) as run:
        run.log({"step": np.int32(1), "loss": np.float32(math.nan), "drift": np.array([1, math.inf]), "split": "train"})
        run.log({"step": 2, "steps": {"a": (-math.inf, 0.1)}, "done": np.bool_(True), "none": None})
        expected = [
            {"step": 1, "loss": None, "drift": [1.0, None], "split": "train"},
            {"step": 2, "steps": {"a": [None, 0.1]}, "done": True, "none": None},
        ]
        assert untimed(run.records.read()) == expected
        lines = run.records.file.read_text().splitlines()
    assert untimed(json.loads(line, parse_constant=pytest.fail) for line in lines) == expected
    refused(lambda: run.log({}), "closed")


def test_a_torn_line_is_dropped_and_a_resumed_run_forgets(tmp_path):
    with RunFolder(tmp_path, {}) as run:
        for step in range(5):
            run.log({"step": step})
        run.log({"note": "no step"})
    with run.records.file.open("a") as file:
        file.write('{"step": 5, "lo')
    assert len(read_records(tmp_path)) == 6
    with RunFolder(tmp_path, {}) as run:
        run.log({"step": 6})
        assert [record.get("step") for record in run.records.read()] == [0, 1, 2, 3, 4, None, 6]
        run.forget_after(2)
        run.log({"step": 3})
        assert [record.get("step") for record in run.records.read()] == [0, 1, 2, None, 3]
        warned(
            lambda: run.forget_after(-1), "metrics.jsonl.damaged is what metrics.jsonl held", "there is no checkpoint"
        )
        assert untimed(run.records.read()) == [{"note": "no step"}]


def test_a_line_damaged_by_hand_is_named(tmp_path):
    RunFolder(tmp_path, {}).close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n[2]\n{"step": 3}\n')
    refused(lambda: read_records(tmp_path), "metrics.jsonl, line 2 is no JSON object")


def test_no_run_folder(tmp_path):
    refused(lambda: read_config(tmp_path / "absent"), "absent is no run folder")
    (tmp_path / "config.json").write_text('{"seed":')
    refused(lambda: read_config(tmp_path), "config.json is damaged")
    refused(lambda: RunFolder(tmp_path, {}), "config.json is damaged")
    assert read_records(tmp_path) == []


def test_nesting_beyond_pythons_depth_is_damage(tmp_path):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    refused(lambda: RunFolder(tmp_path / "new", {"rules": deep}), "`config` cannot be written as JSON")
    (tmp_path / "config.json").write_text('{"rules":' + 100_000 * "[")
    refused(lambda: read_config(tmp_path), "config.json is damaged")
    (tmp_path / "metrics.jsonl").write_text(100_000 * "[" + "\n")
    refused(lambda: read_records(tmp_path), "metrics.jsonl, line 1 is no JSON object")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    refused(lambda: RunFolder(tmp_path / "file", {}), "cannot create", "File exists", "another --workdir")
    refused(lambda: RunFolder(tmp_path / "file" / "run", {}), "cannot create", "Not a directory")
    refused(lambda: RunFolder("/proc/run", {}), "cannot create /proc/run")
    refused(lambda: RunFolder(tmp_path / "run", {"lr": math.inf}), "`config` cannot be written as JSON")
    refused(lambda: RunFolder(tmp_path / "run", {"lr": object()}), "`config` cannot be written as JSON")


def test_a_line_that_is_cut_by_a_full_disk_is_taken_back(tmp_path):
    with RunFolder(tmp_path, {}) as run:
        run.log({"step": 1})
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (run.records.file.stat().st_size + 5, limit[1]))
        try:
            refused(lambda: run.log({"step": 2}), "cannot write", "No space left on device")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        run.log({"step": 3})
        assert untimed(run.records.read()) == [{"step": 1}, {"step": 3}]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk(tmp_path):
    with RunFolder(tmp_path / "run", {}) as run:
        run.log({"step": 0})
        run.records.file.unlink()
        run.records.file.symlink_to("/dev/full")
        refused(lambda: run.log({"step": 1}), "cannot write", "No space left on device")
    new = tmp_path / "new"
    new.mkdir()
    (new / ".config.json.unfinished").symlink_to("/dev/full")
    refused(lambda: RunFolder(new, {}), "cannot write", "No space left on device")
    RunFolder(new, {}).close()


def test_the_metrics_are_taken_back_to_what_a_state_was_saved_with(tmp_path):
    with RunFolder(tmp_path, {}) as run:
        for step in (1, 1, 2):
            run.log({"step": step})
        marked, before = run.records.mark(), run.records.file.read_bytes()
        for step in (2, 3):
            run.log({"step": step})  # after the save, also of its own step
        run.records.check(marked)
        run.forget_after(2, marked)
        assert run.records.file.read_bytes() == before
    lines = before.splitlines(keepends=True)
    assert marked["lines"] == 3
    for content, kept, words in (
        (b"", 0, "3 of 3 lines are missing"),
        (b"".join(lines[:2]), 2, "1 of 3 lines are missing"),
        (before[:-4], 2, "1 of 3 lines are missing"),
        (before.replace(b'"step": 2', b'"step": 1'), 3, "a line was changed"),
    ):
        run.records.file.write_bytes(content)
        with RunFolder(tmp_path, {}) as run:
            warned(lambda run=run: run.records.check(marked), "metrics.jsonl is not what this run logged", words)
            warned(lambda run=run: run.forget_after(2, marked), words)
            assert len(run.records.read()) == kept
    run.records.file.unlink()
    with RunFolder(tmp_path, {}) as run:
        warned(lambda: run.records.check(marked), "3 of 3 lines are missing")
        run.records.check(None)


@pytest.mark.parametrize("line", ["[2]", '{"step": "22"}', '{"step": null}', "{", 10_000 * "[", "\udcff"])
def test_damaged_lines_are_put_aside_and_the_run_goes_on(tmp_path, line):
    with RunFolder(tmp_path, {}) as run:
        run.log({"step": 1})
        run.log({"step": 2})
    damaged = run.records.file.read_bytes() + line.encode(errors="surrogateescape") + b"\n"
    for name in ("metrics.jsonl.damaged", "metrics.jsonl.damaged-2"):
        run.records.file.write_bytes(damaged)
        refused(lambda: read_records(tmp_path), "metrics.jsonl, line 3 is no JSON object of a step")
        with RunFolder(tmp_path, {}) as run:
            warned(lambda run=run: run.forget_after(1), f"{name} is what metrics.jsonl held")
            assert untimed(run.records.read()) == [{"step": 1}]
        assert (tmp_path / name).read_bytes() == damaged


def test_seconds_go_on_over_all_starts(tmp_path):
    with RunFolder(tmp_path, {}) as run:
        run.log({"step": 1, "seconds": 3})
        assert run.records.read()[0]["seconds"] < 3  # it is the run that counts
    run.records.file.write_text('{"step": 1, "seconds": 100.5}\n{"step": 2, "seconds": 200.5}\n')
    with RunFolder(tmp_path, {}) as run:
        run.log({"step": 3})
        assert 200.5 <= run.records.read()[-1]["seconds"] < 230
        run.forget_after(1)
        run.log({"step": 2})
        assert 100.5 <= run.records.read()[-1]["seconds"] < 130


@pytest.mark.parametrize("start", [{"versions": {"cimjax": "0.0.1"}}, {"versions": {}}, {"versions": None}, {}, 3])
def test_another_version_of_cimjax_that_goes_on_is_said(tmp_path, start):
    (tmp_path / "versions.json").write_text(json.dumps([start]))
    with RunFolder(tmp_path, {}) as run:
        if isinstance(start, dict) and (start.get("versions") or {}).get("cimjax"):
            warned(lambda: run.log({}), "was trained by cimjax 0.0.1, and goes on by", "random numbers")
        else:
            run.log({})
    assert len(json.loads((tmp_path / "versions.json").read_text())) == 2


def test_a_damaged_list_of_starts_is_put_aside(tmp_path):
    for content in (b"{}", b"[1", b"", b"\xff", b"null"):
        (tmp_path / "versions.json").write_bytes(content)
        with RunFolder(tmp_path, {}) as run:
            warned(lambda run=run: run.log({}), "versions.json is damaged", "it is kept as", "goes on")
        assert len(json.loads((tmp_path / "versions.json").read_text())) == 1
    assert len(list(tmp_path.glob("versions.json.damaged*"))) == 5


def test_opening_changes_no_file_and_removes_nothing(tmp_path):
    with RunFolder(tmp_path, CONFIG) as run:
        run.log({"step": 1})
    for name in ("config.json.tmp", "metrics.jsonl.tmp", "notes", ".config.json.mine"):
        (tmp_path / name).write_text("of the user's own")
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir() if path.name != LOCK}
    with RunFolder(tmp_path, CONFIG) as run:
        run.records.check(run.records.mark())
        assert len(run.records.read()) == 1
    assert (tmp_path / LOCK).read_bytes() == b""
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}
    assert {*before, tmp_path / LOCK} == {*tmp_path.iterdir()}


def test_what_may_change_when_a_run_goes_on(tmp_path):
    old = {"seed": 0, "epochs": 4.0, "data_dir": "", "execution": {"program": "auto"}}
    with RunFolder(tmp_path, old) as run:
        for epoch in (1, 2):
            run.log({"step": 22 * epoch, "epoch": epoch})
    new = {**old, "epochs": 6, "data_dir": "/data", "execution": {"program": "joined"}}
    RunFolder(tmp_path, new).close()
    assert read_config(tmp_path) == new
    RunFolder(tmp_path, {**old, "epochs": 2}).close()
    refused(lambda: RunFolder(tmp_path, {**old, "epochs": 1.5}), "has trained 2 epochs, more than the 1.5", "at least")
    message = refused(lambda: RunFolder(tmp_path, {**old, "seed": 1}), "(seed: 0 -> 1)", "may differ")
    assert all(name in message for name in MAY_CHANGE)


def test_options_of_an_older_version_are_completed(tmp_path):
    def completed(old):
        if not {"seed", "optimizer"} <= old.keys():
            raise ValueError("`config.seed` is missing; give it.")
        return {"ema": 0.0, **old, "optimizer": {"clip": None, **old["optimizer"]}}

    RunFolder(tmp_path, {"seed": 0, "optimizer": {"name": "sgd"}}).close()
    before = (tmp_path / "config.json").read_bytes()
    new = {"seed": 0, "ema": 0.0, "optimizer": {"name": "sgd", "clip": 1.0}}
    refused(lambda: RunFolder(tmp_path, new, completed=completed), "(optimizer.clip: null -> 1.0)")
    new["optimizer"]["clip"] = None
    refused(lambda: RunFolder(tmp_path, new), "(optimizer.clip: absent -> null, ema: absent -> 0.0)")
    RunFolder(tmp_path, new, completed=completed).close()
    assert (tmp_path / "config.json").read_bytes() == before
    RunFolder(tmp_path, {**new, "epochs": 2}, completed=lambda old: {"epochs": 1, **completed(old)}).close()
    assert read_config(tmp_path) == {**new, "epochs": 2}
    (tmp_path / "config.json").write_text("{}")
    refused(lambda: RunFolder(tmp_path, new, completed=completed), "config.json is damaged: `config.seed` is missing")


def test_a_place_where_a_later_save_would_fail_is_refused_at_once(tmp_path):
    refused(lambda: RunFolder(os.fsdecode(bytes(tmp_path) + b"/\xff"), {}), "not UTF-8", "another --workdir")
    refused(lambda: RunFolder("gs://bucket/run", {}), "on this machine", "another --workdir")
    refused(lambda: RunFolder(tmp_path / ("\0" + "a"), {}), "no path")
    refused(lambda: RunFolder(tmp_path / "/".join(2000 * "ab"), {}), "too long")
    refused(lambda: RunFolder(tmp_path / (300 * "a"), {}), "File name too long")
    (tmp_path / "checkpoints").touch()
    refused(lambda: RunFolder(tmp_path, {}), "checkpoints is no folder that can be written")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    odd = tmp_path / "a b#c?d%20e:f'ü"
    RunFolder(odd, {}).close()
    assert read_config(odd) == {}


def test_a_working_directory_that_is_gone(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    refused(lambda: RunFolder("run", {}), "cannot find run: No such file or directory")


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    for code in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):

        def flock(*_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(lock.fcntl, "flock", flock)
        warned(lambda: RunFolder(tmp_path, {}), "without locks: start no second process").close()
    first = warned(lambda: RunFolder(tmp_path, {}), "without locks")
    warned(lambda: RunFolder(tmp_path, {}), f"the last one to start was PID {os.getpid()} on").close()
    first.close()
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: os.stat("/absent"))
    refused(lambda: RunFolder(tmp_path, {}), "cannot lock")


def test_records_go_into_a_table_too(tmp_path):
    with RunFolder(tmp_path, {}) as run:
        run.log({"step": 1, "split": "train", "loss": math.nan})
    with RunFolder(tmp_path, {}, formats=("csv",)) as run:
        run.log({"step": 2, "split": "test", "best": True, "drift": [1, 2]})
        run.log({"step": 3, "split": "train", "loss": 0.5})
        rows = list(csv.DictReader((tmp_path / writers.TABLE).open(newline="")))
        assert [[row[name] for name in ("step", "split", "loss", "best", "drift")] for row in rows] == [
            ["1", "train", "", "", ""],
            ["2", "test", "", "True", "[1, 2]"],
            ["3", "train", "0.5", "", ""],
        ]
        run.forget_after(1)
        run.log({"step": 2})
        rows = list(csv.DictReader((tmp_path / writers.TABLE).open(newline="")))
        assert [row["step"] for row in rows] == ["1", "2"]


def test_tensorboard_is_asked_for_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    refused(lambda: RunFolder(tmp_path, {}, formats=("tensorboard",)), "pip install tensorboard")


def test_records_become_curves(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunFolder(tmp_path, {}, formats=("tensorboard",)) as run:
        for step in (1, 2, 3):
            run.log({"step": step, "split": "health", "layer": "conv", "codes": 10.0 * step, "best": True})
    with RunFolder(tmp_path, {}, formats=("tensorboard",)) as run:
        run.forget_after(1)
        run.log({"step": 2, "split": "health", "layer": "conv", "codes": 5.0})
        curves = accumulator.EventAccumulator(str(tmp_path / writers.TENSORBOARD))
        curves.Reload()
        points = [(point.step, point.value) for point in curves.Scalars("health/conv/codes")]
        assert points == [(1, 10.0), (2, 5.0)]


def test_a_command_shows_a_warning_in_one_line(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    show_in_one_line()
    assert warnings.formatwarning("a was put aside", RunFolderWarning, "file.py", 1) == "cimjax: a was put aside\n"
    assert warnings.formatwarning("another", UserWarning, "file.py", 1, "code").startswith(
        "file.py:1: UserWarning: ano"
    )
