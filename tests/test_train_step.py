"""The step by itself: parts of a batch, averages, mixtures, networks of one's own, weights to start from, devices."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_training import config, quiet

import cimjax
from cimjax.data import Dataset
from cimjax.nn.transfer import choose, put_in
from cimjax.training.batches import FromMemory, Resident, batches_of, mix
from cimjax.training.experiment import Experiment, build
from cimjax.training.optimizer import SCHEDULES, learning_rate
from cimjax.training.programs import train_steps
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.state import Batch, TrainState
from cimjax.training.train_step import train_step

SPEC = cimjax.CIMSpec(adc=cimjax.ADCSpec(bits=3))


def images(count: int = 32) -> Dataset:
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8), rng.integers(0, 3, count)
    return Dataset.from_arrays("tiny", pixels, labels, pixels[:9], labels[:9], classes=3)


class Tiny(nn.Module):
    """Compiled in no time: one dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(3)(x.reshape(len(x), -1))


class Everything(nn.Module):
    """What networks of one's own have: no argument `train`, batch statistics without an axis, another collection,
    dropout, a random stream of its own, and an attribute that cannot be hashed."""

    widths: Any = (6,)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        train = not self.is_initializing() and self.is_mutable_collection("batch_stats")
        x = cimjax.CIMDense(self.widths[0], spec=SPEC)(nn.relu(x.reshape(len(x), -1)))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        count = self.variable("counters", "steps", lambda: jnp.int32(0))
        if train:
            count.value += 1
        noise = jax.random.normal(self.make_rng("noise"), x.shape) if train else 0.0
        return nn.Dense(3)(x + 0.01 * noise)


def tiny(model: nn.Module | None = None, **fields: Any) -> Experiment:
    chosen = config("smoke,weight=none", **{"batch_size": 8, "eval_batch_size": 4, "epochs": 4.0, **fields})
    return build(chosen, model=model or Tiny(), dataset=images())


def resident(experiment: Experiment) -> Resident:
    return Resident(experiment.dataset.train, experiment.preparation, experiment.config.seed, jax.device_put)


def after(experiment: Experiment, steps: int = 3, batches: Any = None) -> tuple[TrainState, Any]:
    batches, state = batches or resident(experiment), experiment.first_state()[0]
    run = jax.jit(lambda state, feed: train_steps(experiment.setup, batches, state, feed, steps))
    return run(state, batches.feed(0, steps))


def test_parts_of_a_batch_give_the_step_of_the_whole() -> None:
    whole, _ = after(tiny())
    parts, _ = after(tiny(optimizer={"accumulate": 4}))
    chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"`config.optimizer.accumulate` is 3, which does not divide the 8 images"):
        tiny(optimizer={"accumulate": 3})


def test_the_average_follows_the_parameters() -> None:
    experiment = tiny(ema=0.9)
    state, batches = experiment.first_state()[0], resident(experiment)
    chex.assert_trees_all_equal(state.average, state.params)
    batch = batches.batch(batches.feed(0, 1), state, 0, None)
    # A tenth of the random weights is left after a first step, and 0.9 of what there was after a hundredth.
    for step, kept in ((0, 1 / 10), (3, 4 / 13), (99, 0.9)):
        before = state.replace(step=jnp.int32(step))
        state, _ = train_step(experiment.setup, before, batch)
        want = jax.tree.map(lambda old, new, kept=kept: kept * old + (1 - kept) * new, before.average, state.params)
        chex.assert_trees_all_close(state.average, want, rtol=1e-5, atol=1e-7)


def test_a_gradient_is_no_longer_than_the_norm_it_is_clipped_to() -> None:
    plain = {"momentum": 0.0, "nesterov": False, "weight_decay": 0.0, "learning_rate": 1.0}
    moved = []
    for clip in (0.0, 1e-3):
        experiment = tiny(optimizer={**plain, "clip_norm": clip}, warmup_epochs=0.0)
        first = experiment.first_state()[0]
        state, _ = after(experiment, 1)
        moved.append(float(optax.tree.norm(jax.tree.map(jnp.subtract, state.params, first.params))))
    assert moved[1] == pytest.approx(1e-3, rel=1e-3) and moved[0] > 1e-2


