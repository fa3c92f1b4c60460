"""The records of a run, `metrics.jsonl`: one strict JSON object per line, appended, and taken back to a saved state."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from cimjax.spec.base import is_number
from cimjax.training.run.files import RunFolderError, in_one_line, parsed, put_aside, warn, write_atomically

METRICS = "metrics.jsonl"


class _Line(NamedTuple):
    """A line as it stands in the file, and what it says; None where it is no record."""

    text: bytes
    record: dict[str, Any] | None


class Records:
    """The records in a file, as far as there are any."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> list[dict[str, Any]]:
        """What has been logged so far, without a last line that has no end (the writer was killed, or writes it now).

        Raises:
          RunFolderError: where another line is no JSON object, or its `step` is no number.
        """
        records = []
        for number, line in enumerate(_lines(self._content()), start=1):
            if line.record is None:
                raise RunFolderError(
                    f"{self.file}, line {number} is no JSON object of a step; mend or remove this line."
                )
            records.append(line.record)
        return records

    def epochs_done(self) -> float:
        """The greatest number of an epoch that a whole line has; 0 where none has any."""
        epochs = ((line.record or {}).get("epoch", 0) for line in _lines(self._content()))
        return max((epoch for epoch in epochs if is_number(epoch)), default=0)

    def append(self, record: dict[str, Any]) -> None:
        """Append a record; it is in the file when this returns, as it is in no part where this fails."""
        text = json.dumps(record, allow_nan=False).encode() + b"\n"
        with in_one_line("write", self.file), self.file.open("ab", buffering=0) as stream:
            start = stream.tell()
            try:
                if stream.write(text) != len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    stream.truncate(start)
                raise

    def mark(self) -> dict[str, Any]:
        """How much there is, to be saved with a state: what `check` and `take_back` hold the file against."""
        content = self._content()
        return {"lines": content.count(b"\n"), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    def check(self, marked: Any) -> bool:
        """Whether the file does not begin with what was marked, if anything was; a warning says what is missing."""
        if not _is_mark(marked) or _begins_with(self._content(), marked):
            return False
        there = sum(line.record is not None for line in _lines(self._content()[: marked["bytes"]]))
        missing = max(0, marked["lines"] - there)
        what = f"{missing} of {marked['lines']} lines are missing or damaged" if missing else "a line was changed"
        warn(f"{self.file} is not what this run logged: {what}; no training depends on it, and the run goes on.")
        return True

    def take_back(self, step: int, marked: Any = None) -> None:
        """Take the file back, atomically, to what was logged when the state of a step was saved.

        That is what was marked; where nothing was, or it is not there any more, every whole line up to the step, and
        every one without a step. A file with damaged lines, or of states that there are not, is kept under another
        name, and a warning says so.

        Args:
          step: steps of that state; -1 for a run that begins.
          marked: `mark()` of that time.
        """
        content = self._content()
        lines = _lines(content)
        changed = self.check(marked)
        if _is_mark(marked) and not changed:
            kept = content[: marked["bytes"]]
        else:
            kept = b"".join(text for text, record in lines if record is not None and record.get("step", step) <= step)
        if kept == content:
            return
        steps = [-1 if record is None else record.get("step", -1) for _, record in lines]
        if step < 0 < max(steps, default=0):
            aside = put_aside(self.file)
            warn(f"{aside} is what {METRICS} held: there is no checkpoint of it, and training begins anew.")
        elif any(record is None for _, record in lines):
            warn(f"{put_aside(self.file)} is what {METRICS} held; its whole lines are kept there.")
        write_atomically(self.file, kept)

    def _content(self) -> bytes:
        with in_one_line("read", self.file):
            return self.file.read_bytes() if self.file.exists() else b""


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What the run in a folder has logged so far; may be called while it goes on. Errors as for `Records.read`."""
    return Records(Path(path) / METRICS).read()


def strict(value: Any) -> Any:
    """A value as strict JSON has it: arrays and their scalars are lists and numbers, NaN and infinities null."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return strict(value.tolist()) if hasattr(value, "tolist") else value


def _lines(content: bytes) -> list[_Line]:
    """Every line that has its end."""
    return [_Line(text, _record(text)) for text in content.splitlines(keepends=True) if text.endswith(b"\n")]


def _record(text: bytes) -> dict[str, Any] | None:
    value = parsed(text)
    return value if isinstance(value, dict) and is_number(value.get("step", 0)) else None


def _is_mark(marked: Any) -> bool:
    return isinstance(marked, dict) and all(isinstance(marked.get(name), int) for name in ("lines", "bytes"))


def _begins_with(content: bytes, marked: dict[str, Any]) -> bool:
    return hashlib.sha256(content[: marked["bytes"]]).hexdigest() == marked.get("sha256")
