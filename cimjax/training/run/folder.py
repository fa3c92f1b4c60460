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
import datetime
import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, Self

import cimjax

CONFIG, VERSIONS, METRICS, CHECKPOINTS, LOCK = "config.json", "versions.json", "metrics.jsonl", "checkpoints", ".lock"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_ABSENT = object()


class RunFolderError(ValueError):
    """What keeps a run folder from being used: one line that says what and how to go on."""


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options of an existing run.

    Raises:
      RunFolderError: where `path` is no run folder, or its `config.json` cannot be read.
    """
    file = Path(path) / CONFIG
    with _in_one_line("read", file):
        found = file.is_file()
    if not found:
        raise RunFolderError(f"{Path(path)} is no run folder: it has no {CONFIG}; give the --workdir of a run.")
    return _read_json(file, dict)


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """What an existing run has logged so far; may be called while the run goes on.

    A last line without its end (the writer was killed, or is writing now) is left out.

    Raises:
      RunFolderError: where another line is no JSON object.
    """
    return [record for _, record in _lines(Path(path) / METRICS)]


class RunFolder:
    """A run folder that this process may write to, until `close` or the end of the process, however it ends."""

    def __init__(self, path: Path, lock: int) -> None:
        """For `open` only: `lock` is the descriptor of the locked file."""
        self.path = path
        self._lock = lock

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: dict[str, Any], *, allow: Set[str] = frozenset()) -> Self:
        """Create a run folder, or take up an existing one of the same options.

        Args:
          path: the folder; its parents are created too.
          config: the options of the run; must be JSON (no NaN, no infinity).
          allow: dotted names of options that may differ from those of the existing run (`"schedule"` includes
            `"schedule.epochs"`); the file then takes the new values.

        Raises:
          RunFolderError: where the folder is in use, holds a run of other options, or cannot be written.
        """
        path = Path(path).absolute()
        plain = _plain(config)
        with _in_one_line("create", path):
            path.mkdir(parents=True, exist_ok=True)
        self = cls(path, _take_lock(path / LOCK))
        try:
            self._settle_config(plain, allow)
            self._add_start()
            self.forget_after(sys.maxsize)  # a last line without its end: the next one would be lost with it
        except BaseException:
            self.close()
            raise
        return self

    @property
    def config_path(self) -> Path:
        """The options of the run."""
        return self.path / CONFIG

    @property
    def metrics_path(self) -> Path:
        """What the run measured, one JSON object per line."""
        return self.path / METRICS

    @property
    def checkpoints_path(self) -> Path:
        """Where `Checkpoints(run.path)` writes."""
        return self.path / CHECKPOINTS

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to the metrics; it is in the file when this returns.

        Arrays and their scalars become lists and numbers. NaN and infinities become null, so that every line is strict
        JSON and every column stays numeric.

        Raises:
          RunFolderError: where the line cannot be written (a full disk); what was written of it is taken back.
        """
        if self._lock < 0:
            raise RunFolderError(f"{self.path} was closed; open it again to log.")
        line = json.dumps(_strict(record), allow_nan=False).encode() + b"\n"
        with _in_one_line("write", self.metrics_path), self.metrics_path.open("ab", buffering=0) as stream:
            start = stream.tell()
            try:
                if stream.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                with contextlib.suppress(OSError):
                    stream.truncate(start)
                raise

    def forget_after(self, step: int) -> None:
        """Drop, atomically, every line whose `step` is greater than `step`; lines without a step stay.

        For a run that resumes at `step`: the process may have logged more after its last checkpoint was written.
        """
        kept = [line for line, record in _lines(self.metrics_path) if record.get("step", step) <= step]
        _write_atomically(self.metrics_path, b"".join(kept))

    def records(self) -> list[dict[str, Any]]:
        """All lines of the metrics."""
        return read_records(self.path)

    def close(self) -> None:
        """Let other processes use the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _settle_config(self, config: dict[str, Any], allow: Set[str]) -> None:
        if self.config_path.exists():
            differences = list(_differences(read_config(self.path), config, allow))
            if differences:
                more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
                raise RunFolderError(
                    f"{self.path} holds a run of other options ({', '.join(differences[:3])}{more}); give the same "
                    "options to resume it, or another --workdir for a new run."
                )
        _write_atomically(self.config_path, _indented(config))

    def _add_start(self) -> None:
        file = self.path / VERSIONS
        starts = _read_json(file, list) if file.exists() else []
        _write_atomically(file, _indented([*starts, _start()]))


def _take_lock(file: Path) -> int:
    """Lock a file for this process and write its number into it; the system takes the lock back when it ends."""
    with _in_one_line("lock", file):
        lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BlockingIOError:
            owner = os.pread(lock, 200, 0).decode(errors="replace")
            os.close(lock)
            raise RunFolderError(
                f"{file.parent} is in use by process PID {owner}; wait for it or give another --workdir."
            ) from None
        except OSError:
            os.close(lock)
            raise
    return lock


def _lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line of the metrics, as it stands and as a record."""
    if not file.exists():
        return
    with _in_one_line("read", file):
        content = file.read_bytes()
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise RunFolderError(f"{file}, line {number} is no JSON object; mend or remove this line.")
        yield line, record


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """The options as they come back from the file (tuples are lists there)."""
    try:
        return json.loads(json.dumps(config, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise RunFolderError(f"`config` cannot be written as JSON: {error}; give plain numbers and text.") from error


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return _strict(value.tolist()) if hasattr(value, "tolist") else value


def _differences(old: Any, new: Any, allow: Set[str], name: str = "") -> Iterator[str]:
    """A text for every option that is not the same in both and is not allowed to differ."""
    if name in allow:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            dotted = f"{name}.{key}" if name else key
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), allow, dotted)
    elif old != new:
        texts = ("absent" if value is _ABSENT else json.dumps(value) for value in (old, new))
        yield f"{name}: {' -> '.join(texts)}"


def _start() -> dict[str, Any]:
    """What a result may depend on besides the options."""
    versions = {"python": platform.python_version(), "cimjax": cimjax.__version__}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "platform": platform.platform(),
        "versions": versions,
        "git": _git(),
    }


def _git() -> dict[str, Any] | None:
    """The commit of the repository of the working directory; None without git, a repository, or a commit."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError):
        return None
    commit, _, dirty = done.stdout.strip().partition("-")
    return {"commit": commit, "dirty": bool(dirty)}


def _indented(value: Any) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _read_json(file: Path, kind: type[dict] | type[list]) -> Any:
    with _in_one_line("read", file):
        content = file.read_bytes()
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, kind):
        raise RunFolderError(f"{file} is damaged: it holds no JSON {kind.__name__}; mend it or give another --workdir.")
    return value


def _write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that at any moment either the old content or the new one is there, whole."""
    temporary = file.with_name(f"{file.name}.tmp")
    with _in_one_line("write", file):
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


@contextlib.contextmanager
def _in_one_line(action: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFolderError(f"cannot {action} {path}: {reason}; mend this or give another --workdir.") from error
