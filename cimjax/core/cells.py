"""What the memory cells hold: quantized weights, divided into digits and laid out in arrays (3.2 to 3.4, 3.9)."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cimjax.core import encoding, lsq, variation
from cimjax.core.learned_scales import nearest_digits
from cimjax.core.step_sizes import expand_weight
from cimjax.core.tiling import Tiling, tile_kernel
from cimjax.spec import CIMSpec, Encoding, Reference


class StoredArrays(NamedTuple):
    """What the arrays of a layer hold; places that store nothing hold 0.

    digits: (K, kh, kw, R, c, O) float32, the digits of the weight codes, varied if the specification says so.
    reference: (kh, kw, R, c) float32, 1 in every true row: each read group's dummy column (or the digital adder that
      stands for it); None without an `offset` encoding.
    codes: (kh, kw, R, c, O) float32, the weight codes that were divided; with a step per plane (K, kh, kw, R, c, O).
    """

    digits: Float[Array, "K *kernel R c O"]
    reference: Float[Array, "*kernel R c"] | None
    codes: Float[Array, "*planes_and_kernel R c O"]


def quantize_weight(
    kernel: Float[Array, "*kernel C O"], step: Float[Array, ...], tiling: Tiling, spec: CIMSpec
) -> Float[Array, "*planes_and_kernel R c O"]:
    """Weight codes in the layout of the arrays: `q = clip(rint(w / s_w), q_min, q_max)` (the paper's eq. 1); of
    `learned_scales` the digits of the nearest sum of steps.

    Args:
      kernel: (kh, kw, C, O) real.
      step: at weight granularity, > 0.

    Returns:
      (kh, kw, R, c, O) float32; with a step per plane (K, kh, kw, R, c, O). Places that store nothing have code 0.
    """
    tiled = tile_kernel(kernel, tiling)
    per_plane = jnp.moveaxis(expand_weight(step, tiling), 1, 0)
    per_plane = jnp.expand_dims(per_plane, (*range(1, 1 + len(tiling.kernel_size)), -2))
    if spec.weight.step_per_plane:
        # One step for all planes still quantizes once for each, as `encode` expects.
        step = jnp.broadcast_to(per_plane, (len(spec.weight.planes), *per_plane.shape[1:]))
    else:
        step = per_plane[0]
    if spec.weight.encoding == Encoding.LEARNED_SCALES:
        codes = nearest_digits(tiled, step)
    else:
        codes = lsq.quantize(tiled, step, spec.weight.code_range)
    # Where nothing is stored the code is 0 also for {-1, +1}.
    return jnp.where(tiling.stored[..., None], codes, 0)


def store(
    codes: Float[Array, "*planes_and_kernel R c O"], tiling: Tiling, spec: CIMSpec, key: Array | None = None
) -> StoredArrays:
    """Write weight codes into the cells: encode, leave foreign and padding rows at digit 0, vary if asked.

    Args:
      codes: as `quantize_weight` gives them.
      key: the random key of the chip; needed with `spec.variation`.

    Raises:
      ValueError: with `spec.variation` and no `key`.
    """
    # Rows that store nothing hold digit 0, which is not code 0 in every encoding.
    digits = jnp.where(tiling.stored[..., None], encoding.encode(codes, spec.weight), 0)
    reference = None
    if spec.weight.encoding == Encoding.OFFSET:
        reference = jnp.asarray(tiling.stored, jnp.float32)
    if spec.variation is not None:
        if key is None:
            raise ValueError("`variation_key` is None but the specification has `variation`; give a random key.")
        digits = variation.vary(digits, key, tiling, spec.variation)
        if reference is not None and spec.weight.reference == Reference.ADC:
            reference = variation.vary_reference(reference, key, spec.variation)
    return StoredArrays(digits, reference, codes)
