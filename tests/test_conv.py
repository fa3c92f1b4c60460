"""The array convolution against the oracle, over the contract table, by every lowering."""

from __future__ import annotations

import dataclasses

import pytest
from cases import CASES, Case
from compare import assert_equals_oracle

from cimjax.core.lowering import LOWERINGS, choose
from cimjax.spec import Lowering

# What `auto` chooses here goes through the whole table; other lowerings, which differ in the array product only,
# through every sixth row and all windows.
CHOSEN = next(name for name, program in LOWERINGS.items() if program is choose(Lowering.AUTO))
OTHERS = [name for name in LOWERINGS if name != CHOSEN]
PART = [case for index, case in enumerate(CASES) if index % 6 == 0 or case.name.startswith("window")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_equal_the_oracle(case: Case) -> None:
    assert_equals_oracle(case)


@pytest.mark.parametrize("lowering", OTHERS, ids=str)
@pytest.mark.parametrize("case", PART, ids=lambda case: case.name)
def test_every_lowering_equals_the_oracle(case: Case, lowering: Lowering) -> None:
    assert_equals_oracle(dataclasses.replace(case, spec=dataclasses.replace(case.spec, lowering=lowering)))


def test_a_lowering_can_be_forced() -> None:
    assert {choose(name) for name in LOWERINGS} == set(LOWERINGS.values())
