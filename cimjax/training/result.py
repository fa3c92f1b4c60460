"""What a run comes to, and what is recorded of an epoch's training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cimjax.nn.parameters import stored_steps
from cimjax.training.experiment import Experiment
from cimjax.training.metrics import mean_movement, movement
from cimjax.training.oscillation import frozen_part
from cimjax.training.state import TrainState

# `callback(epoch, state, records)` after every epoch, with its records by split; True ends the run there.
Callback = Callable[[int, TrainState, dict[str, Any]], bool | None]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    accuracy, loss: on the test images, of the last state; the accuracy 0 to 1.
    steps: optimizer steps of the whole run.
    moved: how far each kind of step moved, mean `|log(s / s0)|`.
    workdir: the run folder; an address where it is in a bucket.
    more: other accuracies by name, where the configuration asks for them: of the averaged parameters, of the state that
      was best on the held-out images, on fresh chips (their mean and standard deviation).
    """

    accuracy: float
    loss: float
    steps: int
    moved: dict[str, float]
    workdir: Path | str
    more: dict[str, float]


def training_record(
    experiment: Experiment, state: TrainState, step: int, seen: Mapping[str, Sequence[float]]
) -> dict[str, float]:
    """The record of an epoch's training: means over its steps, the last learning rate, the part of the weights that is
    frozen where `optimizer.freeze_oscillating` asks for it, and how far steps moved."""
    means = {name: float(np.mean(values)) for name, values in seen.items()}
    # An optimizer of the caller's own has no schedule.
    rate = {} if experiment.schedule is None else {"learning_rate": float(experiment.schedule(step - 1))}
    part = frozen_part(state.opt_state)
    frozen = {} if part is None else {"frozen": part}
    return {**rate, **means, **frozen, **mean_movement(moved(experiment, state))}


def moved(experiment: Experiment, state: TrainState) -> dict[str, dict[str, float]]:
    """How far steps have moved since they were set, by kind and layer."""
    first, now = jax.device_get((state.first_steps, stored_steps(state.params)))
    return movement(first, now, experiment.specs, experiment.config.frozen)
