"""What runs of other ADCs have in common: the epochs with ideal ones, trained once and taken over by the others."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from cimjax.data.dataset import Description
from cimjax.nn.parameters import trained_as
from cimjax.training.config.fields import completed
from cimjax.training.experiment import Experiment, planned_ideal
from cimjax.training.run import network_file
from cimjax.training.run.checkpoint import Checkpoints, named_leaves
from cimjax.training.run.folder import RunFolder, RunFolderError, read_config, read_records
from cimjax.training.run.options import MAY_CHANGE, differences, in_a_line
from cimjax.training.state import TrainState

# What is decided after the epochs that are taken over, besides what may differ whenever a run goes on.
_DECIDED_LATER = ("ideal_share", "recalibrate_epochs", "batch_norm_images", "fresh_chips")
# Splits of what is recorded of these epochs.
_RECORDED = ("train", "test", "validation", "calibration")


def take_over(experiment: Experiment, run: Path, folder: RunFolder) -> tuple[TrainState, int]:
    """The state that another run had when the epochs with ideal ADCs of this one end, on every device, and its step.

    Steps of ADCs are not set in it; the records of these epochs are copied.

    Args:
      run: the folder of a run that differs in its ADCs alone, or has none.
      folder: that of this run.

    Raises:
      ValueError: where this run has no such epochs.
      RunFolderError: where the other was trained otherwise, or keeps no state of that step.
    """
    epochs, devices = experiment.ideal_epochs, experiment.devices
    if not epochs:
        raise ValueError(
            "this run has no epochs with ideal ADCs to take over; give ADCs and --config.ideal_share=0.5, or leave out "
            "--fork."
        )
    if network_file.read(run):
        raise RunFolderError(f"{run} holds a packed network, without what its training kept; give the run itself.")
    _require_same_training(run, experiment, epochs)
    step, checkpoints = epochs * experiment.steps_per_epoch, Checkpoints(run)
    if step not in checkpoints.steps():
        kept = ", ".join(f"{other:,}" for other in checkpoints.steps()) or "none"
        raise RunFolderError(
            f"{run} keeps no state of epoch {epochs} (step {step:,}; it has {kept}); train it with "
            f"--config.checkpoint_epochs={epochs} --config.checkpoint_keep=2."
        )
    own = devices.put(experiment.uncalibrated_state())
    common = {name: leaf for name, leaf in named_leaves(devices.described(own)).items() if not _of_adcs(name)}
    taken, extra = checkpoints.restore(common, step=step, passes_over=_of_adcs)
    data = json.loads(json.dumps(dataclasses.asdict(Description.of(experiment.dataset))))
    if extra.get("data") not in (None, data):
        raise RunFolderError(f"{run} was trained on other images; give a run of the same.")
    state = jax.tree.unflatten(
        jax.tree.structure(own), [taken.get(name, leaf) for name, leaf in named_leaves(own).items()]
    )
    devices.require_same("state that was taken over", state)
    folder.begin_with([_as_here(record) for record in read_records(run) if _is_common(record, step)])
    return state, step


def _is_common(record: dict[str, Any], step: int) -> bool:
    # What is said of ADCs that are set at this step is of the other's.
    last = step - 1 if record["split"] == "calibration" else step
    return record["split"] in _RECORDED and record["step"] <= last


def _as_here(record: dict[str, Any]) -> dict[str, Any]:
    """A record as this run would have it, which says where ADCs were ideal."""
    return {**record, "ideal_adcs": True} if record["split"] in ("test", "validation") else record


def _of_adcs(name: str) -> bool:
    return trained_as(name) == "psum"


def _require_same_training(run: Path, experiment: Experiment, epochs: int) -> None:
    there, here = (
        json.loads(config.to_json_best_effort()) for config in (read_config(run, completed), experiment.config)
    )
    allowed = {*MAY_CHANGE, *_DECIDED_LATER} - {"epochs"}  # which the learning rate follows
    ideal, there, here = _ideal_epochs(there), _without_adcs(there), _without_adcs(here)
    if found := list(differences(there, here, allow=allowed)):
        raise RunFolderError(
            f"{run} was trained otherwise, not only for other ADCs ({in_a_line(found)}); give the same options, or "
            "start from its weights alone by --from."
        )
    if ideal is not None and ideal < epochs:
        raise RunFolderError(
            f"{run} has ideal ADCs until epoch {ideal} alone, and this run until {epochs}; give --config.ideal_share, "
            "or another run."
        )


def _ideal_epochs(options: dict[str, Any]) -> int | None:
    """The epochs with ideal ADCs of a run; None where it has no others."""
    specs = [options["spec"], *(spec for _, spec in options["rules"])]
    has_adcs = any(spec and spec.get("adc") for spec in specs)
    return planned_ideal(options) if has_adcs else None


def _without_adcs(options: dict[str, Any]) -> dict[str, Any]:
    def without(spec: Any) -> Any:
        return {name: value for name, value in spec.items() if name != "adc"} if spec else spec

    rules = [[pattern, without(spec)] for pattern, spec in options["rules"]]
    return {**options, "spec": without(options["spec"]), "rules": rules}
