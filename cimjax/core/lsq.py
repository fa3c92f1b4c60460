"""Learned-step quantization (LSQ): codes, their custom gradients, and how a step is stored and scaled.

Source: Esser et al., "Learned step size quantization", ICLR 2020, extended to steps of any broadcastable shape and to
an offset. What shares a step is decided by `cimjax.core.step_sizes`; starting values are in `cimjax.core.calibration`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from cimjax.core.broadcasts import spread, sum_to_shape
from cimjax.core.gradients import straight_through
from cimjax.core.reciprocal import reciprocal
from cimjax.spec import ActivationSpec
from cimjax.spec.codes import CodeRange

# Bounds of a stored log-step: a step stays within exp(-25) .. exp(25), about 1e-11 .. 1e11, so that the product of an
# activation's, a weight's and an ADC's step and of what they multiply is finite in float32.
LOG_STEP_LIMIT = 25.0
# Bound of a stored offset, in its units.
OFFSET_LIMIT = 2.0**24


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "step"], meta_fields=["spec"])
@dataclasses.dataclass(frozen=True)
class Codes:
    """A quantized tensor: integer-valued `codes`, the `step` that one unit stands for, and their specification.

    codes: (N, ..., C) float32, integer-valued, within `spec.code_range`.
    step: () float32, > 0.
    """

    codes: Array
    step: Array
    spec: ActivationSpec

    @property
    def value(self) -> Array:
        """The real tensor that the codes stand for, `step * codes`."""
        return self.codes * self.step


def quantize(
    x: ArrayLike,
    step: ArrayLike,
    code_range: CodeRange,
    offset: ArrayLike | None = None,
    *,
    half_up: bool = False,
    margin: float = 0.0,
    bumps: float = 0.0,
) -> Array:
    """Codes of `x`: `clip(round(u), q_min, q_max)` with `u = (x - offset) * (1 / step)` in float32.

    A `{-1, +1}` quantizer gives the sign of `x - offset`, +1 at 0. Gradients, with the same `u`: inside
    `q_min - margin <= u <= q_max + margin`, `d code/dx = 1/step`, `d/dstep = -u/step`, `d/doffset = -1/step`; outside
    all are 0. For `{-1, +1}`: `1/step` and `-1/step` where `|u| <= 1`, and no gradient to the step. With `dequantize`
    this is LSQ (Esser et al. 2020, eq. 3).

    With `bumps`, gradients pass everywhere, each multiplied by `h N(u - t)` instead of by 1 or 0: `t` is the threshold
    between codes that is nearest to `u`, `N` the density of a normal distribution of that deviation, and `h` the height
    of the stair at `t`, 1, or 2 of `{-1, +1}`. (hpic-lab/BNN_IGA, "impulse gradient approximation".)

    Deviation: activations and weights round ties to even, as the paper's `round` does in its code; an ADC rounds them
    up (`half_up`), so that its thresholds are a uniform ladder.

    Args:
      x: any shape, real; computed in float32.
      step: broadcastable to `x`, > 0.
      code_range: the codes; its entries may be arrays broadcastable to `x`, so that parts of one tensor may be signed
        and others unsigned.
      offset: broadcastable to `x`, the value of code 0; None is 0.
      half_up: round ties up (an ADC's uniform ladder) instead of to even.
      margin: how far beyond its codes a quantizer passes gradients, in steps; 0 is LSQ's, 1/2 reaches as far as values
        are rounded to the outer codes by no more than half a step.
      bumps: standard deviation of the bumps, in steps; 0 is LSQ's window.

    Returns:
      Codes, float32, the shape of `x`; NaN where `x` or the offset is.

    >>> print(quantize(jnp.array([-1.0, 0.6, 9.0]), 0.5, CodeRange(0, 7, 8)))
    [0. 1. 7.]
    """
    bounds = Bounds.of(code_range, margin, bumps)
    x, step = jnp.asarray(x, jnp.float32), jnp.asarray(step, jnp.float32)
    offset = None if offset is None else jnp.asarray(offset, jnp.float32)
    return _quantize(half_up, x, step, offset, bounds)


class Bounds(NamedTuple):
    """What a quantizer does where: arrays that broadcast to its input, known before tracing.

    q_min, q_max: the lowest and the highest code, float32.
    sign: bool, where the code is a sign; None where there is no such part, so that others pay nothing for it.
    low, high: the `u` between which gradients pass, ends included, float32.
    bumps: standard deviation in steps of bumps at thresholds in which gradients pass instead; None where none are.
    """

    q_min: Any
    q_max: Any
    sign: Any
    low: Any
    high: Any
    bumps: Any = None

    @classmethod
    def of(cls, code_range: CodeRange, margin: float, bumps: float = 0.0) -> Bounds:
        """The bounds of a code range, passing gradients `margin` beyond its codes; a sign only up to them."""
        q_min, q_max, size = (np.asarray(entry, np.float32) for entry in code_range)
        sign = CodeRange(q_min, q_max, size).binary
        reach = np.where(sign, np.float32(0), np.float32(margin))
        deviation = np.float32(bumps) if bumps else None
        return cls(q_min, q_max, sign if sign.any() else None, q_min - reach, q_max + reach, deviation)


def in_steps(x: Array, of_step: Array, offset: Array | None) -> Array:
    """`u`: the distance of `x` from the offset, in steps; the same float32 numbers in both passes.

    Args:
      of_step: `reciprocal(step)`, computed before it is broadcast: no backend may turn this into a division.
    """
    return _from_offset(x, offset) * of_step


def round_to_codes(u: Array, x: Array, offset: Array | None, bounds: Bounds, *, half_up: bool) -> Array:
    """The codes of `x` at `u = in_steps(x, reciprocal(step), offset)`; arguments as for `quantize`."""
    # Clipping first changes no code, and keeps compilers from fusing the product in `u` with the sum below into one
    # operation that rounds once instead of twice: codes at ties are then the same on every backend.
    inside = jnp.clip(u, bounds.q_min, bounds.q_max)
    codes = jnp.floor(inside + 0.5) if half_up else jnp.rint(inside)
    if bounds.sign is None:
        return codes
    # The sign of `x - offset`: in steps a tiny negative distance could vanish. What is no number has none.
    distance = _from_offset(x, offset)
    sign_of_distance = jnp.where(distance >= 0, 1.0, jnp.where(distance < 0, -1.0, distance))
    return jnp.where(bounds.sign, sign_of_distance, codes)


def _from_offset(x: Array, offset: Array | None) -> Array:
    return x if offset is None else x - offset


def passed(gradient: Array, u: Array, bounds: Bounds) -> Array:
    """What of a gradient passes a quantizer: all that follows from it is LSQ's (Esser et al. 2020, eq. 3).

    With `g` the gradient to `P^ = step code + offset` and `g'` what passes of it: `g'` goes to `x`, `code g - u g'` to
    the step (`code g` where the code is a sign), and `g - g'` to the offset.

    Args:
      gradient: broadcastable to `u`.
      u: as `in_steps` gives it.
    """
    if bounds.bumps is None:
        return jnp.where(jnp.logical_and(bounds.low <= u, u <= bounds.high), gradient, 0.0)
    threshold = jnp.clip(jnp.floor(u) + 0.5, bounds.q_min + 0.5, bounds.q_max - 0.5)
    if bounds.sign is not None:
        threshold = jnp.where(bounds.sign, 0.0, threshold)
        gradient = jnp.where(bounds.sign, 2.0, 1.0) * gradient
    density = jnp.exp(-0.5 * jnp.square((u - threshold) / bounds.bumps)) / (bounds.bumps * math.sqrt(2 * math.pi))
    return jnp.where(jnp.isfinite(u), gradient * density, 0.0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quantize(half_up: bool, x: Array, step: Array, offset: Array | None, bounds: Bounds) -> Array:
    return round_to_codes(in_steps(x, reciprocal(step), offset), x, offset, bounds, half_up=half_up)


def _quantize_forward(half_up: bool, *operands: Any) -> tuple[Array, tuple[Any, ...]]:
    return _quantize(half_up, *operands), operands


def _quantize_backward(half_up: bool, residuals: tuple[Any, ...], gradient: Array) -> tuple[Any, ...]:
    x, step, offset, bounds = residuals
    of_step = reciprocal(step)
    u = in_steps(x, of_step, offset)
    to_x = passed(gradient, u, bounds) * of_step
    # The operand is selected too: a huge `u` must not meet a zero gradient as inf * 0.
    counts = to_x != 0 if bounds.sign is None else jnp.logical_and(to_x != 0, jnp.logical_not(bounds.sign))
    rest = jnp.where(counts, u, 0.0)
    to_offset = None if offset is None else sum_to_shape(-to_x, offset.shape)
    return sum_to_shape(to_x, x.shape), sum_to_shape(-rest * to_x, step.shape), to_offset, None


_quantize.defvjp(_quantize_forward, _quantize_backward)


def dequantize(codes: ArrayLike, step: ArrayLike, offset: ArrayLike | None = None) -> Array:
    """The real values of codes: `step * codes + offset`, differentiated as it stands.

    Args:
      codes: any shape.
      step: broadcastable to `codes`, > 0.
      offset: broadcastable to `codes`; None is 0.

    Returns:
      Array of the broadcast shape, float32.
    """
    codes, step = jnp.asarray(codes, jnp.float32), jnp.asarray(step, jnp.float32)
    shape = jnp.broadcast_shapes(codes.shape, step.shape)
    value = codes * spread(step, shape)
    return value if offset is None else value + spread(jnp.asarray(offset, jnp.float32), shape)


def fake_quantize(
    x: ArrayLike,
    step: ArrayLike,
    code_range: CodeRange,
    offset: ArrayLike | None = None,
    *,
    half_up: bool = False,
    margin: float = 0.0,
    bumps: float = 0.0,
) -> Array:
    """`dequantize(quantize(x))`: `x` rounded to the nearest representable value.

    Gradients follow: inside `d/dx = 1`, `d/dstep = code - u`, `d/doffset = 0`; outside `0`, `code`, `1` (Esser et al.
    2020, eq. 3, with an offset). Arguments as for `quantize`.
    """
    codes = quantize(x, step, code_range, offset, half_up=half_up, margin=margin, bumps=bumps)
    return dequantize(codes, step, offset)


def quantize_activation(x: ArrayLike | Codes, step: Array | None, spec: ActivationSpec) -> Codes:
    """Activation codes `a = clip(rint(x / s_a), q_min, q_max)`, one step for the tensor; `Codes` pass unchanged.

    Args:
      x: (N, ..., C) real, or `Codes`.
      step: () > 0; None only for `Codes`.

    Raises:
      ValueError: for `Codes` of another specification, or a real `x` without a step.
    """
    if isinstance(x, Codes):
        if (x.spec.code_range, x.spec.slices) != (spec.code_range, spec.slices):
            raise ValueError(
                f"The input was quantized with {x.spec}, but the layer's `activation` is {spec}; give both the same."
            )
        return x
    if step is None:
        raise ValueError("`steps.activation` is None: a real input needs a step; give one, or give `Codes`.")
    step = jnp.asarray(step, jnp.float32)
    return Codes(quantize(x, step, spec.code_range), step, spec)


@jax.custom_jvp
def scale_gradient(x: Array, factor: ArrayLike) -> Array:
    """`x`, whose gradient is multiplied by `factor` (broadcastable to `x`): LSQ's `gradscale`."""
    del factor
    return x


@scale_gradient.defjvp
def _scale_gradient_jvp(primals: tuple[Array, ArrayLike], tangents: tuple[Array, Any]) -> tuple[Array, Array]:
    x, factor = primals
    # A float32 factor must not widen the gradient of a bfloat16 parameter, nor narrow a float64 one.
    return x, (tangents[0] * factor).astype(tangents[0].dtype)


def step_from_log(log_step: Array) -> Array:
    """The step that a stored logarithm stands for: `exp(clip(log_step, -25, 25))`, > 0 and finite.

    The gradient, `step`, passes straight through the clip, so that a step at the limit can come back.

    Args:
      log_step: any shape, float32.

    Returns:
      Steps of the same shape.
    """
    return jnp.exp(straight_through(lambda x: jnp.clip(x, -LOG_STEP_LIMIT, LOG_STEP_LIMIT), log_step))


def log_from_step(step: ArrayLike) -> Array:
    """The logarithm to store for a positive step; steps outside the limits are clipped to them."""
    return jnp.clip(jnp.log(jnp.asarray(step, jnp.float32)), -LOG_STEP_LIMIT, LOG_STEP_LIMIT)


def offset_in_limits(zeta: Array) -> Array:
    """A stored offset, clipped to +-2^24 with a straight-through gradient: beyond, float32 has no unit step left."""
    return straight_through(lambda x: jnp.clip(x, -OFFSET_LIMIT, OFFSET_LIMIT), zeta)


def nearest_power_of_two(step: Array) -> Array:
    """The step rounded to a power of two, `2^rint(log2(step))`, with a straight-through gradient on its logarithm."""
    return straight_through(_power_of_two, scale_gradient(step, _power_of_two(step) / step))


def _power_of_two(step: Array) -> Array:
    # Not `exp2`, which XLA computes as an exponential: off by a bit from 2^13 on.
    rounded = jnp.ldexp(jnp.ones_like(step), jnp.rint(jnp.log2(step)).astype(jnp.int32))
    return jnp.where(jnp.isnan(step), step, rounded)
