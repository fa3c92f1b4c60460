"""How well an ADC's ladder fits its partial sums: what saturates, and how many codes are used."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.core import lsq
from cimjax.core.adc import ranges_of_psums
from cimjax.core.step_sizes import StepSizes, expand_outputs
from cimjax.core.tiling import Tiling
from cimjax.spec import CIMSpec


class ADCStatistics(NamedTuple):
    """The state of one layer's ADCs on some inputs.

    saturated: () the part of the conversions whose psum lies more than half a step beyond the ladder, 0 to 1.
    codes_used: () how many different codes a column gives, mean over columns.
    """

    saturated: Array
    codes_used: Array


def adc_health(psums: Array, steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> ADCStatistics:
    """Look at the conversions of one layer.

    Args:
      psums: (T, M, R, K, O) float32.
      steps: `psum` and `offset` are used.
      spec: with an `adc`.
    """
    q_min, q_max, size = ranges_of_psums(spec)
    step = expand_outputs(steps.psum, tiling)
    offset = None if steps.offset is None else expand_outputs(steps.offset, tiling)
    u = (psums if offset is None else psums - offset) / step
    # A signed 1-bit ADC has two levels, one step from its middle, and reaches one step further.
    margin = np.where((np.asarray(size) == 2) & (np.asarray(q_min) == -1), 1.0, 0.5)
    beyond = (u < q_min - margin) | (u > q_max + margin)
    codes = lsq.quantize(psums, step, (q_min, q_max, size), offset, half_up=True)
    values = np.arange(int(np.min(np.asarray(q_min))), int(np.max(np.asarray(q_max))) + 1, dtype=np.float32)
    used = jax.lax.map(lambda value: jnp.any(codes == value, axis=(0, 1)), jnp.asarray(values))
    return ADCStatistics(jnp.mean(beyond, dtype=jnp.float32), jnp.mean(jnp.sum(used, axis=0, dtype=jnp.float32)))
