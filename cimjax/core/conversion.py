"""What ADCs make of partial sums, weighted and added up, and the gradients of that: functions of arrays in memory.

Partial sums are by far the largest arrays of a layer, so that all this is written for few and cheap passes over them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cimjax.core import lsq
from cimjax.core.schedule import apart
from cimjax.core.tiling import Tiling
from cimjax.spec import CIMSpec
from cimjax.spec.codes import CodeRange

# The largest magnitude of a partial sum that 16 bits keep.
_SMALL_INTEGERS = 2**15 - 1
# Sums of at most so many columns are written out.
_UNROLLED = 8
# Parts of a batch that are added up before sums over positions; fewer where each takes many operations.
_PARTS = 8
_LONG_PARTS = 4


class Conversion(NamedTuple):
    """What is fixed about the ADCs of one slice.

    ranges: the codes of each plane.
    features: `O`.
    margin: `ADCSpec.gradient_margin`.
    """

    ranges: tuple[CodeRange, ...]
    features: int
    margin: float

    @classmethod
    def of(cls, index: int, tiling: Tiling, spec: CIMSpec) -> Conversion:
        """That of slice `index` by the ADCs of a specification."""
        return cls(spec.adc_ranges[index], tiling.features, spec.adc.gradient_margin if spec.adc else 0.0)

    def bounds(self, columns: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Lowest and highest code of `columns = r K O` columns and whether the code is a sign, () or (r K O,)."""
        groups = columns // (self.features * len(self.ranges))
        q_min, q_max, sign = (
            np.tile(np.repeat(np.asarray(bound), self.features), groups)
            if len(set(bound)) > 1
            else np.asarray(bound[0])
            for bound in zip(*((float(c.q_min), float(c.q_max), c.binary) for c in self.ranges), strict=True)
        )
        return q_min.astype(np.float32), q_max.astype(np.float32), sign if sign.any() else None


class Scales(NamedTuple):
    """What every column's ADC and its result are scaled by, float32 of one shape: (R, K O) or, of a part, (r K O,).

    step: in psum units, > 0; None behind an ideal ADC.
    offset: the partial sum of code 0; None where there is none.
    weight: what a partial sum counts, `g_t f_k s_w`.
    """

    step: Any
    offset: Any
    weight: Any

    def split(self, parts: int) -> list[Scales]:
        """Those of each of so many successive parts with as many read groups each."""
        # Not slices: their gradients would each be padded to all groups and added up.
        each = [[None] * parts if values is None else jnp.split(values, parts) for values in self]
        return [Scales(*of) for of in zip(*each, strict=True)]


def converted(conversion: Conversion, psums: Array, of: Scales) -> Array:
    """`sum over groups and planes of weight * P^`, where `P^ = s p + z`, `p = clip(floor((P - z) / s + 0.5), ...)`.

    Args:
      psums: (..., r K O) float32.

    Returns:
      (..., O) float32.
    """
    # `s w p + z w`, of which the second part is the same at all positions.
    total = over_columns(_codes(conversion, psums, of) * (of.step * of.weight), conversion.features)
    return total if of.offset is None else total + over_columns(of.offset * of.weight, conversion.features)


def as_small_integers(psums: Array) -> Array:
    """Partial sums that are integers as 16 bits each."""
    if jax.default_backend() != "cpu":
        return psums.astype(jnp.int16)
    # With 2^23 + 2^22 added, the last bits of a float32 number are the integer: much quicker than a conversion, which
    # looks for numbers out of range.
    return lax.bitcast_convert_type(psums + np.float32(3 * 2**22), jnp.int32).astype(jnp.int16)


def fit_small_integers(tiling: Tiling, spec: CIMSpec) -> bool:
    """Whether 16 bits hold every partial sum of a layer exactly."""
    return spec.variation is None and tiling.largest_psum(spec) <= _SMALL_INTEGERS


