"""From partial sums to the output: ADC, shift, scale and sum in one function, with a backward pass of its own.

Partial sums are by far the largest arrays of a layer. Here nothing but them is kept for the backward pass, as 16-bit
integers where these are exact; XLA's CPU backend undoes that, and keeps the float32 numbers that they come from.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cimjax.core import lsq
from cimjax.core.schedule import columns_once
from cimjax.core.steps import Steps, expand_outputs, expand_weight
from cimjax.core.tiling import Tiling
from cimjax.planes import CodeRange
from cimjax.spec import CIMSpec, Reference

# The largest magnitude of a partial sum that 16 bits keep.
_SMALL_INTEGERS = 2**15 - 1
# Sums of at most so many columns are written out.
_UNROLLED = 8
# Parts of a batch that are added up before sums over positions.
_PARTS = 4


class Part(NamedTuple):
    """Partial sums of `r` successive read groups, slices stacked in the batch: `B = T N`.

    columns: (B, OH, OW, r K O) float32.
    reference: (B, OH, OW, r) float32, the sum of each group's inputs; None without an `offset` encoding.
    """

    columns: Array
    reference: Array | None


def read_out(parts: Sequence[Part], steps: Steps, tiling: Tiling, spec: CIMSpec) -> Array:
    """Convert, shift, dequantize and add: `sum_{t,r,k} g_t f_k s_w P^` (the paper's eqs. 2 and 3).

    `P^ = s_p p + z`, `p = clip(floor((P - z) / s_p + 0.5), q_min, q_max)`, is what an ADC makes of a partial sum: one
    of exactly `2^bits` values (3 for 1.5 bits; a signed 1-bit ADC gives the sign of `P - z`), which depends on
    nothing but that partial sum and its step. Behind an ideal ADC (`spec.adc` None) `P^ = P`, and the columns may be
    undivided (`spec.undivided`). A digital offset reference is exact.

    Gradients are LSQ's (`lsq.quantize`): inside the ladder, `spec.adc.gradient_margin` steps beyond its outer codes
    included, `d P^/dP = 1`, `d P^/ds = p - u` and `d P^/dz = 0`; outside `0`, `p` and `1`.

    Args:
      parts: all read groups in order.
      steps: `weight`, and with an ADC `psum` > 0 and `offset` in psum units; of the reference's ADC too.

    Returns:
      (N, OH, OW, O) float32, not yet multiplied by the activation's step.
    """
    slices = (1,) if spec.undivided else tuple(s.significance for s in spec.activation.slices)
    scales = scales_of(steps, tiling, spec)

    def of(groups: slice, values: Array) -> Array:
        return values[groups].reshape(-1)

    total, first = jnp.float32(0), 0
    for part in parts:
        groups = slice(first, first + part.columns.shape[-1] // scales.weight.shape[-1])
        first = groups.stop
        for index, significance in enumerate(slices):
            columns = _of_slice(part.columns, index, len(slices))
            weight = float(significance) * of(groups, scales.weight)
            if scales.step is None:
                total = total + _over_columns(columns * weight, tiling.features)
            else:
                zero = None if scales.offset is None else of(groups, scales.offset)
                total = total + _converted(
                    conversion_of(index, tiling, spec), columns, of(groups, scales.step), zero, weight
                )
        if part.reference is not None:
            total = total + read_reference(part.reference, groups, steps, tiling, spec)
    return total


class Scales(NamedTuple):
    """What every column's ADC and its result are scaled by, (R, K O): step and offset (or None), and the weight
    `f_k s_w` that a partial sum counts."""

    step: Array | None
    offset: Array | None
    weight: Array


def scales_of(steps: Steps, tiling: Tiling, spec: CIMSpec) -> Scales:
    """The scales of all columns; without slices and planes where these are undivided."""
    planes = (1,) if spec.undivided else tuple(p.significance for p in spec.weight.planes)

    def by_group(values: Array) -> Array:
        """Values broadcastable to (R, K, O) as (R, K O)."""
        columns = jnp.broadcast_to(values, (tiling.groups, len(planes), tiling.features))
        return columns_once(columns.reshape(tiling.groups, -1))

    return Scales(
        step=None if spec.adc is None else by_group(expand_outputs(steps.psum, tiling)),
        offset=None if steps.offset is None else by_group(expand_outputs(steps.offset, tiling)),
        weight=by_group(expand_weight(steps.weight, tiling) * np.asarray(planes, np.float32)[:, None]),
    )


def read_reference(sums: Array, groups: slice, steps: Steps, tiling: Tiling, spec: CIMSpec) -> Array:
    """What the constant of an `offset` encoding adds: `sum_{t,r} g_t s_w constant` times the sum of the inputs.

    Args:
      sums: (T N, OH, OW, r) float32, of the read groups in `groups`.

    Returns:
      (N, OH, OW, O) float32.
    """
    # The top plane carries the constant, so its step is the constant's.
    constant = expand_weight(steps.weight, tiling)[:, -1] * spec.weight.constant
    constant = jnp.broadcast_to(constant, (tiling.groups, tiling.features))[groups]
    total = jnp.float32(0)
    for index, part in enumerate(spec.activation.slices):
        of_slice = _of_slice(sums, index, len(spec.activation.slices))
        codes = None if spec.adc is None else spec.reference_ranges[index]
        of_slice = _convert_reference(of_slice, codes, groups, steps, spec)
        total = total + jnp.matmul(of_slice, float(part.significance) * constant, precision=lax.Precision.HIGHEST)
    return total


def _of_slice(sums: Array, index: int, slices: int) -> Array:
    return sums if slices == 1 else sums.reshape(slices, -1, *sums.shape[1:])[index]


def _convert_reference(sums: Array, codes: CodeRange | None, groups: slice, steps: Steps, spec: CIMSpec) -> Array:
    """The dummy columns' sums (B, OH, OW, r) behind ADCs with a step for each read group; exact if digital."""
    if codes is None or spec.weight.reference != Reference.ADC:
        return sums
    many = (max(groups.stop, np.size(steps.reference)),)
    step = jnp.broadcast_to(steps.reference, many)[groups]
    offset = None if steps.reference_offset is None else jnp.broadcast_to(steps.reference_offset, many)[groups]
    margin = spec.adc.gradient_margin if spec.adc else 0.0
    return lsq.fake_quantize(sums, step, codes, offset, half_up=True, margin=margin)


def conversion_of(index: int, tiling: Tiling, spec: CIMSpec) -> Conversion:
    """The conversion of slice `index` by the ADCs of a specification that has some."""
    margin = spec.adc.gradient_margin if spec.adc else 0.0
    return Conversion(spec.adc_ranges[index], tiling.features, _kept_as(tiling, spec), margin)


def _kept_as(tiling: Tiling, spec: CIMSpec) -> str:
    """What partial sums are kept as for the backward pass: 16-bit integers where these hold them exactly."""
    exact = spec.variation is None and tiling.largest_psum(spec) <= _SMALL_INTEGERS
    return "int16" if exact else "float32"


class Conversion(NamedTuple):
    """What is fixed about the conversion of one slice: the codes of each plane, `O`, the type of residuals, and
    `ADCSpec.gradient_margin`."""

    ranges: tuple[CodeRange, ...]
    features: int
    kept_as: str
    margin: float

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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _converted(conversion: Conversion, psums: Array, step: Array, offset: Array | None, weight: Array) -> Array:
    """`sum over groups and planes of weight * P^`: psums (..., r K O), parameters (r K O,) to (..., O)."""
    u = lsq.in_steps(psums, step, offset)
    codes = lsq.round_to_codes(u, psums, offset, conversion.bounds(psums.shape[-1]), half_up=True)
    return _over_columns(lsq.dequantize(codes, step, offset) * weight, conversion.features)


def _converted_forward(
    conversion: Conversion, psums: Array, step: Array, offset: Array | None, weight: Array
) -> tuple[Array, tuple[Any, ...]]:
    return _converted(conversion, psums, step, offset, weight), (psums.astype(conversion.kept_as), step, offset, weight)


def _converted_backward(conversion: Conversion, residuals: tuple[Any, ...], gradient: Array) -> tuple[Any, ...]:
    kept, step, offset, weight = residuals
    bounds = conversion.bounds(kept.shape[-1])
    psums = kept.astype(jnp.float32)
    u = lsq.in_steps(psums, step, offset)
    codes = lsq.round_to_codes(u, psums, offset, bounds, half_up=True)
    count = kept.shape[-1] // conversion.features
    of_columns = jnp.concatenate([gradient] * count, axis=-1)
    terms = conversion_gradients(of_columns, u, codes, bounds, conversion.margin, weight)
    to_step = weight * _over_positions(terms.step)
    to_offset = None if offset is None else weight * _over_positions(terms.offset)
    to_weight = step * _over_positions(of_columns * codes)
    if offset is not None:
        to_weight = to_weight + offset * jnp.concatenate([_over_positions(gradient)] * count)
    return terms.psums, to_step, to_offset, to_weight


_converted.defvjp(_converted_forward, _converted_backward)


class Gradients(NamedTuple):
    """What each column and position adds to a gradient; those to step and offset are still to be multiplied by what
    the column counts."""

    psums: Array
    step: Array
    offset: Array


def conversion_gradients(
    gradient: Array, u: Array, codes: Array, bounds: tuple[Any, Any, Any], margin: float, weight: Array
) -> Gradients:
    """LSQ's gradients of `weight P^` at every column and position.

    Args:
      gradient: of the output, for each column (..., K O).
      u, codes: distance from the offset in steps, and codes.
      bounds, margin: as for `lsq.passes_gradient`.
      weight: what a column counts.
    """
    inside = lsq.passes_gradient(u, bounds, margin)
    # The operand is selected too: a huge `u` outside must not meet a zero gradient as inf * 0.
    sign = bounds[2]
    rest = jnp.where(inside if sign is None else jnp.logical_and(inside, np.logical_not(sign)), u, 0.0)
    return Gradients(
        jnp.where(inside, gradient * weight, 0.0), gradient * (codes - rest), jnp.where(inside, 0.0, gradient)
    )


def _over_positions(values: Array) -> Array:
    """Sum over all axes but the last."""
    if jax.default_backend() != "cpu" or not values.size:
        return jnp.sum(values, axis=tuple(range(values.ndim - 1)))
    # XLA's CPU backend writes its operand to memory before it sums: a part of it after some additions, which a matrix
    # product keeps apart from the sum. A product with two rows, for that with one would be compiled anew each time.
    parts = math.gcd(values.shape[0], _PARTS)
    size = values.shape[0] // parts
    few = functools.reduce(jnp.add, (values[i * size : (i + 1) * size] for i in range(parts)))
    few = few.reshape(-1, few.shape[-1])
    return jnp.matmul(jnp.ones((2, few.shape[0])), few, precision=lax.Precision.HIGHEST)[0]


def _over_columns(values: Array, features: int) -> Array:
    """Sum over groups and planes: (..., r K O) to (..., O)."""
    count = values.shape[-1] // features
    if count > _UNROLLED:
        return jnp.sum(values.reshape(*values.shape[:-1], count, features), axis=-2)
    # Sums over a short middle axis are slow on CPU.
    return functools.reduce(jnp.add, (values[..., i * features : (i + 1) * features] for i in range(count)))
