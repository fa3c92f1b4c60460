"""Compiled programs kept on disk, so that the second start of a run begins at once."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax

from cimjax.user_folders import cache_folder

# JAX's own setting: the seconds of compilation from which on a program is kept.
KEPT_FROM = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def keep_compiled_programs(folder: str | os.PathLike[str] | None = None) -> None:
    """Turn on JAX's persistent compilation cache, unless the user has set one or turned it off.

    Args:
      folder: where to keep programs; `$XDG_CACHE_HOME/cimjax` or `~/.cache/cimjax` if not given. A folder that
        cannot be written, or no home (a container's user may have none), is no error: programs are then compiled anew.
    """
    if jax.config.values["jax_compilation_cache_dir"] or "JAX_ENABLE_COMPILATION_CACHE" in os.environ:
        return
    # No home: no RuntimeError of `Path.home`, and no folder that others could fill with programs of theirs.
    with contextlib.suppress(OSError, RuntimeError):
        chosen = Path(folder) if folder is not None else cache_folder()
        chosen.mkdir(parents=True, exist_ok=True)
        if os.access(chosen, os.W_OK | os.X_OK):
            jax.config.update("jax_compilation_cache_dir", str(chosen))
            if KEPT_FROM not in os.environ:
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
