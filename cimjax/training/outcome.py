"""What a state of a run is worth: on splits of images, on fresh chips, and how far its steps have moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from cimjax.training.evaluate import Evaluator
from cimjax.training.experiment import Experiment
from cimjax.training.metrics import mean_movement, movement
from cimjax.training.optimizer import stored_steps
from cimjax.training.state import TrainState


def measured(evaluator: Evaluator, state: TrainState, *, ideal_adcs: bool) -> dict[str, Any]:
    """Accuracy and loss on a split, with the averaged parameters as well where there are any."""
    found: dict[str, Any] = evaluator(state, ideal_adcs=ideal_adcs)
    if state.average is not None:
        found["average_accuracy"] = evaluator(state, ideal_adcs=ideal_adcs, average=True)["accuracy"]
    return {**found, **({"ideal_adcs": True} if ideal_adcs else {})}


def on_fresh_chips(experiment: Experiment, evaluator: Evaluator, state: TrainState) -> dict[str, float]:
    """Mean and standard deviation of the accuracy on so many chips as the configuration asks for."""
    if not experiment.config.fresh_chips:
        return {}
    accuracies = evaluator.on_fresh_chips(state, experiment.config.fresh_chips)
    return {"fresh_chips": float(np.mean(accuracies)), "fresh_chips_spread": float(np.std(accuracies))}


def moved(experiment: Experiment, state: TrainState) -> dict[str, dict[str, float]]:
    """How far steps have moved since they were set, by kind and layer; see `metrics.movement`."""
    first, now = jax.device_get((state.first_steps, stored_steps(state.params)))
    return movement(first, now, experiment.specs, experiment.config.frozen)


def seen_in(
    experiment: Experiment, state: TrainState, step: int, seen: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """The record of an epoch's training: means over its steps, the last learning rate, and how far steps have moved.

    Args:
      step: those done.
      seen: metrics of every step.
    """
    means = {name: float(np.mean(values)) for name, values in seen.items()}
    # An optimizer of the caller's own has no schedule.
    schedule = experiment.schedule
    rate = {} if schedule is None else {"learning_rate": float(schedule(step - 1))}
    return {**rate, **means, **mean_movement(moved(experiment, state))}
