"""Gradients that are not those which JAX derives: straight through a function, and once only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import Array


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
