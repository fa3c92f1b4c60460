"""Reciprocals of steps that are the same on every backend."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


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
