"""Weights as signed sums of learned steps: `W = sum_k s_k d_k` with `d_k` in {-1, 0, +1}, the one nearest to `w`.

Unlike a code's planes, whose significances are powers of two, every plane has a step of its own that is learned; its
digits are stored in pairs of one-bit cells. Source: the class `LsqWeight_v3` of the authors' code of 2025
(jiyoonkm/ColumnQuant), which the paper does not describe.

Deviation: there one converter reads the sum of all planes of one sign, which only cells of real-valued levels could
add up; here every plane has its ADC, as other encodings have. And there gradients are those of a softmax over all
sums, whose sharpness depends on how large weights are; here they are LSQ's, of which one plane is the special case.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from cimjax.core.broadcasts import sum_to_shape
from cimjax.core.reciprocal import reciprocal


@functools.cache
def sums_of(planes: int) -> np.ndarray:
    """All combinations of digits, (3^K, K) float32: those of fewer digits first, then in the order of their digits."""
    combinations = itertools.product((0, 1, -1), repeat=planes)
    return np.array(sorted(combinations, key=np.count_nonzero), np.float32)


@jax.custom_vjp
def nearest_digits(x: Float[Array, ...], steps: Float[Array, "K ..."]) -> Float[Array, "K ..."]:
    """The digits whose sum `sum_k s_k d_k` is nearest to `x`; of equally near ones those that come first in `sums_of`.

    Gradients: with the residual `r = x - sum_k s_k d_k` shared equally by the planes, `u_k = d_k + r / (K s_k)`, where
    `|x|` is at most the sum of all steps: the gradient to `x` is the mean over the planes of `(dL/d d_k) / s_k`, that
    to `s_k` is `-(dL/d d_k) u_k / s_k`. Elsewhere both are 0. For one plane that is `lsq.quantize` to {-1, 0, +1}.

    Args:
      x: any shape, float32.
      steps: > 0, each of as many axes as `x` and broadcastable to it.

    Returns:
      (K, ...) float32 in {-1, 0, +1}; NaN where `x` or a step is.
    """
    combinations = jnp.asarray(sums_of(len(steps)))
    sums = sum(jnp.multiply.outer(combinations[:, k], step) for k, step in enumerate(steps))
    nearest = jnp.argmin(jnp.abs(x - sums), axis=0)
    digits = jnp.moveaxis(combinations[nearest], -1, 0)
    return jnp.where(jnp.isnan(x + sum(steps)), jnp.nan, digits)


def _forward(x: Array, steps: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    digits = nearest_digits(x, steps)
    return digits, (x, steps, digits)


def _backward(residuals: tuple[Array, Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, steps, digits = residuals
    planes, step_reciprocal = len(steps), reciprocal(steps)
    rest = x - jnp.sum(digits * steps, axis=0)
    passed = jnp.where(jnp.abs(x) <= jnp.sum(steps, axis=0), gradient, 0.0) * step_reciprocal
    to_steps = -passed * (digits + rest * step_reciprocal / planes)
    return jnp.mean(passed, axis=0), sum_to_shape(to_steps, steps.shape)


nearest_digits.defvjp(_forward, _backward)
