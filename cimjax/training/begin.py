"""The state that a run goes on from: one that is made, or the one that was saved last."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cimjax.nn.transfer import choose, fits
from cimjax.training.experiment import Experiment
from cimjax.training.forking import take_over
from cimjax.training.programs import Programs
from cimjax.training.restore import Loaded
from cimjax.training.run.checkpoint import BESIDE, Checkpoints
from cimjax.training.run.folder import RunFolder
from cimjax.training.show.reporter import Reporter
from cimjax.training.state import TrainState

# A state, its step, the best accuracy on held-out images so far, and the metrics of the epoch so far.
Start = tuple[TrainState, int, float, dict[str, list[float]]]


def start(
    programs: Programs, folder: RunFolder, tell: Reporter, checkpoints: Checkpoints, variables: Any, fork: Path | None
) -> Start:
    """What a run goes on from, on every device, while its first program is compiled in the background.

    Args:
      variables: what a new run starts from instead of random weights; None for these.
      fork: a run whose epochs with ideal ADCs a new run takes over; None where it trains its own.

    Raises:
      ValueError: for a run that has done more steps than it is to do.
    """
    saved = checkpoints.latest_step()
    if saved is None and fork is not None:
        state, step = take_over(programs.experiment, fork, folder)
        tell.taken_over(fork, step)
        return state, step, -1.0, {}
    with ThreadPoolExecutor(1) as background:
        if (saved or 0) < programs.experiment.total_steps:
            tell.compiling("the training step")
            programs.compile_first(background, saved or 0)
        if saved is None:
            return begin(programs.experiment, folder, tell, variables), 0, -1.0, {}
        return resume(programs.experiment, folder, tell, checkpoints)


def begin(experiment: Experiment, folder: RunFolder, tell: Reporter, variables: Any) -> TrainState:
    """The state before the first step, on every device: random or given weights, and steps calibrated on data."""
    given = None
    folder.forget_after(-1)
    if variables is not None:
        specs = variables.specs if isinstance(variables, Loaded) else experiment.specs
        there = variables.variables if isinstance(variables, Loaded) else variables
        given, facts = choose(there, experiment.abstract_state().variables, fits(specs, experiment.specs))
        tell.taken(facts)
    state, reports = experiment.first_state(given)
    tell.calibrated(reports, 0)
    experiment.devices.require_same("state before the first step", state)
    return experiment.devices.put(state)


def resume(experiment: Experiment, folder: RunFolder, tell: Reporter, checkpoints: Checkpoints) -> Start:
    """The last saved state, on every device, and what was saved beside it. Later records are forgotten.

    Raises:
      ValueError: for a run that has done more steps than it is to do.
    """
    devices = experiment.devices
    state, extra = checkpoints.restore(devices.described(experiment.abstract_state()), holding=BESIDE)
    devices.require_same("saved state", state)
    step, marked, total = int(state.step), extra.get("metrics"), experiment.total_steps
    if step > total:
        raise ValueError(f"{folder.path} has done {step:,} steps, more than {total:,}; give more epochs.")
    splits = [record.get("split") for record in folder.records.read()]
    tell.finished = step == total and splits[-1:] == ["result"]
    if tell.finished:
        folder.records.check(marked)
    else:
        folder.forget_after(step, marked)
    tell.resumed(step)
    return state, step, extra["best"], extra["seen"]
