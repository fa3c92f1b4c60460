"""What a result may depend on besides the options: the versions, command and commit of every start of a run."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import cimjax
from cimjax.training.run.files import RunFolderError, put_aside, read_json, warn, write_json

VERSIONS = "versions.json"

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def add_start(folder: Path) -> None:
    """Add this start to the list in `versions.json`; a damaged list is put aside, and a new one begun.

    Warns where another version of cimjax made the start before: what a seed means may have changed between them.
    """
    file, starts = folder / VERSIONS, []
    if file.exists():
        try:
            starts = read_json(file, list)
        except RunFolderError as error:
            warn(f"{error.args[0].partition(';')[0]}; it is kept as {put_aside(file)}, and the run goes on.")
    if starts and (before := _cimjax_of(starts[-1])) not in (None, cimjax.__version__):
        warn(
            f"{folder} was trained by cimjax {before}, and goes on by {cimjax.__version__}: its random numbers may be "
            "others than those of a run that was not stopped."
        )
    write_json(file, [*starts, _start()])


def _cimjax_of(start: Any) -> Any:
    versions = start.get("versions") if isinstance(start, dict) else None
    return versions.get("cimjax") if isinstance(versions, dict) else None


def _start() -> dict[str, Any]:
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
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    commit, _, dirty = done.stdout.strip().partition("-")
    return {"commit": commit, "dirty": bool(dirty)}
