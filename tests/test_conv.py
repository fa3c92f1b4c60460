"""The array convolution against the oracle, over the contract table."""

from __future__ import annotations

import pytest
from cases import CASES, Case
from compare import assert_equals_oracle


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_equal_the_oracle(case: Case) -> None:
    assert_equals_oracle(case)
