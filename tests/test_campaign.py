"""Random layers against the oracle: a few in the suite, as many as wanted by hand.

    CIMJAX_CAMPAIGN=1000 pytest tests/test_campaign.py --full -n 0

runs that many examples of either test, other ones every time.
"""

from __future__ import annotations

import os

import hypothesis
import hypothesis.strategies as st
import pytest
import strategies
from cases import Case
from compare import assert_equals_oracle

CAMPAIGN = int(os.environ.get("CIMJAX_CAMPAIGN", "0"))


def campaign(examples: int) -> hypothesis.settings:
    return hypothesis.settings(
        max_examples=CAMPAIGN or examples,
        derandomize=not CAMPAIGN,
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@campaign(4)
@hypothesis.given(strategies.cases(), st.integers(0, 1000))
def test_any_layer_equals_the_oracle(case: Case, seed: int) -> None:
    assert_equals_oracle(case, seed)


@pytest.mark.full
@campaign(30)
@hypothesis.given(strategies.cases(most_images=12, most_pixels=9), st.integers(0, 1000))
def test_any_larger_layer_equals_the_oracle(case: Case, seed: int) -> None:
    assert_equals_oracle(case, seed)
