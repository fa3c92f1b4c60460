"""Training end to end, on the real digits, with real optimizers, checkpoints and processes."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cimjax
from cimjax.data import Dataset, load
from cimjax.nn.ideal import ideal_adcs
from cimjax.nn.layers import ADC_STATISTICS
from cimjax.nn.parameters import kind_of
from cimjax.nn.transfer import Given
from cimjax.training import batches as batches_lib
from cimjax.training import loop
from cimjax.training.batches import Resident, augment, order_of_epoch
from cimjax.training.config.file import Override, load_config
from cimjax.training.evaluate import Evaluator, Health
from cimjax.training.experiment import Experiment, build
from cimjax.training.metrics import health_by_layer
from cimjax.training.optimizer import learning_rate, make_optimizer, total_steps
from cimjax.training.random_streams import chip_key
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.folder import RunFolderError, read_records
from cimjax.training.show.diagnosis import explain_failure
from cimjax.training.show.display import Display
from cimjax.training.state import TrainState
from cimjax.training.train_step import Setup, step_rngs

ROOT = Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "digits.py")


# Through arrays goes the layer of several row tiles alone, which is compiled soonest.
RULES = (("conv[12]", None),)


def config(options: str = "smoke", **fields: Any) -> Any:
    chosen = load_config(f"{CONFIG}:{options}" if options else CONFIG, [])
    with chosen.unlocked():
        chosen.model.width, chosen.rules = 4, RULES
        for name, value in fields.items():
            if isinstance(value, dict):
                chosen[name].update(value)
            else:
                chosen[name] = value
    return chosen


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if "second" not in key} for record in records]


def quiet() -> Any:
    return Display(stream=open(os.devnull, "w"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("runs") / "digits"
    return folder, cimjax.train(config(epochs=4.0), workdir=folder, display=quiet())


def test_a_run_learns_and_leaves_its_records(trained: tuple[Path, Any]) -> None:
    require_records(*trained, layers={"conv3"})


@pytest.mark.full
def test_all_layers_learn_through_arrays(tmp_path: Path) -> None:
    result = cimjax.train(config(epochs=4.0, rules=()), workdir=tmp_path, display=quiet())
    require_records(tmp_path, result, layers={"conv1", "conv2", "conv3"})


def require_records(folder: Path, result: Any, layers: set[str]) -> None:
    records = read_records(folder)
    tests = [record for record in records if record["split"] == "test"]
    trains = [record for record in records if record["split"] == "train"]
    assert [record["step"] for record in tests] == [22, 44, 66, 88]
    assert trains[-1]["loss"] < 0.7 * trains[0]["loss"]
    assert result.accuracy == tests[-1]["accuracy"] > 0.3
    assert {"psum_moved", "weight_moved", "activation_moved", "psum_gradient_ratio"} <= set(trains[-1])
    assert all(value > 0 for value in result.moved.values())
    health = [record for record in records if record["split"] == "health"]
    assert {record["layer"] for record in health} == layers
    assert all(0 <= record["saturated"] <= 1 and 1 <= record["codes_used"] <= 8 for record in health)
    saved = json.loads((folder / "config.json").read_text())
    assert cimjax.CIMSpec.from_dict(saved["spec"]).adc.bits == 3
    assert (folder / "versions.json").exists()


def test_a_run_can_be_loaded_and_evaluated(trained: tuple[Path, Any]) -> None:
    folder, result = trained
    model, variables, spec = cimjax.load(folder)
    assert spec == cimjax.CIMSpec.from_dict(config().spec.to_dict())
    digits = load("digits")
    images = (digits.test.images / 255 - digits.mean) / digits.std
    logits = model.apply(variables, jnp.asarray(images, jnp.float32))
    accuracy = float(np.mean(np.argmax(logits, -1) == digits.test.labels))
    assert accuracy == pytest.approx(result.accuracy)
    last = cimjax.evaluate(folder)
    assert (last["accuracy"], last["images"], last["step"]) == (pytest.approx(result.accuracy), 360, 88)
    # A trained network gives an image the same logits whatever its neighbours are.
    apply = jax.jit(model.apply)
    few = apply(variables, jnp.asarray(images[:8], jnp.float32))
    other = np.concatenate([images[:4], -3 * images[4:8]]).astype(np.float32)
    chex.assert_trees_all_equal(few[:4], apply(variables, jnp.asarray(other))[:4])


def test_starting_a_finished_run_again_changes_nothing(trained: tuple[Path, Any], tmp_path: Path) -> None:
    run, result = trained
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    before = read_records(folder)
    again = cimjax.train(config(epochs=4.0), workdir=folder, display=quiet())
    assert (again.accuracy, again.loss, again.steps) == (result.accuracy, result.loss, 88)
    tests = [record for record in read_records(folder) if record["split"] == "test"]
    assert tests == [record for record in before if record["split"] == "test"]
    with pytest.raises(RunFolderError, match=r"holds a run of other options \(batch_size: 64 -> 32\)"):
        cimjax.train(config(epochs=4.0, batch_size=32), workdir=folder, display=quiet())


def start(folder: Path, *fields: str) -> subprocess.Popen[str]:
    command = [sys.executable, "train.py", "--config", "configs/digits.py:smoke", "--workdir", str(folder)]
    command += ["--config.model.width=4", *fields]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def wait_for_epoch(folder: Path, epoch: int, process: subprocess.Popen[str]) -> None:
    """Until that epoch is on the disk."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (Checkpoints(folder).latest_step() or 0) >= 22 * epoch:
            return
        time.sleep(0.02)
    raise AssertionError(f"epoch {epoch} was not seen: {process.communicate()}")


