"""What the quantizers compute with: reciprocals that are the same on every backend, broadcasts and their sums."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from cimjax.spec import CodeRange


def reciprocal(step: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`1 / step`, rounded to the nearest float32 on every backend, so that codes at ties are the same on all.

    XLA:GPU's division misses it by a unit in the last place for a quarter of all numbers (openxla/xla#37181).

    Args:
      step: any shape, float32; between 2^-100 and 2^100, beyond which the division is left as it is.
    """
    return nearest_quotient(step, 1.0 / step)


# Traced once for each shape, or it would be much of what the programs of a network are traced for.
@jax.jit
def nearest_quotient(step: Float[Array, "*shape"], quotient: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The float32 nearest to `1 / step`, given one within some units in the last place of it."""
    near = quotient - quotient * _excess(step, quotient)
    bits = lax.bitcast_convert_type(near, jnp.int32)
    best, least = near, jnp.abs(_excess(step, near))
    for neighbour in (bits - 1, bits + 1):
        candidate = lax.bitcast_convert_type(neighbour, jnp.float32)
        distance = jnp.abs(_excess(step, candidate))
        best, least = jnp.where(distance < least, candidate, best), jnp.minimum(distance, least)
    return jnp.where((step > 2.0**-100) & (step < 2.0**100), best, quotient)


def _excess(step: Array, quotient: Array) -> Array:
    """`step * quotient - 1`, exact where this is near 0."""
    (a, b), (c, d) = _halves(step), _halves(quotient)
    return ((a * c - 1) + a * d + b * c) + b * d


def _halves(x: Array) -> tuple[Array, Array]:
    """Two float32 of 12 bits each, whose sum is `x`."""
    high = lax.bitcast_convert_type(lax.bitcast_convert_type(x, jnp.int32) & -(2**12), jnp.float32)
    return high, x - high


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def straight_through(function: Callable[[Array], Array], x: Array) -> Array:
    """`function(x)`, whose gradient is that of `x` itself."""
    return function(x)


@straight_through.defjvp
def _straight_through_jvp(
    function: Callable[[Array], Array], primals: tuple[Array], tangents: tuple[Array]
) -> tuple[Array, Array]:
    return function(primals[0]), tangents[0]


@jax.custom_vjp
def differentiable_once(x: Array) -> Array:
    """`x`, with a gradient that cannot be differentiated: of straight-through estimates JAX would derive something else
    than the derivative of what they estimate, without a word.

    Raises:
      NotImplementedError: in a second derivative.
    """
    return x


@jax.custom_jvp
def _at_the_end(x: Array) -> Array:
    return x


@_at_the_end.defjvp
def _refuse_second_derivative(primals: Any, tangents: Any, **_: Any) -> Any:
    raise NotImplementedError(
        "array layers have first derivatives only, by jax.grad or jax.vjp: these are straight-through estimates, and "
        "have no derivatives of their own."
    )


differentiable_once.defvjp(lambda x: (_at_the_end(x), None), lambda _, gradient: (gradient,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread(x: Array, shape: tuple[int, ...]) -> Array:
    """`x`, broadcast to a shape; its gradient is summed by `sum_to_shape`, quicker than the sum that JAX derives."""
    return jnp.broadcast_to(x, shape)


def _spread_backward(shape: tuple[int, ...], x: Array, gradient: Array) -> tuple[Array]:
    return (sum_to_shape(gradient, x.shape),)


spread.defvjp(lambda x, shape: (spread(x, shape), x), _spread_backward)


def sum_to_shape(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum `x` over the axes along which an array of `shape` was broadcast to it."""
    extra = x.ndim - len(shape)
    kept = (1,) * extra + shape
    leading = next((axis for axis, size in enumerate(kept) if size != 1), x.ndim)
    count, rest = math.prod(x.shape[:leading]), x.shape[leading:]
    if count > 1 and math.prod(rest) > 1:
        # As a product with ones: for a sum XLA's CPU backend walks through memory column by column.
        x = jnp.matmul(jnp.ones((1, count), x.dtype), x.reshape(count, math.prod(rest)), precision="highest")
    else:
        x = jnp.sum(x, axis=tuple(range(leading)))
    x = x.reshape(rest)
    axes = tuple(axis for axis, size in enumerate(kept[leading:]) if size == 1)
    return jnp.sum(x, axis=axes).reshape(shape)


def smallest_type(code_range: CodeRange) -> Any:
    """The smallest of the types that hold all codes, and 0; the code of a sign is +1 or -1."""
    for dtype in (np.int8, np.uint8, np.int16, np.uint16):
        if np.iinfo(dtype).min <= min(code_range.q_min, 0) and code_range.q_max <= np.iinfo(dtype).max:
            return dtype
    return np.float32
