"""The array product: what every column sums up before its ADC (3.5 of the design; the paper's Fig. 5)."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cimjax.core.cells import StoredArrays, quantize_weight, store
from cimjax.core.convolution import convolution
from cimjax.core.encoding import slice_codes
from cimjax.core.gradients import straight_through
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import Tiling, tile_inputs
from cimjax.core.window import Window
from cimjax.spec import CIMSpec


class PartialSums(NamedTuple):
    """A number for every column at every output position: sums before the ADC, or what the ADC makes of them.

    Positions share one axis because XLA's CPU backend crashes on sums over arrays of seven axes.

    columns: (T, M, R, K, O) float32; sums are exact integers unless the specification has `variation`.
    reference: (T, M, R) float32, the sum of the inputs that drive each read group; None without an `offset` encoding.
    """

    columns: Float[Array, "T M R K O"]
    reference: Float[Array, "T M R"] | None


def array_mac(
    slices: Float[Array, "T N *space C"], arrays: StoredArrays, tiling: Tiling, window: Window, spec: CIMSpec
) -> PartialSums:
    """`P[t,r,k,o] = sum over the rows of read group r of a_t * d_k`, by ONE grouped convolution.

    Groups are read groups; the output channels of a group are its planes' columns and its dummy column, if it has one.

    Args:
      slices: (T, N, H, W, C) float32, integer-valued.
      arrays: what the cells hold.
      window: strides, padding and dilations; padded places are undriven rows.

    Returns:
      `PartialSums`, exact integers in the integer path.
    """
    columns = by_column(arrays.digits)
    if arrays.reference is None:
        return PartialSums(_by_plane(sum_columns(slices, columns, tiling, window, spec), tiling), None)
    columns = jnp.concatenate([columns, arrays.reference[..., None]], axis=-1)
    sums = sum_columns(slices, columns, tiling, window, spec)
    return PartialSums(_by_plane(sums[..., :-1], tiling), sums[..., -1])


def sum_columns(
    slices: Float[Array, "T N *space C"],
    columns: Float[Array, "*kernel R c m"],
    tiling: Tiling,
    window: Window,
    spec: CIMSpec,
) -> Float[Array, "T M R m"]:
    """The sums of any `m` columns of every read group: one grouped convolution.

    Args:
      slices: (T, N, H, W, C) float32.
      columns: (kh, kw, R, c, m) float32, what each read group holds.

    Returns:
      (T, M, R, m) float32.
    """
    count, images = slices.shape[:2]
    *kernel_size, groups, channels, outputs = columns.shape
    driven = tile_inputs(slices.reshape(count * images, *slices.shape[2:]), tiling)
    kernel = jnp.moveaxis(columns, -3, -2).reshape(*kernel_size, channels, groups * outputs)
    sums = snap_to_integers(convolution(driven, kernel, window, groups), spec)
    return sums.reshape(count, images * math.prod(sums.shape[1:-1]), groups, outputs)


def by_column(values: Float[Array, "K *kernel R c O"]) -> Float[Array, "*kernel R c K*O"]:
    """Planes (or the like) side by side: (K, kh, kw, R, c, O) to (kh, kw, R, c, K O)."""
    columns = jnp.moveaxis(values, 0, -2)
    return columns.reshape(*columns.shape[:-2], -1)


def _by_plane(sums: Array, tiling: Tiling) -> Array:
    return sums.reshape(*sums.shape[:-1], sums.shape[-1] // tiling.features, tiling.features)


def partial_sums(
    codes: Float[Array, "N *space C"],
    kernel: Float[Array, "*kernel C O"],
    steps: StepSizes,
    tiling: Tiling,
    window: Window,
    spec: CIMSpec,
    variation_key: Array | None = None,
) -> PartialSums:
    """The partial sums of a layer from its activation codes and its real kernel: steps 3.2 to 3.5 of the design.

    Args:
      codes: (N, H, W, C) float32.
      kernel: (kh, kw, C, O) real.
      steps: `weight` is used.
      variation_key: the random key of the chip; needed with `spec.variation`.
    """
    arrays = store(quantize_weight(kernel, steps.weight, tiling, spec), tiling, spec, variation_key)
    return array_mac(slice_codes(codes, spec.activation), arrays, tiling, window, spec)


def snap_to_integers(sums: Array, spec: CIMSpec) -> Array:
    """Sums that are integers by construction, freed from the rounding of inexact convolution algorithms; others as they
    are."""
    return sums if spec.variation is not None else straight_through(jnp.rint, sums)
