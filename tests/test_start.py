"""Runs that start from a trained one: post-training schemes, what stays frozen, and what is calibrated only."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import chex
import flax.traverse_util
import jax
import numpy as np
import pytest
from test_training import config, quiet

import cimjax
from cimjax.nn.transfer import choose, fits
from cimjax.training.config.file import load_config
from cimjax.training.experiment import build
from cimjax.training.run.folder import read_records

DIGITS = Path(__file__).parents[1] / "configs" / "digits.py"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of full precision."""
    folder = tmp_path_factory.mktemp("start") / "full"
    cimjax.train(config("smoke,weight=none", epochs=4.0), workdir=folder, display=quiet())
    return cimjax.load(folder)


def of(options: str, **fields: Any) -> Any:
    chosen = load_config(f"{DIGITS}:smoke,{options}")
    with chosen.unlocked():
        chosen.model.width = 4
        chosen.update(fields)
    return chosen


def flat(variables: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(dict(variables), sep="/").items()}


def test_a_post_training_scheme_learns_the_steps_of_adcs_alone(trained: Any, tmp_path: Path) -> None:
    chosen = of("scheme=kim2022", model=trained.config.model, rules=trained.config.rules)
    with pytest.raises(ValueError, match=r"`config.start` is 'run', as training=post_training has it; give a trained"):
        cimjax.train(chosen, workdir=tmp_path / "none", display=quiet())
    assert not (tmp_path / "none").exists()
    result = cimjax.train(chosen, workdir=tmp_path / "run", variables=trained, display=quiet())
    assert set(result.moved) == {"psum_moved"} and result.moved["psum_moved"] > 1e-3
    before, after = flat(trained.variables["params"]), flat(cimjax.load(tmp_path / "run").variables["params"])
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value)
    # It goes on, and ends, without being given the run again.
    cimjax.train(chosen, workdir=tmp_path / "run", display=quiet())


def test_without_epochs_a_network_is_calibrated_saved_and_measured(trained: Any, tmp_path: Path) -> None:
    fields = {"model": trained.config.model, "rules": trained.config.rules}
    chosen = of("training=post_training,adc_step=calibrated,adc_start=percentile", **fields)
    result = cimjax.train(chosen, workdir=tmp_path / "run", variables=trained, display=quiet())
    assert (result.steps, result.moved) == (0, {})
    assert [record["split"] for record in read_records(tmp_path / "run")][-1] == "result"
    assert cimjax.evaluate(tmp_path / "run")["accuracy"] == result.accuracy > 0.2
    records = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    cimjax.train(chosen, workdir=tmp_path / "run", display=quiet())
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == records


def test_what_is_frozen_stays(tmp_path: Path) -> None:
    chosen = of("weight_step=calibrated,offset")
    assert chosen.frozen == ("weight",)
    result = cimjax.train(chosen, workdir=tmp_path, display=quiet())
    assert {"activation_moved", "psum_moved", "offset_moved"} == set(result.moved)
    assert min(result.moved.values()) > 1e-4
    first, last = build(chosen).first_state()[0].params, cimjax.load(tmp_path).variables["params"]
    np.testing.assert_allclose(last["conv1"]["weight_log_step"], first["conv1"]["weight_log_step"], rtol=1e-6)
    assert float(jax.numpy.abs(last["conv1"]["kernel"] - first["conv1"]["kernel"]).max()) > 1e-3


def test_steps_are_taken_where_what_they_quantize_is_built_alike() -> None:
    here = cimjax.CIMSpec()
    other = {
        "adc": dataclasses.replace(here, adc=cimjax.ADCSpec(bits=5)),
        "weight": dataclasses.replace(here, weight=cimjax.WeightSpec(bits=3)),
        "activation": dataclasses.replace(here, activation=cimjax.ActivationSpec(bits=3)),
        "array": dataclasses.replace(here, array=cimjax.ArraySpec(rows=64)),
        "start": dataclasses.replace(here, weight=cimjax.WeightSpec(start="range")),
    }
    steps = [f"params/conv/{name}_log_step" for name in ("activation", "weight", "psum")]
    taken = {name: [fits({"conv": spec}, {"conv": here})(path) for path in steps] for name, spec in other.items()}
    assert taken == {
        "adc": [True, True, False],
        "weight": [True, False, False],
        "activation": [False, True, False],
        "array": [True, False, False],
        "start": [True, True, False],
    }
    # A tensor that several layers read.
    alone = "params/Quantize_0/log_step"
    assert fits({"conv": other["adc"]}, {"conv": here})(alone)
    assert not fits({"conv": other["activation"]}, {"conv": here})(alone)


def test_adcs_are_set_behind_the_steps_that_were_taken(tmp_path: Path) -> None:
    """Ladders are those of the partial sums that the network has, not of those that fresh steps would give."""
    cimjax.train(of("psum=none", epochs=4.0), workdir=tmp_path / "ideal", display=quiet())
    given = cimjax.load(tmp_path / "ideal")
    experiment = build(of("adc_bits=4"))
    there, here = given.variables, experiment.abstract_state().variables
    taken, _ = choose(there, here, fits(given.specs, experiment.specs))
    assert taken.kept == {(layer, kind) for layer in experiment.specs for kind in ("activation", "weight")}
    state, reports = experiment.first_state(taken)
    params, steps = flat(state.params), flat(there["params"])
    for path, value in steps.items():
        np.testing.assert_array_equal(params[path], value)
    fresh = flat(build(of("psum=none")).first_state()[0].params)
    # The steps that training moved are not those that calibration sets.
    assert max(np.abs(steps[path] - value).max() for path, value in fresh.items() if "log_step" in path) > 0.1
    images, mode = experiment.calibration_images(), experiment.setup.mode(train=True)
    again = cimjax.calibrate(experiment.model, state.variables, images, kinds=("psum",), **mode)
    for path, value in flat(again["params"]).items():
        np.testing.assert_allclose(params[path], value, rtol=1e-5, atol=1e-5, err_msg=path)
    assert set(reports) == set(experiment.specs) and all(report.calls for report in reports.values())


def test_what_is_kept_stays_and_what_follows_is_set_behind_it() -> None:
    x = jax.random.uniform(jax.random.key(0), (8, 6, 6, 3))
    model = cimjax.CIMConv(4, (3, 3))
    variables = model.init(jax.random.key(1), x)
    wide = {**variables["params"], "activation_log_step": variables["params"]["activation_log_step"] + 1.0}
    kept = cimjax.calibrate(model, {"params": wide}, x, kept={("", "activation")})["params"]
    assert kept["activation_log_step"] == wide["activation_log_step"]
    behind = cimjax.calibrate(model, {"params": wide}, x, kinds=("weight", "psum"))["params"]
    chex.assert_trees_all_equal(kept, behind)
    assert not np.array_equal(kept["psum_log_step"], variables["params"]["psum_log_step"])
    every = {("", kind) for kind in ("activation", "weight", "psum")}
    chex.assert_trees_all_equal(cimjax.calibrate(model, {"params": wide}, x, kept=every)["params"], wide)
