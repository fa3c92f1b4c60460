"""What training is watched by: gradients of steps against those of weights, how far steps moved, how ADCs are used."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.nn.parameters import STEP_KINDS, kind_of_step, trained_as
from cimjax.spec import CIMSpec


def gradient_ratios(params: Any, gradient: Any) -> dict[str, Array]:
    """For each kind of step the median over layers of `|dL/dlog_step| / (|dL/dw| |w|)`, norms over the layer.

    It tells how fast steps learn compared with weights.

    Returns:
      {"activation_gradient_ratio": ..., ...} for the kinds that the network has, () float32.
    """
    ratios: dict[str, list[Array]] = {}
    flat, slopes = (flax.traverse_util.flatten_dict(tree) for tree in (params, gradient))
    for path, kernel in flat.items():
        if path[-1] != "kernel":
            continue
        scale = jnp.linalg.norm(slopes[path].ravel()) * jnp.linalg.norm(kernel.ravel())
        for name, kind in STEP_KINDS.items():
            step = (*path[:-1], name)
            if step in flat:
                ratio = jnp.linalg.norm(slopes[step].ravel()) / jnp.maximum(scale, 1e-30)
                ratios.setdefault(kind, []).append(ratio)
    return {f"{kind}_gradient_ratio": jnp.median(jnp.stack(values)) for kind, values in ratios.items()}


def movement(
    first: Mapping[str, Any], now: Mapping[str, Any], specs: Mapping[str, CIMSpec], frozen: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """How far steps moved since calibration: by kind and layer, the mean of `|log(s / s0)|` (offsets: of steps).

    Args:
      first, now: stored steps by path, as `parameters.stored_steps` gives them.
      specs: of the array layers by path; steps of ADCs that are fixed, or frozen once calibrated, are left out.
      frozen: as `config.frozen`, whose steps are left out as well.
    """
    moved: dict[str, dict[str, float]] = {}
    for path, value in now.items():
        layer, kind, trained = path.rpartition("/")[0], str(kind_of_step(path)), trained_as(path)
        adc = specs[layer].adc if layer in specs else None
        if trained in frozen or (trained == "psum" and adc is not None and not adc.trainable):
            continue
        distance = float(np.mean(np.abs(np.asarray(value, np.float64) - np.asarray(first[path], np.float64))))
        moved.setdefault(kind, {})[layer] = distance
    return moved


def mean_movement(moved: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean over layers of `movement`, {"psum_moved": ...}."""
    return {f"{kind}_moved": float(np.mean(list(layers.values()))) for kind, layers in moved.items()}


def adc_usage_by_layer(collection: Any) -> dict[str, dict[str, float]]:
    """The `ADCStatistics` that layers left in their collection: {"conv1": {"saturated": ..., "codes_used": ...}}."""
    flat = flax.traverse_util.flatten_dict(dict(collection), sep="/")
    return {
        # Layers stacked by a lifted transform have one path: their mean.
        path.rsplit("/", 1)[0]: {name: float(np.mean(value)) for name, value in usage._asdict().items()}
        for path, usage in flat.items()
    }
