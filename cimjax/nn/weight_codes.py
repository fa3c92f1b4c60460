"""Weight codes and their steps in the layout of a kernel, where every weight has one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax import Array

from cimjax.core import lsq
from cimjax.core.cells import quantize_weight
from cimjax.core.step_sizes import expand_weight
from cimjax.core.tiling import Tiling, tile, tile_kernel
from cimjax.nn.parameters import PARAMETERS
from cimjax.spec import CIMSpec


def has_codes(spec: CIMSpec) -> bool:
    """Whether a weight has one code: not with a step for each plane, as learned scales are."""
    return not spec.weight.step_per_plane


def weight_codes(params: Mapping[str, Any], specs: Mapping[str, CIMSpec]) -> dict[str, Array]:
    """The weight codes of layers, by path: int8, of the shape of the kernel.

    Args:
      params: of the network.
      specs: of the layers that are asked for; `has_codes` of each.
    """
    flat, found = flax.traverse_util.flatten_dict(dict(params), sep="/"), {}
    for name, spec in specs.items():
        kernel = flat[f"{name}/kernel"]
        tiling, step = tile(kernel.shape, spec), lsq.step_from_log(flat[f"{name}/{PARAMETERS.weight}"])
        codes = _untiled(quantize_weight(kernel, step, tiling, spec), tiling, kernel.shape)
        found[name] = codes.astype(jnp.int8)
    return found


def weight_steps(log_step: Array, shape: tuple[int, ...], spec: CIMSpec) -> Array:
    """The step of every weight of a layer, float32, of the shape of its kernel.

    Args:
      log_step: as it is stored.
      shape: of the kernel.
    """
    tiling, step = tile(shape, spec), lsq.step_from_log(log_step)
    per_group = jnp.expand_dims(expand_weight(step, tiling)[:, 0], -2)  # (R, 1, O)
    return _untiled(jnp.broadcast_to(per_group, (*tiling.stored.shape, tiling.features)), tiling, shape)


def _untiled(values: Array, tiling: Tiling, shape: tuple[int, ...]) -> Array:
    """From the layout of the arrays, (kh, kw, R, c, O), to that of the kernel, whose every weight has one place."""
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.linear_transpose(lambda kernel: tile_kernel(kernel, tiling), kernel)(values)[0]
