"""Programs for the array product: rows of one table, which all give the same partial sums.

A lowering takes the codes that drive the rows and the digits that the arrays store, and returns the sum of every
column. Everything before (quantizing, encoding, tiling) and after (the ADC) is elsewhere and the same for all.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cimjax.core.tiling import Tiling, tile_inputs
from cimjax.core.window import Window
from cimjax.spec import Lowering


class ArrayProduct(Protocol):
    """The contract of a lowering.

    Args:
      inputs: (B, H, W, C) float32, integer-valued in the integer path.
      digits: (kh, kw, R, c, M) float32: what each read group stores for its `M` columns, 0 at undriven places.
      tiling: which channels drive which group.
      window: strides, padding and dilations.

    Returns:
      The sums of all columns in parts, each (B, OH, OW, r M) float32 for `r` successive groups; exact while they stay
      below 2^24; differentiable in both arrays, in float32.
    """

    def __call__(self, inputs: Array, digits: Array, tiling: Tiling, window: Window) -> tuple[Array, ...]: ...


def grouped_conv(inputs: Array, digits: Array, tiling: Tiling, window: Window) -> tuple[Array, ...]:
    """ONE grouped convolution: a group is a read group, its output channels are that group's columns."""
    *kernel_size, groups, channels, columns = digits.shape
    kernel = jnp.moveaxis(digits, -3, -2).reshape(*kernel_size, channels, groups * columns)
    return (_convolve(tile_inputs(inputs, tiling), kernel, window, groups),)


def conv_per_tile(inputs: Array, digits: Array, tiling: Tiling, window: Window) -> tuple[Array, ...]:
    """One plain convolution per read group, on the channels that drive it.

    On CPU the grouped one is several times slower, most of all backwards, and computes the places that pad the last
    group too.
    """
    driven = [row[row < tiling.in_channels] for row in tiling.channels]
    consecutive = np.array_equal(np.concatenate(driven), np.arange(tiling.in_channels))
    if consecutive:
        # Not slices: their gradients would each be padded to all channels and added up.
        shares = jnp.split(inputs, np.cumsum([len(channels) for channels in driven])[:-1], axis=-1)
    else:
        shares = [jnp.take(inputs, channels, axis=-1) for channels in driven]
    return tuple(
        _convolve(share, digits[..., group, : len(channels), :], window)
        for group, (share, channels) in enumerate(zip(shares, driven, strict=True))
    )


def _convolve(inputs: Array, kernel: Array, window: Window, groups: int = 1) -> Array:
    spatial = "".join(chr(ord("a") + axis) for axis in range(kernel.ndim - 2))
    return lax.conv_general_dilated(
        inputs,
        kernel,
        window_strides=window.strides,
        padding=window.padding,
        lhs_dilation=window.input_dilation,
        rhs_dilation=window.kernel_dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
        # Integers must stay exact, and step gradients are small differences of large terms: no TF32 or bfloat16.
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


LOWERINGS: dict[Lowering, ArrayProduct] = {
    Lowering.GROUPED_CONV: grouped_conv,
    Lowering.CONV_PER_TILE: conv_per_tile,
}


def choose(lowering: Lowering) -> ArrayProduct:
    """The program for a specification's `lowering`; `auto` is one convolution per tile on CPU, else the grouped one."""
    if lowering == Lowering.AUTO:
        lowering = Lowering.CONV_PER_TILE if jax.default_backend() == "cpu" else Lowering.GROUPED_CONV
    return LOWERINGS[lowering]
