"""Arrangements for XLA's CPU backend, which change no value; each is worth what `docs/speed.md` says it is.

That backend computes an operand again for each of its readers, and once more for every element that a broadcast makes
of it, as long as it consists of cheap operations; and it drops the barriers that JAX puts up before it fuses.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from cimjax.core.convolution import convolution
from cimjax.core.programs.platforms import by_platform, runs_on
from cimjax.core.window import Window, shifted

# The gradient to the input is a matrix product where a kernel has at least so many times as many output as input
# channels, and as long as that writes at most so many numbers.
WIDENING = 3
LARGEST_PRODUCT = 10_000_000

_OPTIONS = {
    # XLA's CPU backend gives most convolutions to a library that computes them on one core only (measured with jaxlib
    # 0.10.2); the older one uses all cores, and is two to three times as fast on two.
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    # LLVM's higher levels make no step faster, but compiling slower.
    "xla_backend_optimization_level": "1",
    # As wide as they come, where XLA would take half; without effect on processors that have no such registers.
    "xla_cpu_prefer_vector_width": "512",
}


def compiler_options() -> dict[str, str]:
    """What to give to `jax.jit` for programs with array layers, so that they are fast, and soon compiled: it changes
    nothing else but the order of sums.

    The programs of `cimjax` use it by themselves; a training loop of your own should too. Options hold for a whole
    program, so only the outermost `jax.jit` can have them.

    Returns:
      Options for the default backend, of which the installed jaxlib knows; empty where there is nothing to ask for.

    >>> fast = jax.jit(lambda x: x + 1, compiler_options=compiler_options())
    """
    return {name: value for name, value in _OPTIONS.items() if runs_on("cpu") and _known(name)}


@functools.cache
def _known(option: str) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: _OPTIONS[option]}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def materialize(function: Callable[..., Array], *args: Any) -> Array:
    """`function(*args)`, on CPU computed by itself and written to memory, whatever reads it; not differentiable."""
    return by_platform(function, cpu=functools.partial(_apart, function))(*args)


def _apart(function: Callable[..., Array], *args: Any) -> Array:
    """`function(*args)` as a program of its own: a branch that is always taken, which no compiler knows."""
    result = jax.eval_shape(function, *args)
    never = lax.optimization_barrier(jnp.zeros((), bool))
    return lax.cond(never, lambda *_: jnp.zeros(result.shape, result.dtype), function, *args)


@jax.custom_vjp
def written(x: Array) -> Array:
    """`x`, whose gradient is written to memory, on CPU, before anything reads it."""
    return x


written.defvjp(lambda x: (x, None), lambda _, gradient: (materialize(lambda gradient: gradient, gradient),))


def sum_over_positions(values: Array) -> Array:
    """(T, positions, K O) to (K O,)."""
    return by_platform(_sum, cpu=_sum_by_product)(values)


def _sum(values: Array) -> Array:
    return jnp.sum(values, axis=(0, 1))


def _sum_by_product(values: Array) -> Array:
    # What is summed would be written to memory first: so an eighth of it is, after some additions, which a matrix
    # product keeps apart from the sum. A product with two rows, for that with one would be compiled anew each time.
    flat = values.reshape(-1, values.shape[-1])
    parts = 8 if flat.shape[0] % 8 == 0 else 1
    few = functools.reduce(jnp.add, jnp.split(flat, parts))
    return jnp.matmul(jnp.ones((2, few.shape[0]), few.dtype), few, precision=lax.Precision.HIGHEST)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(inputs: Array, kernel: Array, window: Window, groups: int) -> Array:
    """As `core.convolution.convolution`, with quicker gradients."""
    return convolution(inputs, kernel, window, groups)


def _forward(inputs: Array, kernel: Array, window: Window, groups: int) -> tuple[Array, tuple[Array, Array]]:
    return convolution(inputs, kernel, window, groups), (inputs, kernel)


def _backward(window: Window, groups: int, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    inputs, kernel = residuals
    # XLA transposes the inputs for the gradient to the kernel, and would compute them again for that, element by
    # element.
    written = _apart(lambda inputs: inputs, inputs)
    to_kernel = jax.vjp(lambda kernel: convolution(written, kernel, window, groups), kernel)[1]
    return _to_inputs(window, groups, inputs, kernel, gradient), to_kernel(gradient)[0]


convolve.defvjp(_forward, _backward)


def _to_inputs(window: Window, groups: int, inputs: Array, kernel: Array, gradient: Array) -> Array:
    flat, by_place = gradient.reshape(-1, gradient.shape[-1]), kernel.reshape(-1, kernel.shape[-1])
    widens = groups == 1 and kernel.shape[-1] >= WIDENING * kernel.shape[-2]
    if not widens or flat.shape[0] * by_place.shape[0] > LARGEST_PRODUCT:
        return jax.vjp(lambda inputs: convolution(inputs, kernel, window, groups), inputs)[1](gradient)[0]
    # What each place of the kernel gives to each position, which is then added where it belongs.
    given = jnp.matmul(flat, by_place.T, precision=lax.Precision.HIGHEST)
    given = given.reshape(*gradient.shape[:-1], math.prod(kernel.shape[:-2]), inputs.shape[-1])

    def add(given: Array) -> Array:
        places = [given[..., place, :] for place in range(given.shape[-2])]
        return jax.linear_transpose(lambda x: shifted(x, kernel.shape[:-2], window), inputs)(places)[0]

    return _apart(add, given)
