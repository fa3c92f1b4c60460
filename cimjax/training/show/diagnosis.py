"""Why a loss is not finite: the first layer whose output is not, else the parameters whose gradient is not."""

from __future__ import annotations

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp

from cimjax.training.batches import Batches
from cimjax.training.experiment import Experiment
from cimjax.training.state import Batch, TrainState
from cimjax.training.train_step import Setup, gradients, step_rngs


def require_finite(failed_at: int, experiment: Experiment, state: TrainState, batches: Batches) -> None:
    """Stop a run whose loss was not finite at a step; `failed_at` is negative where all is well.

    Raises:
      ValueError: with `explain_failure`.
    """
    if failed_at >= 0:
        raise ValueError(explain_failure(experiment, state, failed_at, batches))


def explain_failure(experiment: Experiment, state: TrainState, step: int, batches: Batches) -> str:
    """One line on the step that failed.

    Args:
      state: as it was before that step; a failed step changes nothing.
      step: the step that failed.
      batches: of the training images.
    """
    advice = "lower optimizer.learning_rate or optimizer.step_factor, or raise warmup_epochs"
    if experiment.devices.processes.count > 1:
        return f"Step {step}: the loss or a gradient is not finite (one process alone would say where); {advice}."
    ideal_adcs = experiment.setup_in(step // experiment.steps_per_epoch).ideal_adcs
    setup = dataclasses.replace(experiment.setup_on_one_device(), ideal_adcs=ideal_adcs)
    batch = batches.batch(batches.feed(step, 1), state, 0, None)
    culprit = _first_layer(setup, state, batch) or _gradients(setup, state, batch)
    return f"Step {step}: the loss or a gradient is not finite ({culprit}); {advice}."


def _first_layer(setup: Setup, state: TrainState, batch: Batch) -> str | None:
    mutable, rngs = [*state.collections, "intermediates"], step_rngs(setup, state)
    _, found = setup.apply(
        state.variables, batch.images, train=True, mutable=mutable, capture_intermediates=True, rngs=rngs
    )
    for path, values in flax.traverse_util.flatten_dict(found["intermediates"], sep="/").items():
        finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(values))
        if not finite:
            layer = path.removesuffix("__call__").strip("/") or "the network's output"
            return f"the first layer with such an output is {layer}"
    return None


def _gradients(setup: Setup, state: TrainState, batch: Batch) -> str:
    gradient = gradients(setup, state, batch)[0]
    names = [
        "/".join(str(part.key) for part in path)
        for path, value in jax.tree_util.tree_flatten_with_path(gradient)[0]
        if not bool(jnp.all(jnp.isfinite(value)))
    ]
    return f"every output is finite, but not the gradient of {', '.join(names[:3]) or 'the loss'}"
