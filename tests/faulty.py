"""Runs tests on a copy of the package, in a process that has imported everything but the package.

Processes are forked from one that did no more than import (`multiprocessing`'s server): these imports are half of what
a quick test takes. Nothing of cimjax is imported here.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from pathlib import Path
from typing import NamedTuple

# What tests import, but for what they test.
_IMPORTED = (
    *("beartype", "chex", "flax.linen", "flax.traverse_util", "hypothesis", "jax", "jax.experimental.pallas"),
    *("jaxtyping", "ml_collections", "numpy", "optax", "orbax.checkpoint", "pytest", "rich"),
)
# Where tests ran on something else than the copy, or where it cannot be imported.
NOT_THE_COPY = 9


class Outcome(NamedTuple):
    """How pytest ended (`pytest.ExitCode`, or `NOT_THE_COPY`), and what it printed."""

    code: int | None
    printed: str


def run_tests(copy: Path, module: str, tests: list[str], *, seconds: float) -> Outcome:
    """Run tests of a copy of the package, and see that they ran on its `module`.

    Args:
      copy: with the folders `cimjax` and `tests`.
      seconds: after which it is ended; the code is then that of a signal.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    printed = copy / "printed"
    process = context.Process(target=_run, args=(str(copy), module, tests, str(printed)))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return Outcome(process.exitcode, printed.read_text() if printed.exists() else "")


def _run(copy: str, module: str, tests: list[str], printed: str) -> None:
    with open(printed, "w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(copy)
    # Of the run that this is a part of it takes the compiled programs, but it is no worker of it.
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    os.environ |= {"PYTHONPATH": copy}
    sys.path.insert(0, copy)
    sys.dont_write_bytecode = True
    import pytest

    options = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "--no-header", "--hypothesis-profile", "first_failure"]
    code = int(pytest.main([*options, *tests]))
    try:
        found = str(importlib.import_module(module).__file__)
    except Exception as error:
        found = repr(error)
    if not found.startswith(os.path.join(os.getcwd(), "cimjax", "")):
        print(f"{module} is not the copy's: {found}")
        code = NOT_THE_COPY
    sys.stdout.flush()
    os._exit(code)
