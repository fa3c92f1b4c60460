"""The folder of one training run: who may write to it, which options it belongs to, and what was measured.

    config.json      the options of the run
    versions.json    a list of starts: time, command, versions, git commit
    metrics.jsonl    one strict JSON object per line
    checkpoints/     written by `cimjax.training.run.checkpoint`
    .lock            held while a process trains here; names that process

Neither jax nor orbax is imported here, so that a run can be looked at quickly. In a run of several processes only the
primary one opens the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from cimjax.spec.base import is_number, shown
from cimjax.training.run import writers
from cimjax.training.run.address import is_remote
from cimjax.training.run.files import RunFolderError, RunFolderWarning, in_one_line, read_json, write_json
from cimjax.training.run.lock import give_back, take_lock
from cimjax.training.run.options import MAY_CHANGE, differences, in_a_line
from cimjax.training.run.provenance import add_start
from cimjax.training.run.records import METRICS, Records, read_records, strict

__all__ = ["CHECKPOINTS", "CONFIG", "LOCK", "SAVE_NAME", "RunFolder", "RunFolderError", "RunFolderWarning"]
__all__ += ["read_config", "read_records"]

CONFIG, CHECKPOINTS, LOCK = "config.json", "checkpoints", ".lock"
# A complete save among the checkpoints: number, step, whether it is the best; what has another name is unfinished.
SAVE_NAME = re.compile(r"(\d+)_step_(\d+)(_best)?")

# Letters that the names of a run's files may add to the path of its folder, within the 4,096 of Linux.
_LONGEST = 3800


def read_config(path: str | os.PathLike[str], completed: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The options of an existing run, a dictionary.

    Args:
      path: the run folder.
      completed: makes of options that an older version may have written those of this version, in any form; a
        ValueError of its says what is wrong with them.

    Raises:
      RunFolderError: where `path` is no run folder, or its `config.json` cannot be read or completed.
    """
    file = Path(path) / CONFIG
    with in_one_line("read", file):
        found = file.is_file()
    if not found:
        raise RunFolderError(f"{Path(path)} is no run folder: it has no {CONFIG}; give the --workdir of a run.")
    options = read_json(file, dict)
    try:
        return completed(options) if completed else options
    except ValueError as error:
        raise RunFolderError(f"{file} is damaged: {error}") from error


