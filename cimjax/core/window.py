"""How a kernel moves over its input: strides, padding and dilations, resolved from what a user may write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

# What `flax.linen.Conv` accepts for strides and dilations, and for padding.
PerAxis = int | Sequence[int] | None
Padding = str | int | Sequence[int | Sequence[int]]


class Window(NamedTuple):
    """How a kernel moves over its input, one entry per spatial axis; padded and dilated places are undriven rows."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]


def resolve(
    input_size: tuple[int, ...],
    kernel_size: tuple[int, ...],
    *,
    strides: PerAxis = None,
    padding: Padding,
    input_dilation: PerAxis = None,
    kernel_dilation: PerAxis = None,
) -> Window:
    """The window of a convolution in the forms that `flax.linen.Conv` accepts; None and integers hold for all axes.

    Raises:
      ValueError: for a padding mode other than SAME and VALID, or an entry count that is not the number of axes.
    """
    axes = len(kernel_size)
    steps = _per_axis("strides", strides, axes)
    input_gaps = _per_axis("input_dilation", input_dilation, axes)
    kernel_gaps = _per_axis("kernel_dilation", kernel_dilation, axes)
    if isinstance(padding, str) and any(gap != 1 for gap in input_gaps):
        raise ValueError(f"`padding` is {padding!r} with an input dilation of {input_gaps}; give (low, high) pairs.")
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(
                f"`padding` is {padding!r}; give 'SAME', 'VALID', an integer or pairs, or pad the input yourself."
            )
        spans = [(size - 1) * gap + 1 for size, gap in zip(kernel_size, kernel_gaps, strict=True)]
        pairs = tuple((low, high) for low, high in lax.padtype_to_pads(input_size, spans, steps, padding))
    elif isinstance(padding, int):
        pairs = ((padding, padding),) * axes
    else:
        entries = [(entry, entry) if isinstance(entry, int) else tuple(entry) for entry in padding]
        if any(len(entry) != 2 for entry in entries):
            raise ValueError(f"`padding` is {padding!r}; give an integer or a (low, high) pair for each spatial axis.")
        pairs = tuple((low, high) for low, high in entries)
    if len(pairs) != axes:
        raise ValueError(f"`padding` is {padding!r}; give one (low, high) pair for each of the {axes} spatial axes.")
    return Window(steps, pairs, input_gaps, kernel_gaps)


def _per_axis(name: str, value: PerAxis, axes: int) -> tuple[int, ...]:
    value = 1 if value is None else value
    entries = (value,) * axes if isinstance(value, int) else tuple(value)
    if len(entries) != axes or any(entry < 1 for entry in entries):
        raise ValueError(f"`{name}` is {value!r}; give a positive integer for each of the {axes} spatial axes.")
    return entries


def output_size(input_size: tuple[int, ...], kernel_size: tuple[int, ...], window: Window) -> tuple[int, ...]:
    """The spatial shape of the output."""
    sizes = []
    for size, kernel, stride, pair, gap, kernel_gap in zip(input_size, kernel_size, *window, strict=True):
        span = (kernel - 1) * kernel_gap + 1
        sizes.append(max(0, ((size - 1) * gap + 1 + sum(pair) - span) // stride + 1))
    return tuple(sizes)


def dimension_numbers(axes: int) -> tuple[str, str, str]:
    """The layouts of inputs, kernel and outputs of a convolution over so many spatial axes: `NHWC`, `HWIO`, `NHWC`."""
    spatial = "".join(chr(ord("a") + axis) for axis in range(axes))
    return f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"


def shifted(x: Array, kernel_size: tuple[int, ...], window: Window) -> list[Array]:
    """What each place of the kernel meets at every output position, 0 where the input is padded.

    Args:
      x: (N, H, W, C).

    Returns:
      `kh kw` arrays (N, OH, OW, C), the kernel's last axis fastest.
    """
    padded = pad(x, window)
    size = output_size(x.shape[1:-1], kernel_size, window)
    spans = [stride * (count - 1) + 1 if count else 0 for stride, count in zip(window.strides, size, strict=True)]
    parts = []
    for place in itertools.product(*map(range, kernel_size)):
        first = [index * gap for index, gap in zip(place, window.kernel_dilation, strict=True)]
        last = [start + span for start, span in zip(first, spans, strict=True)]
        parts.append(lax.slice(padded, (0, *first, 0), (x.shape[0], *last, x.shape[-1]), (1, *window.strides, 1)))
    return parts


def seen_at(x: Array, places: np.ndarray, kernel_size: tuple[int, ...], window: Window) -> Array:
    """What a kernel meets at some output positions: (S, kh, kw, C), to be convolved by `without_padding`.

    Args:
      x: (N, H, W, C).
      places: (S,) int, positions in `N OH OW`.
    """
    padded = pad(x, window)
    image, *corner = np.unravel_index(places, (x.shape[0], *output_size(x.shape[1:-1], kernel_size, window)))
    axes = len(kernel_size)
    index = [image.reshape(-1, *[1] * axes)]
    for axis, size in enumerate(kernel_size):
        inside = np.arange(size).reshape(*[1] * (axis + 1), -1, *[1] * (axes - axis - 1))
        first = (corner[axis] * window.strides[axis]).reshape(-1, *[1] * axes)
        index.append(first + inside * window.kernel_dilation[axis])
    return padded[tuple(index)]


def pad(x: Array, window: Window) -> Array:
    """(N, H, W, C) with undriven places around and between."""
    edges = [(low, high, gap - 1) for (low, high), gap in zip(window.padding, window.input_dilation, strict=True)]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *edges, (0, 0, 0)])


def without_padding(axes: int) -> Window:
    """A kernel that stands still on an input of its own size."""
    return Window((1,) * axes, ((0, 0),) * axes, (1,) * axes, (1,) * axes)


def positions(input_size: tuple[int, ...], kernel_size: tuple[int, ...], window: Window) -> int:
    """Output positions per example, `OH * OW`."""
    return math.prod(output_size(input_size, kernel_size, window))
