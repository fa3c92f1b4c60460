"""Programs for the array product: rows of one table, which all give the same partial sums.

A lowering takes the codes that drive the rows and the digits that the arrays store, and says how the sums of all
columns are computed: by which products of which inputs with which digits. Everything before (quantizing, encoding,
tiling) and after (the ADC) is elsewhere and the same for all.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from cimjax.core.convolution import convolve, sum_type
from cimjax.core.schedule import apart, in_turn, turn
from cimjax.core.tiling import Tiling, tile_inputs
from cimjax.core.window import Window, positions, shifted
from cimjax.spec import CIMSpec, Lowering, Operands

# With so many products of one layer, and partial sums of at least so many bytes, products are computed one after the
# other: on CPU XLA would hold the sums of all of them at a time. That takes a tenth longer; see `docs/speed.md`.
MANY_TILES = 8
LARGE = 2**26

# The sums of columns of inputs and digits (kh, kw, r, c, m) of one dtype (float32, bfloat16, float16 or int8), linear
# in both, for any `m`: in parts, each (B, OH, OW, r' m) float32 for `r'` successive read groups of the `r`; exact while
# they stay below 2^24.
Product = Callable[[Array, Array], tuple[Array, ...]]


class Columns(NamedTuple):
    """What the arrays store, and what its gradients go to.

    digits: (kh, kw, R, c, M) float32: what each read group stores for its `M` columns, 0 at undriven places.
    codes: (kh, kw, R, c, G O) float32, the weight codes that the first `K O` columns are made of
      (`encoding.split_by_sign`). They get the gradient, by `shares`, and the digits get none: one weight gradient instead of one for every plane.
      None where digits are differentiated themselves.
    shares: `G` rows of `K`, as `encoding.shares` gives them.
    """

    digits: Array
    codes: Array | None = None
    shares: tuple[tuple[float, ...], ...] | None = None

    def by_group(self, channels: Sequence[int]) -> list[Columns]:
        """Those of every read group, and of its first so many channels."""

        def split(values: Array) -> list[Array]:
            # Not slices: their gradients would each be padded to all groups and added up.
            groups = jnp.split(values, len(channels), axis=-3)
            return [group[..., :count, :] for group, count in zip(groups, channels, strict=True)]

        codes = [None] * len(channels) if self.codes is None else split(self.codes)
        return [Columns(*both, self.shares) for both in zip(split(self.digits), codes, strict=True)]


class Tile(NamedTuple):
    """One product of a lowering: of some inputs with the columns of successive read groups."""

    inputs: Array
    columns: Columns
    product: Product


class ArrayProduct(Protocol):
    """The contract of a lowering.

    Args:
      inputs: (B, H, W, C) float32, integer-valued in the integer path.
      columns: what is stored.
      tiling: which channels drive which group.
      window: strides, padding and dilations.

    Returns:
      The products that give all sums; read groups in order.
    """

    def __call__(self, inputs: Array, columns: Columns, tiling: Tiling, window: Window) -> list[Tile]: ...


def grouped_conv(inputs: Array, columns: Columns, tiling: Tiling, window: Window) -> list[Tile]:
    """ONE grouped convolution: a group is a read group, its output channels are that group's columns."""

    def product(inputs: Array, digits: Array) -> tuple[Array, ...]:
        *kernel_size, groups, channels, count = digits.shape
        kernel = jnp.moveaxis(digits, -3, -2).reshape(*kernel_size, channels, groups * count)
        return (convolve(inputs, kernel, window, groups),)

    return [Tile(tile_inputs(inputs, tiling), columns, product)]


def conv_per_tile(inputs: Array, columns: Columns, tiling: Tiling, window: Window) -> list[Tile]:
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

    def product(inputs: Array, digits: Array) -> tuple[Array, ...]:
        return (convolve(inputs, digits[..., 0, :, :], window),)

    groups = columns.by_group([len(channels) for channels in driven])
    return [Tile(share, group, product) for share, group in zip(shares, groups, strict=True)]


def patches(inputs: Array, columns: Columns, tiling: Tiling, window: Window) -> list[Tile]:
    """One batch of matrix products over read groups, on what each output position sees: `im2col` written to memory."""

    def product(inputs: Array, digits: Array) -> tuple[Array, ...]:
        *kernel_size, groups, channels, count = digits.shape
        area = math.prod(kernel_size)
        seen = jnp.stack(shifted(inputs, tuple(kernel_size), window), axis=-2)
        places = seen.shape[:-2]
        sums = lax.dot_general(
            seen.reshape(math.prod(places), area, groups, channels),
            digits.reshape(area, groups, channels, count),
            (((1, 3), (0, 2)), ((2,), (1,))),
            precision=lax.Precision.HIGHEST,
            preferred_element_type=sum_type(inputs.dtype),
        ).astype(jnp.float32)
        return tuple(part.reshape(*places, count) for part in sums)

    return [Tile(tile_inputs(inputs, tiling), columns, product)]


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


