"""Programs for the array product: rows of one table, which all give the same partial sums.

A row takes what drives the rows and what the columns hold, and says how the sums of all columns are computed. It is
linear in both, so that its gradients are its transposes: computed by the same row, in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from cimjax.core.convolution import convolution, sum_type
from cimjax.core.programs.contract import Layer, built_in, operand_type
from cimjax.core.programs.cpu import convolve as cpu_convolve
from cimjax.core.programs.platforms import by_platform
from cimjax.core.tiling import Tiling, tile_inputs
from cimjax.core.window import Window, shifted
from cimjax.spec import Product


class ArrayProduct(Protocol):
    """The contract of a row.

    Args:
      inputs: (B, H, W, C), integer-valued in the integer path; float32, bfloat16, float16 or int8.
      columns: (kh, kw, R, c, m) of the same dtype: what each read group holds for any number of columns.
      tiling: which channels drive which group.
      window: strides, padding and dilations.
      convolve: a convolution `(inputs, kernel, window, groups) -> sums` in float32 or int32.

    Returns:
      The sums of each read group, `R` arrays (B, OH, OW, m), exact while the sums of integers stay below 2^24.
    """

    def __call__(
        self, inputs: Array, columns: Array, tiling: Tiling, window: Window, convolve: Callable[..., Array]
    ) -> tuple[Array, ...]: ...


def grouped_conv(
    inputs: Array, columns: Array, tiling: Tiling, window: Window, convolve: Callable[..., Array]
) -> tuple[Array, ...]:
    """ONE grouped convolution: a group is a read group, its output channels are that group's columns."""
    *kernel_size, groups, channels, count = columns.shape
    kernel = jnp.moveaxis(columns, -3, -2).reshape(*kernel_size, channels, groups * count)
    return tuple(jnp.split(convolve(tile_inputs(inputs, tiling), kernel, window, groups), groups, axis=-1))


def conv_per_tile(
    inputs: Array, columns: Array, tiling: Tiling, window: Window, convolve: Callable[..., Array]
) -> tuple[Array, ...]:
    """One plain convolution per read group, on the channels that drive it.

    On CPU the grouped one is several times slower, most of all backwards, and computes the places that pad the last
    group too.
    """
    driven = [row[row < tiling.in_channels] for row in tiling.channels]
    if np.array_equal(np.concatenate(driven), np.arange(tiling.in_channels)):
        # Not slices: their gradients would each be padded to all channels and added up.
        shares = jnp.split(inputs, np.cumsum([len(channels) for channels in driven])[:-1], axis=-1)
    else:
        shares = [jnp.take(inputs, channels, axis=-1) for channels in driven]
    by_group = [group[..., 0, :, :] for group in jnp.split(columns, tiling.groups, axis=-3)]
    return tuple(
        convolve(share, group[..., : share.shape[-1], :], window, 1)
        for share, group in zip(shares, by_group, strict=True)
    )


def patches(
    inputs: Array, columns: Array, tiling: Tiling, window: Window, convolve: Callable[..., Array]
) -> tuple[Array, ...]:
    """One batch of matrix products over read groups, on what each output position sees: `im2col` written to memory."""
    del convolve
    *kernel_size, groups, channels, count = columns.shape
    area = math.prod(kernel_size)
    seen = jnp.stack(shifted(tile_inputs(inputs, tiling), tuple(kernel_size), window), axis=-2)
    places = seen.shape[:-2]
    sums = lax.dot_general(
        seen.reshape(math.prod(places), area, groups, channels),
        columns.reshape(area, groups, channels, count),
        (((1, 3), (0, 2)), ((2,), (1,))),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=sum_type(inputs.dtype),
    )
    return tuple(part.reshape(*places, count) for part in sums)


PRODUCTS: dict[Product, ArrayProduct] = {
    Product.GROUPED_CONV: grouped_conv,
    Product.CONV_PER_TILE: conv_per_tile,
    Product.PATCHES: patches,
}


def sums(layer: Layer, inputs: Array, columns: Array) -> tuple[Array, ...]:
    """The sums of all columns, by the product and in the operands of the layer's execution.

    Args:
      inputs: (B, H, W, C) float32.
      columns: (kh, kw, R, c, m) float32.

    Returns:
      `R` arrays (B, OH, OW, m) float32, exact in the integer path.
    """
    return _by_row(_sums, layer)(inputs, columns)


def to_inputs(layer: Layer, inputs: Array, columns: Array, gradient: tuple[Array, ...]) -> Array:
    """The gradient to inputs (B, H, W, C) of that to the sums; of `inputs` only the shape counts."""
    return _by_row(_to_inputs, layer)(inputs, columns, gradient)


def to_columns(layer: Layer, inputs: Array, columns: Array, gradient: tuple[Array, ...]) -> Array:
    """The gradient to columns (kh, kw, R, c, m) of that to their sums; of `columns` only the shape counts."""
    return _by_row(_to_columns, layer)(inputs, columns, gradient)


def _by_row(function: Callable[..., Any], layer: Layer) -> Callable[..., Any]:
    default, on_cpu = (functools.partial(function, _row(layer, cpu=cpu), layer) for cpu in (False, True))
    return by_platform(default, cpu=on_cpu)


class _Row(NamedTuple):
    """A product with its operands, as one platform computes it."""

    product: ArrayProduct
    convolve: Callable[..., Array]
    operands: DTypeLike


def _row(layer: Layer, *, cpu: bool) -> _Row:
    """The product of an execution."""
    product = layer.execution.product
    if product == Product.AUTO:
        product = built_in(layer.spec, cpu=cpu).product
    convolve = cpu_convolve if cpu else convolution
    return _Row(PRODUCTS[product], convolve, operand_type(layer, cpu=cpu))


def _sums(row: _Row, layer: Layer, inputs: Array, columns: Array) -> tuple[Array, ...]:
    operands = inputs.astype(row.operands), columns.astype(row.operands)
    parts = row.product(*operands, layer.tiling, layer.window, row.convolve)
    # What is no number has no integer either: it would be lost without a word.
    if jnp.issubdtype(row.operands, jnp.integer):
        return tuple(part.astype(jnp.float32) + _missing(inputs, columns) for part in parts)
    return parts


def _missing(inputs: Array, columns: Array) -> Array:
    """NaN for images and columns with NaN among what is multiplied, elsewhere 0: broadcastable to sums."""
    images = jnp.sum(inputs * 0, axis=tuple(range(1, inputs.ndim)), keepdims=True)
    return images + jnp.sum(columns * 0, axis=tuple(range(columns.ndim - 1)))


def _to_inputs(row: _Row, layer: Layer, inputs: Array, columns: Array, gradient: tuple[Array, ...]) -> Array:
    def multiply(inputs: Array) -> tuple[Array, ...]:
        return row.product(inputs, columns, layer.tiling, layer.window, row.convolve)

    return jax.vjp(multiply, inputs)[1](gradient)[0]


def _to_columns(row: _Row, layer: Layer, inputs: Array, columns: Array, gradient: tuple[Array, ...]) -> Array:
    def multiply(columns: Array) -> tuple[Array, ...]:
        return row.product(inputs, columns, layer.tiling, layer.window, row.convolve)

    return jax.vjp(multiply, columns)[1](gradient)[0]
