"""What is said and written of a run: records for `metrics.jsonl` and other writers, lines for a person."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from cimjax.hardware.advice import on_design
from cimjax.hardware.table import layer_table, show
from cimjax.nn.calibrate import RULES_OF_ARRAYS
from cimjax.nn.calibration_warnings import messages
from cimjax.spec.rules import on_rules
from cimjax.training.experiment import Experiment, Reports
from cimjax.training.run.folder import RunFolder
from cimjax.training.run.writers import Writer
from cimjax.training.show import advice
from cimjax.training.show.display import Display
from cimjax.training.show.report import describe_run, final_rows, step_table

if TYPE_CHECKING:
    from cimjax.training.result import Result


class Reporter:
    """Reports of one run.

    finished: whether the run was finished before, and has nothing more to write down.
    """

    def __init__(
        self, experiment: Experiment, run: RunFolder, display: Display, writers: Sequence[Writer], *, own: bool
    ) -> None:
        self.experiment, self.folder, self.display, self.own = experiment, run, display, own
        self.writers, self.finished = writers, False
        # When the metrics were last looked at, after how many steps, and the speed between the last two looks.
        self._looked, self._speed = (time.monotonic(), 0), 0.0

    def start(self) -> None:
        experiment = self.experiment
        self.display.start(**describe_run(experiment), layers=layer_table(experiment.layers))
        model, paths = experiment.model, [layer.name for layer in experiment.layers]
        for line in on_rules(getattr(model, "rules", getattr(model, RULES_OF_ARRAYS, ())), paths):
            self.display.warn(line)
        for line in on_design(experiment.layers):
            self.display.note(line)

    def compiling(self, what: str) -> None:
        self.display.waiting(f"compiling {what}")
        self._looked = time.monotonic(), self._looked[1]

    def taken(self, facts: Mapping[str, str]) -> None:
        """What the network starts from."""
        for name, text in facts.items():
            self.display.note(f"{name:<10}  {text}")

    def taken_over(self, run: Path, step: int) -> None:
        """The epochs with ideal ADCs are those of another run."""
        self._looked = time.monotonic(), step
        epochs = self.experiment.ideal_epochs
        self.display.note(f"forked from {run} after its first {epochs} epoch{'s' * (epochs > 1)}, with ideal ADCs")

    def resumed(self, step: int) -> None:
        self._looked = time.monotonic(), step
        self.display.note(f"resumed after step {step:,} (epoch {show(step / self.experiment.steps_per_epoch)})")
        self.display.waiting("preparing the first steps")

    def calibrated(self, reports: Reports, step: int) -> None:
        """What is wrong with the data from which steps were set."""
        for layer, message in messages(jax.device_get(reports)):
            self.display.warn(message)
            self._log({"step": step, "split": "calibration", "layer": layer, "message": message})

    def adcs_on(self) -> None:
        self.display.note(advice.adcs_on(self.experiment.layers))

    def remark(self, line: str) -> None:
        """What is odd about the data."""
        self.display.warn(line)

    def progress(self, step: int, seen: Mapping[str, Sequence[float]]) -> None:
        """The metrics of the steps up to `step` have been seen."""
        (before, first), now = self._looked, time.monotonic()
        self._speed = (step - first) * self.experiment.config.batch_size / max(now - before, 1e-9)
        self._looked = now, step
        loss, accuracy = (float(np.mean(seen[name][-20:])) for name in ("loss", "accuracy"))
        experiment = self.experiment
        fraction = step / experiment.steps_per_epoch
        self.display.progress(step, experiment.total_steps, fraction, loss, accuracy, self._speed)

    def epoch(self, step: int, epoch: float, records: Mapping[str, Mapping[str, Any]]) -> None:
        """The records of an epoch by split; its number is that of `config.epochs` where they end within it."""
        for split, record in records.items():
            more = {"images_per_second": round(self._speed, 1)} if split == "train" else {}
            self._log({"step": step, "epoch": epoch, "split": split, **record, **more})
        self.display.epoch(epoch, self.experiment.config.epochs, records, self._speed)
        self._looked = time.monotonic(), step

    def adcs(self, step: int, found: Mapping[str, Mapping[str, float]]) -> None:
        """How ADCs are used, by layer."""
        self._log_adcs(step, found)
        for message in advice.on_adcs(found, self.experiment.layers):
            self.display.warn(message)

    def finish(self, result: Result, moved: dict[str, Any], found: dict[str, Any]) -> None:
        """What the run came to."""
        self._log_adcs(result.steps, found)
        summary = {"accuracy": result.accuracy, **result.more, "moved": result.moved}
        self._log({"step": result.steps, "split": "result", **summary})
        self.display.finish(step_table(self.experiment.layers, moved, found), final_rows(result, own=self.own))
        had_time = {name: distance for name, distance in result.moved.items() if self._had_time(name)}
        for message in (*advice.on_adcs(found, self.experiment.layers), *advice.on_steps(had_time)):
            self.display.warn(message)

    def _log_adcs(self, step: int, found: Mapping[str, Mapping[str, float]]) -> None:
        for layer, values in found.items():
            self._log({"step": step, "split": "health", "layer": layer, **values})

    def _log(self, record: dict[str, Any]) -> None:
        if self.finished:
            return
        self.folder.log(record)
        for writer in self.writers:
            writer.write(record)

    def _had_time(self, kind: str) -> bool:
        """Whether steps of a kind, as `mean_movement` names it, were trained long enough to have moved far."""
        epochs = self.experiment.config.epochs
        since = self.experiment.last_setting_of_adcs if kind.startswith(("psum", "offset")) else 0
        return epochs - since >= 2
