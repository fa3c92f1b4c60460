"""Batch normalisation's statistics after training: those of whole batches, whatever the running ones are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import config, quiet

import cimjax
from cimjax.training.batch_norm import reestimated, statistics_of
from cimjax.training.experiment import build
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


def test_many_batches_are_averaged_and_none_leaves_the_state_as_it_is() -> None:
    experiment = build(few(batch_norm_images=200, batch_size=64), model=Normalised())
    state = experiment.uncalibrated_state()
    found = reestimated(experiment, state).collections["batch_stats"]["BatchNorm_0"]
    images = experiment.training_images(192)
    np.testing.assert_allclose(found["mean"], np.mean(images), rtol=1e-4, atol=1e-6)
    parts = [np.var(part) for part in np.split(np.asarray(images), 3)]
    np.testing.assert_allclose(found["var"], np.mean(parts), rtol=1e-4)
    assert reestimated(build(few(), model=Normalised()), state) is state
    # No more than there are.
    every = build(few(batch_norm_images=10**9, batch_size=600), model=Normalised())
    found = reestimated(every, state).collections["batch_stats"]["BatchNorm_0"]
    whole = len(every.dataset.train) // 600 * 600
    np.testing.assert_allclose(found["mean"], np.mean(every.training_images(whole)), rtol=1e-4, atol=1e-6)


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
