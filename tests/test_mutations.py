"""The quick tier catches faults: one at a time is put into a copy of the package, and a few quick tests must fail.

The table is in `faults.py`; a new one is a row there. A copy without a fault passes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
# Runs tests on the package of the working directory; 9 where that is not what was tested, or cannot be imported.
RUN = """
import importlib, os, sys
import pytest
module, *arguments = sys.argv[1:]
status = pytest.main(["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *arguments])
try:
    found = importlib.import_module(module).__file__
except Exception as error:
    found = repr(error)
if not found.startswith(os.path.join(os.getcwd(), "cimjax", "")):
    print(f"{module} is not the copy's: {found}")
    sys.exit(9)
sys.exit(status)
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the tests need."""
    for name in ("cimjax", "tests", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "train.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def outcome_of(copy: Path, module: str, *tests: str) -> subprocess.CompletedProcess[str]:
    # Of this run's environment that one takes the compiled programs, but it is no worker of this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", RUN, module, *(f"tests/{test}" for test in tests)]
    # A fault must not keep its tests from ending.
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=900)


def test_every_fault_has_its_place() -> None:
    for fault in FAULTS:
        count = (ROOT / "cimjax" / fault.file).read_text().count(fault.old)
        assert count == 1, f"{fault.file} has {count} times: {fault.old}"


@pytest.mark.full
def test_without_a_fault_tests_pass_on_a_copy(copy: Path) -> None:
    """Of every file that the table names one test: that all of them pass where they stand is what the quick tier is."""
    of_file = {test.partition("::")[0]: test for fault in FAULTS for test in fault.tests}
    done = outcome_of(copy, "cimjax", *of_file.values())
    assert done.returncode == 0, done.stdout


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault: Fault, copy: Path) -> None:
    file = copy / "cimjax" / fault.file
    file.write_text(file.read_text().replace(fault.old, fault.new))
    module = ".".join(["cimjax", *Path(fault.file).with_suffix("").parts]).removesuffix(".__init__")
    done = outcome_of(copy, module, *fault.tests)
    assert done.returncode == 1, f"{fault.name} is not caught by {fault.tests}:\n{done.stdout}{done.stderr}"
