"""Programs for the array product: rows of one table, which all give the same partial sums.

A lowering takes the codes that drive the rows and the digits that the arrays store, and returns the sum of every
column. Everything before (quantizing, encoding, tiling) and after (the ADC) is elsewhere and the same for all.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cimjax.core.convolution import convolve, sum_type
from cimjax.core.schedule import in_turn, turn
from cimjax.core.tiling import Tiling, tile_inputs
from cimjax.core.window import Window, shifted
from cimjax.spec import CIMSpec, Lowering, Operands

# From so many row tiles on their gradients are computed one after the other: on CPU XLA would hold all of them at
# a time. With fewer it costs a twentieth of a step's time, and gains little memory; see `docs/speed.md`.
MANY_TILES = 8


class ArrayProduct(Protocol):
    """The contract of a lowering.

    Args:
      inputs: (B, H, W, C), integer-valued in the integer path.
      digits: (kh, kw, R, c, M): what each read group stores for its `M` columns, 0 at undriven places; of the dtype of
        `inputs`: float32, bfloat16, float16 or int8.
      tiling: which channels drive which group.
      window: strides, padding and dilations.

    Returns:
      The sums of all columns in parts, each (B, OH, OW, r M) float32 for `r` successive groups; exact while they stay
      below 2^24; in float32, differentiable in both arrays.
    """

    def __call__(self, inputs: Array, digits: Array, tiling: Tiling, window: Window) -> tuple[Array, ...]: ...


def array_product(inputs: Array, digits: Array, tiling: Tiling, window: Window, spec: CIMSpec) -> tuple[Array, ...]:
    """The sums of all columns, by the program and in the operands that a specification names.

    Args:
      inputs, digits: float32, as for `ArrayProduct`.

    Returns:
      As `ArrayProduct`. Gradients are computed in float32 whatever the operands.
    """
    operands = choose_operands(spec)
    if operands == Operands.FLOAT32:
        return choose(spec.lowering)(inputs, digits, tiling, window)
    return _in_operands(spec.lowering, operands, tiling, window, inputs, digits)


def grouped_conv(inputs: Array, digits: Array, tiling: Tiling, window: Window) -> tuple[Array, ...]:
    """ONE grouped convolution: a group is a read group, its output channels are that group's columns."""
    *kernel_size, groups, channels, columns = digits.shape
    kernel = jnp.moveaxis(digits, -3, -2).reshape(*kernel_size, channels, groups * columns)
    return (convolve(tile_inputs(inputs, tiling), kernel, window, groups),)


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
    parts: list[Array] = []
    number = None
    for group, (share, channels) in enumerate(zip(shares, driven, strict=True)):
        of_group = digits[..., group, : len(channels), :]
        if number is not None:
            of_group = in_turn(of_group, number)
        sums = convolve(share, of_group, window)
        if tiling.groups >= MANY_TILES:
            sums, number = turn(sums)
        parts.append(sums)
    return tuple(parts)


def patches(inputs: Array, digits: Array, tiling: Tiling, window: Window) -> tuple[Array, ...]:
    """One batch of matrix products over read groups, on what each output position sees: `im2col` written to memory."""
    *kernel_size, groups, channels, columns = digits.shape
    area = math.prod(kernel_size)
    seen = jnp.stack(shifted(tile_inputs(inputs, tiling), tuple(kernel_size), window), axis=-2)
    *positions, _, _ = seen.shape
    sums = lax.dot_general(
        seen.reshape(math.prod(positions), area, groups, channels),
        digits.reshape(area, groups, channels, columns),
        (((1, 3), (0, 2)), ((2,), (1,))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=sum_type(inputs.dtype),
    ).astype(jnp.float32)
    return tuple(part.reshape(*positions, columns) for part in sums)


LOWERINGS: dict[Lowering, ArrayProduct] = {
    Lowering.GROUPED_CONV: grouped_conv,
    Lowering.CONV_PER_TILE: conv_per_tile,
    Lowering.PATCHES: patches,
}


def choose(lowering: Lowering) -> ArrayProduct:
    """The program for a specification's `lowering`; `auto` is one convolution per tile on CPU, else the grouped one.

    `pallas` is as `auto` wherever partial sums themselves are asked for; with ADCs it is `core.fused`.
    """
    if lowering in (Lowering.AUTO, Lowering.PALLAS):
        lowering = Lowering.CONV_PER_TILE if jax.default_backend() == "cpu" else Lowering.GROUPED_CONV
    return LOWERINGS[lowering]


def choose_operands(spec: CIMSpec) -> Operands:
    """A specification's `operands`; `auto` is float32 on CPU, elsewhere bfloat16 where that is exact."""
    if spec.operands != Operands.AUTO:
        return spec.operands
    cheap = jax.default_backend() != "cpu" and spec.exact_in(Operands.BFLOAT16)
    return Operands.BFLOAT16 if cheap else Operands.FLOAT32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _in_operands(
    lowering: Lowering, operands: Operands, tiling: Tiling, window: Window, inputs: Array, digits: Array
) -> tuple[Array, ...]:
    dtype = jnp.dtype(operands.value)
    return choose(lowering)(inputs.astype(dtype), digits.astype(dtype), tiling, window)


def _in_operands_forward(
    lowering: Lowering, operands: Operands, tiling: Tiling, window: Window, inputs: Array, digits: Array
) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    return _in_operands(lowering, operands, tiling, window, inputs, digits), (inputs, digits)


def _in_operands_backward(
    lowering: Lowering, operands: Operands, tiling: Tiling, window: Window, kept: tuple[Array, Array], gradient: Any
) -> tuple[Array, Array]:
    # The product is linear in each operand, so the sums of this second call are not computed.
    return jax.vjp(lambda inputs, digits: choose(lowering)(inputs, digits, tiling, window), *kept)[1](gradient)


_in_operands.defvjp(_in_operands_forward, _in_operands_backward)
