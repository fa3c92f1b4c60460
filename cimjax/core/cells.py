"""What the memory cells hold: quantized weights, divided into digits and laid out in arrays."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from cimjax.core import encoding, lsq, variation
from cimjax.core.lowering import Columns
from cimjax.core.step_sizes import StepSizes, expand_weight
from cimjax.core.tiling import Tiling, tile_kernel
from cimjax.spec import CIMSpec, Encoding, Reference


def quantize_weight(kernel: Array, step: Array, tiling: Tiling, spec: CIMSpec) -> Array:
    """Weight codes in the layout of the arrays: `q = clip(rint(w / s_w), q_min, q_max)` (the paper's eq. 1).

    Args:
      kernel: (kh, kw, C, O) real.
      step: at weight granularity, > 0.

    Returns:
      (kh, kw, R, c, O) float32; with a step per plane (K, kh, kw, R, c, O).
    """
    tiled = tile_kernel(kernel, tiling)
    per_plane = jnp.moveaxis(expand_weight(step, tiling), 1, 0)
    per_plane = jnp.expand_dims(per_plane, (*range(1, 1 + len(tiling.kernel_size)), -2))
    if spec.weight.step_per_plane:
        # One step for all planes still quantizes once for each, as `encode` expects.
        step = jnp.broadcast_to(per_plane, (len(spec.weight.planes), *per_plane.shape[1:]))
    else:
        step = per_plane[0]
    return lsq.quantize(tiled, step, spec.weight.code_range)


def store(kernel: Array, step: Array, tiling: Tiling, spec: CIMSpec, key: Array | None = None) -> Array:
    """What the cells hold: the digits of the weight codes, 0 where an array stores nothing, varied if asked.

    Args:
      kernel: (kh, kw, C, O) real.
      step: at weight granularity, > 0.
      key: the random key of the chip.

    Returns:
      (K, kh, kw, R, c, O) float32.

    Raises:
      ValueError: with `spec.variation` and no `key`.
    """
    return _stored_digits(quantize_weight(kernel, step, tiling, spec), tiling, spec, key)


def _stored_digits(codes: Array, tiling: Tiling, spec: CIMSpec, key: Array | None) -> Array:
    # Undriven or foreign rows hold digit 0, which is not code 0 in every encoding.
    digits = jnp.where(tiling.stored[..., None], encoding.encode(codes, spec.weight), 0)
    if spec.variation is None:
        return digits
    return variation.vary(digits, _required(key), tiling, spec.variation)


def stored_columns(
    kernel: Array, steps: StepSizes, tiling: Tiling, spec: CIMSpec, variation_key: Array | None
) -> tuple[Columns, Array | None]:
    """What the columns of every read group hold, and its dummy column, if it has one.

    Args:
      kernel: (kh, kw, C, O) real.
      steps: `weight` is used, > 0.
      variation_key: needed with `spec.variation`.

    Returns:
      `Columns` with digits (kh, kw, R, c, K O) float32; and (kh, kw, R, c, 1) float32, or None without an `offset`
      encoding.

    Raises:
      ValueError: with `spec.variation` and no key.
    """
    codes = quantize_weight(kernel, steps.weight, tiling, spec)
    columns = Columns(_by_column(_stored_digits(codes, tiling, spec, variation_key)))
    if spec.variation is None and not spec.weight.step_per_plane:
        stored = jnp.where(tiling.stored[..., None], encoding.split_by_sign(codes, spec.weight), 0)
        columns = columns._replace(codes=_by_column(stored), shares=encoding.shares(spec.weight))
    if spec.weight.encoding != Encoding.OFFSET:
        return columns, None
    ones = jnp.asarray(tiling.stored, jnp.float32)
    if spec.variation is not None and spec.weight.reference == Reference.ADC:
        ones = variation.vary_reference(ones, _required(variation_key), spec.variation)
    return columns, ones[..., None]


def with_ones(columns: Columns, ones: Array | None) -> Columns:
    """`stored_columns` as one: each group's dummy column, if it has one, is its last, (kh, kw, R, c, K O + 1)."""
    return columns if ones is None else columns._replace(digits=jnp.concatenate([columns.digits, ones], axis=-1))


def _by_column(values: Array) -> Array:
    """Planes (or the like) side by side: (K, kh, kw, R, c, O) to (kh, kw, R, c, K O)."""
    columns = jnp.moveaxis(values, 0, -2)
    return columns.reshape(*columns.shape[:-2], -1)


def _required(key: Array | None) -> Array:
    if key is None:
        raise ValueError("`variation_key` is None but the specification has `variation`; give a random key.")
    return key
