"""The compiled programs of a run: some steps each, with ideal ADCs or real ones."""

from __future__ import annotations

import time
from concurrent.futures import Executor, Future
from typing import Any

import jax
from jax import Array, lax
from ml_collections import ConfigDict

from cimjax.training.batches import Batches
from cimjax.training.experiment import Experiment
from cimjax.training.state import TrainState
from cimjax.training.train_step import Setup, train_step


def train_steps(
    setup: Setup, batches: Batches, state: TrainState, feed: Any, count: int
) -> tuple[TrainState, dict[str, Array]]:
    """`count` steps on the batches of a feed; metrics have a leading axis of `count`."""

    def step(state: TrainState, index: int | Array) -> tuple[TrainState, dict[str, Array]]:
        return train_step(setup, state, batches.batch(feed, state, index, setup.axis_name))

    if count == 1:
        state, metrics = step(state, 0)
        return state, jax.tree.map(lambda value: value[None], metrics)
    return lax.scan(step, state, jax.numpy.arange(count))


def most_steps(config: ConfigDict, platform: str) -> int:
    """How many steps of a run one program does: `steps_per_dispatch`, or what suits a platform ("cpu", "gpu", ...)."""
    # On CPU a loop inside a program runs its convolutions on one core; elsewhere it saves dispatches.
    return config.steps_per_dispatch or (1 if platform == "cpu" else 16)


class Programs:
    """Each is compiled when it is first called; the first one of a run in the background."""

    def __init__(self, experiment: Experiment, batches: Batches) -> None:
        self.experiment, self.batches = experiment, batches
        # Seconds that were spent to bring images, which no device computes meanwhile.
        self.seconds_for_images = 0.0
        self._most = most_steps(experiment.config, experiment.devices.platform)
        self._compiled: dict[tuple[bool, int], Any] = {}
        self._first: tuple[tuple[bool, int], Future[Any]] | None = None

    def steps_from(self, step: int) -> int:
        """How many steps the program of a step does: all of one epoch."""
        per_epoch = self.experiment.steps_per_epoch
        return min(self._most, self.batches.most, per_epoch - step % per_epoch, self.experiment.total_steps - step)

    def compile_first(self, background: Executor, step: int) -> None:
        """Compile while the first state is made: two long tasks that need not wait for each other.

        It is traced here and now, under whatever settings of JAX the caller has made for this thread.
        """
        count = self.steps_from(step)
        setup = self.experiment.setup_in(step // self.experiment.steps_per_epoch)
        program = self._program(setup, count)
        if hasattr(program, "lower"):
            state = self.experiment.devices.described(self.experiment.abstract_state())
            lowered = program.lower(state, self.batches.feed(step, count))
            self._first = (setup.ideal_adcs, count), background.submit(lowered.compile)

    def __call__(self, state: TrainState, step: int, count: int) -> tuple[TrainState, dict[str, Array]]:
        """`count` steps from `step` on, all of one epoch; the state is given up."""
        setup = self.experiment.setup_in(step // self.experiment.steps_per_epoch)
        key = setup.ideal_adcs, count
        if self._first and self._first[0] == key:
            self._compiled[key], self._first = self._first[1].result(), None
        if key not in self._compiled:
            self._compiled[key] = self._program(setup, count)
        began = time.monotonic()
        feed = self.batches.feed(step, count)
        self.seconds_for_images += time.monotonic() - began
        done = self._compiled[key](state, feed)
        if following := self.steps_from(step + count):
            self.batches.expect(step + count, following)
        return done

    def _program(self, setup: Setup, count: int) -> Any:
        def steps(state: TrainState, feed: Any) -> tuple[TrainState, dict[str, Array]]:
            return train_steps(setup, self.batches, state, feed, count)

        return self.experiment.devices.spread(steps, self.batches.spread, donate=True)
