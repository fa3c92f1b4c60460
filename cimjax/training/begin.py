"""The first state of a run, or the one that it goes on from."""

from __future__ import annotations

from typing import Any

from cimjax.training.evaluate import Loaded
from cimjax.training.experiment import Experiment
from cimjax.training.run.checkpoint import BESIDE, Checkpoints
from cimjax.training.run.folder import RunFolder
from cimjax.training.show.teller import Teller
from cimjax.training.start import choose, fits
from cimjax.training.state import TrainState


def begin(experiment: Experiment, folder: RunFolder, tell: Teller, variables: Any) -> TrainState:
    """The state before the first step, on every device: random or given weights, and steps calibrated on data.

    Args:
      variables: as for `cimjax.train`.
    """
    given = None
    folder.forget_after(-1)
    if variables is not None:
        specs = variables.specs if isinstance(variables, Loaded) else experiment.specs
        there = variables.variables if isinstance(variables, Loaded) else variables
        given, facts = choose(there, experiment.abstract_state().variables, fits(specs, experiment.specs))
        tell.taken(facts)
    state, reports = experiment.first_state_and_reports(given)
    tell.calibrated(reports, 0)
    return experiment.devices.put(state)


def resume(
    experiment: Experiment, folder: RunFolder, tell: Teller, checkpoints: Checkpoints
) -> tuple[TrainState, int, float, dict[str, list[float]]]:
    """The last saved state, on every device, and its step; the best accuracy on held-out images, and the metrics of its
    epoch so far. Later records are forgotten.

    Raises:
      ValueError: where the run has done more steps than it is to have, or a file of it is damaged.
    """
    state, extra = checkpoints.restore(experiment.abstract_state(), holding=BESIDE)
    step, marked, total = int(state.step), extra.get("metrics"), experiment.total_steps
    if step > total:
        raise ValueError(f"{folder.path} has done {step:,} steps, more than {total:,}; give more epochs.")
    splits = [record.get("split") for record in folder.records()]
    tell.finished = step == total and splits[-1:] == ["result"]
    folder.check(marked) if tell.finished else folder.forget_after(step, marked)
    tell.resumed(step)
    return experiment.devices.put(state), step, extra["best"], extra["seen"]
