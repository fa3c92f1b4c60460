"""Which platform and which device computes: the only file that asks. What suits which is the contract's to say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir


def by_platform(default: Callable[..., Any], **rows: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is computed as the row of the platform (`cpu`, `cuda`, ...) that its program is lowered for.

    Unlike `jax.lax.platform_dependent` only that row is traced, and no trace of the choice is left in the program. Not
    differentiable: for the inside of functions that have a gradient of their own.

    Args:
      default: for platforms without a row; it tells the shapes and dtypes of the results, which are the same for all.
      **rows: hashable functions of the same arguments.
    """
    rows["default"] = default

    def call(*args: Any) -> Any:
        flat, structure = jax.tree.flatten(args)
        results = jax.eval_shape(default, *args)
        shapes, result_structure = jax.tree.flatten(results)
        flat_rows = tuple((name, _Flat(row, structure)) for name, row in rows.items())
        avals = tuple((shape.shape, shape.dtype) for shape in shapes)
        return jax.tree.unflatten(result_structure, _choice.bind(*flat, rows=flat_rows, avals=avals))

    return call


class _Flat(NamedTuple):
    """A function of the leaves of its arguments, giving the leaves of its result."""

    function: Callable[..., Any]
    structure: Any

    def __call__(self, *leaves: Any) -> list[Array]:
        return jax.tree.leaves(self.function(*jax.tree.unflatten(self.structure, leaves)))


_choice = Primitive("choice_by_platform")
_choice.multiple_results = True


@_choice.def_abstract_eval
def _abstract(*operands: Any, rows: Any, avals: Any) -> Any:
    del operands, rows
    return [jax.core.ShapedArray(shape, dtype) for shape, dtype in avals]


@functools.lru_cache(maxsize=256)
def _jitted(rows: Any, avals: Any) -> Callable[..., Any]:
    return jax.jit(functools.partial(_choice.bind, rows=rows, avals=avals))


_choice.def_impl(lambda *operands, rows, avals: _jitted(rows, avals)(*operands))


def _row(platform: str) -> Callable[..., Any]:
    def run(*operands: Any, rows: Any, avals: Any) -> Any:
        del avals
        chosen: dict[str, Any] = dict(rows)
        return (chosen.get(platform) or chosen["default"])(*operands)

    return mlir.lower_fun(run, multiple_results=True)


mlir.register_lowering(_choice, _row("default"))
for _platform in ("cpu", "cuda", "rocm", "tpu"):
    mlir.register_lowering(_choice, _row(_platform), platform=_platform)


def _batched(operands: Any, axes: Any, *, rows: Any, avals: Any) -> Any:
    mapped = {name: jax.vmap(row, in_axes=axes) for name, row in rows}
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    avals = tuple(((size, *shape), dtype) for shape, dtype in avals)
    results = _choice.bind(*operands, rows=tuple(mapped.items()), avals=avals)
    return results, [0] * len(results)


batching.primitive_batchers[_choice] = _batched


def default_device() -> Any:
    """The device that JAX computes on unless it is told otherwise."""
    config: Any = jax.config
    asked = config.jax_default_device
    if asked is None:
        return jax.devices()[0]
    return jax.devices(asked)[0] if isinstance(asked, str) else asked


def compute_capability() -> float:
    """That of JAX's default device; 0 where it is no GPU of NVIDIA's."""
    device = default_device()
    try:
        return float(getattr(device, "compute_capability", None) or 0)
    except ValueError:  # "gfx90a", of AMD's
        return 0.0


def runs_on(*platforms: str) -> bool:
    """Whether programs run on one of these platforms unless they are told otherwise."""
    return default_device().platform in platforms
