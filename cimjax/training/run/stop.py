"""A request to stop, made by Ctrl-C or SIGTERM: heard at once, obeyed when the state can be saved.

Of several processes all stop at the same step, whichever of them were asked.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cimjax.training.processes.agreement import Agreement

# Seconds within which the same request counts once: a cluster may send it to a process and to what started it.
_ONCE = 0.5


class Stop:
    """Whether the run shall stop.

    agreement: with the other processes; None where there are none.
    """

    def __init__(self, agreement: Agreement | None = None) -> None:
        self.agreement = agreement
        self.signal: int | None = None

    def request(self, signal: int) -> None:
        """Ask to stop; may be called by a handler of signals."""
        self.signal = signal
        if self.agreement:
            self.agreement.request(signal)

    def here(self) -> bool:
        """Whether the run stops where it is. Several processes ask at the same points, and get the same answer."""
        if self.agreement is None:
            return self.signal is not None
        stops = self.agreement.here()
        if stops:
            self.signal = self.agreement.signal
        return stops

    def leave(self, step: int, total: int, folder: Path | str) -> None:
        """End the run, whose state was saved."""
        where = shlex.quote(str(folder))
        message = f"stopped after step {step:,} of {total:,}; saved: the same command with --workdir {where} goes on."
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(f"cimjax: {message}")


@contextlib.contextmanager
def stop_requests(say: Callable[[str], None], agreement: Agreement | None = None) -> Iterator[Stop]:
    """Turn Ctrl-C and SIGTERM into requests, in the main thread, where Python receives signals.

    A compilation keeps Python from running anything, so a thread of its own hears of signals, says so at once, and ends
    the process at the second one.
    """
    stop = Stop(agreement)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    heard, wake = os.pipe()
    os.set_blocking(wake, False)
    watched = (signal.SIGINT, signal.SIGTERM)

    def request(number: int, frame: Any = None) -> None:
        del frame
        stop.request(number)

    def listen() -> None:
        before: float | None = None
        while numbers := os.read(heard, 64):
            for number in (number for number in numbers if number in watched):
                now = time.monotonic()
                if before is not None and now - before < _ONCE:
                    continue
                if before is not None:
                    os._exit(128 + number)
                before = now
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
