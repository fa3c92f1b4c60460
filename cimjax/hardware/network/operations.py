"""A network in integers from its first codes to its result: what a chip computes, bit for bit, in NumPy.

A list of steps, each an operation on the integers of earlier ones, to which the order of sums does not matter. Built by
`cimjax.hardware.network.fold`, which puts normalization and all steps of quantizers into factors and thresholds.

An operation is called on int32 arrays (N, ..., C), and gives int32, or what fits into it. Its `bound` is the largest
magnitude of what it gives, by the largest magnitudes of what it is called on: so every integer of a network is known to
fit before there is any.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cimjax.hardware import engine
from cimjax.hardware.factors import INT32
from cimjax.hardware.freeze import FrozenLayer


@dataclasses.dataclass(frozen=True, eq=False)
class Entry:
    """What comes from outside: codes, or values in units of the step's exponent, of which larger ones are cut off.

    number: which of the network's entries it is.
    largest: its largest magnitude.
    """

    number: int
    largest: int

    def bound(self) -> int:
        return self.largest


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """A layer of arrays on codes: its accumulators. The step of its input is in its factors.

    largest: what an accumulator can come to.
    """

    layer: FrozenLayer
    largest: int

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        leading = codes.ndim - len(self.layer.kernel_size) - 1
        images = codes.reshape(-1, *codes.shape[leading:])
        accumulators = engine.run(self.layer, images).accumulators
        return accumulators.reshape(*codes.shape[:leading], *accumulators.shape[1:])

    def bound(self, codes: int) -> int:
        return self.largest


@dataclasses.dataclass(frozen=True, eq=False)
class Codes:
    """The codes of an activation: `lowest + spacing * (how many thresholds the value reaches)`.

    thresholds: (C, L) int32, rising, of each channel, or (1, L) of all.
    sign: (C,) or (1,): -1 where codes fall as the value rises, whose thresholds are those of its negative; else 1.
    """

    thresholds: np.ndarray
    sign: np.ndarray
    lowest: int
    spacing: int

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = x * self.sign
        reached = np.zeros(x.shape, np.int32)
        for threshold in self.thresholds.T:
            reached += x >= threshold
        return self.lowest + self.spacing * reached

    def bound(self, x: int) -> int:
        return max(abs(self.lowest), abs(self.lowest + self.spacing * self.thresholds.shape[1]))


@dataclasses.dataclass(frozen=True, eq=False)
class Add:
    """The sum of two values, each `x >> shift`, rounded: those in finer units than the sum are shifted."""

    shifts: tuple[int, ...]

    def __call__(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return shifted(x, self.shifts[0]) + shifted(y, self.shifts[1])

    def bound(self, x: int, y: int) -> int:
        return shifted_bound(x, self.shifts[0]) + shifted_bound(y, self.shifts[1])


@dataclasses.dataclass(frozen=True, eq=False)
class Limit:
    """Values kept between two: `low` 0 alone is a ReLU.

    low, high: (C,) or (1,) int32.
    """

    low: np.ndarray
    high: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.clip(x, self.low, self.high)

    def bound(self, x: int) -> int:
        return max(int(np.abs(np.clip(end, self.low, self.high)).max()) for end in (-x, x))


@dataclasses.dataclass(frozen=True, eq=False)
class Rescale:
    """Values in other units: `(x * factors >> shift) + added`, of a product of 64 bits, rounded in the shift.

    factors, added: (C,) or (1,) int32, of one shape.
    """

    shift: int
    factors: np.ndarray
    added: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return shifted(x.astype(np.int64) * self.factors, self.shift) + self.added

    def bound(self, x: int) -> int:
        pairs = zip(*(np.abs(each.astype(np.int64)).tolist() for each in (self.factors, self.added)), strict=True)
        return max(shifted_bound(x * factor, self.shift) + added for factor, added in pairs)


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """A matrix product of values: `(x >> shift) @ weights + added`, rounded in the shift.

    weights: (C, O) int32.
    added: (O,) int32.
    """

    shift: int
    weights: np.ndarray
    added: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return shifted(x, self.shift) @ self.weights + self.added

    def bound(self, x: int) -> int:
        columns = np.abs(self.weights.astype(np.int64)).sum(axis=0)
        return int((columns * shifted_bound(x, self.shift) + np.abs(self.added.astype(np.int64))).max())


@dataclasses.dataclass(frozen=True, eq=False)
class Reduce:
    """The largest value over axes, or with `shift` the sum of so many `terms`, each `x >> shift`, rounded."""

    axes: tuple[int, ...]
    terms: int
    shift: int | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self.shift is None:
            return x.max(axis=self.axes)
        return shifted(x, self.shift).sum(axis=self.axes, dtype=np.int32)

    def bound(self, x: int) -> int:
        return x if self.shift is None else self.terms * shifted_bound(x, self.shift)


@dataclasses.dataclass(frozen=True, eq=False)
class Pool:
    """The largest value of windows, or with `shift` the sum of `x >> shift` in them; padding is never the largest.

    size, strides, padding: of every axis, as of `jax.lax.reduce_window`.
    """

    size: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    shift: int | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        largest = self.shift is None
        x = x if self.shift is None else shifted(x, self.shift)
        x = np.pad(x, self.padding, constant_values=-INT32 if largest else 0)
        windows = np.lib.stride_tricks.sliding_window_view(x, self.size)
        windows = windows[tuple(slice(None, None, stride) for stride in self.strides)]
        axes = tuple(range(x.ndim, 2 * x.ndim))
        return windows.max(axis=axes) if largest else windows.sum(axis=axes, dtype=np.int32)

    def bound(self, x: int) -> int:
        return x if self.shift is None else int(np.prod(self.size)) * shifted_bound(x, self.shift)


@dataclasses.dataclass(frozen=True, eq=False)
class Rearrange:
    """Values in other places, of every image alike.

    kind: "pick" (start, stop, step of every axis behind the images), "pad" (zeros before and behind on every axis),
      "reshape" (the shape of an image) or "transpose" (the axes, the first of which is that of images).
    """

    kind: str
    to: tuple[Any, ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        if self.kind == "pick":
            return x[(slice(None), *(slice(*each) for each in self.to))]
        if self.kind == "pad":
            return np.pad(x, self.to)
        return x.reshape(len(x), *self.to) if self.kind == "reshape" else x.transpose(self.to)

    def bound(self, x: int) -> int:
        return x


@dataclasses.dataclass(frozen=True, eq=False)
class Join:
    """Values side by side on an axis, each `x >> shift`, rounded."""

    axis: int
    shifts: tuple[int, ...]

    def __call__(self, *parts: np.ndarray) -> np.ndarray:
        return np.concatenate([shifted(x, shift) for x, shift in zip(parts, self.shifts, strict=True)], axis=self.axis)

    def bound(self, *parts: int) -> int:
        return max(shifted_bound(x, shift) for x, shift in zip(parts, self.shifts, strict=True))


Operation = Entry | Arrays | Codes | Add | Limit | Rescale | Product | Reduce | Pool | Join | Rearrange


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One operation.

    inputs: the numbers of the steps whose integers it takes.
    exponent: of the power of two that one unit of its integers is; None of codes, which are counted in the step of
      their quantizer.
    """

    operation: Operation
    inputs: tuple[int, ...]
    exponent: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class IntegerNetwork:
    """A network as steps on integers; the last one's are the result.

    steps: in order.
    enter: the integers that come from outside, of images (N, H, W, C): what stands before the first codes (a first
      convolution in full precision, say) is computed as the network has it, and rounded.
    """

    steps: tuple[Step, ...]
    enter: Callable[[Any], list[np.ndarray]]

    def __call__(self, images: Any) -> np.ndarray:
        """The result for images (N, H, W, C), as real numbers, float64, of the shape of the network's."""
        exponent = self.steps[-1].exponent
        assert exponent is not None
        return np.ldexp(self.run(self.enter(images))[-1].astype(np.float64), exponent)

    def run(self, entries: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The integers of every step, int32, of those that enter.

        Args:
          entries: integers of each entry, of the first axis that images have; larger ones are cut off.
        """
        found: list[np.ndarray] = []
        for step in self.steps:
            if isinstance(step.operation, Entry):
                most = step.operation.largest
                value = np.clip(np.asarray(entries[step.operation.number]), -most, most)
            else:
                value = step.operation(*(found[number] for number in step.inputs))
            found.append(value.astype(np.int32))
        return found


def shifted(x: np.ndarray, shift: int) -> np.ndarray:
    """`x / 2^shift`, rounded, halves up."""
    return x if not shift else ((x >> (shift - 1)) + 1) >> 1


def shifted_bound(x: int, shift: int) -> int:
    """What values up to `x` can be after a shift."""
    return x if not shift else (x >> shift) + 1
