"""The run folder as processes other than the first have it: they write nothing, and see what process 0 has written."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cimjax.training.processes.group import Group, ProcessesError
from cimjax.training.run.folder import LOCK, RunFolder
from cimjax.training.run.records import METRICS, Records

# Seconds that a network file system may take to show a file to another machine.
_VISIBLE = 8.0


class _SecondaryRecords(Records):
    """Records that another process writes."""

    def read(self) -> list[dict[str, Any]]:
        return []

    def mark(self) -> dict[str, Any]:
        return {}  # that of process 0 is saved

    def check(self, marked: Any) -> bool:
        return False


class SecondaryFolder(RunFolder):
    """A run folder in which another process writes."""

    def __init__(self, path: Path) -> None:
        """Nothing is opened."""
        self.path = self.address = path.absolute()
        self.in_bucket = False
        self.records = _SecondaryRecords(self.path / METRICS)

    def log(self, record: dict[str, Any]) -> None:
        """Process 0 logs the same."""

    def forget_after(self, step: int, marked: Any = None) -> None:
        """Process 0 forgets."""

    def begin_with(self, records: Sequence[dict[str, Any]]) -> None:
        """Process 0 does."""

    def close(self) -> None:
        """There is nothing to close."""


def require_shared(folder: RunFolder, processes: Group) -> None:
    """Refuse a run folder that some process does not see as process 0 has it.

    Raises:
      ProcessesError: on all processes, naming those.
    """
    if processes.count == 1:
        return
    file = folder.path / LOCK
    owner = processes.of_first("the run folder", _content(file))
    until = time.monotonic() + _VISIBLE
    while _content(file) != owner and time.monotonic() < until:
        time.sleep(0.2)
    seen = processes.gather("whether all see the run folder", "yes" if _content(file) == owner else str(folder.path))
    if blind := [index for index, word in enumerate(seen) if word != "yes"]:
        raise ProcessesError(
            f"process {blind[0]} does not see at {seen[blind[0]]} what process 0 writes to {folder.path}; give a "
            "--workdir on a file system that all share."
        )


def _content(file: Path) -> str:
    with contextlib.suppress(OSError):
        return file.read_text()
    return ""
