"""A broadcast, and the sum over what was broadcast, which is its gradient."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array


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
