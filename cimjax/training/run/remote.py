"""Run folders in a bucket, `gs://BUCKET/RUN` or `s3://BUCKET/RUN`, through fsspec, which etils paths use as well.

A run trains in a folder on this machine, which begins with what the bucket holds and is copied there after every epoch
and at the end. Objects are not renamed: which saves are whole is told by one object that is written last. A bucket has
no locks either, so that a run writes into an object every half a minute that it is there.

Etils paths are not used themselves: they keep listings of a bucket, so that another run's sign of life may not be seen.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from cimjax.spec.base import shown
from cimjax.training.run.address import is_remote
from cimjax.training.run.files import RunFolderError, first_line, parsed, warn
from cimjax.training.run.folder import CHECKPOINTS, CONFIG, LOCK, SAVE_NAME
from cimjax.training.run.records import METRICS

# What a scheme needs besides etils and fsspec, which are there.
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}
# In the bucket's folder of checkpoints: the names of those that are whole.
WHOLE = "whole.json"
# Seconds between signs of life, and until a run that gives none is taken for dead.
_ALIVE_EVERY, _DEAD_AFTER = 30.0, 100.0
# How often something is tried, and seconds between.
_TRIES, _PAUSE = 3, 2.0


def local_copy(run: str | os.PathLike[str]) -> Path:
    """A run as a folder on this machine: itself (`~` is the home folder), or a copy of what a bucket holds, which
    is gone when the process ends.

    Raises:
      RunFolderError: in one line, where there is none.
    """
    if not is_remote(run):
        return Path(os.path.expanduser(run))
    bucket = _Bucket(run)
    kept = tempfile.TemporaryDirectory(prefix="cimjax-")
    _COPIES.append(kept)
    folder = Path(kept.name) / bucket.name
    if not bucket.pull(folder):
        raise RunFolderError(f"{bucket.url} is no run folder: it has no {CONFIG}; give the --workdir of a run.")
    return folder


# Copies that this process reads; removed at its end.
_COPIES: list[tempfile.TemporaryDirectory[str]] = []


class Mirror:
    """A folder on this machine in which a run of a bucket trains; a context manager that holds the run's lock.

    It stands for the folder wherever files are opened, and shows itself as the address in the bucket.

    folder: the folder, which is removed at the end unless the last copy failed.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        """Nothing is looked at yet.

        Raises:
          RunFolderError: in one line, where such a place cannot be reached from here.
        """
        self._bucket = _Bucket(url)
        self.url, self._kept = self._bucket.url, Path(tempfile.mkdtemp(prefix="cimjax-"))
        self.folder = self._kept / self._bucket.name

    def __fspath__(self) -> str:
        return str(self.folder)

    def __str__(self) -> str:
        return self.url

    def __enter__(self) -> Self:
        self._life = _SignOfLife(self._bucket)
        try:
            self._bucket.pull(self.folder)
        except BaseException:
            self._life.end()
            raise
        return self

    def after_epoch(self, *result: Any) -> None:
        """A callback of `train`; where the bucket cannot be reached the run goes on, and the next epoch tries again.

        Raises:
          RunFolderError: where another run has taken this one for dead.
        """
        del result
        try:
            other = self._life.other()
            if other is None:
                self._bucket.push(self.folder)
        except RunFolderError as error:
            warn(f"{error}; the run goes on, and this is tried again after the next epoch.")
        else:
            if other is not None:
                raise RunFolderError(f"{self.url} was taken up by {other}: this run was taken for dead, and ends here.")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if self.folder.exists() and self._life.other() is None:
                self._bucket.push(self.folder)
        except RunFolderError as failed:
            raise RunFolderError(f"{failed}; what is missing there is in {self.folder}.") from error
        finally:
            self._life.end()
        shutil.rmtree(self._kept, ignore_errors=True)
        if isinstance(error, RunFolderError):
            # The folder on this machine means nothing to whoever goes on.
            error.args = (str(error).replace(str(self.folder), self.url),)


