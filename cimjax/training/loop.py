"""The run: from the first state or a checkpoint to the last epoch; what is measured, saved and shown on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from cimjax.data import Dataset
from cimjax.nn.calibration_warnings import messages
from cimjax.training.evaluate import Evaluator, health
from cimjax.training.experiment import Experiment, Reports, build, default_workdir, on_device
from cimjax.training.metrics import mean_movement, movement
from cimjax.training.optimizer import learning_rate
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.folder import RunFolder
from cimjax.training.show import advice
from cimjax.training.show.diagnosis import explain_failure
from cimjax.training.show.display import Display
from cimjax.training.show.report import describe_run, final_rows, layer_rows, step_rows
from cimjax.training.train_step import Stepper, TrainState, order_of_epoch, stored_steps

# Seconds between looks at the metrics of a step, each of which waits for the device.
LOOK_EVERY = 0.5


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    accuracy, best_accuracy: on the test images, 0 to 1, of the last state and of the best.
    loss: of the last state.
    steps: optimizer steps of the whole run.
    moved: how far each kind of step moved, mean `|log(s / s0)|`.
    workdir: the run folder.
    """

    accuracy: float
    best_accuracy: float
    loss: float
    steps: int
    moved: dict[str, float]
    workdir: Path


def train(
    config: ConfigDict,
    *,
    workdir: str | Path | None = None,
    model: nn.Module | None = None,
    dataset: Dataset | None = None,
    display: Display | None = None,
) -> Result:
    """Train a network, or go on with the run that the folder holds.

    Ctrl-C and SIGTERM save the state and raise KeyboardInterrupt or SystemExit; the same call goes on from there, and
    ends with the same numbers as a run that was never stopped.

    Args:
      config: as the files in `configs/` give it.
      workdir: the run folder; `runs/DATASET-MODEL` if not given.
      model: a network of your own, called as `model(images, train=...)`; else `config.model` names one.
      dataset: images of your own; else `config.dataset` names some.
      display: where to print; the terminal if not given.

    Raises:
      ValueError: for what cannot be trained: a field of the configuration, missing data, a folder in use or of another
        run (`RunFolderError`), a loss that is not finite.
    """
    experiment = build(config, model=model, dataset=dataset)
    folder = Path(workdir) if workdir is not None else default_workdir(config)
    with (
        RunFolder.open(folder, json.loads(config.to_json_best_effort()), allow={"execution"}) as run,
        display or Display() as screen,
        _stop_requests() as stop,
    ):
        return _Run(experiment, run, screen, stop, own=model is not None or dataset is not None).run()


