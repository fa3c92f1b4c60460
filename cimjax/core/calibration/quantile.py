"""Quantiles of values in groups of any shape, from sums over groups alone."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

# The part of a group that lies inside a range of `start="percentile"`: 99.9 %, as is usual for activations.
PERCENTILE = 0.999
# Halvings of the range of all values: beyond what float32 tells apart.
_HALVINGS = 40


def quantile(
    values: Array, part: float, expand: Callable[[Array], Array], total: Callable[[Array], Array], weight: Array
) -> Array:
    """The smallest value that at least `part` of a group does not exceed, for every group, by bisection.

    Args:
      values: real, any shape.
      part: above 0 up to 1, which gives the largest value (to rounding).
      expand: values of groups, made broadcastable to `values`.
      total: sums of `values`-shaped arrays over each group.
      weight: how much each value counts, 0 where it is none of its group's; broadcastable to `values`.

    Returns:
      float32 of the groups' shape; the largest of all values for a group without any.
    """
    weight = jnp.broadcast_to(weight, values.shape).astype(jnp.float32)
    wanted = part * total(weight)
    low, high = jnp.min(values) - 1, jnp.max(values)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = (ends[0] + ends[1]) / 2
        enough = total(weight * (values <= expand(middle))) >= wanted
        return jnp.where(enough, ends[0], middle), jnp.where(enough, middle, ends[1])

    start = jnp.broadcast_to(low, wanted.shape), jnp.broadcast_to(high, wanted.shape)
    return jax.lax.fori_loop(0, _HALVINGS, halve, start)[1]
