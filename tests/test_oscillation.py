"""Weights between two codes: when they are frozen, where, and that others go on."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import spec
from test_training import config, quiet

import cimjax
from cimjax.training.oscillation import freeze_oscillating, frozen_part
from cimjax.training.run.folder import read_records

# Two input channels for each array.
SPEC = spec(array={"rows": 18, "columns": 16}, weight={"granularity": "column"})


def kernel_of(value: float) -> Any:
    """A layer of 3 arrays, all of whose weights are the same; steps are 1/2."""
    return {"conv": {"kernel": jnp.full((3, 3, 5, 4), value), "weight_log_step": jnp.full((3, 4), jnp.log(0.5))}}


def moved_by(changes: list[np.ndarray], threshold: float = 0.05) -> tuple[list[Any], Any]:
    """The kernels after each of some updates, and the last state."""
    params = kernel_of(0.7)
    optimizer = freeze_oscillating(optax.identity(), {"conv": SPEC}, threshold, len(changes))
    state, seen = optimizer.init(params), []
    for change in changes:
        steps = jnp.zeros_like(params["conv"]["weight_log_step"])
        updates = {"conv": {"kernel": jnp.asarray(change, jnp.float32), "weight_log_step": steps}}
        updates, state = optimizer.update(updates, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(np.asarray(params["conv"]["kernel"]))
    return seen, state


def test_what_turns_to_and_fro_is_held_where_it_mostly_is_and_the_rest_goes_on() -> None:
    where = np.zeros((3, 3, 5, 4), bool)
    where[0, 1, 4, 2] = where[2, 2, 0, 0] = True
    changes = []
    for number in range(60):
        jump = 0.1 if number % 2 == 0 else -0.1  # 0.7 and 0.8 of steps of 0.5: codes 1 and 2
        changes.append(np.where(where, jump, -0.0005))
    seen, state = moved_by(changes)
    frozen = np.asarray(state.layers["conv"].frozen)
    np.testing.assert_array_equal(frozen, where)
    assert frozen_part(state) == pytest.approx(2 / where.size)
    # Mostly at 0.7, where it began: code 1.
    np.testing.assert_allclose(seen[-1][where], 0.5, atol=1e-6)
    np.testing.assert_allclose(seen[-1][~where], 0.7 - 60 * 0.0005, atol=1e-4)


def test_what_moves_one_way_is_not_frozen_and_a_high_threshold_freezes_nothing() -> None:
    seen, state = moved_by([np.full((3, 3, 5, 4), 0.02)] * 60)
    assert not np.any(state.layers["conv"].frozen)
    np.testing.assert_allclose(seen[-1], 0.7 + 60 * 0.02, rtol=1e-5)
    jumps = [np.full((3, 3, 5, 4), 0.1 * (-1) ** number) for number in range(60)]
    assert frozen_part(moved_by(jumps, threshold=0.9)[1]) == 0
    assert frozen_part(moved_by(jumps)[1]) == 1


def test_a_frozen_weight_follows_its_step() -> None:
    params = kernel_of(0.7)
    optimizer = freeze_oscillating(optax.identity(), {"conv": SPEC}, 0.05, 10)
    state = optimizer.init(params)
    held = state.layers["conv"]._replace(frozen=jnp.ones_like(state.layers["conv"].frozen))
    updates = {"conv": {"kernel": jnp.ones((3, 3, 5, 4)), "weight_log_step": jnp.full((3, 4), jnp.log(2.0))}}
    updates, state = optimizer.update(updates, state._replace(layers={"conv": held}), params)
    np.testing.assert_allclose(optax.apply_updates(params, updates)["conv"]["kernel"], 1.0, rtol=1e-6)


def test_frequencies_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(0)
    changes = [rng.normal(size=(3, 3, 5, 4)) * 0.2 for _ in range(30)]
    seen, state = moved_by(changes, threshold=0.99)
    q_min, q_max, _ = SPEC.weight.code_range
    codes = np.clip(np.rint(np.array([np.full((3, 3, 5, 4), 0.7), *seen]) / 0.5), q_min, q_max)
    frequency, direction, mean = np.zeros((3, 3, 5, 4)), np.zeros((3, 3, 5, 4)), codes[0]
    for before, after in itertools.pairwise(codes):
        change = np.sign(after - before)
        frequency = 0.01 * (change * direction < 0) + 0.99 * frequency
        direction = np.where(change == 0, direction, change)
        mean = 0.01 * after + 0.99 * mean
    weights = state.layers["conv"]
    np.testing.assert_allclose(weights.frequency, frequency, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(weights.mean, mean, rtol=1e-4, atol=1e-5)


def test_a_run_records_what_is_frozen(tmp_path: Path) -> None:
    chosen = config("smoke,adc_bits=2", epochs=2.0)
    with chosen.unlocked():
        chosen.optimizer.freeze_oscillating = 0.001
    result = cimjax.train(chosen, workdir=tmp_path / "run", display=quiet())
    parts = [record["frozen"] for record in read_records(result.workdir) if record["split"] == "train"]
    assert len(parts) == 2 and 0 <= parts[0] <= parts[1] and 0 < parts[1] < 1


def test_a_step_for_each_plane_is_refused_in_one_line(tmp_path: Path) -> None:
    chosen = config("smoke,adc_bits=2,step_per_plane")
    with chosen.unlocked():
        chosen.optimizer.freeze_oscillating = 0.01
    with pytest.raises(ValueError, match=r"^`config.optimizer.freeze_oscillating` is 0.01, but [^\n]*$"):
        cimjax.train(chosen, workdir=tmp_path, display=quiet())
