"""The lock of a run folder: one process trains there at a time, and the system frees it however that process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from cimjax.training.run.files import RunFolderError, in_one_line, warn

_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def take_lock(file: Path) -> int:
    """Lock a file for this process, write the process into it, and return its descriptor.

    Where the file system has no locks, a `RunFolderWarning` says so, and the run goes on.

    Raises:
      RunFolderError: where another process holds the lock, which is named, or the file cannot be written.
    """
    with in_one_line("lock", file):
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            _lock(lock, file)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        except BaseException:
            os.close(lock)
            raise
    return lock


def give_back(lock: int) -> None:
    """Free a lock; its file is empty again."""
    try:
        os.ftruncate(lock, 0)
    finally:
        os.close(lock)


def _lock(lock: int, file: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunFolderError(
            f"{file.parent} is in use by process PID {_owner(lock)}; wait for it or give another --workdir."
        ) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        owner = f" (the last one to start was PID {_owner(lock)})" if _owner(lock) else ""
        warn(f"{file.parent} is on a file system without locks: start no second process in this folder{owner}.")


def _owner(lock: int) -> str:
    return " ".join(os.pread(lock, 200, 0).decode(errors="replace").split())
