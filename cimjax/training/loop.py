"""The run: from the first state or a checkpoint to the last epoch, and what it comes to."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cimjax.core.programs.cpu import compiler_options
from cimjax.data.dataset import Description
from cimjax.nn.parameters import stored_steps
from cimjax.nn.transfer import choose, fits
from cimjax.training.batches import batches_of
from cimjax.training.evaluate import Evaluator, Health, Loaded
from cimjax.training.experiment import Experiment
from cimjax.training.metrics import mean_movement, movement
from cimjax.training.programs import Programs
from cimjax.training.run.checkpoint import BESIDE, Checkpoints
from cimjax.training.run.folder import RunFolder
from cimjax.training.run.stop import Stop
from cimjax.training.show.diagnosis import explain_failure
from cimjax.training.show.teller import Teller
from cimjax.training.state import TrainState

# Seconds between looks at the metrics of a step, each of which waits for the device.
LOOK_EVERY = 0.5
# `callback(epoch, state, records)` after every epoch, with its records by split; True ends the run there.
Callback = Callable[[int, TrainState, dict[str, Any]], bool | None]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    accuracy, loss: on the test images, of the last state; the accuracy 0 to 1.
    steps: optimizer steps of the whole run.
    moved: how far each kind of step moved, mean `|log(s / s0)|`.
    workdir: the run folder.
    more: other accuracies by name, where the configuration asks for them: of the averaged parameters, of the state that
      was best on the held-out images, on fresh chips (their mean and standard deviation).
    """

    accuracy: float
    loss: float
    steps: int
    moved: dict[str, float]
    workdir: Path
    more: dict[str, float]


