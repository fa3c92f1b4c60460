"""Settings of the whole suite: its two tiers, no time limits for properties, and compiled programs kept while it runs.

`pytest` runs the quick tier, `pytest --full` everything.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import hypothesis
import pytest

from cimjax.training.cache import keep_compiled_programs

hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run what takes long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
    items[:] = [item for item in items if not item.get_closest_marker("full")]


def pytest_configure(config: pytest.Config) -> None:
    """What takes long to compile is compiled once for all workers and all processes that tests start.

    In a folder of this run: no test sees programs of another version, and none are left with the user. And by LLVM's
    first level, as the programs of cimjax are; `test_conv` holds it against the default level.
    """
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="cimjax-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        # Workers and their processes inherit it.
        os.environ["XDG_CACHE_HOME"] = folder
    keep_compiled_programs()
