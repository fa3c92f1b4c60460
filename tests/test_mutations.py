"""The quick tier catches faults: one at a time is put into a copy of the package, and a few quick tests must fail.

The table is in `faults.py`; a new one is a row there. A copy without a fault passes.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults import FAULTS, Fault
from faulty import Outcome, run_tests

ROOT = Path(__file__).parents[1]
# Of files whose other tests take long, one that takes none.
QUICK = (
    "test_convert.py::test_a_converted_network_stays_so_inside_another",
    "test_start.py::test_steps_are_taken_where_what_they_quantize_is_built_alike",
    "test_tiling.py::test_packed_fills_arrays_and_balanced_spreads_channels",
)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of what the tests need."""
    for name in ("cimjax", "tests", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "train.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def outcome_of(copy: Path, module: str, *tests: str) -> Outcome:
    # A fault must not keep its tests from ending.
    return run_tests(copy, module, [f"tests/{test}" for test in tests], seconds=900)


def test_every_fault_has_its_place() -> None:
    for fault in FAULTS:
        count = (ROOT / "cimjax" / fault.file).read_text().count(fault.old)
        assert count == 1, f"{fault.file} has {count} times: {fault.old}"


@pytest.mark.full
def test_without_a_fault_tests_pass_on_a_copy(copy: Path) -> None:
    """Of every file that the table names one test: that all of them pass where they stand is what the quick tier is."""
    named = [test for fault in FAULTS for test in fault.tests]
    of_file = {test.partition("::")[0]: test for test in (*named, *QUICK)}
    done = outcome_of(copy, "cimjax", *of_file.values())
    assert done.code == 0, done.printed


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught(fault: Fault, copy: Path) -> None:
    file = copy / "cimjax" / fault.file
    file.write_text(file.read_text().replace(fault.old, fault.new))
    module = ".".join(["cimjax", *Path(fault.file).with_suffix("").parts]).removesuffix(".__init__")
    done = outcome_of(copy, module, *fault.tests)
    assert done.code == 1, f"{fault.name} is not caught by {fault.tests}:\n{done.printed}"
