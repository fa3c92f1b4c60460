"""What is said of the data from which steps were set: no step is good that follows from the wrong data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cimjax.spec import ActivationSpec

# The part of an input's magnitude whose loss is worth a word: LSQ's start loses below a tenth, at any number of bits.
MUCH = 0.2


class CalibrationReport(NamedTuple):
    """What the data of one layer was like; all () float32 or int32, or one for each of several.

    below, above: the part of the input's magnitude that lies beyond the lowest and the highest code, 0 to 1.
    constant: 1 where the input is the same everywhere, else 0.
    silent, groups: ADC steps whose columns saw partial sums of 0 alone, and how many there are.
    empty: weight steps all of whose weights are 0.
    calls: from how many calls of the layer its steps were set.
    """

    below: Any = 0.0
    above: Any = 0.0
    constant: Any = 0
    silent: Any = 0
    groups: Any = 0
    empty: Any = 0
    calls: Any = 1

    @classmethod
    def nothing(cls, like: Array) -> CalibrationReport:
        """That of a layer that was not called, each entry of the shape of an array."""
        shape = jnp.shape(like)
        return cls(*(jnp.zeros(shape, jnp.float32 if isinstance(value, float) else jnp.int32) for value in cls()))

    def joined(self, other: CalibrationReport) -> CalibrationReport:
        """The worse of two reports of one layer, of each entry, and the calls of both."""
        worse = jax.tree.map(lambda one, two: jnp.maximum(one, jnp.asarray(two, one.dtype)), self, other)
        return worse._replace(calls=self.calls + other.calls)

    def worst(self) -> CalibrationReport:
        """The worst of several reports of one path; of calls the fewest."""
        worst = jax.tree.map(jnp.max, self)
        return worst._replace(calls=jnp.min(self.calls))

    def messages(self, name: str) -> Iterator[tuple[str, str]]:
        """What is wrong: the name of the matter, and a line on it.

        Args:
          name: the layer's path.
        """
        if not self.calls:
            yield (
                "calls",
                f"{name}: no steps were set, it was not called, or where its parameters cannot change; calibrate it by "
                "a call that reaches it.",
            )
            return
        if self.constant:
            yield (
                "constant",
                f"{name}: steps were set from an input that is the same everywhere, so they say nothing of real data; "
                "give real data to `init`, or call cimjax.calibrate(model, variables, data) before training.",
            )
            return
        if self.below > MUCH:
            yield (
                "below",
                f"{name}: {self.below:.0%} of the input's magnitude lies below its lowest code and is lost; give the "
                "layer's `activation` signed=True, or put a ReLU before it.",
            )
        if self.above > MUCH:
            yield (
                "above",
                f"{name}: {self.above:.0%} of the input's magnitude lies beyond its highest code and is lost; use more "
                "activation bits, start='least_squares' or a larger step.",
            )
        if self.silent:
            yield (
                "silent",
                f"{name}: {self.silent:,} of {self.groups:,} ADC steps saw partial sums of 0 alone and stay at 1; "
                "calibrate on data that drives all inputs.",
            )
        if self.empty:
            yield "empty", f"{name}: {self.empty:,} weight steps have weights of 0 alone and stay at 1."


def report_input(x: Array, step: Array, spec: ActivationSpec) -> CalibrationReport:
    """What a layer's input loses to the range of its codes.

    Args:
      x: any shape, real.
      step: () > 0.
    """
    x = jnp.asarray(x, jnp.float32)
    if not x.size:
        return CalibrationReport()
    codes, magnitude = spec.code_range, jnp.maximum(jnp.sum(jnp.abs(x)), 1e-30)
    # A sign stands for all values of its side.
    below, above = (
        (0.0, 0.0)
        if codes.binary
        else (
            jnp.sum(jnp.maximum(step * codes.q_min - x, 0.0)) / magnitude,
            jnp.sum(jnp.maximum(x - step * codes.q_max, 0.0)) / magnitude,
        )
    )
    constant = (jnp.max(x) == jnp.min(x)) & (x.size > 1)
    return CalibrationReport(
        jnp.float32(below), jnp.float32(above), constant.astype(jnp.int32), *jnp.zeros(3, jnp.int32)
    )
