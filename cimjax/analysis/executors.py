"""Who trains the runs of a sweep: what every executor offers, and the plainest, processes on this machine.

Jobs of a cluster are in `cimjax.analysis.cluster`. Whoever trains a run, it is one command, whose output is kept in the
run's folder; jax is not imported here.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple, Protocol

from cimjax.analysis.sweep_plan import PlannedRun
from cimjax.training.run.files import in_one_line

# What the process of a run printed, in its folder.
OUTPUT = "output.log"


class End(NamedTuple):
    """How the training of a run ended.

    code: the exit code of its process; None where nobody knows it.
    reason: what ended it from outside; empty where it ended by itself.
    """

    code: int | None
    reason: str = ""


class Job(Protocol):
    """The training of one run, which has been started or waits for a machine.

    name: what is said of it while it goes on, in front of the run.
    """

    name: str

    def ended(self) -> End | None:
        """How it has ended; None while it goes on."""

    def stop(self) -> None:
        """Ask it to save its state and to end; at the second time, to end at once."""


class Executor(Protocol):
    """What starts the training of runs.

    look_every: seconds between looks at jobs.
    stopping: what is said when all are asked to stop.
    """

    look_every: float
    stopping: str

    @property
    def jobs(self) -> int | None:
        """How many at a time; None: all."""

    def start(self, run: PlannedRun) -> Job:
        """Start the training of a run whose folder is there.

        Raises:
          ValueError: in one line, where it cannot be started.
        """


class Processes:
    """Trains runs in processes on this machine."""

    look_every = 0.1
    stopping = "stopping as soon as all states are saved; the same once more stops at once."

    def __init__(self, jobs: int = 1) -> None:
        """Nothing is started yet.

        Raises:
          ValueError: for fewer than one at a time.
        """
        require_jobs(jobs)
        self.jobs = jobs

    def start(self, run: PlannedRun) -> Job:
        """Start a process for a run."""
        environment = dict(os.environ)
        if self.jobs > 1:
            # Each process of jax takes three quarters of a GPU's memory unless told otherwise.
            environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / self.jobs:.3f}")
        with in_one_line("write", run.folder):
            (run.folder / OUTPUT).unlink(missing_ok=True)
            return _Process(start_process(command_of(run), run.folder / OUTPUT, environment))


class _Process:
    name = "training"

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def ended(self) -> End | None:
        code = self._process.poll()
        return None if code is None else of_process(code)

    def stop(self) -> None:
        self._process.terminate()


def require_jobs(jobs: int) -> None:
    """Refuse fewer runs at a time than one.

    Raises:
      ValueError: in one line.
    """
    if jobs < 1:
        raise ValueError(f"`jobs` is {jobs}; give the number of runs at a time, at least 1.")


def command_of(run: PlannedRun) -> list[str]:
    """What trains a run."""
    command = [sys.executable, "-m", "cimjax", "train", "--config", run.config, "--workdir", str(run.folder)]
    for word, other in (("--from", run.start), ("--fork", run.fork)):
        command += [] if other is None else [word, str(other)]
    return [*command, *run.fields]


def of_process(code: int) -> End:
    """How a process of this exit code has ended; negative for a signal."""
    if code >= 0:
        return End(code)
    memory = ", as by a system without memory left" if -code == signal.SIGKILL else ""
    return End(code, f"killed by {signal.Signals(-code).name}{memory}")


def last_words(printed: str) -> str:
    """The last line that tells of an error, else the last line."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"cimjax: |[\w.]*(Error|Exception)\b", line)]
    return ["", *lines, *errors[-1:]][-1].removeprefix("cimjax: ")


def start_process(command: list[str], output: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, so that what is typed at the terminal, or sent to a whole group of
    processes, reaches it through its parent only; what it prints is appended to a file."""
    with output.open("ab") as stream:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment | {"PYTHONUNBUFFERED": "1"},  # lines in the order in which they were printed
            start_new_session=True,
        )