def test_mixtures_are_of_neighbours_by_one_part() -> None:
    labels = jnp.arange(5) % 3
    pixels = jax.random.uniform(jax.random.key(1), (5, 2, 2, 1))
    batch = Batch(pixels, labels, jax.nn.one_hot(labels, 3))
    mixed = mix(batch, jax.random.key(0), 1.0)
    part = float(mixed.targets[0, 0])
    assert 0 < part < 1
    np.testing.assert_allclose(mixed.images[0], part * pixels[0] + (1 - part) * pixels[1], rtol=1e-5)
    np.testing.assert_allclose(mixed.targets[1], [1 - part, part, 0], atol=1e-6)
    np.testing.assert_array_equal(mixed.images[4], pixels[4])
    np.testing.assert_allclose(mixed.targets.sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_start_at_the_rate_and_do_not_rise_beyond_it(name: str) -> None:
    chosen = config("smoke,weight=none", epochs=10.0, warmup_epochs=1.0, optimizer={"schedule": name})
    rate, peak = learning_rate(chosen, 640), chosen.optimizer.learning_rate
    values = [float(rate(step)) for step in range(100)]
    assert values[0] == 0 and max(values) <= peak * (1 + 1e-6)
    if "onecycle" not in name:
        assert values[10] == pytest.approx(peak)
    if name not in ("constant", "sgdr"):
        assert values[-1] < 0.5 * peak


def test_images_on_the_host_give_the_steps_of_images_on_the_device() -> None:
    """Over the end of an epoch as well, whose order is another."""
    experiment = tiny(augment={"shift": 1, "flip": True}, label_smoothing=0.1, mixup=0.4)
    streamed = tiny(augment={"shift": 1, "flip": True}, label_smoothing=0.1, mixup=0.4, images_on="host")
    batches = batches_of(streamed.dataset.train, streamed.preparation, streamed.devices)
    assert isinstance(batches, FromMemory)
    for step in (0, experiment.steps_per_epoch - 1, experiment.steps_per_epoch):
        feeds = [each.feed(step, 1) for each in (batches, resident(experiment))]
        state = experiment.first_state()[0].replace(step=jnp.int32(step))
        got, want = (
            each.batch(feed, state, 0, None) for each, feed in zip((batches, resident(experiment)), feeds, strict=True)
        )
        chex.assert_trees_all_equal(got, want)
    got, _ = after(streamed, batches=batches)
    want, _ = after(experiment)
    chex.assert_trees_all_equal(got, want)


def test_networks_of_ones_own_train_with_all_that_they_have() -> None:
    experiment = tiny(Everything([6]))
    state, metrics = after(experiment)
    assert int(state.collections["counters"]["steps"]) == 3
    first = experiment.first_state()[0]
    moved = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)), first.collections["batch_stats"], state.collections["batch_stats"]
    )
    assert all(jax.tree.leaves(moved)) and np.isfinite(metrics["loss"]).all()
    # ADC steps can be set anew in training mode, dropout included.
    renewed, _ = jax.jit(experiment.recalibrated)(state, experiment.calibration_images())
    assert int(renewed.step) == 3


def test_a_loss_of_ones_own_is_what_is_minimised() -> None:
    def loss_fn(logits: jax.Array, batch: Batch) -> jax.Array:
        return jnp.sum(jnp.square(logits - batch.targets), -1)

    experiment = tiny()
    experiment = dataclasses.replace(experiment, setup=dataclasses.replace(experiment.setup, loss_fn=loss_fn))
    batches, state = resident(experiment), experiment.first_state()[0]
    batch = batches.batch(batches.feed(0, 1), state, 0, None)
    _, metrics = train_step(experiment.setup, state, batch)
    logits = Tiny().apply(state.variables, batch.images)
    assert float(metrics["loss"]) == pytest.approx(float(jnp.mean(loss_fn(logits, batch))), rel=1e-5)


