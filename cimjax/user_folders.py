"""Folders that cimjax has with its user. Compiled programs and tables of tuning lie there; no jax is imported here."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The folder of cimjax among the user's caches; a relative `$XDG_CACHE_HOME` is none, as its specification says.

    Raises:
      RuntimeError: for a user without a home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "cimjax"


def user_tables() -> Path | None:
    """Where `cimjax tune` leaves tables; None where the user has no folder of caches."""
    try:
        return cache_folder() / "tuning"
    except RuntimeError:
        return None