class _Bucket:
    """The place of a run in a bucket."""

    def __init__(self, url: str | os.PathLike[str]) -> None:
        scheme, rest = re.split(r":/+", os.fspath(url), maxsplit=1)
        self.url = f"{scheme}://{rest.rstrip('/')}"
        self.name = rest.rstrip("/").rpartition("/")[2] or "run"
        if scheme not in _PACKAGES:
            buckets = ", ".join(f"{name}://" for name in _PACKAGES)
            raise RunFolderError(
                f"a run folder is on this machine or in a bucket ({buckets}), not at {shown(self.url)}; give another "
                "--workdir."
            )
        import fsspec

        logging.getLogger(_PACKAGES[scheme]).setLevel(logging.CRITICAL + 1)  # what matters is raised
        try:
            self._system, self._root = fsspec.core.url_to_fs(self.url, use_listings_cache=False)
        except ImportError as error:
            package = _PACKAGES[scheme]
            raise RunFolderError(f"{scheme}:// needs a package; install it with: pip install {package}") from error
        except Exception as error:  # each kind of bucket has errors of its own
            raise RunFolderError(f"cannot reach {self.url}: {first_line(error)}") from error
        # What is there: checksums of files by their paths, and the names of saves.
        self._files: dict[str, str] = {}
        self._saves: set[str] = set()

    def pull(self, folder: Path) -> bool:
        """Copy what there is into a new folder; whether there is a run."""
        return self._tried("read", lambda: self._pull(folder))

    def push(self, folder: Path) -> None:
        """Copy what is new, and remove the saves that the run has removed."""
        self._tried("write", lambda: self._push(folder))

    def read(self, name: str) -> Any:
        """The value of a JSON object; None where there is none."""
        return self._tried("read", lambda: self._read(name))

    def write(self, name: str, value: Any) -> None:
        """Write a JSON object."""
        self._tried("write", lambda: self._put(name, json.dumps(value).encode()))

    def remove(self, name: str) -> None:
        """Remove an object."""
        self._tried("write", lambda: self._system.rm_file(f"{self._root}/{name}"))

    def _read(self, name: str) -> Any:
        try:
            return parsed(self._system.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None

    def _put(self, name: str, content: bytes) -> None:
        self._system.pipe_file(f"{self._root}/{name}", content)

    def _pull(self, folder: Path) -> bool:
        if self._read(CONFIG) is None:
            return False
        folder.mkdir(parents=True, exist_ok=True)
        whole = self._read(f"{CHECKPOINTS}/{WHOLE}")
        for place in self._system.find(self._root):
            name = place[len(self._root) :].lstrip("/")
            room, _, rest = name.partition("/")
            save = rest.partition("/")[0]
            if name == LOCK or (
                room == CHECKPOINTS and not (SAVE_NAME.fullmatch(save) and save in ([save] if whole is None else whole))
            ):
                continue
            if name == METRICS and whole == []:
                continue  # of a run that was ended before its first save was copied
            content = self._system.cat_file(place)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
            if room == CHECKPOINTS:
                self._saves.add(save)
            else:
                self._files[name] = hashlib.sha256(content).hexdigest()
        return True

    def _push(self, folder: Path) -> None:
        checkpoints = folder / CHECKPOINTS
        names = os.listdir(checkpoints) if checkpoints.is_dir() else []
        whole = {name for name in names if SAVE_NAME.fullmatch(name)}
        if not self._saves:
            self._put(f"{CHECKPOINTS}/{WHOLE}", b"[]")  # none of what follows counts yet
        for save in sorted(whole - self._saves):
            for name, content in _files(checkpoints / save):
                self._put(f"{CHECKPOINTS}/{save}/{name}", content)
        for name, content in _files(folder):
            digest = hashlib.sha256(content).hexdigest()
            if self._files.get(name) != digest:
                self._put(name, content)
                self._files[name] = digest
        whole = {save for save in whole if (checkpoints / save).is_dir()}
        if whole != self._saves:
            # From here on the new saves count, and the others no more.
            self._put(f"{CHECKPOINTS}/{WHOLE}", json.dumps(sorted(whole)).encode())
            gone, self._saves = self._saves - whole, whole
            for save in gone:
                self._system.rm(f"{self._root}/{CHECKPOINTS}/{save}", recursive=True)

    def _tried(self, action: str, what: Callable[[], Any]) -> Any:
        for left in reversed(range(_TRIES)):
            try:
                return what()
            except RunFolderError:
                raise
            except Exception as error:
                if not left:
                    raise RunFolderError(f"cannot {action} {self.url}: {first_line(error)}") from error
                time.sleep(_PAUSE)


class _SignOfLife:
    """The lock of a run in a bucket: an object that says who trains there, written again and again."""

    def __init__(self, bucket: _Bucket) -> None:
        self._bucket, self._id = bucket, uuid.uuid4().hex
        there = bucket.read(LOCK)
        age = time.time() - there["time"] if isinstance(there, dict) else _DEAD_AFTER
        if age < _DEAD_AFTER:
            wait = f"wait for it (if it was killed, {_DEAD_AFTER - age:.0f} s)"
            raise RunFolderError(f"{bucket.url} is in use by {there['owner']}; {wait} or give another --workdir.")
        self._write()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    def other(self) -> str | None:
        """Who has taken this run for dead, and trains there now or has ended since."""
        there = self._bucket.read(LOCK)
        if not isinstance(there, dict):
            return "another process, which has ended"
        return None if there.get("id") == self._id else str(there.get("owner"))

    def end(self) -> None:
        """Let others train there."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(RunFolderError):
            there = self._bucket.read(LOCK)
            if isinstance(there, dict) and there.get("id") == self._id:
                self._bucket.remove(LOCK)

    def _live(self) -> None:
        while not self._ended.wait(_ALIVE_EVERY):
            with contextlib.suppress(RunFolderError):  # said when the run is copied
                if self.other() is None:
                    self._write()

    def _write(self) -> None:
        owner = f"process PID {os.getpid()} on {socket.gethostname()}"
        self._bucket.write(LOCK, {"owner": owner, "id": self._id, "time": time.time()})


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every file below a folder by its path from there, without hidden ones, and without checkpoints."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not path.name.startswith(".") and name.parts[0] != CHECKPOINTS:
            with contextlib.suppress(FileNotFoundError):  # replaced meanwhile
                yield name.as_posix(), path.read_bytes()
