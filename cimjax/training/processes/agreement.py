"""At which point of a run its processes stop, when a signal reached only some of them, or not all at once."""

from __future__ import annotations

import threading

from cimjax.training.processes.group import Group

_STOP, _PASSED = "cimjax/stop", "cimjax/passed"


class Agreement:
    """An agreement on the last point that is passed.

    All processes pass the same points in the same order, and devices wait for each other between them. Whoever hears
    of a request says how many points it has passed, and passes no other until all have said so; the one that has come
    farthest is where all stop. Nobody can be waited for in vain: devices only wait for steps before that point.

    signal: what was asked for, by whomever; None before the request.
    """

    def __init__(self, group: Group) -> None:
        self.signal: int | None = None
        self.passed = 0
        self._group = group
        self._changed = threading.Condition()
        self._heard = False
        self._last: int | None = None

    def request(self, signal: int) -> None:
        """Ask all processes to stop; may be called by a handler of signals."""
        self.signal = signal

    @property
    def reached(self) -> bool:
        """Whether it is settled where all stop."""
        return self._last is not None

    def here(self) -> bool:
        """Whether all stop at this point; otherwise it is passed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._heard or self._last is not None)
            if self._last is not None and self.passed >= self._last:
                return True
            self.passed += 1
            return False

    def exchange(self) -> None:
        """Tell and hear; called again and again by a thread of its own."""
        group = self._group
        if self.signal is not None and not self._heard:
            group.tell(f"{_STOP}/{group.index}", str(self.signal))
        if not self._heard:
            requests = group.told(_STOP)
            if not requests:
                return
            with self._changed:
                self._heard, passed = True, self.passed
            self.signal = int(requests[min(requests)])
            group.tell(f"{_PASSED}/{group.index}", str(passed))
        if self._last is None:
            said = group.told(_PASSED)
            if len(said) == group.count:
                with self._changed:
                    self._last = max(map(int, said.values()))
                    self._changed.notify_all()
