"""Dequantize and add (3.7 of the design): from what the ADCs give to the output."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from cimjax.core.array_mac import PartialSums
from cimjax.core.broadcasts import spread
from cimjax.core.step_sizes import StepSizes, expand_outputs, expand_weight
from cimjax.core.tiling import Tiling
from cimjax.spec import CIMSpec


def dequantize_and_add(read: PartialSums, steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> Float[Array, "M O"]:
    """`sum_{t,r,k} g_t f_k s_w P^`, and what the constant of an `offset` encoding adds (the paper's eqs. 2 and 3).

    Args:
      read: partial sums as the ADCs give them, `P^`, (T, M, R, K, O), and the reference's, (T, M, R).
      steps: `weight` and `gain` are used, > 0.

    Returns:
      (M, O) float32, not yet multiplied by the activation's step.
    """
    scale = spread(output_scale(steps, tiling, spec), read.columns.shape)
    slices = slice_significances(spec)[:, None, None, None, None]
    total = jnp.sum(read.columns * scale * slices, axis=(0, 2, 3))
    if read.reference is None:
        return total
    return total + add_reference(read.reference, steps, tiling, spec)


def add_reference(read: Float[Array, "T M R"], steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> Float[Array, "M O"]:
    """What the constant of an `offset` encoding adds: `sum_{t,r} g_t s_w constant` times the sum of the inputs.

    Args:
      read: (T, M, R) float32, the sums of the inputs that drive each read group, as their ADCs give them.

    Returns:
      (M, O) float32.
    """
    significances = slice_significances(spec)
    return jnp.einsum("tmr,t,ro->mo", read, significances, constant(steps, tiling, spec), precision="highest")


def constant(steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> Float[Array, "R O"]:
    """What every input counts, but for its slice, for the constant of an `offset` encoding."""
    # The top plane carries the constant, so its step is the constant's.
    each = expand_weight(steps.weight, tiling)[:, -1] * spec.weight.constant
    return jnp.broadcast_to(each, (tiling.groups, tiling.features))


def output_scale(steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> Array:
    """What a partial sum counts behind its ADC, but for its slice: `f_k s_w`, its gain; broadcastable to (R, K, O)."""
    scale = expand_weight(steps.weight, tiling) * plane_significances(spec)[:, None]
    return scale if steps.gain is None else scale * expand_outputs(steps.gain, tiling)


def slice_significances(spec: CIMSpec) -> np.ndarray:
    """`g_t`, (T,) float32."""
    return np.asarray([part.significance for part in spec.activation.slices], np.float32)


def plane_significances(spec: CIMSpec) -> np.ndarray:
    """`f_k`, (K,) float32."""
    return np.asarray([plane.significance for plane in spec.weight.planes], np.float32)
