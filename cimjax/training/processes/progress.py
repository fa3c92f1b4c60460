"""Which process the others wait for: the one that stays behind, or that takes long for its images."""

from __future__ import annotations

import statistics
import time
import warnings

from cimjax.training.processes.group import Group, ProcessesWarning

_AT = "cimjax/at"
# Seconds that a process may be behind the others before it is named, and then between two lines about it.
_BEHIND = 30.0
# A process is named that takes so many times as long as the one in the middle, and so large a part of a step.
_TIMES, _PART = 3.0, 0.2


class Progress:
    """How far processes have come, as their watches tell each other."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._told = -1
        # Of process 0: how far each process is, and since when.
        self._at: dict[int, tuple[int, float]] = {}
        self._named = 0.0

    def exchange(self, passed: int) -> None:
        """Tell how many points of the run this process has passed; process 0 names one that stays behind."""
        if passed != self._told:
            self._group.tell(f"{_AT}/{self._group.index}", str(passed))
            self._told = passed
        if self._group.first:
            self._look({index: int(word) for index, word in self._group.told(_AT).items()})

    def _look(self, at: dict[int, int]) -> None:
        now = time.monotonic()
        for index, passed in at.items():
            if index not in self._at or self._at[index][0] != passed:
                self._at[index] = passed, now
        last = min(self._at, key=lambda index: self._at[index])
        passed, since = self._at[last]
        waited = now - since
        if passed < max(at.values()) and min(waited, now - self._named) >= _BEHIND:
            self._named = now
            _warn(f"process {last} is behind: the others have waited {waited:.0f} s for its next step")


def name_slowest(group: Group, what: str, seconds: float, wall: float) -> None:
    """Name a process that takes much longer for something than others, so that all wait for it.

    Args:
      what: what takes the time, on each process by itself.
      seconds: how long that took here.
      wall: how long all took for everything meanwhile.
    """
    if group.count == 1:
        return
    each = [float(word) for word in group.gather(f"seconds for {what}", f"{seconds:.3f}")]
    slowest = max(range(group.count), key=each.__getitem__)
    usual = statistics.median(each[:slowest] + each[slowest + 1 :])
    if group.first and each[slowest] > _TIMES * usual and each[slowest] - usual > _PART * wall:
        _warn(
            f"process {slowest} took {each[slowest]:.1f} s of {wall:.1f} s for {what}, the others {usual:.1f} s: all "
            "wait for it"
        )


def _warn(line: str) -> None:
    warnings.warn(line, ProcessesWarning, stacklevel=3)
