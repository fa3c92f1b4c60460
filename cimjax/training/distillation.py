"""Learning from a trained network, `config.teacher`, beside the labels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from cimjax.training.experiment import Experiment
from cimjax.training.restore import Loaded
from cimjax.training.state import Batch
from cimjax.training.train_step import LossFunction, cross_entropy


def taught_by(teacher: Loaded, weight: float, temperature: float) -> LossFunction:
    """The loss of a network that learns from another: `(1 - a) CE(targets, z) + a T^2 CE(softmax(z' / T), z / T)`.

    With the student's logits `z` and the teacher's `z'`, which sees the same augmented images, in evaluation mode.
    Source: Hinton et al., "Distilling the knowledge in a neural network", 2015, section 2.

    Args:
      teacher: a trained run.
      weight: `a`, 0 to 1.
      temperature: `T` > 0.
    """
    rngs = {"variation": teacher.chip, "params": teacher.chip}

    def loss_fn(logits: Array, batch: Batch) -> Array:
        taught = jnp.asarray(teacher.model.apply(teacher.variables, batch.images, rngs=rngs), jnp.float32)
        probabilities = jax.nn.softmax(jax.lax.stop_gradient(taught) / temperature)
        soft = optax.softmax_cross_entropy(logits.astype(jnp.float32) / temperature, probabilities)
        return (1 - weight) * cross_entropy(logits, batch) + weight * temperature**2 * soft

    return loss_fn


def check_teacher(teacher: Loaded, experiment: Experiment) -> None:
    """Refuse a teacher of other classes or of images that are normalised otherwise.

    Raises:
      ValueError: in one line.
    """
    theirs, own = teacher.preparation, experiment.preparation
    if theirs.classes != own.classes:
        raise ValueError(
            f"`config.teacher` tells {theirs.classes} classes apart, but {experiment.dataset.name} has {own.classes}; "
            "give a run of the same data set."
        )
    if not np.allclose((theirs.mean, theirs.std), (own.mean, own.std), atol=1e-6):
        raise ValueError(
            f"`config.teacher` was trained on images of another mean and deviation than {experiment.dataset.name}; "
            "give a run of the same data set."
        )
