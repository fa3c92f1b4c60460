"""What a command of the command line is; the table of them is in `cimjax.cli`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
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
