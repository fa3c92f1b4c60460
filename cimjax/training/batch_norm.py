"""Statistics of batch normalisation, taken anew with the weights that training ends with."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cimjax.core.programs.cpu import compiler_options
from cimjax.training.experiment import Experiment
from cimjax.training.state import TrainState
from cimjax.training.train_step import Setup, step_rngs

# The collection in which `flax.linen.BatchNorm` keeps running statistics.
STATISTICS = "batch_stats"


def reestimated(experiment: Experiment, state: TrainState) -> TrainState:
    """The state with the mean of the statistics of `config.batch_norm_images` training images, in whole batches,
    instead of the running ones; as it is for 0 images.

    Running statistics lag behind weights, and more so behind weights that jump between codes. Source: Nagel et al.,
    "Overcoming oscillations in quantization-aware training", ICML 2022, section 4.
    """
    wanted = experiment.config.batch_norm_images
    if not wanted:
        return state
    there = len(experiment.dataset.train)
    size = min(experiment.config.batch_size, there)
    setup, firsts = experiment.setup_on_one_device(), range(0, max(1, min(wanted, there) // size) * size, size)
    measure = jax.jit(lambda state, images: statistics_of(setup, state, images), compiler_options=compiler_options())
    # Every process measures the same by itself.
    devices, here = experiment.devices, experiment.devices.here(state)
    each = (measure(here, experiment.training_images(size, first)) for first in firsts)
    total = functools.reduce(lambda one, other: jax.tree.map(jnp.add, one, other), each)
    found = jax.tree.map(lambda value: value / len(firsts), total)
    devices.require_same("statistics of batch normalisation", found)
    return state.replace(collections={**state.collections, STATISTICS: devices.put(found)})


def statistics_of(setup: Setup, state: TrainState, images: Array) -> Any:
    """The statistics of one batch, of the structure of the running ones.

    What a batch does to running statistics is linear, `m old + (1 - m) its own`, so that two updates tell both `m` and
    its own, whatever layers have for `m`.

    Args:
      images: (N, H, W, C) float32, normalised.
    """
    running = state.collections[STATISTICS]

    def updated(start: float) -> Any:
        before = {**state.collections, STATISTICS: jax.tree.map(lambda value: jnp.full_like(value, start), running)}
        variables, rngs = {"params": state.params, **before}, step_rngs(setup, state)
        return setup.apply(variables, images, train=True, mutable=list(before), rngs=rngs)[1][STATISTICS]

    def own(from_zero: Array, from_one: Array, old: Array) -> Array:
        part = 1 - (from_one - from_zero)
        return jnp.where(part > 0, from_zero / jnp.where(part > 0, part, 1), old)

    return jax.tree.map(own, updated(0.0), updated(1.0), running)


def check_statistics(experiment: Experiment) -> None:
    """Refuse `config.batch_norm_images` for a network without running statistics.

    Raises:
      ValueError: in one line.
    """
    wanted = experiment.config.batch_norm_images
    if wanted and STATISTICS not in experiment.abstract_state().collections:
        raise ValueError(
            f"`config.batch_norm_images` is {wanted}, but the network keeps no `{STATISTICS}` of batch normalisation; "
            "give 0."
        )
