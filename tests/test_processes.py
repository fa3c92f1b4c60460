"""Runs of several processes on loopback: they compute what one does, stop together, end together, and go on.

pytest --rest tests/test_processes.py -k kills --kills 20
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from test_training import ROOT, RULES, config, quiet

import cimjax
from cimjax.cli import main
from cimjax.training.processes.agreement import Agreement
from cimjax.training.processes.group import Group
from cimjax.training.processes.launch import supervise
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.folder import read_records

SMALL = ["--config", "configs/digits.py:smoke", "--config.model.width=4", f"--config.rules={RULES}"]
# All stages: ideal ADCs, then ADCs set from data, and once more.
STAGES = ["--config.epochs=4.0", "--config.ideal_share=0.3", "--config.recalibrate_epochs=(2,)"]
AGAIN = "the same command with the same --workdir goes on from the last checkpoint"


def environment(devices: int = 1) -> dict[str, str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def started(command: Sequence[str], devices: int = 1, **more: str) -> subprocess.Popen[str]:
    pipe, variables = subprocess.PIPE, {**environment(devices), **more}
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, env=variables)


def launch(folder: Path, count: int, *fields: str, devices: int = 1) -> subprocess.Popen[str]:
    """A run of `count` processes under one parent."""
    arguments = [*SMALL, "--workdir", str(folder), *fields]
    return started([sys.executable, "-m", "cimjax", "launch", "--num_processes", str(count), "--", *arguments], devices)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def ranks(count: int, *fields: str, of_each: Sequence[Sequence[str]] = ((), ())) -> list[subprocess.Popen[str]]:
    """A run whose processes are started one by one, as a cluster does."""
    address = f"127.0.0.1:{free_port()}"
    words = [*SMALL, "--distributed", "--coordinator_address", address, "--num_processes", str(count), *fields]
    return [
        started([sys.executable, "train.py", *words, "--process_id", str(index), *of_each[index]])
        for index in range(count)
    ]


def child_of(process: subprocess.Popen[str], index: int = 0) -> psutil.Process:
    """The process that trains, of those that its parent watches."""
    children = psutil.Process(process.pid).children()
    return next(child for child in children if f"--process_id {index}" in " ".join(child.cmdline()))


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The records of a run, without times."""
    return [{k: v for k, v in record.items() if "second" not in k} for record in read_records(folder)]


def require_equal(found: list[dict[str, Any]], wanted: list[dict[str, Any]], relative: float = 1e-6) -> None:
    assert [record.keys() for record in found] == [record.keys() for record in wanted]
    for one, other in zip(found, wanted, strict=True):
        for name, value in other.items():
            number = isinstance(value, float | dict)
            want = pytest.approx(value, rel=relative, abs=relative) if number else value
            assert one[name] == want, (name, one, other)


def mistakes_in(error: str) -> list[str]:
    """The lines of standard error without those of what a busy machine makes wait."""
    notices = re.compile("cimjax: process .* (is behind|kept the others waiting|for images, the others)")
    return [line for line in error.splitlines() if not notices.match(line)]


def require_ended_well(process: subprocess.Popen[str]) -> str:
    output, error = process.communicate(timeout=300)
    assert process.returncode == 0 and not mistakes_in(error), error
    assert "Gloo" not in output
    return output


