"""Programs for the array product: rows of one table, which all give the same partial sums.

A lowering takes the inputs that drive the read groups and the digits that they store, and returns the sum of every
column. Everything before (quantizing, encoding, tiling) and after (the ADC) is elsewhere and the same for all.
"""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from cimjax.core.window import Window
from cimjax.spec import Lowering


class ArrayProduct(Protocol):
    """The contract of a lowering.

    Args:
      inputs: (B, H, W, R * c) float32, integer-valued in the integer path: the channels of each read group in turn.
      digits: (kh, kw, R, c, M) float32: what each group stores for its `M` columns.
      window: strides, padding and dilations.

    Returns:
      (B, OH, OW, R, M) float32, exact while sums stay below 2^24; differentiable in both arrays, in float32.
    """

    def __call__(self, inputs: Array, digits: Array, window: Window) -> Array: ...


def grouped_conv(inputs: Array, digits: Array, window: Window) -> Array:
    """ONE grouped convolution: a group is a read group, its output channels are that group's columns."""
    *kernel_size, groups, channels, columns = digits.shape
    axes = len(kernel_size)
    spatial = "".join(chr(ord("a") + axis) for axis in range(axes))
    kernel = jnp.moveaxis(digits, -3, -2).reshape(*kernel_size, channels, groups * columns)
    sums = lax.conv_general_dilated(
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
    return sums.reshape(*sums.shape[:-1], groups, columns)


def conv_per_tile(inputs: Array, digits: Array, window: Window) -> Array:
    """One plain convolution per read group: on CPU the grouped one is several times slower, most of all backwards."""
    groups, channels = digits.shape[-3:-1]
    sums = [
        grouped_conv(inputs[..., group * channels : (group + 1) * channels], digits[..., group, None, :, :], window)
        for group in range(groups)
    ]
    return jnp.concatenate(sums, axis=-2)


LOWERINGS: dict[Lowering, ArrayProduct] = {
    Lowering.GROUPED_CONV: grouped_conv,
    Lowering.CONV_PER_TILE: conv_per_tile,
}


def choose(lowering: Lowering) -> ArrayProduct:
    """The program for a specification's `lowering`; `auto` is one convolution per tile on CPU, else the grouped one."""
    if lowering == Lowering.AUTO:
        lowering = Lowering.CONV_PER_TILE if jax.default_backend() == "cpu" else Lowering.GROUPED_CONV
    return LOWERINGS[lowering]