def test_weights_of_another_network_are_taken_and_the_rest_is_calibrated() -> None:
    class Net(nn.Module):
        spec: cimjax.CIMSpec | None
        classes: int = 3

        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            dense = nn.Dense if self.spec is None else lambda n, name: cimjax.CIMDense(n, spec=self.spec, name=name)
            x = nn.relu(x.reshape(len(x), -1))
            return nn.Dense(self.classes, name="head")(dense(6, name="body")(x))

    pretrained = tiny(Net(None)).first_state()[0].variables
    experiment = tiny(Net(SPEC, classes=3))
    given, facts = choose(pretrained, experiment.abstract_state().variables)
    assert facts["taken"].startswith("4 of") and facts["new"] == "none" and facts["left over"] == "none"
    assert "weight_log_step" in facts["calibrated"]
    state, _ = experiment.first_state(given)
    chex.assert_trees_all_equal(state.params["body"]["kernel"], pretrained["params"]["body"]["kernel"])
    want = cimjax.calibrate(
        Net(SPEC), put_in(experiment.uncalibrated_state().variables, given.values), experiment.calibration_images()
    )
    chex.assert_trees_all_close(state.params, want["params"], rtol=1e-5)
    # Steps of the same specification are taken; those of another are calibrated.
    _, facts = choose(state.variables, experiment.abstract_state().variables)
    assert facts["calibrated"] == "none"
    given, facts = choose(state.variables, experiment.abstract_state().variables, lambda path: "body" not in path)
    assert not given.steps and "psum_log_step" in facts["calibrated"]
    with pytest.raises(ValueError, match="nothing of the given variables fits: they have 2: other/kernel"):
        choose({"params": {"other": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}}, state.variables)


MANY = """
import os, sys
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
sys.path.insert(0, sys.argv[1])
import json, jax, test_train_step
print(json.dumps(test_train_step.on_devices(int(sys.argv[2]), *sys.argv[3:])))
"""


class Plain(nn.Module):
    """With batch statistics that know of no axis, in an array layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(cimjax.CIMConv(4, (3, 3), spec=SPEC)(nn.relu(x)))
        x = nn.BatchNorm(use_running_average=not train, axis_name=self.axis_name)(x)
        return nn.Dense(3)(x.mean((1, 2)))

    axis_name: str | None = None


def on_devices(count: int, way: str, images_on: str) -> dict[str, Any]:
    """Losses of three steps, evaluation and what the program gathers, on so many devices."""
    from cimjax.training import parallel
    from cimjax.training.batch_norm import reestimated
    from cimjax.training.evaluate import Evaluator
    from cimjax.training.programs import Programs

    devices = jax.devices()[:count]
    jax.devices = lambda: devices
    fields = {"parallel": way, "mixup": 0.2, "images_on": images_on, "batch_norm_images": 16}
    chosen = config("smoke,weight=none", batch_size=8, eval_batch_size=4, epochs=4.0, **fields)
    experiment = build(chosen, model=Plain(), dataset=images())
    assert experiment.devices.count == count and parallel.AXIS
    if count == 2:
        with pytest.raises(ValueError, match=r"^`config.mixup` mixes neighbours, and 2 devices have 3 images"):
            build(config("smoke,weight=none", batch_size=6, mixup=0.2), model=Plain(), dataset=images())
    batches = batches_of(experiment.dataset.train, experiment.preparation, experiment.devices)
    state, losses = experiment.devices.put(experiment.first_state()[0]), []
    programs = Programs(experiment, batches)
    gathered = []
    if way == "shard_map":
        program = programs._program(experiment.setup, 1).lower(state, batches.feed(0, 1)).compile()
        gathered = [line for line in program.as_text().splitlines() if "all-gather" in line]
    for step in range(3):
        state, metrics = programs(state, step, 1)
        losses.append(float(metrics["loss"][0]))
    found = Evaluator(experiment, experiment.dataset.test)(state)
    means = [
        [float(x) for x in jax.tree.leaves(jax.device_get(each.collections))[0]]
        for each in (state, reestimated(experiment, state, batches))
    ]
    statistics = means[0] + means[1]
    return {"losses": losses, "evaluated": found, "statistics": statistics, "gathered": gathered}


def test_devices_share_a_step_by_both_ways() -> None:
    """1 = 2 = 4 devices: loss, batch statistics, evaluation, wherever images lie; nothing of a batch is gathered."""
    jobs = [(1, "shard_map", "device"), (2, "shard_map", "device"), (4, "pmap", "host")]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MANY, str(Path(__file__).parent), str(count), way, place],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for count, way, place in jobs
    ]
    results = []
    for process in started:
        output, error = process.communicate()
        assert process.returncode == 0, error
        results.append(json.loads(output.splitlines()[-1]))
    one, *others = results
    for other in others:
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert other["statistics"] == pytest.approx(one["statistics"], rel=1e-4, abs=1e-6)
        assert other["evaluated"] == pytest.approx(one["evaluated"], rel=1e-5)
        assert other["gathered"] == []


def test_a_stop_at_the_end_of_an_epoch_keeps_the_epoch(tmp_path: Path) -> None:
    """Its evaluation and its records: the run goes on as one that was never stopped."""
    from test_training import Stopping, without_times

    from cimjax.training.run.folder import read_records

    chosen = config("smoke,weight=none", batch_size=8, eval_batch_size=4, epochs=3.0)
    cimjax.train(chosen, workdir=tmp_path / "whole", model=Tiny(), dataset=images(), display=quiet())
    with pytest.raises(KeyboardInterrupt, match="stopped after step 4 of 12"):
        cimjax.train(chosen, workdir=tmp_path / "cut", model=Tiny(), dataset=images(), display=Stopping(after=4))
    assert [record["split"] for record in read_records(tmp_path / "cut")] == ["train", "test"]
    cimjax.train(chosen, workdir=tmp_path / "cut", model=Tiny(), dataset=images(), display=quiet())
    assert without_times(read_records(tmp_path / "cut")) == without_times(read_records(tmp_path / "whole"))


def test_callbacks_see_every_epoch_and_may_end_the_run(tmp_path: Path) -> None:
    seen: list[int] = []

    def callback(epoch: int, state: TrainState, records: dict[str, Any]) -> bool:
        seen.append(epoch)
        assert set(records) == {"train", "test"} and int(state.step) == 4 * epoch
        return epoch == 2

    class Kept:
        """A writer of one's own."""

        def __init__(self) -> None:
            self.splits: list[str] = []
            self.closed = False

        def write(self, record: dict[str, Any]) -> None:
            self.splits.append(record["split"])

        def close(self) -> None:
            self.closed = True

    writer = Kept()
    chosen = config("smoke,weight=none", batch_size=8, eval_batch_size=4, epochs=5.0, checkpoint_epochs=10.0)
    result = cimjax.train(
        chosen,
        workdir=tmp_path,
        model=Tiny(),
        dataset=images(),
        callbacks=[callback],
        writers=[writer],
        display=quiet(),
    )
    assert seen == [1, 2] and result.steps == 8
    # The state at which it ended is saved, and a writer has every record.
    assert Checkpoints(tmp_path).latest_step() == 8
    assert writer.closed and writer.splits == ["train", "test", "train", "test", "result"]