class Stopping(Display):
    """Asks for an end, as Ctrl-C does, at the first look at the metrics after so many steps."""

    def __init__(self, after: int) -> None:
        super().__init__(stream=io.StringIO())
        self.after = after

    def progress(self, step: int, *args: Any) -> None:
        super().progress(step, *args)
        if step >= self.after:
            signal.raise_signal(signal.SIGINT)


def test_a_run_stopped_within_an_epoch_ends_with_the_numbers_of_one_that_was_not(
    trained: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOOK_EVERY", 0.0)
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped after step 3[01] of 88; saved: the same command with --workdir"
    ):
        cimjax.train(config(epochs=4.0), workdir=tmp_path, display=Stopping(after=30))
    cimjax.train(config(epochs=4.0), workdir=tmp_path, display=quiet())
    assert without_times(read_records(tmp_path)) == without_times(read_records(trained[0]))


@pytest.mark.full
def test_a_run_killed_or_stopped_at_any_time_ends_with_the_numbers_of_one_that_was_not(tmp_path: Path) -> None:
    """All stages: ideal ADCs for two epochs, then ADCs set from data, and once more after the fourth."""
    stages = ("--config.epochs=6.0", "--config.ideal_share=0.4", "--config.recalibrate_epochs=(4,)")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    output, error = start(whole, *stages).communicate()
    assert "test accuracy" in output and not error, error
    for end, epoch in ((signal.SIGKILL, 1), (signal.SIGINT, 2), (signal.SIGTERM, 4)):
        process = start(cut, *stages)
        wait_for_epoch(cut, epoch, process)
        process.send_signal(end)
        output, error = process.communicate()
        if end == signal.SIGKILL:
            assert process.returncode == -signal.SIGKILL
            continue
        assert "Traceback" not in error
        assert f"saved: the same command with --workdir {cut} goes on" in error
        assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 1}[end]
    output, error = start(cut, *stages).communicate()
    assert "resumed after step" in output and not error, error
    assert without_times(read_records(cut)) == without_times(read_records(whole))


def test_a_loss_that_is_not_finite_stops_the_run_with_step_and_layer(tmp_path: Path) -> None:
    wild = config("smoke,weight=none", optimizer={"learning_rate": 1e30, "step_factor": 0.0}, warmup_epochs=0.0)
    with pytest.raises(ValueError, match=r"Step \d+: the loss or a gradient is not finite \(.*(conv|stem|BatchNorm)"):
        cimjax.train(wild, workdir=tmp_path / "run", display=quiet())


