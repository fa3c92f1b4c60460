"""A request to stop, made by Ctrl-C or SIGTERM: heard at once, obeyed when the state can be saved."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class Stop:
    """Whether the run shall stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def leave(self, step: int, total: int, folder: Path | str) -> None:
        """End the run, whose state was saved."""
        where = shlex.quote(str(folder))
        message = f"stopped after step {step:,} of {total:,}; saved: the same command with --workdir {where} goes on."
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(f"cimjax: {message}")


@contextlib.contextmanager
def stop_requests(say: Callable[[str], None]) -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into requests, in the main thread, where Python receives signals.

    A compilation keeps Python from running anything, so a thread of its own hears of signals, says so at once, and ends
    the process at the second one.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard, wake = os.pipe()
    os.set_blocking(wake, False)
    watched = (signal.SIGINT, signal.SIGTERM)

    def request(number: int, frame: Any = None) -> None:
        del frame
        stop.signal = number

    def listen() -> None:
        before = False
        while numbers := os.read(heard, 64):
            for number in (number for number in numbers if number in watched):
                if before:
                    os._exit(128 + number)
                before = True
                request(number)
                say("stopping as soon as the state can be saved; the same once more stops at once and loses it.")

    before = {number: signal.signal(number, request) for number in watched}
    woken = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(wake)
        listener.join()
        os.close(heard)
