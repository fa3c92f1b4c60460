"""What happens to one process happens to all: an error of one ends the others, with one line from process 0.

A thread of each process hears of it. That a process is killed is heard of otherwise: devices and JAX's own service
lose it, and `cimjax.training.processes.launch` makes one line of what they print.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import NoReturn, Self

import jax

from cimjax.command import is_for_the_user
from cimjax.spec.base import Notice
from cimjax.training.processes.agreement import Agreement
from cimjax.training.processes.group import Group, group
from cimjax.training.processes.launch import watched
from cimjax.training.processes.progress import Progress

_ENDED, _LEFT = "cimjax/ended", "cimjax/left"
# Seconds between two looks at what others have said.
_EVERY = 0.5
# Seconds in which the loss of a process is explained by JAX's service, which then ends this one.
_EXPLAINED = 20.0
# Seconds that process 0, without which no word is heard, gives the others to leave.
_LEAVING = 5.0


@contextlib.contextmanager
def together() -> Iterator[Agreement | None]:
    """Within it, an error of any process ends all; it gives where to agree on a stop, None where there is one process.

    In a run of several processes an error does not come out of it: it is printed, and the process ends.
    """
    members = group()
    if members.count == 1 or _Watch.current is not None:
        yield _Watch.current.agreement if _Watch.current else None
        return
    if not members.first:
        warnings.simplefilter("ignore", Notice)  # process 0 gives the same
    with _Watch(members) as watch:
        try:
            yield watch.agreement
            members.gather("the end", "")
        except (KeyboardInterrupt, SystemExit) as stop:
            if not watch.agreement.reached:
                watch.leave(stop)
            if members.first:
                raise
            raise SystemExit(130 if isinstance(stop, KeyboardInterrupt) else 1) from stop
        except BaseException as error:
            watch.leave(error)


class _Watch(threading.Thread):
    """Hears of what the other processes say, and ends this one when another has ended."""

    current: _Watch | None = None

    def __init__(self, members: Group) -> None:
        super().__init__(name="cimjax-watch", daemon=True)
        self.agreement, self.progress = Agreement(members), Progress(members)
        self._group, self._parent = members, os.getppid() if watched() else None
        self._closed, self._leaving = threading.Event(), threading.Event()

    def __enter__(self) -> Self:
        _Watch.current = self
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _Watch.current = None
        self._closed.set()
        self.join()

    def run(self) -> None:
        while not self._closed.wait(_EVERY):
            try:
                self._look()
            except jax.errors.JaxRuntimeError:
                return  # process 0 has gone: JAX's service ends this one

    def _look(self) -> None:
        if self._parent is not None and os.getppid() != self._parent:
            os._exit(1)  # whoever watches it was killed
        ended = self._group.told(_ENDED)
        ended.pop(self._group.index, None)
        if ended and not self._leaving.is_set():
            self._follow(ended)
        self.agreement.exchange()
        self.progress.exchange(self.agreement.passed)

    def _follow(self, ended: dict[int, str]) -> None:
        """End as others have; where all make the same mistake, process 0 says it in its own words."""
        if self._group.first and self._leaving.wait(2 * _EVERY):
            return
        index = min(ended)
        said = json.loads(ended[index])
        self._end(f"cimjax: process {index}: {said['message']}", said["code"])

    def leave(self, error: BaseException) -> NoReturn:
        """End this process, and by it the others."""
        if _may_be_loss(error):
            # It is a process that was lost, or whose error is being told: that is the better line.
            time.sleep(_EXPLAINED)
        self._leaving.set()
        message, code = " ".join(str(error).split()) or type(error).__name__, 2
        if isinstance(error, KeyboardInterrupt | SystemExit):
            message, code = "interrupted", 130
        elif not (isinstance(error, ValueError) and is_for_the_user(error)):
            traceback.print_exception(error)
            message, code = f"{type(error).__name__}: {message}", 1
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._group.tell(f"{_ENDED}/{self._group.index}", json.dumps({"message": message, "code": code}))
        self._end(f"cimjax: {message}" if code != 1 else "", code)

    def _end(self, line: str, code: int) -> NoReturn:
        """End at once: at its usual end a process would wait for the others, which wait for it."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._group.tell(f"{_LEFT}/{self._group.index}", "")
            if self._group.first:
                if line:
                    print(line, file=sys.stderr, flush=True)
                until = time.monotonic() + _LEAVING
                while len(self._group.told(_LEFT)) < self._group.count and time.monotonic() < until:
                    time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _may_be_loss(error: BaseException) -> bool:
    """Whether an error can come from the loss of another process, on which devices or files waited."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, jax.errors.JaxRuntimeError) or "Gloo" in str(found):
            return True
        found = found.__cause__ or found.__context__
    return False
