"""Settings of the whole suite: its two tiers, checked shapes, no time limits for properties, compiled programs kept.

`pytest` runs the quick tier: of the contract table, which holds programs against the oracle, so much that every two
kinds of options meet; every granularity pair on the smallest network; short runs. `pytest --rest` runs what is marked
`full`: the rest of the table, larger networks, runs that are killed and resumed, and `test_mutations`, which puts every
fault of `faults.py` into a copy and runs the few quick tests that must notice it. `pytest --full` is both. `.ci/run`
runs one after the other.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import hypothesis
import jaxtyping
import pytest

# The shapes and types in the signatures of the mathematics are checked in every call: from its import on.
MATHEMATICS = (
    *("adc", "array_mac", "cells", "conv", "convolution", "encoding"),
    *("readout", "tiling", "variation"),
)
jaxtyping.install_import_hook([f"cimjax.core.{name}" for name in MATHEMATICS], "beartype.beartype")

from cimjax.compilation_cache import KEPT_FROM, keep_compiled_programs  # noqa: E402
from cimjax.core.programs import cpu  # noqa: E402

# Set within a run of the suite, for runs of it that its tests start.
_WITHIN = "CIMJAX_WITHIN_SUITE"
# A folder for compiled programs, which whoever names it removes.
_PROGRAMS = "CIMJAX_SUITE_PROGRAMS"

hypothesis.settings.register_profile("suite", deadline=None)
# Where it is enough that a property fails: without the search for the smallest example, which takes minutes.
found = [phase for phase in hypothesis.Phase if phase not in (hypothesis.Phase.shrink, hypothesis.Phase.explain)]
hypothesis.settings.register_profile("first_failure", deadline=None, phases=found)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run everything, also what takes long")
    parser.addoption("--kills", type=int, help="how often runs are ended at random moments; a few times by itself")
    parser.addoption("--rest", action="store_true", help="run only what takes long, which is left out by default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    takes_long = config.getoption("--rest")
    left_out = [item for item in items if bool(item.get_closest_marker("full")) != takes_long]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if bool(item.get_closest_marker("full")) == takes_long]


def pytest_configure(config: pytest.Config) -> None:
    """Programs are compiled once for all workers and all processes that tests start, and quickly.

    In a folder of this run: no test sees programs of another version, and none are left with the user. Two runs of one
    check share the folder that it names.
    """
    if not hasattr(config, "workerinput") and _WITHIN not in os.environ:
        os.environ[_WITHIN] = "1"
        os.environ.setdefault("XLA_FLAGS", compiles_quickly())
        # The small ones are kept too: a suite has thousands of them, most of them many times.
        os.environ.setdefault(KEPT_FROM, "0")
        if _PROGRAMS not in os.environ:
            os.environ[_PROGRAMS] = folder = tempfile.mkdtemp(prefix="cimjax-tests-")
            config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        # Workers and their processes inherit it, runs of faulty copies too: a program is found by what it computes.
        os.environ["XDG_CACHE_HOME"] = os.environ[_PROGRAMS]
    keep_compiled_programs()
    # Tracing leaves many objects, and Python would look through all of them again and again.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    # Not in `pyproject.toml`: it would import the mathematics before its types are checked.
    config.addinivalue_line("filterwarnings", "error::cimjax.CalibrationWarning")


def compiles_quickly() -> str:
    """Flags by which XLA compiles the suite's programs about five times as fast: it is most of what a test takes.

    Without LLVM's optimizations and by XLA's older way to fused loops; `test_programs` holds layers as users compile
    them against the oracle as well. Without what the installed jaxlib does not know: it would end the process, some
    versions when they are imported and some when a device is asked for.
    """
    # jaxlib 0.11 and newer lack the second.
    flags = ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
    for count in (2, 1):
        environment = os.environ | {"XLA_FLAGS": " ".join(flags[:count]), "JAX_PLATFORMS": "cpu"}
        asks = [sys.executable, "-c", "import jax; jax.devices()"]
        if subprocess.run(asks, env=environment, capture_output=True).returncode == 0:
            return environment["XLA_FLAGS"]
    return ""


@pytest.fixture(scope="session", autouse=True)
def _programs_of_cimjax_compile_quickly_too() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cpu._OPTIONS, "xla_backend_optimization_level", "0")
        yield
