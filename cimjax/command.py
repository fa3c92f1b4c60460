"""What commands of the command line are made of; the rooms have tables of theirs, which `cimjax.cli` joins."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

# How commands show that they take a config with its options.
A_CONFIG = "FILE[:OPTIONS]"


class UsageError(ValueError):
    """A command line that cannot be understood: one line that says what, and how to mend it."""


class Command(NamedTuple):
    """One command: what `--help` says, its arguments as `argparse` takes them, and what it does."""

    help: str
    example: str
    arguments: Mapping[str, dict[str, Any]]
    run: Callable[[argparse.Namespace], None]


def path(text: str) -> Path:
    """A path as it was typed, perhaps with a `~`: the `type` of an argument."""
    return Path(os.path.expanduser(text))


def run_folder(text: str) -> Path:
    """The folder of a run as it was typed, a copy of it where it is in a bucket: the `type` of an argument."""
    from cimjax.training.run.remote import is_remote, local_copy

    if not is_remote(text):
        return path(text)
    try:
        return local_copy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


# The argument of commands that look at runs.
RUN: dict[str, Any] = {"metavar": "RUN", "type": run_folder, "help": "the folder of a run, or gs://BUCKET/RUN"}


def checked_folder(workdir: str) -> Path:
    """The folder that `--workdir` names; refused at once is what can never become one."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", workdir):
        raise UsageError(f"--workdir {workdir}: only single runs train in a bucket; give a folder on this machine.")
    if not workdir:
        raise UsageError("--workdir is empty; give a folder, or leave it out for a new one in runs/.")
    folder = path(workdir).absolute()
    with contextlib.suppress(PermissionError):  # said by whoever opens the folder
        there = next(above for above in (folder, *folder.parents) if above.exists())
        if not there.is_dir():
            raise UsageError(f"--workdir {workdir}: {there} is a file, not a folder; give another --workdir.")
    return path(workdir)


@contextlib.contextmanager
def ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process as it ends others: within an import libraries make other errors of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