class RunFolder:
    """A run folder that this process may write to, until `close` or the end of the process, however it ends.

    What is there is looked at when the folder is opened, and written only when there is something to say: a run that
    was finished can be started again, and no file changes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: dict[str, Any],
        *,
        completed: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        formats: Sequence[str] = (),
    ) -> None:
        """Create a run folder, or take up an existing one of the same options.

        Args:
          path: the folder; its parents are created too.
          config: the options of the run; must be JSON (no NaN, no infinity). An existing run takes over new values of
            those of `MAY_CHANGE`.
          completed: for `read_config`; gives a plain dictionary.
          formats: how records are written besides `metrics.jsonl`, names of `writers.WRITERS`.

        Raises:
          RunFolderError: where the folder is in use, holds a run of other options or more epochs, or cannot be written.
        """
        self.path = _writable(path)
        # As it is shown: a folder that stands for one in a bucket shows that.
        self.address = self.path if isinstance(path, str | Path) else str(path)
        self.in_bucket = not isinstance(path, str | Path)
        self.records = Records(self.path / METRICS)
        self._formats = formats
        self._writers: list[writers.Writer] | None = None
        self._started = time.monotonic()
        plain = _plain(config)
        writers.check(formats)
        with in_one_line("create", self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = take_lock(self.path / LOCK)
        try:
            self._settle_config(plain, completed)
        except BaseException:
            self.close()
            raise

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics; it is in the file when this returns.

        Arrays and their scalars become lists and numbers. NaN and infinities become null, so that every line is strict
        JSON and every column stays numeric. `seconds` is added: how long the run has trained, over all its starts.

        Raises:
          RunFolderError: where the line cannot be written (a full disk); what was written of it is taken back.
        """
        if self._lock < 0:
            raise RunFolderError(f"{self.path} was closed; open it again to log.")
        others = self._begin()
        record = strict({**record, "seconds": round(time.monotonic() - self._started, 2)})
        self.records.append(record)
        for writer in others:
            with in_one_line("write", self.path):
                writer.write(record)

    def forget_after(self, step: int, marked: Any = None) -> None:
        """Take the records back to what was logged when a state was saved, for a run that goes on from there: the
        process may have logged more after its last checkpoint was written. Arguments as for `Records.take_back`."""
        self.records.take_back(step, marked)
        self._begin(anew=True)

    def begin_with(self, records: Sequence[dict[str, Any]]) -> None:
        """Begin a run with what another has logged, its times too; what was logged here without a state is forgotten
        (`forget_after`)."""
        self.forget_after(-1)
        for record in records:
            self.records.append(record)
        self._begin(anew=True)

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock < 0:
            return
        lock, self._lock = self._lock, -1
        with in_one_line("write", self.path), contextlib.ExitStack() as stack:
            stack.callback(give_back, lock)
            for writer in self._writers or []:
                stack.callback(writer.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin(self, *, anew: bool = False) -> list[writers.Writer]:
        """Record this start before the first line; the writers, which begin with the lines that there are."""
        if self._writers is None:
            add_start(self.path)
            # A last line without its end: the next one would be lost with it.
            self.records.take_back(2**63)
        if self._writers is None or anew:
            before = self.records.read()
            done = [record["seconds"] for record in before if is_number(record.get("seconds"))]
            self._started = time.monotonic() - max(done, default=0)
            self._writers = [writers.WRITERS[name](self.path, before) for name in self._formats]
        return self._writers

    def _settle_config(self, config: dict[str, Any], completed: Any) -> None:
        file = self.path / CONFIG
        if file.exists():
            old = _plain(read_config(self.path, completed))
            if found := list(differences(old, config)):
                raise RunFolderError(
                    f"{self.path} holds a run of other options ({in_a_line(found)}); give the same options to resume "
                    f"it ({', '.join(MAY_CHANGE)} may differ), or another --workdir for a new run."
                )
            if old == config:
                return
            self._require_epochs(old.get("epochs"), config.get("epochs"))
        write_json(file, config)

    def _require_epochs(self, old: Any, new: Any) -> None:
        """Refuse fewer epochs than are done."""
        if new == old or not is_number(new):
            return
        done = self.records.epochs_done()
        if new < done:
            raise RunFolderError(
                f"{self.path} has trained {done:g} epochs, more than the {new:g} of `config.epochs`; give at least "
                f"{done:g} to go on, or another --workdir for a new run."
            )


def _writable(path: str | os.PathLike[str]) -> Path:
    """The absolute path of a run folder; refused at once are names under which a later save would fail."""
    text = os.fspath(path)
    if is_remote(text):
        raise RunFolderError(f"a run folder is on this machine, not at {shown(text)}; give another --workdir.")
    with in_one_line("find", Path(path)):
        path = Path(path).absolute()
    try:
        letters = len(str(path).encode())
    except UnicodeEncodeError:
        raise RunFolderError(
            f"no checkpoint can be saved in {shown(str(path))}: this name is not UTF-8; give another --workdir."
        ) from None
    if "\0" in text or letters > _LONGEST:
        raise RunFolderError(f"{shown(str(path))} is too long or no path; give another --workdir.")
    checkpoints = path / CHECKPOINTS
    with in_one_line("read", path):
        there = os.path.lexists(checkpoints)
    if there and not (checkpoints.is_dir() and os.access(checkpoints, os.W_OK | os.X_OK)):
        raise RunFolderError(f"{checkpoints} is no folder that can be written; mend this or give another --workdir.")
    return path


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The options as they come back from the file (tuples are lists there)."""
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RunFolderError(f"`config` cannot be written as JSON: {error}; give plain numbers and text.") from error
