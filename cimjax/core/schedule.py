"""What XLA's CPU backend computes once, and in which order: functions that change no value.

That backend computes an operand again for each of its readers, and once more for every element that a broadcast makes
of it, as long as it consists of cheap operations; it schedules for width, not for memory; and it drops the barriers
that JAX puts up. What looks roundabout here is what it does not see through. Elsewhere these functions do nothing, or
little.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from cimjax.spec.codes import CodeRange


def after(x: Array, other: Array) -> Array:
    """`x`, which cannot be computed before `other`: what is kept in between is what `x` is made of.

    Args:
      x: any shape, of a float dtype.
      other: any shape, real.
    """
    return x + _zero(other).astype(x.dtype) if other.size else x


@jax.custom_vjp
def turn(result: Array) -> tuple[Array, Array]:
    """A result, and a number for `in_turn`: the gradient to what has it is computed before that of the result.

    Args:
      result: any shape, float32.
    """
    return result, jnp.float32(0)


turn.defvjp(lambda result: (turn(result), None), lambda _, gradients: (gradients[0] + gradients[1],))


@jax.custom_vjp
def in_turn(x: Array, number: Array) -> Array:
    """`x`, whose gradient is computed before that of the result of which `turn` gave the number.

    Args:
      x: any shape, float32; its gradient should come from a matrix product or a convolution, which XLA never repeats.
      number: () float32.
    """
    del number
    return x


in_turn.defvjp(lambda x, number: (in_turn(x, number), None), lambda _, gradient: (gradient, _zero(gradient)))


def apart(function: Callable[..., Array], *operands: Any, known: Array, like: Array | None = None) -> Array:
    """`function(*operands)`, computed by itself and written to memory (on CPU), whatever reads it.

    Args:
      function: of arrays; not differentiated through here.
      known: any real array that exists by then, preferably the same for several calls.
      like: something of the result's shape and dtype, if there is such: it spares compilation.

    Returns:
      The function's result. Where `jax.vmap` maps over `known`, both branches run: the same result, but not apart.
    """
    if jax.default_backend() != "cpu" or not known.size:
        return function(*operands)
    if like is None:
        result = jax.eval_shape(function, *operands)
        like = jnp.zeros(result.shape, result.dtype)
    # A branch is a program of its own. No compiler knows which is taken: the other one never is.
    return lax.cond(_zero(known) > 0, lambda like, *_: like, lambda _, *x: function(*x), like, *operands)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def codes_once(codes: Array, step: Array, code_range: CodeRange) -> Array:
    """Codes, written to memory instead of computed again by each of their readers (on CPU).

    Args:
      codes: any shape, float32, integers in `code_range`.
      step: of the codes; any number that no compiler knows would do.
    """
    if jax.default_backend() != "cpu":
        return codes
    # In binary arithmetic the root of a square is exact, and a root is too dear to be computed twice.
    lowest = float(min(code_range.q_min, 0))
    positive = codes - lowest
    return jnp.sqrt(positive * (positive + _zero(step))) + lowest


@codes_once.defjvp
def _codes_once_jvp(
    code_range: CodeRange, primals: tuple[Array, Array], tangents: tuple[Array, Array]
) -> tuple[Array, Array]:
    return codes_once(*primals, code_range), tangents[0]


@jax.custom_jvp
def columns_once(values: Array) -> Array:
    """Parameters of columns, (R, M) float32 and finite, written to memory before they are broadcast (on CPU)."""
    if jax.default_backend() != "cpu":
        return values
    # Products with 1 and 0 are exact, and matrix products are never computed twice. Twice as deep as need be, for a
    # product with a single number would be a cheap operation again.
    rows = values.shape[0]
    picked = jnp.eye(rows, 2 * rows, dtype=values.dtype)
    return jnp.matmul(picked, jnp.concatenate([values, values]), precision=lax.Precision.HIGHEST)


@columns_once.defjvp
def _columns_once_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return columns_once(primals[0]), tangents[0]


def _zero(values: Any) -> Array:
    """0, but nothing that a compiler knows."""
    least = jnp.minimum(jnp.abs(values.reshape(-1)[0]), 0)
    return jnp.where(jnp.isnan(least), jnp.zeros_like(least), least)
