"""The run: from the first state or a checkpoint to the last epoch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from cimjax.core.programs.cpu import compiler_options
from cimjax.data.dataset import Description
from cimjax.training.batch_norm import reestimated
from cimjax.training.batches import batches_of
from cimjax.training.begin import start
from cimjax.training.evaluate import ADCUsage, Evaluator
from cimjax.training.experiment import Experiment
from cimjax.training.metrics import mean_movement
from cimjax.training.processes.progress import name_slowest
from cimjax.training.programs import Programs
from cimjax.training.restore import lacks_adcs
from cimjax.training.result import Callback, Result, moved, training_record
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.folder import RunFolder
from cimjax.training.run.stop import Stop
from cimjax.training.show.diagnosis import require_finite
from cimjax.training.show.reporter import Reporter
from cimjax.training.state import TrainState

# Seconds between looks at the metrics of a step, each of which waits for the device.
LOOK_EVERY = 0.5
# Kinds of steps that ADCs have.
_OF_ADCS = ("psum", "offset", "gain")


class Run:
    """One run in progress."""

    def __init__(
        self, experiment: Experiment, run: RunFolder, reporter: Reporter, stop: Stop, callbacks: Sequence[Callback]
    ) -> None:
        self.experiment, self.folder, self.tell, self.stop = experiment, run, reporter, stop
        self.callbacks = callbacks
        self.checkpoints = Checkpoints(run.path, keep=experiment.config.checkpoint_keep)
        data = experiment.dataset
        self.batches = batches_of(data.train, experiment.preparation, experiment.devices)
        self.programs = Programs(experiment, self.batches)
        self.usage, self.test = ADCUsage(experiment), Evaluator(experiment, data.test)
        self.validation = Evaluator(experiment, data.validation) if data.validation else None
        self.recalibrated = jax.jit(experiment.recalibrated, compiler_options=compiler_options())
        # The best accuracy on the held-out images, and the per-step metrics of the epoch so far.
        self.best, self.seen = -1.0, {}  # type: float, dict[str, list[float]]
        # Steps between saved states, and the last step of which one was.
        self.every, self.saved = max(1, round(experiment.config.checkpoint_epochs * experiment.steps_per_epoch)), 0

    def close(self) -> None:
        """End what reads images, and what writes a state."""
        self.batches.close()
        self.test.close()
        if self.validation:
            self.validation.close()
        self.checkpoints.wait()

    def run(self, variables: Any, fork: Path | None) -> Result:
        """All epochs that are still to do; arguments as of `begin.start`."""
        experiment, per_epoch, total = self.experiment, self.experiment.steps_per_epoch, self.experiment.total_steps
        self.tell.start()
        parts = self.programs, self.folder, self.tell, self.checkpoints
        state, step, self.best, self.seen = start(*parts, variables, fork)
        self.saved = step
        if step and self.checkpoints.latest_step() is None:
            self._save(state, step)  # taken over from another run
        records: dict[str, Any] = {}
        if not total:
            state = reestimated(experiment, state, self.batches)
        while step < total:
            epoch = step // per_epoch
            if step == epoch * per_epoch and experiment.sets_adcs_before(epoch):
                # Not saved before the next checkpoint: a run that stops here sets them again.
                self.tell.compiling("the setting of ADC steps")
                devices = experiment.devices
                state, reports = self.recalibrated(devices.here(state), experiment.calibration_images())
                devices.require_same("state with newly set ADCs", state)
                state = devices.put(state)
                self.tell.calibrated(reports, step)
                if epoch == experiment.ideal_epochs:
                    # The best state is one with ADCs.
                    self.best = -1.0
                    self.tell.adcs_on()
            state, step = self._epoch(state, step, min(total, (epoch + 1) * per_epoch))
            if step == total:
                state = reestimated(experiment, state, self.batches)
            records, stopping = self._after_epoch(state, step, epoch + 1)
            if self.folder.in_bucket:
                self.checkpoints.wait()  # what is copied there after an epoch is whole
            ended = any([callback(epoch + 1, state, records) for callback in self.callbacks])
            if stopping and step < total:
                self.checkpoints.wait()
                self.stop.leave(step, total, self.folder.address)
            if ended:
                break
        if self.checkpoints.latest_step() != step:
            # Of a run that a callback has ended, or of one without steps.
            self._save(state, step, best=bool(self.validation) and not self.checkpoints.has("best"))
        test = records.get("test") or self.test(state, ideal_adcs=lacks_adcs(experiment, state))
        return self._finish(state, step, test)

    def _epoch(self, state: TrainState, step: int, end: int) -> tuple[TrainState, int]:
        """Steps up to `end`, all in one epoch; a request to stop saves and leaves from here, but not after the last."""
        pending: list[dict[str, jax.Array]] = []
        looked = began = time.monotonic()
        while step < end:
            count = self.programs.steps_from(step)
            state, metrics = self.programs(state, step, count)
            pending.append(metrics)
            step += count
            stopping = step < end and self.stop.here()
            saving = step < end and not stopping and step // self.every > self.saved // self.every
            if time.monotonic() - looked >= LOOK_EVERY or step == end or stopping or saving:
                self._take(pending, state)
                self.tell.progress(step, self.seen)
                looked = time.monotonic()
            if saving:
                self._save(state, step)
            if stopping:
                self._save(state, step)
                self.checkpoints.wait()
                self.stop.leave(step, self.experiment.total_steps, self.folder.address)
        seconds, self.programs.seconds_for_images = self.programs.seconds_for_images, 0.0
        name_slowest(self.experiment.devices.processes, "images", seconds, time.monotonic() - began)
        return state, step

    def _take(self, pending: list[dict[str, jax.Array]], state: TrainState) -> None:
        """Wait for the metrics of the steps done, and stop the run where they are not finite."""
        for line in self.batches.remarks():
            self.tell.remark(line)
        for metrics in jax.device_get(pending):
            require_finite(int(metrics.pop("failed_at")[-1]), self.experiment, state, self.batches)
            for name, values in metrics.items():
                self.seen.setdefault(name, []).extend(float(value) for value in values)
        pending.clear()

    def _after_epoch(self, state: TrainState, step: int, epoch: int) -> tuple[dict[str, Any], bool]:
        """Evaluate, record and save; the records by split, and whether the run stops here."""
        experiment = self.experiment
        ideal, final = epoch <= experiment.ideal_epochs, step == experiment.total_steps
        records = {"train": training_record(experiment, state, step, self.seen)}
        records["test"] = self.test.record(state, ideal_adcs=ideal)
        best = False
        if step % experiment.steps_per_epoch == 0:
            self.seen = {}  # else the epoch goes on where the run does
        if self.validation:
            records["validation"] = self.validation.record(state, ideal_adcs=ideal)
            best = records["validation"]["accuracy"] > self.best or not self.checkpoints.has("best")
            self.best = max(self.best, records["validation"]["accuracy"])
            records["validation"]["best"] = best
        self.tell.epoch(step, min(epoch, experiment.config.epochs), records)
        # Before the state is saved: what is recorded after that is forgotten when the run goes on from there.
        if epoch == experiment.ideal_epochs + 1 and not final:
            self.tell.adcs(step, self.usage(state))
        stopping = self.stop.here()
        due = step // self.every > self.saved // self.every
        if best or final or due or stopping or self.checkpoints.latest_step() is None:
            self._save(state, step, best=best)
        return records, stopping

    def _save(self, state: TrainState, step: int, *, best: bool = False) -> None:
        data = dataclasses.asdict(Description.of(self.experiment.dataset))
        extra = {"best": self.best, "seen": self.seen, "metrics": self.folder.records.mark(), "data": data}
        extra["ideal_epochs"] = self.experiment.ideal_epochs
        self.checkpoints.save_in_background(step, state, extra, best=best)
        self.saved = step

    def _finish(self, state: TrainState, step: int, test: dict[str, Any]) -> Result:
        experiment = self.experiment
        more = {name: value for name, value in test.items() if name == "average_accuracy"}
        self.checkpoints.wait()
        if self.validation:
            best, _ = self.checkpoints.restore(experiment.devices.described(experiment.abstract_state()), which="best")
            more["best_accuracy"] = self.test(best, ideal_adcs=lacks_adcs(experiment, best))["accuracy"]
        distances = moved(experiment, state)
        if lacks_adcs(experiment, state):  # ended by a callback: steps of ADCs are not set
            more["ideal_adcs"] = True
            distances = {kind: values for kind, values in distances.items() if kind not in _OF_ADCS}
            usage: dict[str, Any] = {}
        else:
            more, usage = more | self.test.on_fresh_chips(state), self.usage(state)
        result = Result(test["accuracy"], test["loss"], step, mean_movement(distances), self.folder.address, more)
        self.tell.finish(result, distances, usage)
        return result
