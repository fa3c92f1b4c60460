"""How XLA is asked to compile programs of array layers, beyond what it does by itself."""

from __future__ import annotations

import functools

import jax

_CPU = {
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
    return {name: value for name, value in _CPU.items() if jax.default_backend() == "cpu" and _known(name)}


@functools.cache
def _known(option: str) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: _CPU[option]}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
