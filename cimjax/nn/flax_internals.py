"""What is read of Flax and JAX by names of theirs that are not public: inside which of Flax's transforms a layer is.

`test_flax_internals` holds the names against the Flax that is installed.
"""

from __future__ import annotations

import sys
from typing import Any

import flax.linen as nn
import jax

# Where Flax traces a loop's body to see what is the same in all iterations; the argument of the body that says so; and
# the body's arguments that differ: what an iteration hands on, and what it is given.
LOOPS, ASKS, DIFFER = "flax.core.axes_scan", "init_mode", ("c", "xs")
# What a scope's path for errors has around a layer that is copied.
COPIES = "vmap("


def loop_that_is_asked() -> Any:
    """The trace of a loop's body by which Flax asks what is the same in all iterations, inside it; else None."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == LOOPS and frame.f_locals.get(ASKS):
            inputs = jax.tree.leaves([frame.f_locals[name] for name in DIFFER])
            return next((value._trace for value in inputs if isinstance(value, jax.core.Tracer)), frame)
        frame = frame.f_back
    return None


def is_of(trace: Any, value: Any) -> bool:
    """Whether a value is traced by a trace."""
    return isinstance(value, jax.core.Tracer) and value._trace is trace


def is_copied(module: nn.Module) -> bool:
    """Whether a layer is copied by `nn.vmap`, itself or what it is in."""
    assert module.scope is not None
    return any(COPIES in part for part in module.scope.debug_path)
