"""How a kernel moves over its input: strides, padding and dilations, resolved from what a user may write."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jax import lax

# What `flax.linen.Conv` accepts for strides and dilations, and for padding.
PerAxis = int | Sequence[int] | None
Padding = str | int | Sequence[int | tuple[int, int]]


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


def positions(input_size: tuple[int, ...], kernel_size: tuple[int, ...], window: Window) -> int:
    """Output positions per example, `OH * OW`."""
    return math.prod(output_size(input_size, kernel_size, window))