def epochs_on(count: int, folder: str, epochs: int) -> list[dict[str, Any]]:
    """A run of one's own network on so many devices up to an epoch, and what it records by then."""
    from cimjax.training.run.folder import read_records

    devices = jax.devices()[:count]
    jax.devices = lambda: devices
    chosen = config("smoke,weight=none", batch_size=8, eval_batch_size=4, epochs=3.0)
    stop = [lambda epoch, state, records: epoch == epochs]
    cimjax.train(chosen, workdir=folder, model=Plain(), dataset=images(), callbacks=stop, display=quiet())
    return [record for record in read_records(folder) if "loss" in record]


@pytest.mark.full
def test_a_network_of_ones_own_goes_on_with_another_number_of_devices(tmp_path: Path) -> None:
    run = MANY.replace("on_devices(int(sys.argv[2]), *sys.argv[3:])", "epochs_on(*map(json.loads, sys.argv[2:]))")

    def records(count: int, folder: str, epochs: int) -> list[dict[str, Any]]:
        words = [str(Path(__file__).parent), str(count), json.dumps(str(tmp_path / folder)), str(epochs)]
        found = subprocess.run([sys.executable, "-c", run, *words], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr
        return json.loads(found.stdout.splitlines()[-1])

    whole = records(1, "whole", 3)
    for count, epochs in ((1, 1), (4, 2), (2, 3)):
        parts = records(count, "parts", epochs)
    assert [(one["split"], one["step"]) for one in parts] == [(one["split"], one["step"]) for one in whole]
    for one, other in zip(whole, parts, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["accuracy"] == pytest.approx(one["accuracy"], abs=1e-6)
