"""The ADC and what is said of its use, on partial sums written out by hand."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from cases import spec

from cimjax.core import adc
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import tile
from cimjax.spec import CIMSpec


def layer(**options: Any) -> CIMSpec:
    """Two columns: one plane, one read group and two outputs."""
    return spec(weight={"bits": 3, "cell_bits": 8, "encoding": "offset"}, adc=options)


def columns(values: Any, step: float, offset: float | None = None) -> tuple[Any, StepSizes]:
    """Partial sums (1, M, 1, 1, 2), and steps of all columns."""
    psums = jnp.asarray(values, jnp.float32).reshape(1, -1, 1, 1, 2)
    ladder = (None if value is None else jnp.full((1, 1, 2), value) for value in (step, offset))
    return psums, StepSizes(**dict(zip(("psum", "offset"), ladder, strict=True)))


@pytest.mark.parametrize(
    "options,step,offset,values,read",
    [
        # Ties go up, and what lies beyond the ladder to its ends.
        ({"bits": 3}, 2.0, None, [-3, 0, 1, 2, 3, 12, 13, 30], [0, 0, 2, 2, 4, 12, 14, 14]),
        ({"bits": 2, "offset": True}, 4.0, 5.0, [2, 3, 4, 7, 8, 16, 18, 40], [5, 5, 5, 9, 9, 17, 17, 17]),
        ({"bits": 1.5}, 2.0, None, [-9, 0, 1, 2, 3, 4, 5, 6], [0, 0, 2, 2, 4, 4, 4, 4]),
        # A sign: one step above or below the middle.
        ({"bits": 1, "range": "signed", "offset": True}, 3.0, 5.0, [0, 4, 5, 6, 9, 4, 5, -1], [2, 2, 8, 8, 8, 2, 8, 2]),
    ],
)
def test_partial_sums_are_read_as_by_hand(
    options: dict[str, Any], step: float, offset: float | None, values: list[int], read: list[int]
) -> None:
    layer_spec = layer(**options)
    psums, steps = columns(values, step, offset)
    got = adc.convert(psums, steps, tile((4, 2), layer_spec), layer_spec)
    np.testing.assert_array_equal(got.ravel(), read)


def test_what_lies_beyond_a_ladder_and_the_codes_that_columns_use_are_counted() -> None:
    layer_spec = layer(bits=3)
    tiling = tile((4, 2), layer_spec)
    # The ladder reads 0 to 14 in steps of 2, and half a step more is rounded to its ends.
    first, second = [-2, -1, 0, 14, 15, 16, 20], [4, 4, 5, 4, 4, 4, 4]
    psums, steps = columns(np.stack([first, second], axis=-1), 2.0)
    found = adc.adc_statistics(psums, steps, tiling, layer_spec)
    assert float(found.saturated) == pytest.approx(3 / 14)
    # 0 and 7 in one column, 2 and 3 in the other.
    assert float(found.codes_used) == 2
    psums, steps = columns([0, 0, 14, 0, 4, 0], 2.0)
    assert float(adc.adc_statistics(psums, steps, tiling, layer_spec).codes_used) == (3 + 1) / 2
    # Of two levels, one step from the middle, each reaches one step further.
    binary = layer(bits=1, range="signed", offset=True)
    psums, steps = columns([0, 1, 5, 8, 11, 12, 14, 5], 3.0, 5.0)
    assert float(adc.adc_statistics(psums, steps, tiling, binary).saturated) == pytest.approx(2 / 8)
