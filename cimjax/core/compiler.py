"""How XLA is asked to compile programs of array layers, beyond what it does by itself."""

from __future__ import annotations

import functools

import jax

# XLA's CPU backend gives most convolutions to a library that computes them on one core only (measured with jaxlib
# 0.10.2); the older one uses all cores, and is two to three times as fast on two.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}


@functools.cache
def compiler_options() -> dict[str, str]:
    """What to give to `jax.jit` for programs with array layers, so that they are fast: it changes how fast a program is
    and the order of its sums, nothing else.

    The programs of `cimjax` use it by themselves; a training loop of your own should too. Options hold for a whole
    program, so only the outermost `jax.jit` can have them.

    Returns:
      Options for the default backend; empty where there is nothing to ask for, or where the installed jaxlib does not
      know the option.

    >>> fast = jax.jit(lambda x: x + 1, compiler_options=compiler_options())
    """
    if jax.default_backend() != "cpu":
        return {}
    try:
        jax.jit(lambda: 0, compiler_options=_CPU).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return _CPU
