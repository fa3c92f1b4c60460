"""How the files of a run are read and written: whole or not at all, and with one line about what is wrong.

Which files there are and what is in them is told elsewhere. Nothing here removes a file that it did not write.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cimjax.spec.base import Notice


class RunFolderError(ValueError):
    """What keeps a run folder from being used: one line that says what and how to go on."""


class RunFolderWarning(Notice):
    """What a run goes on in spite of: one line that says what was found, and what is done about it."""


def warn(message: str) -> None:
    """Give a `RunFolderWarning`."""
    warnings.warn(message, RunFolderWarning, stacklevel=3)


def show_in_one_line() -> None:
    """Print each `Notice` as one line from here on, without Python's own about its place: for a command."""
    usual = warnings.formatwarning

    def formatted(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        ours = issubclass(category, Notice)
        return f"cimjax: {message}\n" if ours else usual(message, category, *where, **line)

    warnings.formatwarning = formatted


def read_json(file: Path, kind: type[dict] | type[list]) -> Any:
    """The object or the list that a file holds.

    Raises:
      RunFolderError: where the file cannot be read or holds anything else.
    """
    with in_one_line("read", file):
        content = file.read_bytes()
    value = parsed(content)
    if not isinstance(value, kind):
        raise RunFolderError(f"{file} is damaged: it holds no JSON {kind.__name__}; mend it or give another --workdir.")
    return value


def parsed(content: bytes) -> Any:
    """The value of a JSON text; None where it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def write_json(file: Path, value: Any) -> None:
    """Write a value so that people can read it."""
    write_atomically(file, json.dumps(value, indent=2).encode() + b"\n")


def write_atomically(file: Path, content: bytes) -> None:
    """Write a file so that at any moment either the old content or the new one is there, whole.

    Raises:
      RunFolderError: where it cannot be written; the old content stays.
    """
    unfinished = file.with_name(f".{file.name}.unfinished")
    with in_one_line("write", file):
        try:
            with unfinished.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            unfinished.replace(file)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink()
            raise


def put_aside(file: Path) -> Path:
    """Give a damaged file another name beside its own, which is then free, and return it."""
    number, aside = 1, file.with_name(f"{file.name}.damaged")
    while os.path.lexists(aside):
        number += 1
        aside = file.with_name(f"{file.name}.damaged-{number}")
    with in_one_line("rename", file):
        file.rename(aside)
    return aside


def first_line(error: Exception) -> str:
    """What an error says first; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextlib.contextmanager
def in_one_line(action: str, path: Path) -> Iterator[None]:
    """Turn what the system refuses into a `RunFolderError`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFolderError(f"cannot {action} {path}: {reason}; mend this or give another --workdir.") from error
