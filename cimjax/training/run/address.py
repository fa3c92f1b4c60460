"""Which runs are in a bucket. Imports nothing that takes time: every command asks."""

from __future__ import annotations

import os
import re


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a place in a bucket; `Path` makes one slash of two."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(path)) is not None
