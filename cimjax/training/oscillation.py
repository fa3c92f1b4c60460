"""Weights that jump to and fro between two codes are held at the one where they are most of the time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jax import Array

from cimjax.nn.parameters import PARAMETERS
from cimjax.nn.weight_codes import weight_codes, weight_steps
from cimjax.spec import CIMSpec

# What a step counts in the running averages.
MOMENTUM = 0.01
# How much higher the threshold is when training begins.
AT_FIRST = 4.0


class Weights(NamedTuple):
    """What is known of the weights of a layer, each of the shape of its kernel.

    codes: int8, those of the last step.
    direction: int8, of the last change: -1, +1, or 0 before any.
    frequency: float32, how often the direction turns, as a running average over steps.
    mean: float32, the running average of the codes.
    frozen: bool, whether the code is held.
    """

    codes: Array
    direction: Array
    frequency: Array
    mean: Array
    frozen: Array


class Watched(NamedTuple):
    """The state: of the optimizer that is watched, the weights by path of their layer, and the steps done, ()."""

    inner: Any
    layers: dict[str, Weights]
    step: Array


def freeze_oscillating(
    optimizer: optax.GradientTransformation, specs: Mapping[str, CIMSpec], threshold: float, total_steps: int
) -> optax.GradientTransformation:
    """An optimizer that freezes the weights whose codes turn back more often than in `threshold` of all steps.

    The threshold falls to that by half a cosine, from four times as much. A frozen weight follows its learned step.
    Source: Nagel et al., "Overcoming oscillations in quantization-aware training", ICML 2022, algorithm 1.

    Args:
      optimizer: any.
      specs: of the layers, by path.
      threshold: above 0, below 1.
      total_steps: of the whole training.
    """

    def init(params: Any) -> Watched:
        found = {name: _first(codes) for name, codes in weight_codes(params, specs).items()}
        return Watched(optimizer.init(params), found, jnp.int32(0))

    def update(updates: Any, state: Watched, params: Any = None) -> tuple[Any, Watched]:
        updates, inner = optimizer.update(updates, state.inner, params)
        part = jnp.minimum(state.step / max(1, total_steps), 1.0)
        limit = threshold * (1 + (AT_FIRST - 1) * (1 + jnp.cos(jnp.pi * part)) / 2)
        moved = optax.apply_updates(params, updates)
        layers = {name: _next(state.layers[name], codes, limit) for name, codes in weight_codes(moved, specs).items()}
        flat, before, after = (_flat(tree) for tree in (updates, params, moved))
        for name, weights in layers.items():
            kernel = after[f"{name}/kernel"]
            step = weight_steps(after[f"{name}/{PARAMETERS.weight}"], kernel.shape, specs[name])
            held = jnp.where(weights.frozen, weights.codes * step, kernel)
            flat[f"{name}/kernel"] = (held - before[f"{name}/kernel"]).astype(flat[f"{name}/kernel"].dtype)
        return flax.traverse_util.unflatten_dict(flat, sep="/"), Watched(inner, layers, state.step + 1)

    return optax.GradientTransformation(init, update)


def frozen_part(optimizer_state: Any) -> float | None:
    """The part of all weights that is frozen, 0 to 1; None where no optimizer freezes any."""
    if not isinstance(optimizer_state, Watched) or not optimizer_state.layers:
        return None
    layers = jax.device_get([weights.frozen for weights in optimizer_state.layers.values()])
    return float(sum(frozen.sum() for frozen in layers) / sum(frozen.size for frozen in layers))


def _flat(params: Any) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(params, sep="/")


def _first(codes: Array) -> Weights:
    zeros = jnp.zeros(codes.shape, jnp.float32)
    return Weights(codes, jnp.zeros_like(codes), zeros, codes.astype(jnp.float32), zeros > 0)


def _next(weights: Weights, codes: Array, limit: Array) -> Weights:
    """After a step that leads to other codes."""
    codes = jnp.where(weights.frozen, weights.codes, codes)
    change = (codes > weights.codes).astype(jnp.int8) - (codes < weights.codes).astype(jnp.int8)
    turned = change * weights.direction < 0
    frequency = MOMENTUM * turned + (1 - MOMENTUM) * weights.frequency
    mean = MOMENTUM * codes + (1 - MOMENTUM) * weights.mean
    now = (frequency > limit) & ~weights.frozen
    return Weights(
        codes=jnp.where(now, jnp.rint(mean).astype(jnp.int8), codes),
        direction=jnp.where(change == 0, weights.direction, change),
        frequency=frequency,
        mean=mean,
        frozen=weights.frozen | now,
    )
