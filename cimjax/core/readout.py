"""What partial sums count: shift, scale and sum behind ideal ADCs, and the reference of an `offset` encoding.

What real ADCs make of partial sums is in `cimjax.core.digitise`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cimjax.core import lsq
from cimjax.core.conversion import Scales, over_columns
from cimjax.core.schedule import columns_once
from cimjax.core.step_sizes import StepSizes, expand_outputs, expand_weight
from cimjax.core.tiling import Tiling
from cimjax.spec import CIMSpec, Reference
from cimjax.spec.codes import CodeRange


class Part(NamedTuple):
    """Partial sums of `r` successive read groups, slices stacked in the batch: `B = T N`; as computed, see `whole`.

    columns: (B, OH, OW, r K O) float32.
    reference: (B, OH, OW, r) float32, the sum of each group's inputs; None without an `offset` encoding.
    """

    columns: Array
    reference: Array | None


def add_up(parts: Sequence[Part], steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> Array:
    """Shift, dequantize and add what ideal ADCs pass on: `sum_{t,r,k} g_t f_k s_w P` (the paper's eqs. 2 and 3).

    Args:
      parts: all read groups in order; the columns may be undivided (`spec.skips_decomposition`).
      steps: `weight` is used.

    Returns:
      (N, OH, OW, O) float32, not yet multiplied by the activation's step.
    """
    slices = (1,) if spec.skips_decomposition else tuple(s.significance for s in spec.activation.slices)
    scales = scales_of(steps, tiling, spec)
    total, first = jnp.float32(0), 0
    for part in parts:
        groups = slice(first, first + part.columns.shape[-1] // scales.weight.shape[-1])
        first = groups.stop
        columns = whole(part.columns, spec)
        for index, significance in enumerate(slices):
            weight = float(significance) * scales.weight[groups].reshape(-1)
            total = total + over_columns(of_slice(columns, index, len(slices)) * weight, tiling.features)
        if part.reference is not None:
            total = total + read_reference(part.reference, groups, steps, tiling, spec)
    return total


def whole(sums: Array, spec: CIMSpec) -> Array:
    """Sums that are integers by construction, freed from the rounding of inexact convolution algorithms; others as they
    are."""
    return sums if spec.variation is not None else _rounded(sums)


@jax.custom_jvp
def _rounded(sums: Array) -> Array:
    return jnp.rint(sums)


@_rounded.defjvp
def _rounded_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _rounded(primals[0]), tangents[0]


def scales_of(steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> Scales:
    """The scales of all columns, (R, K O), but for what a slice counts; without planes where these are undivided."""
    planes = (1,) if spec.skips_decomposition else tuple(p.significance for p in spec.weight.planes)

    def by_group(values: Array) -> Array:
        """Values broadcastable to (R, K, O) as (R, K O)."""
        columns = jnp.broadcast_to(values, (tiling.groups, len(planes), tiling.features))
        return columns_once(columns.reshape(tiling.groups, -1))

    return Scales(
        step=None if spec.adc is None else by_group(expand_outputs(steps.psum, tiling)),
        offset=None if steps.offset is None else by_group(expand_outputs(steps.offset, tiling)),
        weight=by_group(expand_weight(steps.weight, tiling) * np.asarray(planes, np.float32)[:, None]),
    )


def read_reference(sums: Array, groups: slice, steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> Array:
    """What the constant of an `offset` encoding adds: `sum_{t,r} g_t s_w constant` times the sum of the inputs.

    Args:
      sums: (T N, OH, OW, r) float32, of the read groups in `groups`.

    Returns:
      (N, OH, OW, O) float32.
    """
    # The top plane carries the constant, so its step is the constant's.
    constant = expand_weight(steps.weight, tiling)[:, -1] * spec.weight.constant
    constant = jnp.broadcast_to(constant, (tiling.groups, tiling.features))[groups]
    sums, total = whole(sums, spec), jnp.float32(0)
    for index, part in enumerate(spec.activation.slices):
        codes = None if spec.adc is None else spec.reference_ranges[index]
        read = of_slice(sums, index, len(spec.activation.slices))
        read = _convert_reference(read, codes, groups, steps, spec)
        total = total + jnp.matmul(read, float(part.significance) * constant, precision=lax.Precision.HIGHEST)
    return total


def of_slice(sums: Array, index: int, slices: int) -> Array:
    """One of the slices that are stacked in the batch."""
    return sums if slices == 1 else sums.reshape(slices, sums.shape[0] // slices, *sums.shape[1:])[index]


def _convert_reference(sums: Array, codes: CodeRange | None, groups: slice, steps: StepSizes, spec: CIMSpec) -> Array:
    """The dummy columns' sums (B, OH, OW, r) behind ADCs with a step for each read group; exact if digital."""
    if codes is None or spec.weight.reference != Reference.ADC:
        return sums
    many = (max(groups.stop, np.size(steps.reference)),)
    step = jnp.broadcast_to(steps.reference, many)[groups]
    offset = None if steps.reference_offset is None else jnp.broadcast_to(steps.reference_offset, many)[groups]
    margin = spec.adc.gradient_margin if spec.adc else 0.0
    return lsq.fake_quantize(sums, step, codes, offset, half_up=True, margin=margin)
