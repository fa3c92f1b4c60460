"""Memory for time: a function whose backward pass computes it again from small integers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from cimjax.core.schedule import after
from cimjax.spec.codes import CodeRange


def recomputed(function: Callable[..., Array], codes: Array, *operands: Any, code_range: CodeRange) -> Array:
    """`function(codes, *operands)`, of which nothing but its arguments is kept for the backward pass.

    Unlike `jax.checkpoint`, the codes are kept as integers of 8 or 16 bits, and the second computation waits for the
    gradient on every backend: XLA's CPU backend drops the barriers that `jax.checkpoint` puts up.

    Args:
      function: differentiable in all its arguments; may not refer to traced values other than these.
      codes: float32, integers in `code_range`.
    """
    return _recomputed(function, smallest_type(code_range), codes, *operands)


def smallest_type(code_range: CodeRange) -> DTypeLike:
    """The smallest of the types that hold all codes; the code of a sign is +1 or -1."""
    low, high = min(code_range.q_min, -1 if code_range.binary else 0), code_range.q_max
    for dtype in (np.int8, np.uint8, np.int16, np.uint16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    return np.float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _recomputed(function: Callable[..., Array], small: DTypeLike, codes: Array, *operands: Any) -> Array:
    return function(codes, *operands)


def _forward(
    function: Callable[..., Array], small: DTypeLike, codes: Array, *operands: Any
) -> tuple[Array, tuple[Array, tuple[Any, ...]]]:
    return function(codes, *operands), (codes.astype(small), operands)


def _backward(
    function: Callable[..., Array], small: DTypeLike, kept: tuple[Array, tuple[Any, ...]], gradient: Array
) -> tuple[Any, ...]:
    codes, operands = kept
    # Otherwise all partial sums would be computed early, and held.
    codes = after(codes.astype(jnp.float32), gradient)
    return jax.vjp(function, codes, *operands)[1](gradient)


_recomputed.defvjp(_forward, _backward)
