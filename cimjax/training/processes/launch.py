"""Processes watched from outside: started, told of signals, and ended when one of them dies. jax is not imported here.

JAX's service ends a process that has lost another by an abort within its own threads, with a page of C++ that no part
of that process can prevent. So each process of a run has a parent that makes one line of it; on one machine all have
the same parent.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import IO

# Set for processes that are watched already.
_WATCHED = "CIMJAX_WATCHED"
_AGAIN = "the same command with the same --workdir goes on from the last checkpoint"
# Seconds that the others have to end by themselves after one has ended with an error.
_GRACE = 20.0
_EVERY = 0.05
# How JAX's service begins what it logs, how it calls who is lost, and what gloo says whenever it connects.
_SERVICE = re.compile(r"[IWEF]\d{4} [\d:.]+ +\d+ (coordination_service|client\.h)")
_FATAL = re.compile(r"F\d{4} ")
_SILENT = re.compile(r"stopped sending heartbeats\):((?:\s+(?:\S*task:)?\d+)+)")
_WITHOUT_FIRST = "Failed to send RPC to coordination service"
_OURS = ("cimjax: ", "Traceback ")
_NOISE = re.compile(r"\[Gloo\] Rank \d+ is connected")


def watched() -> bool:
    """Whether this process was started by `supervise`."""
    return _WATCHED in os.environ


def number_here() -> int:
    """The number of this process in the run, as far as what started it tells."""
    told = (os.environ.get(name, "") for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK"))
    return next((int(word) for word in told if word.isdigit()), 0)


def launch(arguments: Sequence[str], count: int) -> int:
    """Train in `count` processes on this machine, on a free port of its own; the exit code.

    Args:
      arguments: of `cimjax train`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "cimjax", "train", *arguments, "--distributed"]
    command += ["--coordinator_address", address, "--num_processes", str(count), "--process_id"]
    there = {"JAX_COORDINATOR_BIND_ADDRESS": address}
    # Each takes the GPU of its number; elsewhere this has no effect.
    devices = [{} if "JAX_LOCAL_DEVICE_IDS" in os.environ else {"JAX_LOCAL_DEVICE_IDS": str(i)} for i in range(count)]
    return supervise({i: ([*command, str(i)], {**there, **devices[i]}) for i in range(count)})


def supervise(commands: dict[int, tuple[Sequence[str], dict[str, str]]]) -> int:
    """Run processes until all have ended, however that comes; the exit code.

    Args:
      commands: what to run and what to add to its environment, by the number of the process in the run.
    """
    said = _Said()
    children = [_Child(index, *command, said) for index, command in commands.items()]
    with _forwarding(children) as asked:
        ended = _first_failure(children)
        if ended is None:
            return 0
        if ended.lost_by_signal and not asked:
            others = _all_ended(children[1:])
            said.line(f"cimjax: process {ended.index} was killed by {ended.signal_name}; {others}{_AGAIN}")
        else:
            _wait(children, _GRACE if not asked else None)
        late = [child for child in children if child.process.poll() is None]
        for child in late:
            child.process.kill()
        _wait(late, _GRACE)
        if late and not ended.lost_by_signal:
            said.line(f"cimjax: process {ended.index} has ended, and {_all_ended(late)}{_AGAIN}")
    for child in children if not ended.lost_by_signal else []:
        child.explain()
    return ended.code


def _all_ended(others: Sequence[_Child]) -> str:
    return "the others were ended: " if others else ""


class _Said:
    """What goes to standard error; what several processes say alike is said once."""

    def __init__(self) -> None:
        self._lines: set[str] = set()
        self._lock = threading.Lock()

    def line(self, line: str) -> None:
        with self._lock:
            if line not in self._lines:
                self.as_it_is(line)
            if line.startswith("cimjax: "):
                self._lines.add(line)

    def as_it_is(self, line: str) -> None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


class _Child:
    """One process, what it prints as errors, and how it ended."""

    def __init__(self, index: int, command: Sequence[str], environment: dict[str, str], said: _Said) -> None:
        self.index, self._said = index, said
        self._withheld: list[str] = []
        first = index == 0
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=None if first else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **environment, _WATCHED: "1"},
            # Ctrl-C in a terminal reaches the parent alone, which passes it on: twice would mean to stop at once.
            process_group=0,
        )
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    @property
    def code(self) -> int:
        """The exit code, as a shell gives it."""
        code = self.process.wait()
        return code if code >= 0 else 1 if self._fatal else 128 - code

    @property
    def lost_by_signal(self) -> bool:
        """Whether it was killed, and not by JAX's service, which does so when another was."""
        if self.process.wait() >= 0:
            return False
        self._reader.join(1.0)
        return not self._fatal

    @property
    def signal_name(self) -> str:
        return signal.Signals(-self.process.wait()).name

    @property
    def _fatal(self) -> bool:
        return any(map(_FATAL.match, self._withheld))

    def explain(self) -> None:
        """Make one line of what JAX's service said, if it ended the process."""
        self._reader.join(1.0)
        if not self._fatal:
            return
        text = "\n".join(self._withheld)
        silent = _SILENT.search(text)
        lost = sorted(set(re.findall(r"\d+\b(?!\S*task)", silent[1]))) if silent else []
        lost = ["0"] if _WITHOUT_FIRST in text else lost
        if not lost:
            for line in self._withheld:
                self._said.as_it_is(line)
        elif self.index == 0 or "0" in lost:
            what = f"process {lost[0]} has" if len(lost) == 1 else f"processes {', '.join(lost)} have"
            self._said.line(f"cimjax: {what} gone, and process {self.index} ends with it: {_AGAIN}")

    def _read(self, stream: IO[str]) -> None:
        """Pass lines on, without what JAX's service says, which goes over several."""
        service = fatal = False
        for line in stream:
            line = line.rstrip("\n")
            fatal = fatal or bool(_FATAL.match(line))
            service = bool(_SERVICE.match(line)) or (service and not line.startswith(_OURS))
            if fatal or service:
                self._withheld.append(line)
            elif not _NOISE.match(line):
                self._said.line(line)


def _first_failure(children: Sequence[_Child]) -> _Child | None:
    """The first process that ends with an error; None when all have ended well."""
    running = list(children)
    while running:
        for child in running:
            if child.process.poll():
                return child
        running = [child for child in running if child.process.poll() is None]
        time.sleep(_EVERY)
    return None


def _wait(children: Sequence[_Child], seconds: float | None) -> None:
    until = None if seconds is None else time.monotonic() + seconds
    while any(child.process.poll() is None for child in children):
        if until is not None and time.monotonic() > until:
            return
        time.sleep(_EVERY)


@contextlib.contextmanager
def _forwarding(children: Sequence[_Child]) -> Iterator[list[int]]:
    """Pass signals on to all children; gives those that came."""
    came: list[int] = []

    def forward(number: int, frame: object) -> None:
        del frame
        came.append(number)
        for child in children:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)  # under nohup
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
