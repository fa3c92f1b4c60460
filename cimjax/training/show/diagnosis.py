"""Why a loss is not finite: the first layer whose output is not, else the parameters whose gradient is not."""

from __future__ import annotations

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp

from cimjax.training.experiment import Experiment
from cimjax.training.train_step import Images, Stepper, TrainState, augment, order_of_epoch, step_rngs


def explain_failure(experiment: Experiment, state: TrainState, data: Images, step: int) -> str:
    """One line on the step that failed.

    Args:
      state: as it was before that step; a failed step changes nothing.
      data: the training images.
      step: the step that failed.
    """
    config = experiment.config
    epoch, position = divmod(step, experiment.steps_per_epoch)
    order = order_of_epoch(experiment.key, epoch, data.labels.shape[0])
    chosen = order[position * config.batch_size : (position + 1) * config.batch_size]
    keys = jax.random.split(jax.random.fold_in(experiment.key, step), config.batch_size)
    pixels = augment(data.pixels[chosen], keys, config.augment.shift, config.augment.flip)
    advice = "lower optimizer.learning_rate or optimizer.step_factor, or raise warmup_epochs"
    ideal_adcs = experiment.stepper_in(epoch).ideal_adcs
    stepper = dataclasses.replace(experiment.stepper_on_one_device(), ideal_adcs=ideal_adcs)
    culprit = _first_layer(stepper, state, pixels) or _gradients(stepper, state, pixels, data.labels[chosen])
    return f"Step {step}: the loss or a gradient is not finite ({culprit}); {advice}."


def _first_layer(stepper: Stepper, state: TrainState, pixels: jax.Array) -> str | None:
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    _, found = stepper.apply(
        variables,
        stepper.normalise(pixels),
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
        rngs=step_rngs(state),
    )
    for path, values in flax.traverse_util.flatten_dict(found["intermediates"], sep="/").items():
        finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(values))
        if not finite:
            layer = path.removesuffix("__call__").strip("/") or "the network's output"
            return f"the first layer with such an output is {layer}"
    return None


def _gradients(stepper: Stepper, state: TrainState, pixels: jax.Array, labels: jax.Array) -> str:
    gradient, _ = jax.grad(stepper.loss, has_aux=True)(state.params, state, pixels, labels)
    names = [
        "/".join(str(part.key) for part in path)
        for path, value in jax.tree_util.tree_flatten_with_path(gradient)[0]
        if not bool(jnp.all(jnp.isfinite(value)))
    ]
    return f"every output is finite, but not the gradient of {', '.join(names[:3]) or 'the loss'}"