def wait_for(condition: Any, process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(process.communicate())
        time.sleep(0.05)


def epochs_of(folder: Path, count: int) -> Any:
    return lambda: (
        (folder / "metrics.jsonl").exists() and sum(r["split"] == "test" for r in read_records(folder)) >= count
    )


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `STAGES` by one process of two devices."""
    folder = tmp_path_factory.mktemp("stages") / "run"
    require_ended_well(started([sys.executable, "train.py", *SMALL, *STAGES, "--workdir", str(folder)], 2))
    return folder


@pytest.mark.full
@pytest.mark.parametrize(("count", "devices", "place"), [(2, 1, "device"), (4, 1, "host"), (2, 2, "host")])
def test_processes_equal_one_from_calibration_on(tmp_path: Path, count: int, devices: int, place: str) -> None:
    """22 steps, evaluation in batches of which the last is padded, and the state of ADCs."""
    fields = ["--config.epochs=1.0", f"--config.images_on={place}", "--config.eval_batch_size=100"]
    process = launch(tmp_path / "several", count, *fields, devices=devices)
    cimjax.train(config(epochs=1.0), workdir=tmp_path / "one", display=quiet())
    output = require_ended_well(process)
    assert f"{count * devices} x cpu in {count} processes" in output and output.count("test accuracy") == 1
    require_equal(numbers(tmp_path / "several"), numbers(tmp_path / "one"))


@pytest.mark.full
def test_two_processes_are_one_of_two_devices_in_all_stages(stages: Path, tmp_path: Path) -> None:
    """Of the same number of devices, because rounding makes a long way to another state of another order of sums."""
    require_ended_well(launch(tmp_path, 2, *STAGES, "--config.images_on=host"))
    require_equal(numbers(tmp_path), numbers(stages))


@pytest.mark.full
def test_what_slurm_tells_is_enough(tmp_path: Path) -> None:
    words = [sys.executable, "train.py", *SMALL, "--config.epochs=1.0", "--workdir", str(tmp_path), "--distributed"]
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    both = [started(words, 1, **job, SLURM_PROCID=str(index), SLURM_LOCALID=str(index)) for index in range(2)]
    assert [require_ended_well(process).count("test accuracy") for process in both] == [1, 0]


def test_what_comes_together_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--num_processes", "2"]) == 2
    assert "are of --distributed; give it too" in capsys.readouterr().err
    assert main(["launch", "--num_processes", "0"]) == 2
    assert main(["launch", "--num_processes", "2", "--config", "x.py"]) == 2
    assert "unknown flag --config" in capsys.readouterr().err


# ---- ends


@pytest.mark.full
def test_a_killed_process_ends_the_others_of_its_parent(tmp_path: Path, victim: int = 0) -> None:
    process = launch(tmp_path, 2, "--config.epochs=400.0")
    wait_for(epochs_of(tmp_path, 2), process)
    children = psutil.Process(process.pid).children(recursive=True)
    child_of(process, victim).kill()
    began = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert error == f"cimjax: process {victim} was killed by SIGKILL; the others were ended: {AGAIN}\n"
    assert process.returncode == 137
    assert not psutil.wait_procs(children, timeout=5)[1]


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_those_of_other_parents(tmp_path: Path, victim: int) -> None:
    both = ranks(2, "--config.epochs=400.0", "--workdir", str(tmp_path))
    wait_for(epochs_of(tmp_path, 2), both[0])
    child_of(both[victim], victim).kill()
    began = time.monotonic()
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert time.monotonic() - began < 15
    other = 1 - victim
    assert errors[victim] == f"cimjax: process {victim} was killed by SIGKILL; {AGAIN}\n"
    assert errors[other] == f"cimjax: process {victim} has gone, and process {other} ends with it: {AGAIN}\n"
    assert [process.returncode for process in both] == ([137, 1] if victim == 0 else [1, 137])


@pytest.mark.full
def test_processes_end_with_a_killed_parent(tmp_path: Path) -> None:
    process = launch(tmp_path, 2, "--config.epochs=400.0")
    wait_for(epochs_of(tmp_path, 1), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=15)
    assert not alive


@pytest.mark.full
def test_a_stop_of_one_stops_all_and_another_number_goes_on(stages: Path, tmp_path: Path) -> None:
    both = ranks(2, *STAGES, "--workdir", str(tmp_path))
    wait_for(epochs_of(tmp_path, 1), both[0])
    child_of(both[1], 1).send_signal(signal.SIGTERM)
    errors = [process.communicate(timeout=60)[1] for process in both]
    said = re.fullmatch(r"cimjax: stopped after step (\d+) of 88; saved: .* goes on\.\n", errors[0])
    assert said and errors[1] == "", errors
    assert [process.returncode for process in both] == [1, 1]
    assert Checkpoints(tmp_path).latest_step() == int(said[1])
    output = require_ended_well(launch(tmp_path, 1, *STAGES, devices=2))
    assert f"resumed after step {said[1]}" in output
    require_equal(numbers(tmp_path), numbers(stages))


@pytest.mark.full
def test_two_processes_go_on_with_a_run_of_one(stages: Path, tmp_path: Path) -> None:
    alone = started([sys.executable, "train.py", *SMALL, *STAGES, "--workdir", str(tmp_path)], 2)
    wait_for(epochs_of(tmp_path, 1), alone)
    alone.send_signal(signal.SIGTERM)
    alone.communicate(timeout=60)
    assert "resumed after step" in require_ended_well(launch(tmp_path, 2, *STAGES))
    require_equal(numbers(tmp_path), numbers(stages))


@pytest.mark.full
def test_ctrl_c_at_the_parent_stops_all(tmp_path: Path) -> None:
    process = launch(tmp_path, 2, "--config.epochs=400.0")
    wait_for(epochs_of(tmp_path, 1), process)
    process.send_signal(signal.SIGINT)
    output, error = process.communicate(timeout=60)
    assert re.fullmatch(r"cimjax: stopped after step \d+ of 8,800; saved: .* goes on\.\n", error), error
    assert process.returncode == 130 and "stopping as soon as the state can be saved" in output


@pytest.mark.full
def test_kills_lose_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    rng, seen, folder, kills = random.Random(0), [], tmp_path / "cut", request.config.getoption("--kills") or 1
    began = time.monotonic()
    require_ended_well(launch(tmp_path / "whole", 2, *STAGES))
    seconds = time.monotonic() - began
    while True:
        process = launch(folder, 2, *STAGES)
        if len(seen) < kills:
            time.sleep(rng.uniform(0.2, 0.9) * seconds)
            if process.poll() is None:
                number, end = rng.choice((0, 1)), rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
                child_of(process, number).send_signal(end)
                seen.append(f"{end.name} {number}")
        _, error = process.communicate(timeout=120)
        # Before the first state is saved, there is nothing to go on from.
        lines = [line for line in mistakes_in(error) if "there is no checkpoint of it" not in line]
        assert "Traceback" not in error and len(lines) <= 1, error
        if process.returncode == 0:
            require_equal(numbers(folder), numbers(tmp_path / "whole"), relative=0)
            if len(seen) == kills:
                break
            shutil.rmtree(folder)
    print(f"{len(seen)} ends: {seen}")


# ---- mistakes


@pytest.mark.full
def test_mistakes_end_in_one_line_of_process_0(tmp_path: Path) -> None:
    folder = ("--workdir", str(tmp_path / "run"))
    cases = [
        (ranks(2, *folder, "--config.batch_size=63"), "`config.batch_size` is 63, which 2 devices cannot share evenly"),
        (ranks(2, *folder, "--config.parallel=pmap"), "`config.parallel` is 'pmap', which knows one process only"),
        (
            ranks(2, *folder, of_each=((), ("--config.seed=1",))),
            "process 1 has another config than process 0; start all with the same file",
        ),
        (
            ranks(2, of_each=(folder, ("--workdir", str(tmp_path / "elsewhere")))),
            f"process 1 does not see at {tmp_path}/elsewhere what process 0 writes to {tmp_path}/run",
        ),
        (ranks(2, *folder, of_each=((), ("--config.dataset=no",))), "process 1 has another config than process 0"),
    ]
    for both, message in cases:
        errors = [process.communicate(timeout=60)[1] for process in both]
        assert errors[0].startswith(f"cimjax: {message}") and errors[0].count("\n") == 1, errors
        assert errors[1] == "", errors
        assert [process.returncode for process in both] == [2, 2]
    process = launch(tmp_path / "run", 2, "--config.nothing=1")
    _, error = process.communicate(timeout=60)
    assert error.startswith("cimjax: unknown field config.nothing") and error.count("\n") == 1
    assert process.returncode == 2


def test_a_page_of_the_service_becomes_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """What jaxlib 0.10.2 prints before it aborts a process."""
    page = """
import os, sys
print("cimjax: a line of its own", file=sys.stderr)
print("E1127 02:36:10.608912    3806 coordination_service.cc:1549] Use error polling: UNAVAILABLE", file=sys.stderr)
print('''F1127 02:36:10.609648    3817 client.h:80] Terminating process because the JAX distributed service detected
fatal errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):
3
5
The tasks have crashed. Check the task logs for an earlier error
*** Check failure stack trace: ***
    @     0x7fd413a40634  absl::lts_20260107::log_internal::LogMessage::SendToLog()''', file=sys.stderr, flush=True)
os.abort()
"""
    assert supervise({0: ([sys.executable, "-c", page], {})}) == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "cimjax: a line of its own",
        f"cimjax: processes 3, 5 have gone, and process 0 ends with it: {AGAIN}",
    ]
    # Of what is not understood, everything is shown.
    assert supervise({0: ([sys.executable, "-c", page.replace("stopped sending", "lost their")], {})}) == 1
    assert "The tasks have crashed" in capfd.readouterr().err


class Board:
    """Words of processes that are threads here."""

    def __init__(self) -> None:
        self.words: dict[str, str] = {}

    def key_value_set(self, name: str, word: str, allow_overwrite: bool = False) -> None:
        self.words[name] = word

    def key_value_dir_get(self, name: str) -> list[tuple[str, str]]:
        return [(key, word) for key, word in list(self.words.items()) if key.startswith(name)]


def test_processes_agree_on_where_to_stop() -> None:
    """Three that pass the same points at speeds of their own, whichever is asked: they stop at the same point."""
    for seed in range(5):
        rng, board, ends = random.Random(seed), Board(), [-1, -1, -1]
        agreements = [Agreement(Group(index, 3, board)) for index in range(3)]

        def passing(index: int, pause: float, agreements: Any = agreements, ends: Any = ends) -> None:
            while not agreements[index].here():
                time.sleep(pause)
            ends[index] = agreements[index].passed

        pauses = [rng.uniform(0.0005, 0.005) for _ in range(3)]
        threads = [threading.Thread(target=passing, args=(index, pause)) for index, pause in enumerate(pauses)]
        for thread in threads:
            thread.start()
        time.sleep(0.02)
        agreements[rng.randrange(3)].request(signal.SIGTERM)
        while any(thread.is_alive() for thread in threads):
            for agreement in rng.sample(agreements, 3):
                agreement.exchange()
        assert ends[0] == ends[1] == ends[2] > 0
        assert {agreement.signal for agreement in agreements} == {signal.SIGTERM}


# ---- who is waited for

SLOW = """
import sys, time
sys.path.insert(0, sys.argv[1])
from cimjax.training.processes.group import join
join(sys.argv[2], 2, int(sys.argv[3]))
from test_training import *
from cimjax.training.batches import FromMemory
from cimjax.training.run.files import show_in_one_line
show_in_one_line()
from cimjax.training.processes import progress
progress._BEHIND = 5.0
read, calls = FromMemory.read, []
def slow(self, *arguments):
    calls.append(arguments)
    if sys.argv[3] == "1":
        time.sleep(8 if len(calls) == 30 else 0.1)
    return read(self, *arguments)
FromMemory.read = slow
cimjax.train(config(images_on="host"), workdir=sys.argv[4], display=quiet())
"""


@pytest.mark.full
def test_a_straggler_is_named(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    words = [[sys.executable, "-c", SLOW, str(ROOT / "tests"), address, str(i), str(tmp_path)] for i in range(2)]
    both = [started(command) for command in words]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert re.search("cimjax: process 1 is behind: the others have waited [56] s for its next step\n", errors[0])
    assert re.search(r"cimjax: process 1 took [\d.]+ s of [\d.]+ s for images, the others 0\.\d s: all wait", errors[0])
    assert errors[1] == ""


# ---- files


@pytest.mark.full
def test_processes_share_images_of_files(tmp_path: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 7)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 255, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{number}.png")
    fields = ["model.width=0.05", "image_size=32", "batch_size=8", "eval_batch_size=8", "epochs=3", "workers=1"]
    fields += ["model.blocks=(1,1,1,1)", f"dataset=folder:{tmp_path}/images", "warmup_epochs=0"]
    words = ["--config", "configs/resnet18_imagenet.py:weight=none", *(f"--config.{field}" for field in fields)]
    # As many devices: in five steps of batches of eight, rounding makes another thousandth of a loss.
    require_ended_well(started([sys.executable, "train.py", *words, "--workdir", str(tmp_path / "one")], 2))
    command = [sys.executable, "-m", "cimjax", "launch", "--num_processes", "2", "--", *words]
    require_ended_well(started([*command, "--workdir", str(tmp_path / "two")]))
    require_equal(numbers(tmp_path / "two"), numbers(tmp_path / "one"))
