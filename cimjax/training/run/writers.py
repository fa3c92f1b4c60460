"""Where the records of a run go besides `metrics.jsonl`, by name: a table for spreadsheets, or TensorBoard.

Each writer is a view of that file: it begins with the records that a run has, and gets every later one.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from cimjax.spec.base import is_number
from cimjax.training.run.files import RunFolderError, write_atomically

TABLE, TENSORBOARD = "metrics.csv", "tensorboard"


class Writer(Protocol):
    """What takes the records of a run, plain dictionaries of strict JSON."""

    def write(self, record: dict[str, Any]) -> None:
        """Take a record; others can read it when this returns."""

    def close(self) -> None:
        """There are no more records."""


class CSVWriter:
    """`metrics.csv`: a row for each record, a column for each of their names; empty where a record lacks it."""

    def __init__(self, folder: Path, records: Sequence[dict[str, Any]]) -> None:
        self._file = folder / TABLE
        self._records = list(records)
        self._columns = list(dict.fromkeys(name for record in records for name in record))
        self._write_all()

    def write(self, record: dict[str, Any]) -> None:
        """Append a row; the table is written again where there is a new column."""
        self._records.append(record)
        new = [name for name in record if name not in self._columns]
        if new:
            self._columns += new
            self._write_all()
        else:
            with self._file.open("a", newline="") as stream:
                stream.write(self._rows([record]))

    def close(self) -> None:
        """Everything is written already."""

    def _write_all(self) -> None:
        header = ",".join(self._columns) + "\r\n" if self._columns else ""
        write_atomically(self._file, (header + self._rows(self._records)).encode())

    def _rows(self, records: Iterable[dict[str, Any]]) -> str:
        text = io.StringIO()
        rows = csv.DictWriter(text, self._columns)
        rows.writerows({name: _cell(value) for name, value in record.items()} for record in records)
        return text.getvalue()


class TensorBoardWriter:
    """`tensorboard/`: a curve for each number of a record that has a step, named `SPLIT/LAYER/NAME`."""

    def __init__(self, folder: Path, records: Sequence[dict[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events = EventFileWriter(os.fspath(folder / TENSORBOARD))
        # Events of earlier starts, some of which may be forgotten, are passed over from here on.
        self._events.add_event(Event(step=0, session_log=SessionLog(status=SessionLog.START)))
        for record in records:
            self._add(record)
        self._events.flush()

    def write(self, record: dict[str, Any]) -> None:
        """Add a point to each curve."""
        self._add(record)
        self._events.flush()

    def close(self) -> None:
        """Close the file."""
        self._events.close()

    def _add(self, record: dict[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = {name: value for name, value in record.items() if name != "step" and is_number(value)}
        if numbers and "step" in record:
            group = [str(record[name]) for name in ("split", "layer") if name in record]
            points = [Summary.Value(tag="/".join([*group, name]), simple_value=numbers[name]) for name in numbers]
            self._events.add_event(Event(step=record["step"], wall_time=time.time(), summary=Summary(value=points)))


WRITERS: dict[str, Callable[[Path, Sequence[dict[str, Any]]], Writer]] = {
    "csv": CSVWriter,
    "tensorboard": TensorBoardWriter,
}


def check(names: Sequence[str]) -> None:
    """Refuse a writer whose package is not installed.

    Raises:
      RunFolderError: with the command that installs it.
    """
    if "tensorboard" in names and importlib.util.find_spec("tensorboard") is None:
        raise RunFolderError("the writer `tensorboard` needs a package; install it with: pip install tensorboard")


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value
