"""The run: from the first state or a checkpoint to the last epoch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from cimjax.data.dataset import Description
from cimjax.training.batches import batches_of
from cimjax.training.evaluate import Evaluator, Health, Loaded
from cimjax.training.experiment import Experiment
from cimjax.training.metrics import mean_movement, movement
from cimjax.training.optimizer import stored_steps
from cimjax.training.programs import Programs
from cimjax.training.run.checkpoint import BESIDE, Checkpoints
from cimjax.training.run.folder import RunFolder
from cimjax.training.run.stop import Stop
from cimjax.training.show.teller import Teller
from cimjax.training.start import choose, fits
from cimjax.training.state import TrainState
from cimjax.training.train import Callback, Result

# Seconds between looks at the metrics of a step, each of which waits for the device.
LOOK_EVERY = 0.5


class Run:
    """One run in progress."""

    def __init__(
        self, experiment: Experiment, run: RunFolder, teller: Teller, stop: Stop, callbacks: Sequence[Callback]
    ) -> None:
        self.experiment, self.folder, self.tell, self.stop = experiment, run, teller, stop
        self.callbacks, self.checkpoints = callbacks, Checkpoints(run.path)
        config, data, devices = experiment.config, experiment.dataset, experiment.devices
        self.batches = batches_of(data.train, experiment.preparation, devices.put)
        self.programs = Programs(experiment, self.batches)
        self.health, self.test = Health(experiment), Evaluator(experiment, data.test)
        held_out = getattr(data, "validation", None)
        self.validation = Evaluator(experiment, held_out) if held_out is not None else None
        # On CPU a loop inside a program runs its convolutions on one core; elsewhere it saves dispatches.
        self.chunk = config.steps_per_dispatch or (1 if devices.platform == "cpu" else 16)
        # The best accuracy on the held-out images, and the per-step metrics of the epoch so far.
        self.best, self.seen = -1.0, {}  # type: float, dict[str, list[float]]

    def run(self, variables: Any) -> Result:
        """All epochs that are still to do."""
        experiment, per_epoch, total = self.experiment, self.experiment.steps_per_epoch, self.experiment.total_steps
        self.tell.start()
        begin = self.checkpoints.latest_step()
        with ThreadPoolExecutor(1) as background:
            if (begin or 0) < total:
                self.tell.compiling("the training step")
                self.programs.compile_first(background, begin or 0, self._count(begin or 0))
            state, step = self._begin(variables) if begin is None else self._resume()
        records: dict[str, Any] = {}
        while step < total:
            epoch = step // per_epoch
            if step == epoch * per_epoch and experiment.sets_adcs_before(epoch):
                # Not saved before the next checkpoint: a run that stops here sets them again.
                self.tell.compiling("the setting of ADC steps")
                state, reports = experiment.recalibrated(state)
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
                if self.checkpoints.latest_step() != step:
                    self._save(state, step)
                break
        if self.checkpoints.latest_step() is None:
            self._save(state, step, best=True)
        return self._finish(state, step, records.get("test") or self.test(state))

    def _begin(self, variables: Any) -> tuple[TrainState, int]:
        experiment, given = self.experiment, None
        self.folder.forget_after(-1)
        if variables is not None:
            specs = variables.specs if isinstance(variables, Loaded) else experiment.specs
            there = variables.variables if isinstance(variables, Loaded) else variables
            given, facts = choose(there, experiment.abstract_state().variables, fits(specs, experiment.specs))
            self.tell.taken(facts)
        state, reports = experiment.first_state_and_reports(given)
        self.tell.calibrated(reports, 0)
        return experiment.devices.put(state), 0

    def _resume(self) -> tuple[TrainState, int]:
        state, extra = self.checkpoints.restore(self.experiment.abstract_state(), holding=BESIDE)
        step, marked, total = int(state.step), extra.get("metrics"), self.experiment.total_steps
        if step > total:
            raise ValueError(f"{self.folder.path} has done {step:,} steps, more than {total:,}; give more epochs.")
        splits = [record.get("split") for record in self.folder.records()]
        self.tell.finished = step == total and splits[-1:] == ["result"]
        self.folder.check(marked) if self.tell.finished else self.folder.forget_after(step, marked)
        self.best, self.seen = extra["best"], extra["seen"]
        self.tell.resumed(step)
        return self.experiment.devices.put(state), step

    def _count(self, step: int) -> int:
        """Steps of the next program."""
        per_epoch = self.experiment.steps_per_epoch
        return min(self.chunk, per_epoch - step % per_epoch, self.experiment.total_steps - step)

    def _epoch(self, state: TrainState, step: int, end: int) -> tuple[TrainState, int]:
        """Steps up to `end`, all in one epoch; a request to stop saves and leaves from here, but not after the last."""
        pending: list[dict[str, jax.Array]] = []
        looked = time.monotonic()
        while step < end:
            count = self._count(step)
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
        for metrics in jax.device_get(pending):
            failed_at = int(metrics.pop("failed_at")[-1])
            if failed_at >= 0:
                raise ValueError(self.tell.failure(state, failed_at, self.batches))
            for name, values in metrics.items():
                self.seen.setdefault(name, []).extend(float(value) for value in values)
        pending.clear()

    def _after_epoch(self, state: TrainState, step: int, epoch: int) -> dict[str, Any]:
        """Evaluate, record and save; the records by split."""
        experiment, config = self.experiment, self.experiment.config
        ideal, final = epoch <= experiment.ideal_epochs, step == experiment.total_steps
        means = {name: float(np.mean(values)) for name, values in self.seen.items()}
        self.seen = {}
        records: dict[str, Any] = {
            "train": {**self._rate(step), **means, **mean_movement(self._movement(state))},
            "test": self._measure(self.test, state, ideal),
        }
        best = False
        if self.validation:
            records["validation"] = self._measure(self.validation, state, ideal)
            best = records["validation"]["accuracy"] > self.best or not self.checkpoints.has("best")
            self.best = max(self.best, records["validation"]["accuracy"])
            records["validation"]["best"] = best
        self.tell.epoch(step, epoch, records)
        # Before the state is saved: what is recorded after that is forgotten when the run goes on from there.
        if epoch == experiment.ideal_epochs + 1 and not final:
            self.tell.adcs(step, self.health(state))
        every = max(1, round(config.checkpoint_epochs))
        if best or final or epoch % every == 0 or self.stop.requested or self.checkpoints.latest_step() is None:
            self._save(state, step, best=best)
        return records

    def _rate(self, step: int) -> dict[str, float]:
        schedule = self.experiment.schedule
        return {} if schedule is None else {"learning_rate": float(schedule(step - 1))}

    def _measure(self, evaluator: Evaluator, state: TrainState, ideal: bool) -> dict[str, Any]:
        found: dict[str, Any] = evaluator(state, ideal_adcs=ideal)
        if state.average is not None:
            found["average_accuracy"] = evaluator(state, ideal_adcs=ideal, average=True)["accuracy"]
        return {**found, **({"ideal_adcs": True} if ideal else {})}

    def _save(self, state: TrainState, step: int, *, best: bool = False) -> None:
        data = dataclasses.asdict(Description.of(self.experiment.dataset))
        extra = {"best": self.best, "seen": self.seen, "metrics": self.folder.mark(), "data": data}
        self.checkpoints.save(step, state, extra, best=best)

    def _finish(self, state: TrainState, step: int, test: dict[str, Any]) -> Result:
        more = {name: value for name, value in test.items() if name == "average_accuracy"}
        if self.validation:
            best, _ = self.checkpoints.restore(self.experiment.abstract_state(), which="best")
            more["best_accuracy"] = self.test(self.experiment.devices.put(best))["accuracy"]
        if count := self.experiment.config.fresh_chips:
            accuracies = self.test.on_fresh_chips(state, count)
            more |= {"fresh_chips": float(np.mean(accuracies)), "fresh_chips_spread": float(np.std(accuracies))}
        moved = self._movement(state)
        result = Result(test["accuracy"], test["loss"], step, mean_movement(moved), self.folder.path, more)
        self.tell.finish(result, moved, self.health(state))
        return result

    def _movement(self, state: TrainState) -> dict[str, dict[str, float]]:
        first, now = jax.device_get((state.first_steps, stored_steps(state.params)))
        return movement(first, now, self.experiment.specs, self.experiment.config.frozen)
