"""Batch normalisation's statistics after training: those of whole batches, whatever the running ones are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import config, quiet

import cimjax
from cimjax.training.batch_norm import reestimated, statistics_of
from cimjax.training.batches import batches_of
from cimjax.training.experiment import Experiment, build
from cimjax.training.train_step import Setup


class Normalised(nn.Module):
    """Two layers of batch normalisation, whose running statistics move at different rates."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
        x = nn.Dense(10)(nn.relu(x).mean((1, 2)))
        return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)


def few(**fields: Any) -> Any:
    chosen = config("smoke,adc_bits=2", epochs=1.0)
    with chosen.unlocked():
        chosen.update(fields)
    return chosen


def test_they_are_those_of_the_batch_whatever_the_rate() -> None:
    experiment = build(few(), model=Normalised())
    state = experiment.uncalibrated_state()
    images = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (64, 8, 8, 1))
    setup: Setup = dataclasses.replace(experiment.setup, axis_name=None)
    found = statistics_of(setup, state, images)
    np.testing.assert_allclose(found["BatchNorm_0"]["mean"], np.mean(images), rtol=1e-5)
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], np.var(images), rtol=1e-4)
    logits = setup.apply(
        state.variables,
        images,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: isinstance(module, nn.Dense),
    )[1]
    before = logits["intermediates"]["Dense_0"]["__call__"][0]
    np.testing.assert_allclose(found["BatchNorm_1"]["mean"], jnp.mean(before, 0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["BatchNorm_1"]["var"], jnp.var(before, 0), rtol=1e-3, atol=1e-6)


def retaken(**fields: Any) -> tuple[Experiment, Any]:
    """A run, and the statistics of its first layer that are taken anew of its first state."""
    experiment = build(few(**fields), model=Normalised())
    batches = batches_of(experiment.dataset.train, experiment.preparation, experiment.devices)
    state = experiment.uncalibrated_state()
    found = reestimated(experiment, state, batches)
    assert found.step == state.step and (found is state) == (not fields["batch_norm_images"])
    return experiment, found.collections["batch_stats"]["BatchNorm_0"]


def first_batches(experiment: Experiment, count: int) -> list[np.ndarray]:
    """The images of the first so many steps, as training sees them."""
    batches = batches_of(experiment.dataset.train, experiment.preparation, experiment.devices)
    state = experiment.uncalibrated_state()
    return [
        np.asarray(batches.batch(batches.feed(step, 1), state.replace(step=jnp.int32(step)), 0, None).images)
        for step in range(count)
    ]


@pytest.mark.parametrize("place", ["device", "host"])
def test_many_batches_are_averaged_as_training_augments_them(place: str) -> None:
    augment = {"shift": 3, "flip": True}
    experiment, found = retaken(batch_norm_images=200, batch_size=64, augment=augment, images_on=place)
    seen = first_batches(experiment, 3)
    np.testing.assert_allclose(found["mean"], np.mean(seen), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["var"], np.mean([np.var(batch) for batch in seen]), rtol=1e-4)
    # The edges that shifts bring in are black.
    _, plain = retaken(batch_norm_images=200, batch_size=64, augment={"shift": 0, "flip": True}, images_on=place)
    assert found["mean"] < plain["mean"] - 0.1


def test_there_are_no_more_of_them_than_of_an_epoch_and_none_for_0() -> None:
    experiment, found = retaken(batch_norm_images=10**9, batch_size=600)
    assert experiment.steps_per_epoch == 2
    np.testing.assert_allclose(found["mean"], np.mean(first_batches(experiment, 2)), rtol=1e-4, atol=1e-6)
    retaken(batch_norm_images=0)


def test_a_batch_that_is_computed_in_parts_has_the_mean_of_theirs() -> None:
    experiment, found = retaken(batch_norm_images=64, batch_size=64, optimizer={"accumulate": 32})
    (batch,) = first_batches(experiment, 1)
    parts = [np.var(part) for part in np.split(batch, 32)]
    np.testing.assert_allclose(found["var"], np.mean(parts), rtol=1e-4)
    assert abs(np.mean(parts) - np.var(batch)) > 1e-3 * np.var(batch)


def test_a_run_ends_with_them(tmp_path: Path) -> None:
    chosen = few(batch_norm_images=512)
    result = cimjax.train(chosen, workdir=tmp_path / "new", display=quiet())
    running = cimjax.train(few(), workdir=tmp_path / "running", display=quiet())
    one, other = (cimjax.load(run.workdir) for run in (result, running))
    for name, same in (("params", True), ("batch_stats", False)):
        equal = jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), one.variables[name], other.variables[name])
        assert all(jax.tree.leaves(equal)) == same, name
    assert cimjax.evaluate(result.workdir)["accuracy"] == result.accuracy