class Tiles:
    """The products of the lowering that a specification names.

    many: whether they take turns (on CPU): their gradients by `after`, and forwards if the caller lets them.
    """

    def __init__(self, inputs: Array, columns: Columns, tiling: Tiling, window: Window, spec: CIMSpec):
        self._tiles = choose(spec.lowering)(inputs, columns, tiling, window)
        sums = inputs.shape[0] * positions(inputs.shape[1:-1], tiling.kernel_size, window) * tiling.groups
        large = 4 * sums * columns.digits.shape[-1] >= LARGE
        self.many = jax.default_backend() == "cpu" and len(self._tiles) >= MANY_TILES and large
        self._number: Array | None = None

    def __len__(self) -> int:
        return len(self._tiles)

    def __iter__(self) -> Iterator[Tile]:
        for tile in self._tiles:
            if self._number is not None:
                digits, codes, shares = tile.columns
                if codes is None:
                    digits = in_turn(digits, self._number)
                else:
                    codes = in_turn(codes, self._number)
                tile = tile._replace(columns=Columns(digits, codes, shares))
            yield tile

    def after(self, result: Array) -> Array:
        """A tile's result, unchanged: its gradient waits for those of the tiles after it."""
        if not self.many:
            return result
        result, self._number = turn(result)
        return result


class Multiplication(NamedTuple):
    """What is fixed about the product of a tile.

    operands: the dtype of what is multiplied forwards; gradients are computed in float32 whatever it is.
    columns: `M`, of a read group.
    features, shares: `O`, and `Columns.shares`.
    """

    product: Product
    operands: DTypeLike
    columns: int
    features: int
    shares: tuple[tuple[float, ...], ...] | None

    @classmethod
    def of(cls, tile: Tile, tiling: Tiling, spec: CIMSpec) -> Multiplication:
        """That of a specification."""
        operands = jnp.dtype(choose_operands(spec).value)
        return cls(tile.product, operands, tile.columns.digits.shape[-1], tiling.features, tile.columns.shares)

    def sums(self, inputs: Array, digits: Array) -> tuple[Array, ...]:
        """The sums of all columns in parts, each (..., r M) float32."""
        return self.product(inputs.astype(self.operands), digits.astype(self.operands))

    def gradients(
        self, inputs: Array, digits: Array, codes: Array | None, of_sums: tuple[Array, ...]
    ) -> tuple[Array, Array | None, Array | None]:
        """Gradients to inputs, and to codes or else to digits, of those to the sums of all columns."""
        (to_inputs,) = jax.vjp(lambda inputs: self.product(inputs, digits), inputs)[1](of_sums)
        if codes is None:
            (to_digits,) = jax.vjp(lambda digits: self.product(inputs, digits), digits)[1](of_sums)
            return to_inputs, to_digits, None
        shared = tuple(apart(self._shared, part, known=digits) for part in of_sums)
        (to_codes,) = jax.vjp(lambda codes: self.product(inputs, codes), codes)[1](shared)
        return to_inputs, None, to_codes

    def _shared(self, gradient: Array) -> Array:
        """Gradients of columns, (..., r M), as those of codes, (..., r G O)."""
        assert self.shares is not None
        by_group = gradient
        if gradient.shape[-1] != self.columns:
            by_group = gradient.reshape(*gradient.shape[:-1], gradient.shape[-1] // self.columns, self.columns)
        planes = [by_group[..., k * self.features : (k + 1) * self.features] for k in range(len(self.shares[0]))]
        rows = [
            functools.reduce(jnp.add, (share * plane for share, plane in zip(row, planes, strict=True) if share))
            for row in self.shares
        ]
        joined = rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=-1)
        return joined.reshape(*gradient.shape[:-1], math.prod(joined.shape[gradient.ndim - 1 :]))


def array_product(inputs: Array, columns: Columns, tiling: Tiling, window: Window, spec: CIMSpec) -> tuple[Array, ...]:
    """The sums of all columns, by the program and in the operands that a specification names.

    Returns:
      In parts, each (B, OH, OW, r M) float32 for `r` successive read groups; differentiable in inputs and columns.
    """
    tiles = Tiles(inputs, columns, tiling, window, spec)
    parts: list[Array] = []
    for tile in tiles:
        sums = _multiplied(Multiplication.of(tile, tiling, spec), tile.inputs, tile.columns.digits, tile.columns.codes)
        parts += [tiles.after(part) for part in sums]
    return tuple(parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiplied(how: Multiplication, inputs: Array, digits: Array, codes: Array | None) -> tuple[Array, ...]:
    del codes
    return how.sums(inputs, digits)


def _multiplied_forward(
    how: Multiplication, inputs: Array, digits: Array, codes: Array | None
) -> tuple[tuple[Array, ...], tuple[Array, Array, Array | None]]:
    return _multiplied(how, inputs, digits, codes), (inputs, digits, codes)


def _multiplied_backward(
    how: Multiplication, kept: tuple[Array, Array, Array | None], gradient: tuple[Array, ...]
) -> tuple[Array, Array | None, Array | None]:
    return how.gradients(*kept, gradient)


_multiplied.defvjp(_multiplied_forward, _multiplied_backward)