class _Run:
    """One run in progress."""

    def __init__(self, experiment: Experiment, run: RunFolder, display: Display, stop: _Stop, *, own: bool) -> None:
        self.experiment, self.folder, self.display, self.stop, self.own = experiment, run, display, stop, own
        self.checkpoints = Checkpoints(run.path)
        config, devices = experiment.config, experiment.devices
        self.data = devices.put(on_device(experiment.dataset.train))
        self.evaluator = Evaluator(experiment, experiment.dataset.test)
        self.rate = learning_rate(config, len(experiment.dataset.train))
        # On CPU a loop inside a program runs its convolutions on one core; elsewhere it saves dispatches.
        self.chunk = config.steps_per_dispatch or (1 if devices.platform == "cpu" else 16)
        self.compiled: dict[tuple[bool, int], Any] = {}
        # Being compiled: the key of a program, and what will be it.
        self.first_program: tuple[tuple[bool, int], Future[Any]] | None = None
        self.best = 0.0
        # Per-step metrics of the epoch so far.
        self.seen: dict[str, list[float]] = {}
        self.images_per_second = 0.0

    def run(self) -> Result:
        """All epochs that are still to do."""
        experiment, per_epoch, total = self.experiment, self.experiment.steps_per_epoch, self.experiment.total_steps
        self.display.start(**describe_run(experiment), layers=layer_rows(experiment.layers))
        for line in advice.on_rules(getattr(experiment.model, "rules", ()), experiment.layers):
            self.display.warn(line)
        for line in advice.before_training(experiment.layers):
            self.display.note(line)
        with ThreadPoolExecutor(1) as background:
            self._compile_first(background)
            state, step = self._start()
        epochs, last = -(-total // per_epoch), {}
        while step < total:
            epoch = step // per_epoch
            end = min(total, (epoch + 1) * per_epoch)
            if step == epoch * per_epoch and experiment.sets_adcs_before(epoch):
                # Not saved before the next checkpoint: a run that stops here sets them again.
                state, reports = experiment.recalibrated(state)
                state = experiment.devices.put(state)
                self._tell(reports, step)
                if epoch == experiment.ideal_epochs:
                    # The best state is one with ADCs.
                    self.best = -1.0
                    self.display.note(advice.adcs_on(experiment.layers))
            state, step = self._epoch(state, step, end)
            last = self._after_epoch(state, step, epoch + 1, epochs, final=step == total)
        if not last:
            last = self.evaluator(state)
        return self._finish(state, step, last)

    def _compile_first(self, background: Executor) -> None:
        """Compile the first epoch's program while the first state is made: two long tasks that need not wait.

        It is traced here and now, under whatever settings of JAX the caller has made for this thread.
        """
        experiment, step = self.experiment, self.checkpoints.latest_step() or 0
        per_epoch, total = experiment.steps_per_epoch, experiment.total_steps
        if step >= total:
            return
        epoch = step // per_epoch
        count = min(self.chunk, min(total, (epoch + 1) * per_epoch) - step)
        stepper, order = experiment.stepper_in(epoch), jax.ShapeDtypeStruct((len(experiment.dataset.train),), "int32")
        described = experiment.devices.described((experiment.abstract_state(), self.data, order))
        lowered = self._steps(stepper, count).lower(*described)
        self.first_program = (stepper.ideal_adcs, count), background.submit(lowered.compile)

    def _start(self) -> tuple[TrainState, int]:
        devices = self.experiment.devices
        if self.checkpoints.latest_step() is None:
            self.folder.forget_after(-1)
            first, reports = self.experiment.first_state_and_reports()
            self._tell(reports, 0)
            return devices.put(first), 0
        state, extra = self.checkpoints.restore(self.experiment.abstract_state())
        step = int(state.step)
        self.folder.forget_after(step)
        self.best, self.seen = extra["best"], extra["seen"]
        self.display.resume(step, step / self.experiment.steps_per_epoch)
        return devices.put(state), step

    def _tell(self, reports: Reports, step: int) -> None:
        """Say and write down what is wrong with the data from which steps were set."""
        for layer, message in messages(jax.device_get(reports)):
            self.display.warn(message)
            self.folder.log({"step": step, "split": "calibration", "layer": layer, "message": message})

    def _epoch(self, state: TrainState, step: int, end: int) -> tuple[TrainState, int]:
        """Steps up to `end`, all in one epoch; a request to stop saves and leaves from here."""
        experiment, total = self.experiment, self.experiment.total_steps
        epoch = step // experiment.steps_per_epoch
        stepper = experiment.stepper_in(epoch)
        order = experiment.devices.put(order_of_epoch(experiment.key, epoch, len(experiment.dataset.train)))
        pending: list[dict[str, jax.Array]] = []
        looked, first = time.monotonic(), step
        while step < end:
            count = min(self.chunk, end - step)
            state, metrics = self._steps(stepper, count)(state, self.data, order)
            pending.append(metrics)
            step += count
            now = time.monotonic()
            if now - looked >= LOOK_EVERY or step == end or self.stop.requested:
                self._take(pending, state)
                elapsed = time.monotonic() - looked
                self.images_per_second = (step - first) * experiment.config.batch_size / max(elapsed, 1e-9)
                looked, first = time.monotonic(), step
                loss, accuracy = (float(np.mean(self.seen[name][-20:])) for name in ("loss", "accuracy"))
                fraction = step / experiment.steps_per_epoch
                self.display.progress(step, total, fraction, loss, accuracy, self.images_per_second)
            if self.stop.requested and step < total:
                self._save(state, step)
                self.stop.leave(step, total, self.folder.path)
        return state, step

    def _steps(self, stepper: Stepper, count: int) -> Any:
        key = stepper.ideal_adcs, count
        if self.first_program and self.first_program[0] == key:
            self.compiled[key], self.first_program = self.first_program[1].result(), None
        if key not in self.compiled:

            def steps(state: TrainState, data: Any, order: Any) -> Any:
                return stepper.train_many(state, data, order, count)

            self.compiled[key] = self.experiment.devices.spread(steps, donate=True)
        return self.compiled[key]

    def _take(self, pending: list[dict[str, jax.Array]], state: TrainState) -> None:
        """Wait for the metrics of the steps done, and stop the run where they are not finite."""
        for metrics in jax.device_get(pending):
            failed_at = int(metrics.pop("failed_at")[-1])
            if failed_at >= 0:
                raise ValueError(explain_failure(self.experiment, state, self.data, failed_at))
            for name, values in metrics.items():
                self.seen.setdefault(name, []).extend(float(value) for value in values)
        pending.clear()

    def _after_epoch(self, state: TrainState, step: int, epoch: int, epochs: int, *, final: bool) -> dict[str, float]:
        ideal = epoch <= self.experiment.ideal_epochs
        test = self.evaluator(state, ideal_adcs=ideal)
        best = test["accuracy"] > self.best or self.checkpoints.latest_step() is None
        self.best = max(self.best, test["accuracy"])
        means = {name: float(np.mean(values)) for name, values in self.seen.items()}
        self.seen = {}
        moved = mean_movement(self._movement(state))
        rate = float(self.rate(step - 1))
        self.folder.log({"step": step, "epoch": epoch, "split": "train", "learning_rate": rate, **means, **moved})
        stage = {"ideal_adcs": True} if ideal else {}
        self.folder.log({"step": step, "epoch": epoch, "split": "test", **test, "best": best, **stage})
        record = {
            "test_accuracy": test["accuracy"],
            "best": best,
            "train_accuracy": means["accuracy"],
            "train_loss": means["loss"],
            "learning_rate": rate,
            "images_per_second": self.images_per_second,
        }
        self.display.epoch(epoch, epochs, record)
        every = max(1, round(self.experiment.config.checkpoint_epochs))
        if best or final or epoch % every == 0:
            self._save(state, step, best=best)
        if epoch == self.experiment.ideal_epochs + 1 and not final:
            self._look_at_adcs(state, step, show=True)
        return test

    def _save(self, state: TrainState, step: int, *, best: bool = False) -> None:
        self.checkpoints.save(step, state, {"best": self.best, "seen": self.seen}, best=best)

    def _look_at_adcs(self, state: TrainState, step: int, *, show: bool) -> dict[str, dict[str, float]]:
        found = health(self.experiment, state)
        for layer, of in found.items():
            self.folder.log({"step": step, "split": "health", "layer": layer, **of})
        if show:
            for message in advice.on_adcs(found, self.experiment.layers):
                self.display.warn(message)
        return found

    def _finish(self, state: TrainState, step: int, last: dict[str, float]) -> Result:
        moved = self._movement(state)
        found = self._look_at_adcs(state, step, show=False)
        result = Result(last["accuracy"], self.best, last["loss"], step, mean_movement(moved), self.folder.path)
        summary = {"accuracy": result.accuracy, "best_accuracy": result.best_accuracy, "moved": result.moved}
        self.folder.log({"step": step, "split": "result", **summary})
        self.display.finish(final_rows(result, own=self.own), step_rows(self.experiment, moved, found))
        had_time = {name: distance for name, distance in result.moved.items() if self._had_time(name)}
        for message in (*advice.on_adcs(found, self.experiment.layers), *advice.on_steps(had_time)):
            self.display.warn(message)
        return result

    def _movement(self, state: TrainState) -> dict[str, dict[str, float]]:
        first, now = jax.device_get((state.first_steps, stored_steps(state.params)))
        return movement(first, now, self.experiment.specs)

    def _had_time(self, kind: str) -> bool:
        """Whether steps of a kind, as `mean_movement` names it, were trained long enough to have moved far."""
        epochs = self.experiment.config.epochs
        since = self.experiment.last_setting_of_adcs if kind.startswith(("psum", "offset")) else 0
        return epochs - since >= 2


class _Stop:
    """A request to stop, made by a signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def request(self, number: int, frame: Any) -> None:
        """Remember the signal; the same once more acts at once."""
        del frame
        self.signal = number
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)

    def leave(self, step: int, total: int, folder: Path) -> None:
        """End the run after its state was saved."""
        message = f"stopped after step {step:,} of {total:,}; saved: the same command with --workdir {folder} goes on."
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(f"cimjax: {message}")


@contextlib.contextmanager
def _stop_requests() -> Iterator[_Stop]:
    """Turn Ctrl-C and SIGTERM into requests, in the main thread, where Python receives signals."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
