"""ADCs as tables of integers: from which partial sum on which code is given.

An ADC's codes rise with the partial sum, which is an integer, so that thresholds say all; they are found by asking the
ADC itself (`cimjax.core.adc`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from cimjax.core import adc
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import Tiling
from cimjax.spec import CIMSpec


@dataclasses.dataclass(frozen=True, eq=False)
class ADCTable:
    """When ADCs give which codes: `code = lowest + spacing * (how many thresholds the sum reaches)`.

    thresholds: (T, R, K, O, L) int32, rising; the least sum that is read as the next code. One that no sum reaches is
      larger than any. Of dummy columns K and O are 1.
    lowest, spacing: (T, K) int32; the spacing is 2 of `{-1, +1}`, else 1.
    codes: (T, K) int32, how many codes there are, of at most L + 1.
    """

    thresholds: np.ndarray
    lowest: np.ndarray
    spacing: np.ndarray
    codes: np.ndarray

    @property
    def largest(self) -> np.ndarray:
        """(T, K), the largest magnitude of a code."""
        return np.maximum(np.abs(self.lowest), np.abs(self.lowest + self.spacing * (self.codes - 1)))


def table_of_columns(steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> ADCTable:
    """Of the ADCs of all columns; `spec` has an `adc`."""

    def codes(psums: np.ndarray) -> np.ndarray:
        shape = (psums.shape[0], psums.shape[1], tiling.groups, len(spec.weight.planes), tiling.features)
        return np.asarray(adc.adc_codes(jnp.asarray(np.broadcast_to(psums, shape), jnp.float32), steps, tiling, spec))

    shape = (tiling.groups, len(spec.weight.planes), tiling.features)
    return _table(codes, spec.adc_ranges, shape, tiling.largest_psum(spec))


def table_of_dummies(steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> ADCTable:
    """Of the ADCs behind dummy columns; `spec` has `reference="adc"`."""

    def codes(sums: np.ndarray) -> np.ndarray:
        of_groups = jnp.asarray(np.broadcast_to(sums[..., 0, 0], (*sums.shape[:2], tiling.groups)), jnp.float32)
        return np.asarray(adc.reference_codes(of_groups, steps, spec))[..., None, None]

    largest = int(tiling.rows_of_group.max()) * max(part.magnitude for part in spec.activation.slices)
    return _table(codes, [[each] for each in spec.reference_ranges], (tiling.groups, 1, 1), largest)


def _table(codes: Any, ranges: Any, shape: tuple[int, int, int], largest: int) -> ADCTable:
    """The thresholds at which a rising function of integers -largest .. largest changes, found by bisection.

    Args:
      codes: of sums (T, L, R, K, O), at least broadcastable to it.
      ranges: the ADCs' codes, T rows of K.
      shape: (R, K, O).
    """
    lowest, spacing, count = (
        np.array([[entry(each) for each in row] for row in ranges], np.int32)
        for entry in (lambda c: c.q_min, lambda c: 2 if c.binary else 1, lambda c: c.size)
    )
    steps = np.arange(1, count.max())[:, None]
    wanted = (lowest[:, None] + spacing[:, None] * steps)[:, :, None, :, None]  # (T, L, 1, K, 1)
    low = np.full((*wanted.shape[:2], *shape), -largest, np.int64)
    high = np.full_like(low, largest + 1)
    while (open_ := low < high).any():
        middle = (low + high) // 2
        reached = codes(middle) >= wanted
        high = np.where(open_ & reached, middle, high)
        low = np.where(open_ & ~reached, middle + 1, low)
    return ADCTable(np.moveaxis(high, 1, -1).astype(np.int32), lowest, spacing, count)
