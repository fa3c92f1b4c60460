"""What commands of the command line are made of; the rooms have tables of theirs, which `cimjax.cli` joins."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cimjax
from cimjax.training.run.address import is_remote

# How commands show that they take a config with its options.
A_CONFIG = "FILE[:OPTIONS]"


class UsageError(ValueError):
    """A command line that cannot be understood: one line that says what, and how to mend it."""


class Command(NamedTuple):
    """One command: what `--help` says, its arguments as `argparse` takes them, and what it does.

    takes_rest: whether what follows `--` is not looked at, and is its argument `rest`.
    """

    help: str
    example: str
    arguments: Mapping[str, dict[str, Any]]
    run: Callable[[argparse.Namespace], None]
    takes_rest: bool = False


def path(text: str) -> Path:
    """A path as it was typed, perhaps with a `~`: the `type` of an argument."""
    return Path(os.path.expanduser(text))


def run_folder(text: str) -> Path:
    """The folder of a run as it was typed, a copy of it where it is in a bucket: the `type` of an argument."""
    if not is_remote(text):
        return path(text)
    from cimjax.training.run.remote import local_copy

    try:
        return local_copy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).rstrip(".")) from error


# The argument of commands that look at runs.
RUN: dict[str, Any] = {"metavar": "RUN", "type": run_folder, "help": "the folder of a run, or gs://BUCKET/RUN"}


def checked_folder(workdir: str) -> Path:
    """The folder that `--workdir` names; refused at once is what can never become one."""
    if is_remote(workdir):
        raise UsageError(f"--workdir {workdir}: only single runs train in a bucket; give a folder on this machine.")
    if not workdir:
        raise UsageError("--workdir is empty; give a folder, or leave it out for a new one in runs/.")
    folder = path(workdir).absolute()
    with contextlib.suppress(PermissionError):  # said by whoever opens the folder
        there = next(above for above in (folder, *folder.parents) if above.exists())
        if not there.is_dir():
            raise UsageError(f"--workdir {workdir}: {there} is a file, not a folder; give another --workdir.")
    return path(workdir)


def is_for_the_user(error: ValueError) -> bool:
    """Whether a `raise` statement of cimjax or of the user's own files made it.

    Everywhere in cimjax that is how a user's mistake is refused. A ValueError from a library beneath is a bug of ours.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(frame.filename).is_relative_to(Path(cimjax.__file__).parent)
    theirs = not {"site-packages", "dist-packages"} & set(Path(frame.filename).parts)
    return (ours or theirs) and (frame.line or "").startswith("raise ")


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