def gradients(conversion: Conversion, kept: Array, of: Scales, gradient: Array, known: Array) -> tuple[Array, Scales]:
    """LSQ's gradients of `converted` to partial sums and scales (Esser et al. 2020, eq. 3, with an offset).

    With `g` of the result at each column: to a partial sum `w g` inside the ladder; to a step `w g (p - u)` inside and
    `w g p` outside; to an offset `w g` outside; to a weight `g P^`; the last three summed over positions. A sign has no
    `u` in the gradient to its step.

    Args:
      kept: partial sums (..., r K O), as float32 or small integers.
      gradient: (..., O) float32.
      known: for `schedule.apart`.

    Returns:
      The gradient to partial sums, (..., r K O) float32, and those to scales, (r K O,).
    """
    bounds, count = conversion.bounds(kept.shape[-1]), kept.shape[-1] // conversion.features
    of_columns = jnp.concatenate([gradient] * count, axis=-1)

    def passed(of_columns: Array, kept: Array, of: Scales) -> Array:
        u = lsq.in_steps(kept.astype(jnp.float32), of.step, of.offset)
        return jnp.where(lsq.passes_gradient(u, bounds, conversion.margin), of_columns * of.weight, 0.0)

    to_psums = apart(passed, of_columns, kept, of, known=known, like=of_columns)
    psums = kept.astype(jnp.float32)
    from_offset = psums if of.offset is None else psums - of.offset
    # Outside what has passed is 0, so that no huge `u` there needs to be selected away.
    rest = to_psums * lsq.in_steps(psums, of.step, of.offset)
    of_u = _over_positions(to_psums * from_offset) / of.step
    if bounds[2] is not None:
        rest, of_u = jnp.where(bounds[2], 0.0, rest), jnp.where(bounds[2], 0.0, of_u)
    # Small terms are added up: the difference of the sums of codes and of `u` would lose what matters.
    to_step = _over_positions(of_columns * (of.weight * _codes(conversion, psums, of)) - rest, _LONG_PARTS)
    of_codes = (to_step + of_u) / of.weight
    if of.offset is None:
        return to_psums, Scales(to_step, None, of.step * of_codes)
    to_offset = of.weight * _over_positions(jnp.where(to_psums == 0, of_columns, 0.0))
    of_all = jnp.concatenate([_over_positions(gradient)] * count)
    return to_psums, Scales(to_step, to_offset, of.step * of_codes + of.offset * of_all)


def _codes(conversion: Conversion, psums: Array, of: Scales) -> Array:
    u = lsq.in_steps(psums, of.step, of.offset)
    return lsq.round_to_codes(u, psums, of.offset, conversion.bounds(psums.shape[-1]), half_up=True)


def _over_positions(values: Array, parts: int = _PARTS) -> Array:
    """Sum over all axes but the last."""
    if jax.default_backend() != "cpu" or not values.size:
        return jnp.sum(values, axis=tuple(range(values.ndim - 1)))
    # XLA's CPU backend writes its operand to memory before it sums: a part of it after some additions, which a matrix
    # product keeps apart from the sum. A product with two rows, for that with one would be compiled anew each time.
    parts = math.gcd(values.shape[0], parts)
    size = values.shape[0] // parts
    few = functools.reduce(jnp.add, (values[i * size : (i + 1) * size] for i in range(parts)))
    few = few.reshape(-1, few.shape[-1])
    return jnp.matmul(jnp.ones((2, few.shape[0])), few, precision=lax.Precision.HIGHEST)[0]


def over_columns(values: Array, features: int) -> Array:
    """Sum over groups and planes: (..., r K O) to (..., O)."""
    count = values.shape[-1] // features
    if count > _UNROLLED:
        return jnp.sum(values.reshape(*values.shape[:-1], count, features), axis=-2)
    # Sums over a short middle axis are slow on CPU.
    return functools.reduce(jnp.add, (values[..., i * features : (i + 1) * features] for i in range(count)))
