"""What the data was like from which steps were set: no step is good that follows from the wrong data.

Numbers only; sentences are made of them in `cimjax.nn.calibration_warnings`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cimjax.spec import ActivationSpec


class CalibrationReport(NamedTuple):
    """What the data of one layer was like; all () float32 or int32, or one for each of several.

    negative: the part of the input's magnitude that is negative where codes are not, 0 to 1.
    clipped: the part that lies beyond the codes otherwise, 0 to 1.
    missing: values of the input that are no finite numbers.
    constant: 1 where the input is empty or the same everywhere, else 0.
    single: ADC steps that were each set from a single position's partial sums.
    silent, groups: ADC steps whose columns saw partial sums of 0 alone, and how many there are.
    empty: weight steps all of whose weights are 0.
    calls: from how many calls of the layer its steps were set.
    """

    negative: Any = 0.0
    clipped: Any = 0.0
    missing: Any = 0
    constant: Any = 0
    single: Any = 0
    silent: Any = 0
    groups: Any = 0
    empty: Any = 0
    calls: Any = 1

    @classmethod
    def nothing(cls, step: Array) -> CalibrationReport:
        """Of a layer that was not called; each entry has the shape of its step."""
        shape = jnp.shape(step)
        return cls(*(jnp.zeros(shape, jnp.float32 if isinstance(value, float) else jnp.int32) for value in cls()))

    def joined(self, other: CalibrationReport) -> CalibrationReport:
        """The worse of two reports of one layer, of each entry, and the calls of both."""
        worse = jax.tree.map(lambda one, two: jnp.maximum(one, jnp.asarray(two, one.dtype)), self, other)
        return worse._replace(calls=self.calls + other.calls)

    def worst(self) -> CalibrationReport:
        """The worst of several reports of one path; of calls the fewest."""
        worst = jax.tree.map(jnp.max, self)
        return worst._replace(calls=jnp.min(self.calls))


def report_input(x: Array, step: Array, spec: ActivationSpec) -> CalibrationReport:
    """What a layer's input loses to the range of its codes.

    Args:
      x: any shape, real.
      step: () > 0.
    """
    x = jnp.asarray(x, jnp.float32)
    if not x.size:
        return CalibrationReport(constant=jnp.int32(1))
    codes, magnitude = spec.code_range, jnp.maximum(jnp.sum(jnp.abs(x)), 1e-30)
    below = jnp.sum(jnp.maximum(step * codes.q_min - x, 0.0)) / magnitude
    above = jnp.sum(jnp.maximum(x - step * codes.q_max, 0.0)) / magnitude
    negative, clipped = (below, above) if codes.q_min == 0 else (jnp.zeros_like(above), below + above)
    constant = (jnp.max(x) == jnp.min(x)) & (x.size > 1)
    return CalibrationReport(
        negative=negative,
        # A sign stands for all values of its side.
        clipped=jnp.zeros_like(clipped) if codes.binary else clipped,
        missing=jnp.sum(~jnp.isfinite(x), dtype=jnp.int32),
        constant=constant.astype(jnp.int32),
    )