class Run:
    """One run in progress."""

    def __init__(
        self, experiment: Experiment, run: RunFolder, teller: Teller, stop: Stop, callbacks: Sequence[Callback]
    ) -> None:
        self.experiment, self.folder, self.tell, self.stop = experiment, run, teller, stop
        self.callbacks, self.checkpoints = callbacks, Checkpoints(run.path)
        data = experiment.dataset
        self.batches = batches_of(data.train, experiment.preparation, experiment.devices)
        self.programs = Programs(experiment, self.batches)
        self.health, self.test = Health(experiment), Evaluator(experiment, data.test)
        self.validation = Evaluator(experiment, data.validation) if data.validation else None
        self.recalibrated = jax.jit(experiment.recalibrated, compiler_options=compiler_options())
        # The best accuracy on the held-out images, and the per-step metrics of the epoch so far.
        self.best, self.seen = -1.0, {}  # type: float, dict[str, list[float]]

    def close(self) -> None:
        """End what reads images."""
        self.batches.close()
        self.test.close()
        if self.validation:
            self.validation.close()

    def run(self, variables: Any) -> Result:
        """All epochs that are still to do."""
        experiment, per_epoch, total = self.experiment, self.experiment.steps_per_epoch, self.experiment.total_steps
        self.tell.start()
        saved = self.checkpoints.latest_step()
        with ThreadPoolExecutor(1) as background:
            if (saved or 0) < total:
                self.tell.compiling("the training step")
                self.programs.compile_first(background, saved or 0)
            if saved is None:
                state, step = self._begin(variables), 0
            else:
                state, step = self._resume()
        records: dict[str, Any] = {}
        while step < total:
            epoch = step // per_epoch
            if step == epoch * per_epoch and experiment.sets_adcs_before(epoch):
                # Not saved before the next checkpoint: a run that stops here sets them again.
                self.tell.compiling("the setting of ADC steps")
                state, reports = self.recalibrated(state, experiment.calibration_images())
                state = experiment.devices.put(state)
                self.tell.calibrated(reports, step)
                if epoch == experiment.ideal_epochs:
                    # The best state is one with ADCs.
                    self.best = -1.0
                    self.tell.adcs_on()
            state, step = self._epoch(state, step, min(total, (epoch + 1) * per_epoch))
            records = self._after_epoch(state, step, epoch + 1)
            ended = any([callback(epoch + 1, state, records) for callback in self.callbacks])
            if self.stop.requested and step < total:
                self.stop.leave(step, total, self.folder.path)
            if ended:
                break
        if self.checkpoints.latest_step() != step:
            # Of a run that a callback has ended, or of one without steps.
            self._save(state, step, best=bool(self.validation) and not self.checkpoints.has("best"))
        return self._finish(state, step, records.get("test") or self.test(state))

    def _begin(self, variables: Any) -> TrainState:
        """The state before the first step, on every device: random or given weights, and steps calibrated on data."""
        experiment, given = self.experiment, None
        self.folder.forget_after(-1)
        if variables is not None:
            specs = variables.specs if isinstance(variables, Loaded) else experiment.specs
            there = variables.variables if isinstance(variables, Loaded) else variables
            given, facts = choose(there, experiment.abstract_state().variables, fits(specs, experiment.specs))
            self.tell.taken(facts)
        state, reports = experiment.first_state(given)
        self.tell.calibrated(reports, 0)
        return experiment.devices.put(state)

    def _resume(self) -> tuple[TrainState, int]:
        """The last saved state, on every device, and its step. Later records are forgotten."""
        state, extra = self.checkpoints.restore(self.experiment.abstract_state(), holding=BESIDE)
        step, marked, total = int(state.step), extra.get("metrics"), self.experiment.total_steps
        if step > total:
            raise ValueError(f"{self.folder.path} has done {step:,} steps, more than {total:,}; give more epochs.")
        splits = [record.get("split") for record in self.folder.records.read()]
        self.tell.finished = step == total and splits[-1:] == ["result"]
        self.folder.records.check(marked) if self.tell.finished else self.folder.forget_after(step, marked)
        self.tell.resumed(step)
        self.best, self.seen = extra["best"], extra["seen"]
        return self.experiment.devices.put(state), step

    def _epoch(self, state: TrainState, step: int, end: int) -> tuple[TrainState, int]:
        """Steps up to `end`, all in one epoch; a request to stop saves and leaves from here, but not after the last."""
        pending: list[dict[str, jax.Array]] = []
        looked = time.monotonic()
        while step < end:
            count = self.programs.steps_from(step)
            state, metrics = self.programs(state, step, count)
            pending.append(metrics)
            step += count
            if time.monotonic() - looked >= LOOK_EVERY or step == end or self.stop.requested:
                self._take(pending, state)
                self.tell.progress(step, self.seen)
                looked = time.monotonic()
            if self.stop.requested and step < end:
                self._save(state, step)
                self.stop.leave(step, self.experiment.total_steps, self.folder.path)
        return state, step

    def _take(self, pending: list[dict[str, jax.Array]], state: TrainState) -> None:
        """Wait for the metrics of the steps done, and stop the run where they are not finite."""
        for line in self.batches.remarks():
            self.tell.remark(line)
        for metrics in jax.device_get(pending):
            failed_at = int(metrics.pop("failed_at")[-1])
            if failed_at >= 0:
                raise ValueError(explain_failure(self.experiment, state, failed_at, self.batches))
            for name, values in metrics.items():
                self.seen.setdefault(name, []).extend(float(value) for value in values)
        pending.clear()

    def _after_epoch(self, state: TrainState, step: int, epoch: int) -> dict[str, Any]:
        """Evaluate, record and save; the records by split."""
        experiment = self.experiment
        ideal, final = epoch <= experiment.ideal_epochs, step == experiment.total_steps
        records = {"train": self._training_record(state, step), "test": self.test.record(state, ideal_adcs=ideal)}
        self.seen = {}
        best = False
        if self.validation:
            records["validation"] = self.validation.record(state, ideal_adcs=ideal)
            best = records["validation"]["accuracy"] > self.best or not self.checkpoints.has("best")
            self.best = max(self.best, records["validation"]["accuracy"])
            records["validation"]["best"] = best
        self.tell.epoch(step, epoch, records)
        # Before the state is saved: what is recorded after that is forgotten when the run goes on from there.
        if epoch == experiment.ideal_epochs + 1 and not final:
            self.tell.adcs(step, self.health(state))
        every = max(1, round(experiment.config.checkpoint_epochs))
        if best or final or epoch % every == 0 or self.stop.requested or self.checkpoints.latest_step() is None:
            self._save(state, step, best=best)
        return records

    def _training_record(self, state: TrainState, step: int) -> dict[str, float]:
        """The record of an epoch's training: means over its steps, the last learning rate, and how far steps moved."""
        means = {name: float(np.mean(values)) for name, values in self.seen.items()}
        # An optimizer of the caller's own has no schedule.
        schedule = self.experiment.schedule
        rate = {} if schedule is None else {"learning_rate": float(schedule(step - 1))}
        return {**rate, **means, **mean_movement(self._moved(state))}

    def _moved(self, state: TrainState) -> dict[str, dict[str, float]]:
        """How far steps have moved since they were set, by kind and layer."""
        first, now = jax.device_get((state.first_steps, stored_steps(state.params)))
        return movement(first, now, self.experiment.specs, self.experiment.config.frozen)

    def _save(self, state: TrainState, step: int, *, best: bool = False) -> None:
        data = dataclasses.asdict(Description.of(self.experiment.dataset))
        extra = {"best": self.best, "seen": self.seen, "metrics": self.folder.records.mark(), "data": data}
        self.checkpoints.save(step, state, extra, best=best)

    def _finish(self, state: TrainState, step: int, test: dict[str, Any]) -> Result:
        experiment = self.experiment
        more = {name: value for name, value in test.items() if name == "average_accuracy"}
        if self.validation:
            best, _ = self.checkpoints.restore(experiment.abstract_state(), which="best")
            more["best_accuracy"] = self.test(experiment.devices.put(best))["accuracy"]
        more, distances = more | self.test.on_fresh_chips(state), self._moved(state)
        result = Result(test["accuracy"], test["loss"], step, mean_movement(distances), self.folder.path, more)
        self.tell.finish(result, distances, self.health(state))
        return result
