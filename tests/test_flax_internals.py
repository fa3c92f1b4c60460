"""The names of Flax and JAX that are not public, in the versions that are installed: a rename shows here, by name."""

from __future__ import annotations

import importlib
import inspect
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cimjax.nn.flax_internals import ASKS, DIFFER, LOOPS, is_copied, is_of, loop_that_is_asked


def functions_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function and those inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from functions_in(constant)


def test_the_body_of_a_loop_takes_what_is_asked_for_by_these_names() -> None:
    file = Path(inspect.getfile(importlib.import_module(LOOPS)))
    functions = functions_in(compile(file.read_text(), file, "exec"))
    asking = [names for one in functions if ASKS in (names := one.co_varnames[: one.co_argcount])]
    assert len(asking) == 1 and set(asking[0]) >= set(DIFFER)


class Probe(nn.Module):
    """Notes where it is called: whether in a loop that is asked, on that loop's input, and whether it is copied."""

    note: Callable[[tuple[bool, bool, bool]], None]

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        loop = loop_that_is_asked()
        self.note((loop is not None, is_of(loop, x), is_copied(self)))
        return x, None


def test_where_a_layer_is_called_is_found_out() -> None:
    def seen(probe: Any) -> set[tuple[bool, bool, bool]]:
        found: set[tuple[bool, bool, bool]] = set()
        probe(note=found.add).init(jax.random.key(0), jnp.ones((2, 3)))
        return found

    loop = nn.scan(Probe, variable_broadcast="params", split_rngs={"params": False}, length=4)
    copies = nn.vmap(Probe, variable_axes={"params": 0}, split_rngs={"params": True})
    assert seen(Probe) == {(False, False, False)}
    assert seen(loop) == {(True, True, False), (False, False, False)}
    assert seen(copies) == {(False, False, True)}
