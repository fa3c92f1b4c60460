"""Where a study leaves its files, and its tables as text; jax is not imported here."""

from __future__ import annotations

import os
from collections.abc import Sequence
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


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown: the first row is its head; numbers are at the right of their columns.

    The last column is not padded: long names there do not make all lines long.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    lines = [
        [*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]] for row in rows if len(row)
    ]
    lines.insert(1, [*("-" * (width - 1) + ":" for width in widths), "---"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_text(file: Path, text: str) -> Path:
    """Write a text, whole or not at all."""
    write_atomically(file, f"{text}\n".encode())
    return file
