"""What training is watched by: gradients of steps against those of weights, how far steps moved, ADC health."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.spec import CIMSpec

# The stored parameters of each kind of step.
KINDS = {
    "activation": ("activation_log_step", "log_step"),
    "weight": ("weight_log_step",),
    "psum": ("psum_log_step", "reference_log_step"),
    "offset": ("psum_offset", "reference_offset"),
}


def kind_of_step(path: str) -> str:
    """The kind of a stored step by its path: "activation", "weight", "psum" or "offset"."""
    name = path.rsplit("/", 1)[-1]
    return next(kind for kind, names in KINDS.items() if name in names)


def gradient_ratios(params: Any, gradient: Any) -> dict[str, Array]:
    """For each kind of step the median over layers of `|dL/dlog_step| / (|dL/dw| |w|)`, norms over the layer.

    It tells how fast steps learn compared with weights.

    Returns:
      {"activation_gradient_ratio": ..., ...} for the kinds that the network has, () float32.
    """
    ratios: dict[str, list[Array]] = {}
    for params_of, gradient_of in _layers(params, gradient):
        if "kernel" not in params_of:
            continue
        scale = jnp.linalg.norm(gradient_of["kernel"].ravel()) * jnp.linalg.norm(params_of["kernel"].ravel())
        for kind, names in KINDS.items():
            for name in names:
                if name in params_of:
                    ratio = jnp.linalg.norm(gradient_of[name].ravel()) / jnp.maximum(scale, 1e-30)
                    ratios.setdefault(kind, []).append(ratio)
    return {f"{kind}_gradient_ratio": jnp.median(jnp.stack(values)) for kind, values in ratios.items()}


def _layers(params: Any, gradient: Any) -> Iterator[tuple[dict[str, Array], dict[str, Array]]]:
    """The parameters and gradients of every module that has some of its own."""
    own = {name: value for name, value in params.items() if not isinstance(value, dict)}
    if own:
        yield own, gradient
    for name, value in params.items():
        if isinstance(value, dict):
            yield from _layers(value, gradient[name])


def is_trained(kind: str, spec: CIMSpec) -> bool:
    """Whether training moves the steps of a kind in a layer: those of ADCs may be fixed, or frozen once calibrated."""
    return kind not in ("psum", "offset") or (spec.adc is not None and spec.adc.trainable)


def movement(
    first: Mapping[str, Any], now: Mapping[str, Any], specs: Mapping[str, CIMSpec], frozen: Collection[str] = ()
) -> dict[str, dict[str, float]]:
    """How far steps moved since calibration: by kind and layer, the mean of `|log(s / s0)|` (offsets: of steps).

    Args:
      first, now: stored steps by path, as `step.stored_steps` gives them.
      specs: of the array layers by path; steps that training cannot move are left out, and all others counted.
      frozen: as `config.frozen`, whose steps are left out as well.
    """
    moved: dict[str, dict[str, float]] = {}
    for path, value in now.items():
        layer, kind = path.rsplit("/", 1)[0], kind_of_step(path)
        if (layer in specs and not is_trained(kind, specs[layer])) or {"offset": "psum"}.get(kind, kind) in frozen:
            continue
        distance = float(np.mean(np.abs(np.asarray(value, np.float64) - np.asarray(first[path], np.float64))))
        moved.setdefault(kind, {})[layer] = distance
    return moved


def mean_movement(moved: dict[str, dict[str, float]]) -> dict[str, float]:
    """The mean over layers of `movement`, {"psum_moved": ...}."""
    return {f"{kind}_moved": float(np.mean(list(layers.values()))) for kind, layers in moved.items()}


def health_by_layer(collection: Any) -> dict[str, dict[str, float]]:
    """The `ADCStatistics` that layers left in their collection: {"conv1": {"saturated": ..., "codes_used": ...}}."""
    flat = flax.traverse_util.flatten_dict(dict(collection), sep="/")
    return {
        # Layers stacked by a lifted transform have one path: their mean.
        path.rsplit("/", 1)[0]: {name: float(np.mean(value)) for name, value in health._asdict().items()}
        for path, health in flat.items()
    }