PARALLEL = """
import os, sys
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
sys.path.insert(0, sys.argv[1])
import json, jax, cimjax
from test_training import few_steps, quiet
assert len(jax.devices()) == 4
result = cimjax.train(few_steps(), workdir=sys.argv[2], display=quiet())
print(json.dumps([result.accuracy, result.loss]))
"""


def resident(experiment: Experiment) -> Resident:
    return Resident(experiment.dataset.train, experiment.preparation, experiment.config.seed, jax.device_put)


def few_steps() -> Any:
    # An array layer of one row tile is compiled soonest for several devices.
    return config(epochs=0.45, augment={"shift": 1}, rules=(("conv[23]", None),))


@pytest.mark.full
def test_several_devices_give_the_result_of_one(tmp_path: Path) -> None:
    """To rounding, over ten steps; later a code that lies at a tie may round differently, and runs part from there."""
    four = subprocess.Popen(
        [sys.executable, "-c", PARALLEL, str(Path(__file__).parent), str(tmp_path / "four")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    one = cimjax.train(few_steps(), workdir=tmp_path / "one", display=quiet())
    output, error = four.communicate()
    assert four.returncode == 0, error
    records = {
        name: next(record for record in read_records(tmp_path / name) if record["split"] == "train")
        for name in ("one", "four")
    }
    assert records["four"]["step"] == records["one"]["step"] == 10
    assert records["four"]["accuracy"] == records["one"]["accuracy"]
    # Of the epoch, and of the test images with what was learned.
    assert records["four"]["loss"] == pytest.approx(records["one"]["loss"], rel=1e-5)
    assert json.loads(output) == pytest.approx([one.accuracy, one.loss], rel=1e-5)


@pytest.mark.full
def test_a_run_says_first_from_what_data_no_good_steps_follow(tmp_path: Path) -> None:
    """One line for each layer, before it trains and in its records; and of rules that change nothing."""
    chosen = config("smoke", epochs=0.2)
    with chosen.unlocked():
        # The first layer reads normalised images, half of whose magnitude is negative.
        chosen.rules = (("stem", chosen.spec.to_dict()), ("conv[123]", None), ("conv4", None))
    with (tmp_path / "output").open("w") as stream:
        cimjax.train(chosen, workdir=tmp_path / "run", display=Display(stream=stream))
    output = (tmp_path / "output").read_text()
    lines = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert lines[0].startswith("warning: `rules` has the pattern 'conv4', which names no layer that is left to it")
    assert [line for line in lines if "magnitude is negative and lost" in line] == [lines[1]]
    assert lines[1].startswith("warning: stem: ") and output.index(lines[1]) < output.index("\nepoch ")
    (record,) = [record for record in read_records(tmp_path / "run") if record["split"] == "calibration"]
    assert (record["step"], record["layer"]) == (0, "stem") and record["message"] in lines[1]
    assert not any("callback" in line for line in first_program(chosen).splitlines())


def first_program(chosen: Any) -> str:
    experiment = build(chosen)
    images = experiment.calibration_images()
    return jax.jit(experiment._first_state).lower(jnp.int32(0), images, Given({}, {})).as_text()


class OwnNet(nn.Module):
    """A network of the caller's own, without batch normalisation or an axis name."""

    spec: cimjax.CIMSpec

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.relu(cimjax.CIMConv(6, (3, 3), strides=(2, 2), spec=self.spec)(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


def test_own_networks_and_own_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 200)
    images = (rng.integers(0, 60, (200, 6, 6, 2)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    data = Dataset.from_arrays("own", images[:150], labels[:150], images[150:], labels[150:])
    signed = cimjax.ActivationSpec(bits=4, signed=True)
    net = OwnNet(cimjax.CIMSpec(activation=signed, array=cimjax.ArraySpec(rows=16, tiling="im2col")))
    own = config(epochs=8.0, batch_size=16, eval_batch_size=16, augment={"flip": True})
    result = cimjax.train(own, workdir=tmp_path / "run", model=net, dataset=data, display=quiet())
    assert result.accuracy > 0.9
    # What a network must know of its images is saved with its state.
    loaded = cimjax.load(tmp_path / "run", model=net)
    np.testing.assert_allclose(loaded.normalise(images[:1]), (images[:1] / 255 - data.mean) / data.std, rtol=1e-4)
    model, variables, spec = loaded
    assert model == net and "CIMConv_0" in variables["params"]
    # The network's own, not that of the configuration.
    assert spec == net.spec != build(own).spec


def test_evaluation_counts_every_image_once() -> None:
    experiment = build(config("smoke,weight=none", eval_batch_size=100))
    state = experiment.first_state()[0]
    # To this network everything is a zero, and so is what fills the last batch up.
    params = {**state.params, "classifier": dict(state.params["classifier"])}
    params["classifier"]["bias"] = params["classifier"]["bias"].at[0].set(100.0)
    evaluator = Evaluator(experiment, experiment.dataset.test)
    images = experiment.preparation.normalise(jnp.asarray(experiment.dataset.test.images))
    labels = experiment.dataset.test.labels
    for of_state in (state, state.replace(params=params)):
        found = evaluator(of_state)
        logits = np.asarray(experiment.model.apply(of_state.variables, images), np.float64)
        assert found["accuracy"] == np.mean(logits.argmax(-1) == labels)
        log_sum = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        assert found["loss"] == pytest.approx(np.mean(log_sum - logits[np.arange(360), labels]), rel=1e-5)


@pytest.mark.full
def test_the_chip_of_a_run_is_the_same_wherever_it_is_looked_at() -> None:
    """How ADCs are used is measured on the cells that the run trains through."""
    varied = [Override("spec.variation", "{'sigma': 0.8, 'on': 'cells'}")]
    chosen = load_config(f"{CONFIG}:smoke,seed=3", varied)
    with chosen.unlocked():
        chosen.model.width, chosen.rules = 4, RULES
    experiment = build(chosen)
    state, images = experiment.first_state()[0], experiment.calibration_images()
    variables, health = state.variables, Health(experiment)

    def on(chip: jax.Array) -> dict[str, float]:
        found = experiment.model.apply(variables, images, mutable=[ADC_STATISTICS], rngs={"variation": chip})[1]
        return health_by_layer(found[ADC_STATISTICS])["conv3"]

    measured = health(state)["conv3"]
    assert measured == pytest.approx(on(chip_key(3)), rel=1e-3)
    assert measured["saturated"] != pytest.approx(on(jax.random.key(0))["saturated"], rel=1e-3)
    # The state's seed counts, which every step and every evaluation take.
    other = health(state.replace(seed=jnp.int32(4)))["conv3"]
    assert other == pytest.approx(on(chip_key(4)), rel=1e-3)


def test_evaluation_is_on_the_chip_of_the_run() -> None:
    class Chip(nn.Module):
        """Its answer to all images follows from its chip."""

        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            return nn.Dense(10)(x.reshape(len(x), -1)) * 0 + jax.random.normal(self.make_rng("variation"), (10,))

    experiment = build(config("smoke,weight=none", seed=3), model=Chip())
    answer = Chip().apply(
        {"params": experiment.first_state()[0].params}, jnp.zeros((1, 8, 8, 1)), rngs={"variation": chip_key(3)}
    )
    found = Evaluator(experiment, experiment.dataset.test)(experiment.first_state()[0])
    assert found["accuracy"] == np.mean(experiment.dataset.test.labels == np.argmax(answer))
    assert found["loss"] == pytest.approx(
        float(-np.mean(jax.nn.log_softmax(answer[0])[experiment.dataset.test.labels])), rel=1e-5
    )


class OnOneChip(nn.Module):
    """A network that is no number with any other random keys than those of one training step."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Dense(10)(x.reshape(len(x), -1))
        for kind, expected in self.keys().items() if not self.is_initializing() else ():
            x = jnp.where(jnp.any(self.key_of(kind) != expected), jnp.nan, x)
        return x

    def key_of(self, kind: str) -> jax.Array:
        return jax.random.key_data(self.make_rng(kind))

    def keys(self) -> dict[str, jax.Array]:
        state = jax.tree.map(jnp.int32, {"seed": 3, "step": 5})
        rest = dict.fromkeys(("failed_at", "params", "collections", "opt_state", "average"), 0)
        rngs = step_rngs(Setup(self, None), TrainState(**state, **rest, first_steps={}))
        probe = OnOneChip(parent=None)
        return {kind: probe.apply({}, kind, rngs=rngs, method="key_of") for kind in rngs}


def test_a_failure_is_explained_on_the_chip_and_with_the_keys_of_the_step_that_failed() -> None:
    experiment = build(config("smoke,weight=none", seed=3), model=OnOneChip())
    state = experiment.first_state()[0].replace(step=jnp.int32(5))
    batches = resident(experiment)
    assert "every output is finite" in explain_failure(experiment, state, 5, batches)
    assert "the first layer with such an output is" in explain_failure(experiment, state.replace(step=6), 6, batches)


def test_a_fixed_adc_trains_from_the_command_lines_options_and_says_what_is_true(tmp_path: Path) -> None:
    chosen = config("smoke,adc_step=fixed,full_scale=16,tiling=packed,active_rows=16", ideal_share=0.5, epochs=4.0)
    with chosen.unlocked():
        # Nothing that the optimizer moves may look as if it should have moved more.
        chosen.optimizer.step_factor = 0.0
    with (tmp_path / "output").open("w") as stream:
        result = cimjax.train(chosen, workdir=tmp_path / "run", display=Display(stream=stream))
    output = (tmp_path / "output").read_text()
    assert "ADCs on, their steps fixed; until here they were ideal." in output
    assert (
        "conv3: a conversion drives 9 of the 16 rows that it may, because tiling=packed keeps kernels whole" in output
    )
    assert {kind for kind in ("psum", "offset") if f"{kind} steps moved" in output} == set()
    assert "activation steps moved by 0.0e+00 only" in output and "optimizer.step_factor" in output
    assert set(result.moved) == {"activation_moved", "weight_moved"}
    assert "psums fixed to 16" in output


def test_decay_touches_kernels_only_and_steps_have_their_own_rate() -> None:
    for name in ("sgd", "adamw"):
        chosen = config(optimizer={"name": name, "weight_decay": 0.5, "step_factor": 0.25, "learning_rate": 0.1})
        optimizer = make_optimizer(chosen, 1437)
        params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), build(chosen).abstract_state().params)
        zero = jax.tree.map(jnp.zeros_like, params)
        one = jax.tree.map(jnp.ones_like, params)
        state = optimizer.init(params)
        # The first step of the warm-up has rate 0; look at the second.
        _, state = optimizer.update(zero, state, params)
        by_decay, _ = optimizer.update(zero, state, params)
        _, fresh = optimizer.update(zero, optimizer.init(zero), zero)
        by_gradient, _ = optimizer.update(one, fresh, zero)
        for (path, change), moved in zip(
            jax.tree_util.tree_flatten_with_path(by_decay)[0], jax.tree.leaves(by_gradient), strict=True
        ):
            assert bool(jnp.any(change != 0)) == (kind_of(path) == "kernel"), path
            expected = 0.25 if kind_of(path) == "step" else 1.0
            reference = by_gradient["classifier"]["bias"][0]
            np.testing.assert_allclose(np.asarray(moved), expected * reference, rtol=1e-5)
    with pytest.raises(ValueError, match=r"`config.optimizer.name` is 'adam'; allowed: sgd, adamw"):
        build(config(optimizer={"name": "adam"}))


def test_the_rate_warms_up_and_falls_to_zero_over_derived_steps() -> None:
    chosen = config("", epochs=10.0, warmup_epochs=2.0)
    total = total_steps(chosen, 1437)
    rate = learning_rate(chosen, 1437)
    assert total == 220
    assert float(rate(0)) == 0 and float(rate(44)) == pytest.approx(chosen.optimizer.learning_rate)
    assert float(rate(total)) == pytest.approx(0, abs=1e-9)
    assert float(rate(132)) == pytest.approx(chosen.optimizer.learning_rate / 2, rel=1e-3)
    assert total_steps(config(epochs=0.0), 1437) == 0
    with pytest.raises(ValueError, match=r"`config.batch_size` is 2000; give 1 to 1437"):
        total_steps(config(batch_size=2000), 1437)


def test_order_and_augmentation_are_functions_of_seed_and_step() -> None:
    one, two = order_of_epoch(5, 1, 50), order_of_epoch(5, 2, 50)
    assert sorted(one.tolist()) == list(range(50)) and one.tolist() != two.tolist()
    chex.assert_trees_all_equal(order_of_epoch(5, 1, 50), one)
    pixels = np.random.default_rng(0).integers(1, 255, (30, 8, 8, 1)).astype(np.uint8)
    keys = jax.random.split(jax.random.key(5), 30)
    moved = np.asarray(augment(jnp.asarray(pixels), keys, 2, True))
    chex.assert_trees_all_equal(moved, np.asarray(augment(jnp.asarray(pixels), keys, 2, True)))
    shifts = set()
    for before, after in zip(pixels, moved, strict=True):
        padded = np.pad(before, ((2, 2), (2, 2), (0, 0)))
        found = [
            (row, column, flip)
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
            if np.array_equal(padded[row : row + 8, column : column + 8][:, :: -1 if flip else 1], after)
        ]
        assert len(found) == 1
        shifts.add(found[0])
    assert len(shifts) > 15
    chex.assert_trees_all_equal(augment(jnp.asarray(pixels), keys, 0, False), pixels)


def test_every_step_takes_the_next_images_and_augments_them_in_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = build(config("smoke,weight=none", batch_size=4, augment={"shift": 1}))
    state, batches = experiment.first_state()[0], resident(experiment)
    images = experiment.dataset.train.images
    monkeypatch.setattr(batches_lib.Preparation, "for_training", lambda _, pixels, labels, key, keys: (pixels, keys))
    feed = (*batches.data, jnp.arange(len(images)))
    # Two steps, the second once more, and the same place an epoch later.
    pixels, keys = zip(
        *(
            batches.batch(feed, state.replace(step=jnp.int32(number)), 0, None)
            for number in (0, 1, 1, 1 + len(images) // 4)
        ),
        strict=True,
    )
    keys = [jax.random.key_data(each) for each in keys]
    for got, first in zip(pixels, (0, 4, 4, 4), strict=True):
        np.testing.assert_array_equal(got, images[first : first + 4])
    assert keys[1].tolist() == keys[2].tolist()
    assert len({tuple(key) for of_step in keys for key in of_step.tolist()}) == 3 * 4


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"model": {"name": "smal"}}, r"`model.name` is 'smal' \(did you mean 'small'\?\)"),
        ({"model": {"widht": 3}}, r"`model.widht` is no option of 'small' \(did you mean 'width'\?\)"),
        ({"dataset": "digit"}, r"unknown dataset 'digit'"),
        ({"rules": (("conv[", None),)}, r"`rules` has the pattern 'conv\['"),
        ({"rules": (("conv1",),)}, r"give pairs of a path pattern and a specification"),
        ({"rules": (3,)}, r"`rules` has 3; give pairs of a path pattern and a specification or None"),
        ({"rules": (("x" * 5000, None, 0),)}, r"`rules` has \('x{,40}\.\.\.x+', None, 0\); give pairs"),
        ({"batch_size": 0}, r"`config.batch_size` is 0; give a whole number from 1 to 2147483647"),
        (
            {"seed": 10**400},
            r"`config.seed` is 1000000000000000000000000\.\.\..*; give a whole number from -2147483647",
        ),
        ({"epochs": 1e300}, r"`config.epochs` is 1e\+300; give a number from 0 to 2147483647"),
        ({"epochs": 2e9}, r"`config.epochs` is 2000000000.0: more than 2147483647 steps; give fewer epochs"),
        ({"epochs": float("nan")}, r"`config.epochs` is nan; give a number from 0"),
    ],
)
def test_what_cannot_be_built_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(config(**fields))


def test_rules_change_single_layers() -> None:
    eight = cimjax.CIMSpec(adc=None, weight=cimjax.WeightSpec(bits=8)).to_dict()
    experiment = build(config(rules=(("conv2", None), ("stem|classifier", eight))))
    specs = {layer.name: layer.spec for layer in experiment.layers}
    assert specs["conv2"] is None
    assert specs["stem"].weight.bits == specs["classifier"].weight.bits == 8
    assert specs["conv1"] == specs["conv3"] == cimjax.CIMSpec.from_dict(experiment.config.spec.to_dict())
    # Layers differ, and there is no one specification.
    assert experiment.spec == {name: spec for name, spec in specs.items() if spec is not None}
    assert math.isfinite(float(jax.tree.leaves(experiment.first_state()[0].params)[0].sum()))


@pytest.mark.full
def test_adcs_can_be_ideal_at_first(tmp_path: Path) -> None:
    """Then ladders are set from data, and the best state is one of these."""
    chosen = config(epochs=2.0, ideal_share=0.5)
    result = cimjax.train(chosen, workdir=tmp_path, display=quiet())
    two = [record for record in read_records(tmp_path) if record["split"] in ("train", "test")]
    assert [record.get("ideal_adcs", False) for record in two] == [False, True, False, False]
    assert two[0]["psum_moved"] == 0 == two[0]["psum_gradient_ratio"]
    assert two[2]["psum_moved"] > 0 < two[2]["psum_gradient_ratio"]
    assert "ideal_adcs" not in two[3]
    assert result.accuracy == two[3]["accuracy"]
    with pytest.raises(ValueError, match=r"`config.ideal_share` is 1.0; give a number from 0 to below 1"):
        build(config(ideal_share=1.0))
    assert build(config("smoke,psum=none", ideal_share=0.9)).ideal_epochs == 0


def test_networks_of_ones_own_have_ideal_adcs_too() -> None:
    class Own(nn.Module):
        spec: cimjax.CIMSpec

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.relu(cimjax.CIMConv(4, (3, 3), spec=self.spec)(x))
            return cimjax.CIMDense(3, spec=self.spec)(x.mean((1, 2)))

    spec = cimjax.CIMSpec(adc=cimjax.ADCSpec(bits=1))
    x = jax.random.uniform(jax.random.key(0), (2, 5, 5, 3))
    variables = Own(spec).init(jax.random.key(1), x)
    with ideal_adcs():
        got = Own(spec).apply(variables, x)
    want = Own(dataclasses.replace(spec, adc=None)).apply(variables, x)
    chex.assert_trees_all_equal(got, want)
    assert not jnp.allclose(got, Own(spec).apply(variables, x))


def test_adc_steps_can_be_set_anew_after_an_epoch() -> None:
    """From the weights of that time, with no momentum left."""
    chosen = config(epochs=3.0, recalibrate_epochs=(1,))
    experiment = build(chosen)
    state = experiment.first_state()[0]
    spoiled = state.replace(
        params=jax.tree.map(lambda value: value + 0.5, state.params),
        opt_state=jax.tree.map(lambda value: value + 1, state.opt_state),
    )
    renewed, _ = jax.jit(experiment.recalibrated)(spoiled, experiment.calibration_images())
    for path, value in jax.tree_util.tree_leaves_with_path(renewed.params):
        before, name = spoiled.params, path[-1].key
        for part in path:
            before = before[part.key]
        if name.startswith("psum"):
            assert not jnp.array_equal(value, before), path
            chex.assert_trees_all_equal(value, renewed.first_steps["/".join(part.key for part in path)])
        else:
            chex.assert_trees_all_equal(value, before)
    for path, value in jax.tree_util.tree_leaves_with_path(renewed.opt_state):
        name = getattr(path[-1], "key", "")
        if name.startswith("psum"):
            assert not value.any(), path
        elif name == "kernel":
            assert (value == 1).all(), path
    # The same again from its own result: there is nothing left to set.
    again, _ = jax.jit(experiment.recalibrated)(renewed, experiment.calibration_images())
    chex.assert_trees_all_close(again.params, renewed.params, atol=1e-5)
