"""Statistics of batch normalisation, taken anew with the weights that training ends with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cimjax.nn.batch_norm import STATISTICS, batch_statistics
from cimjax.training.batches import Batches
from cimjax.training.experiment import Experiment
from cimjax.training.state import TrainState
from cimjax.training.train_step import Setup, step_rngs


def reestimated(experiment: Experiment, state: TrainState, batches: Batches) -> TrainState:
    """The state with the mean of the statistics of `config.batch_norm_images` training images, in whole batches and of
    one epoch at most, instead of the running ones; as it is for 0 images.

    The images are those of the steps that training would make next, augmented as it augments them: a network is used to
    these, and loses points of accuracy with the statistics of images as they are (docs/accuracy.md).

    Running statistics lag behind weights, and more so behind weights that jump between codes. Source: Nagel et al.,
    "Overcoming oscillations in quantization-aware training", ICML 2022, section 4.
    """
    wanted, per_epoch = experiment.config.batch_norm_images, experiment.steps_per_epoch
    if not wanted:
        return state
    count = min(max(1, wanted // experiment.config.batch_size), per_epoch)
    setup, devices = experiment.setup_in(max(0, experiment.total_steps - 1) // per_epoch), experiment.devices

    def add(so_far: tuple[TrainState, Any], feed: Any) -> tuple[TrainState, Any]:
        state, total = so_far
        found = statistics_of(setup, state, batches.batch(feed, state, 0, setup.axis_name).images)
        if setup.axis_name is not None:
            found = lax.pmean(found, setup.axis_name)
        return state.replace(step=state.step + 1), jax.tree.map(lambda value, new: value + new / count, total, found)

    add, first = devices.spread(add, batches.spread), int(devices.here(state.step))
    running = state.collections[STATISTICS]
    so_far = state, devices.put(jax.tree.map(lambda value: np.zeros(value.shape, value.dtype), running))
    for step in range(first, first + count):
        so_far = add(so_far, batches.feed(step, 1))
    return state.replace(collections={**state.collections, STATISTICS: so_far[1]})


def statistics_of(setup: Setup, state: TrainState, images: Array) -> Any:
    """The statistics of one batch, of the structure of the running ones; the mean of its parts where training computes
    it in parts.

    Args:
      images: (N, H, W, C) float32, normalised.
    """

    def of_part(part: Array) -> Any:
        return batch_statistics(setup.apply, state.variables, part, train=True, rngs=step_rngs(setup, state))[0]

    if setup.accumulate == 1:
        return of_part(images)
    parts = images.reshape(setup.accumulate, -1, *images.shape[1:])
    return jax.tree.map(lambda value: jnp.mean(value, 0), lax.map(of_part, parts))


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
