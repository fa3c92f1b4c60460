"""Operations on real numbers as ones on integers, when units are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from cimjax.hardware.factors import INT32, Factors, Reach, int32
from cimjax.hardware.freeze import FrozenLayer
from cimjax.hardware.network.nodes import Node
from cimjax.hardware.network.operations import Arrays, Codes, Limit, Operation, Pool, Rearrange, Reduce
from cimjax.hardware.network.units import Make, Value


def function(node: Node) -> Callable[[np.ndarray], np.ndarray]:
    """What a node does to every value, of channels on the last axis."""
    fields = node.fields
    if node.kind == "affine":
        return lambda x: fields["factor"] * x + fields["added"]
    if node.kind == "limit":
        return lambda x: np.clip(x, fields["low"], fields["high"])
    return fields["function"]


def folded(layer: FrozenLayer, real: Factors, reach: Reach) -> Make:
    """A layer of arrays, its factors in units of the exponent; `reach` is how far its sums come."""

    def make(exponent: int, bounds: Sequence[int]) -> Operation:
        found = real.in_units(exponent)
        folded = layer.with_factors(found.of_codes, found.of_sums, found.added, exponent)
        return Arrays(folded, int(found.largest_total(reach)))

    return make


def limits(low: np.ndarray, high: np.ndarray) -> Make:
    """Limits that are real numbers, in units of the exponent."""
    return lambda exponent, bounds: Limit(int32(low, exponent), int32(high, exponent))


def terms(node: Node) -> int:
    """How many values a sum adds up."""
    if node.kind == "window":
        return math.prod(node.fields["size"])
    return math.prod(node.inputs[0].shape[axis] for axis in node.fields["axes"])


def adding(node: Node, x: Value) -> Make:
    """The sum of a "sum" or of the windows of a "window", of values that are shifted to units of the exponent."""

    def make(exponent: int, bounds: Sequence[int]) -> Operation:
        shift = exponent - x.exponent
        if node.kind == "sum":
            return Reduce(node.fields["axes"], terms(node), shift)
        return Pool(node.fields["size"], node.fields["strides"], node.fields["padding"], shift)

    return make


def moved(node: Node) -> Operation:
    """What puts values into other places, or takes the largest."""
    if node.kind == "largest":
        return Reduce(node.fields["axes"], 1)
    if node.kind == "window":
        return Pool(node.fields["size"], node.fields["strides"], node.fields["padding"])
    return Rearrange(node.kind, node.fields["to"])


def crossed(real: Callable[[np.ndarray], np.ndarray], bound: int, node: Node) -> Codes:
    """The thresholds of codes of a rising or falling function of integers up to `bound`, found by bisection."""
    spec, step = node.fields["spec"], node.fields["step"]
    q_min, q_max, size = spec.code_range
    spacing = 2 if spec.code_range.binary else 1
    wanted = q_min + spacing * np.arange(1, size)[:, None]  # (L, 1)
    ends = real(np.array([[-bound], [bound]]))
    sign = np.where(ends[1] < ends[0], -1, 1).astype(np.int32)
    low = np.full((size - 1, len(sign)), -bound, np.int64)
    high = np.full_like(low, bound + 1)
    while (low < high).any():
        middle = (low + high) // 2
        u = real(sign * middle) / step
        codes = np.where(u >= 0, 1, -1) if spec.code_range.binary else np.clip(np.rint(u), q_min, q_max)
        reached = codes >= wanted
        high, low = np.where(reached, middle, high), np.where(reached, low, np.minimum(middle + 1, high))
    return Codes(np.minimum(high, INT32).T.astype(np.int32), sign, int(q_min), spacing)