def test_a_network_without_statistics_is_refused_in_one_line(tmp_path: Path) -> None:
    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(10)(x.reshape(len(x), -1))

    with pytest.raises(ValueError, match=r"^`config.batch_norm_images` is 9, but the network keeps no [^\n]*$"):
        cimjax.train(few(batch_norm_images=9), model=Plain(), workdir=tmp_path, display=quiet())


IMAGES = 3.0 + 2.0 * jax.random.normal(jax.random.key(0), (60, 8, 8, 1))


def test_a_network_is_given_those_of_batches_weighted_by_their_images() -> None:
    model = Normalised()
    variables = model.init(jax.random.key(1), IMAGES)
    found = cimjax.update_batch_norm(model, variables, (part for part in (IMAGES[:40], IMAGES[40:])), train=True)
    assert found["params"] is variables["params"]
    of_first = found["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(of_first["mean"], np.mean(IMAGES), rtol=1e-5)
    weighted = (2 * np.var(IMAGES[:40]) + np.var(IMAGES[40:])) / 3
    np.testing.assert_allclose(of_first["var"], weighted, rtol=1e-4)
    # What it makes of these images is normalised.
    logits = model.apply(found, IMAGES)
    np.testing.assert_allclose(logits.mean(0), 0, atol=0.1)
    # And the running ones play no part.
    again = cimjax.update_batch_norm(model, found, [IMAGES[:40], IMAGES[40:]], train=True)
    chex.assert_trees_all_close(again, found, rtol=1e-4, atol=1e-6)


def test_large_statistics_do_not_hide_the_rate() -> None:
    images = 3000.0 * IMAGES
    variables = Normalised().init(jax.random.key(1), images)
    found = cimjax.update_batch_norm(Normalised(), variables, [images], train=True)
    np.testing.assert_allclose(found["batch_stats"]["BatchNorm_0"]["var"], np.var(images), rtol=1e-3)


def test_after_calibration_a_network_of_low_bit_adcs_is_normalised_again() -> None:
    spec = cimjax.CIMSpec(adc=cimjax.ADCSpec(bits=1), array=cimjax.ArraySpec(rows=16))
    images = jax.random.uniform(jax.random.key(0), (64, 8, 8, 3))

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = cimjax.CIMConv(8, (3, 3), spec=spec)(x)
            return nn.BatchNorm(use_running_average=not train)(x)

    variables = Net().init(jax.random.key(1), images)
    found = cimjax.update_batch_norm(Net(), cimjax.calibrate(Net(), variables, images), [images], train=True)
    result = Net().apply(found, images)
    np.testing.assert_allclose(result.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(result.std((0, 1, 2)), 1, atol=1e-2)


@pytest.mark.parametrize(
    "model,batches,switch,message",
    [
        (Normalised(), [], {"train": True}, "`batches` has no batch; give an iterable"),
        (Normalised(), IMAGES, {"train": True}, r"`batches` is one array, of shape \(60, 8, 8, 1\); give a list"),
        (Normalised(), [IMAGES], {}, "no statistic follows the batch; give the switch"),
        (nn.Dense(3), [IMAGES], {}, "`variables` have no `batch_stats`"),
    ],
)
def test_what_cannot_be_updated_is_refused_in_one_line(
    model: nn.Module, batches: Any, switch: dict[str, bool], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        cimjax.update_batch_norm(model, model.init(jax.random.key(0), IMAGES), batches, **switch)


def test_a_network_that_is_not_trained_has_them_too(tmp_path: Path) -> None:
    cimjax.train(few(), workdir=tmp_path / "whole", display=quiet())
    results = {
        images: cimjax.train(
            few(epochs=0.0, batch_norm_images=images, spec={"adc": {"bits": 1}}),
            workdir=tmp_path / str(images),
            variables=cimjax.load(tmp_path / "whole"),
            display=quiet(),
        )
        for images in (0, 1000)
    }
    assert results[1000].loss < results[0].loss
    assert cimjax.evaluate(tmp_path / "1000")["loss"] == results[1000].loss
