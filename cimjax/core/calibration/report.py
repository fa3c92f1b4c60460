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
    """What the data of one layer was like; all () float32 or int32.

    below, above: the part of the input's magnitude that lies beyond the lowest and the highest code, 0 to 1.
    constant: 1 where the input is the same everywhere, else 0.
    silent, groups: ADC steps whose columns saw partial sums of 0 alone, and how many there are.
    empty: weight steps all of whose weights are 0.
    """

    below: Any = 0.0
    above: Any = 0.0
    constant: Any = 0
    silent: Any = 0
    groups: Any = 0
    empty: Any = 0

    def worse(self, other: CalibrationReport) -> CalibrationReport:
        """The worse of two reports of one layer, of each entry."""
        return jax.tree.map(jnp.maximum, self, other)

    def messages(self, name: str) -> Iterator[str]:
        """One line for each thing that is wrong.

        Args:
          name: the layer's path.
        """
        if self.constant:
            yield (
                f"{name}: steps were set from an input that is the same everywhere, so they say nothing of real data; "
                "give real data to `init`, or call cimjax.calibrate(model, variables, data) before training."
            )
            return
        if self.below > MUCH:
            yield (
                f"{name}: {self.below:.0%} of the input's magnitude lies below its lowest code and is lost; give the "
                "layer's `activation` signed=True, or put a ReLU before it."
            )
        if self.above > MUCH:
            yield (
                f"{name}: {self.above:.0%} of the input's magnitude lies beyond its highest code and is lost; use more "
                "activation bits, start='least_squares' or a larger step."
            )
        if self.silent:
            yield (
                f"{name}: {self.silent:,} of {self.groups:,} ADC steps saw partial sums of 0 alone and stay at 1; "
                "calibrate on data that drives all inputs."
            )
        if self.empty:
            yield f"{name}: {self.empty:,} weight steps have weights of 0 alone and stay at 1."


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
