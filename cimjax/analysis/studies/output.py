"""Where a study leaves its files, and its tables as text; jax is not imported here."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from cimjax.spec.base import shown
from cimjax.training.run.files import write_atomically


def check_folder(folder: str | Path) -> Path:
    """Refuse a folder that cannot be created or written, before the work is done whose results it is to hold.

    Raises:
      ValueError: in one line.
    """
    path = Path(folder)
    try:
        there = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    except OSError as error:
        raise ValueError(f"no folder can be at {shown(str(path))}: {error.strerror}; give another by --save.") from None
    if not there.is_dir():
        raise ValueError(f"{there} is a file, not a folder; give another folder by --save.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{there} cannot be written; give another folder by --save.")
    return path


def create_folder(folder: str | Path) -> Path:
    """The folder, with those that it is in; errors as of `check_folder`."""
    path = check_folder(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot create the folder {path}: {error.strerror}; give another by --save.") from None
    return path


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown; columns of numbers are aligned to the right.

    A last column of words is not padded: long names there do not make all lines long.
    """
    cells = [list(head), *map(list, rows)]
    columns = list(zip(*cells, strict=True))
    right = [all(_is_number(text) for text in column[1:]) for column in columns]
    widths = [max(map(len, column)) for column in columns]
    if not right[-1]:
        widths[-1] = 0
    lines = [[t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)] for row in cells]
    rule = [
        "-" * (max(3, width) - 1) + (":" if is_right else "-") for width, is_right in zip(widths, right, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _is_number(text: str) -> bool:
    return (
        text == "-"
        or text.replace(" of ", "").replace(",", "").replace(".", "").replace("-", "").removesuffix("%").isdecimal()
    )


def write_text(file: Path, text: str) -> Path:
    """Write a text, whole or not at all."""
    write_atomically(file, f"{text}\n".encode())
    return file
