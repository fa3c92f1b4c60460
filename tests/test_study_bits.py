"""The study of ADC bits: the choice is exact, what is measured is kept, and the runs have the bits that were chosen."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cimjax.analysis.studies.bits import parse_bits, parse_budget, study_bits
from cimjax.analysis.studies.bits_allocation import allocate, cheapest
from cimjax.analysis.studies.runs import Runs
from cimjax.analysis.studies.sensitivity import Measurement, rules_for, with_bits
from cimjax.cli import main
from cimjax.spec import CIMSpec
from cimjax.spec.rules import check_rules
from cimjax.training.evaluate import Evaluator
from cimjax.training.restore import restore

pytest.importorskip("matplotlib")
DIGITS = Path(__file__).parents[1] / "configs" / "digits.py"
# The smallest network, of which one layer alone is in full precision.
FIELDS = ("--config.model.width=4", "--config.rules=(('conv2',None),)", "--config.epochs=1")


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], list[list[float]], int]:
    """Costs, losses and a budget that can be kept."""
    choices = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    costs = [draw(st.lists(st.integers(0, 20), min_size=n, max_size=n)) for n in choices]
    # Quarters: their sums are exact, so that ties are.
    losses = [[one / 4 for one in draw(st.lists(st.integers(-9, 40), min_size=n, max_size=n))] for n in choices]
    return costs, losses, cheapest(costs) + draw(st.integers(0, 60))


@given(problems())
def test_the_choice_is_the_best_of_all_and_of_equals_the_cheapest(problem: Any) -> None:
    costs, losses, budget = problem

    def of(numbers: Any) -> tuple[float, int]:
        both = [(losses[layer][number], costs[layer][number]) for layer, number in enumerate(numbers)]
        loss, cost = map(sum, zip(*both, strict=True))
        return loss, cost

    found = of(allocate(costs, losses, budget))
    assert found[1] <= budget
    everything = map(of, itertools.product(*(range(len(own)) for own in costs)))
    assert found == min(one for one in everything if one[1] <= budget)


def test_a_choice_for_many_layers_is_quick_and_uses_the_budget() -> None:
    rng = np.random.default_rng(0)
    conversions = rng.integers(10_000, 1_000_000, 53)
    costs = [[int(count) * codes for codes in (2, 4, 8, 16)] for count in conversions]
    losses = [sorted(rng.exponential(size=4), reverse=True) for _ in costs]
    budget = int(conversions.sum()) * 4
    total = sum(costs[layer][number] for layer, number in enumerate(allocate(costs, losses, budget)))
    assert 0.99 * budget < total <= budget
    with pytest.raises(ValueError, match="`budget` is 1; the cheapest choices cost"):
        allocate(costs, losses, 1)


def test_layers_of_one_specification_share_a_rule_that_matches_them_alone() -> None:
    spec = CIMSpec()
    rules = rules_for({"a.b/conv1": spec, "a/conv2": with_bits(spec, 1.5), "conv3": spec})
    assert rules == ((r"a\.b/conv1|conv3", spec), ("a/conv2", with_bits(spec, 1.5)))
    assert check_rules([(pattern, one.to_dict()) for pattern, one in rules]) == rules
    assert with_bits(spec, 2).adc == CIMSpec(adc={"bits": 2}).adc
    assert with_bits(spec, (3, 3)) == spec == with_bits(with_bits(spec, (1.5, 4)), 3)
    by_plane = with_bits(spec, (1.5, 4))
    assert [codes.size for codes in by_plane.adc_ranges[0]] == [3, 16] and by_plane.adc.bits == 3


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, tuple[Any, ...]]:
    """The folder of a study, what it returned, and its arguments."""
    folder = tmp_path_factory.mktemp("bits")
    # Both layers convert equally often: within the budget one of them at most keeps its bits.
    given = {"bits": ("1", "3"), "budget": "0.65"}
    return folder, study_bits(Runs(f"{DIGITS}:smoke", folder, [0], FIELDS), **given), given


def test_the_fine_tuned_network_has_the_bits_that_were_chosen(studied: Any) -> None:
    folder, study, _ = studied
    found = json.loads((folder / "bits.json").read_text())
    base, best, same = found["networks"]
    assert not study.failed and [base["case"], same["case"]] == ["base", "uniform P3"]
    own = sum(layer["energies"]["3"] for layer in found["columns"])
    assert best["energy"] <= 0.65 * own and same["energy"] == own
    for network in (best, same):
        run = folder / network["case"].replace(" ", "-") / "seed=0"
        experiment, _, _ = restore(run)
        assert {path: spec.adc.bits for path, spec in experiment.specs.items()} == network["bits"]
        assert set(network["bits"]) == {"conv1", "conv3"} and experiment.config.epochs == 1.0
        # Conversions do not depend on bits: codes alone differ.
        energy = sum(one.cost.adc_conversions * experiment.codes[one.name] for one in experiment.layers if one.spec)
        assert energy == network["energy"] and experiment.config.start == "run"
    for name in ("bits.md", "bits.svg", "bits.png", "sensitivities-seed=0.json"):
        assert (folder / name).stat().st_size > 100
    assert study.table.count("\n| conv") == 2 and (folder / "bits.md").read_text() == f"{study.table}\n"


@pytest.mark.full
def test_planes_get_bits_of_their_own(tmp_path: Path) -> None:
    # One layer in arrays: every choice compiles it anew.
    fields = ["--config.model.width=4", "--config.rules=(('conv[23]',None),)", "--config.epochs=1"]
    study = study_bits(Runs(f"{DIGITS}:smoke", tmp_path, [0], fields), bits=("1", "3"), budget="0.6", by="plane")
    found = json.loads((tmp_path / "bits.json").read_text())
    columns = [(one["path"], one["plane"]) for one in found["columns"]]
    assert columns == [("conv1", plane) for plane in range(3)]
    _, best, same = found["networks"]
    own = sum(one["energies"]["3"] for one in found["columns"])
    assert not study.failed and same["energy"] == own / 4
    assert own / 4 < best["energy"] <= 0.6 * own and len(set(best["bits"].values())) == 2
    experiment, _, _ = restore(tmp_path / best["case"].replace(" ", "-") / "seed=0")
    # The energy is that of the layers as they were built.
    layers = [layer for layer in experiment.layers if layer.spec]
    assert sum(layer.cost.adc_energy for layer in layers) == best["energy"]
    for layer in layers:
        bits = tuple(best["bits"][f"{layer.name}, plane {k}"] for k in range(3))
        assert layer.spec == with_bits(layer.spec, bits) and layer.spec.adc.plane_bits in (bits, None)
    for one in found["columns"]:
        assert one["increases"]["3"] == [0.0] and math.isfinite(one["increases"]["1"][0])
    assert "| conv1, plane 2 |" in study.table


def test_nothing_is_lost_at_the_bits_of_the_base_run(studied: Any) -> None:
    folder, _, _ = studied
    for layer in json.loads((folder / "bits.json").read_text())["columns"]:
        assert layer["bits"] == 3 and layer["increases"]["3"] == [0.0]
        assert all(math.isfinite(value) for values in layer["increases"].values() for value in values)


def test_a_measured_network_is_the_trained_one_but_for_its_layer(studied: Any) -> None:
    folder, _, _ = studied
    run = folder / "base" / "seed=0"
    measure = Measurement(run)
    assert measure.images == 1024 and measure({"conv1": 3}) == measure({})
    experiment, state, _ = restore(run, images=True)
    kept = json.loads((folder / "sensitivities-seed=0.json").read_text())["networks"]
    # Computed in one program or layer by layer; on other parts of the training images.
    whole = Evaluator(experiment, experiment.dataset.train)(state)
    assert abs(whole["loss"] - kept["as trained"]["loss"]) < 0.1
    before = state.variables["params"]
    after = measure._calibrated(experiment.model, ["conv3"])["params"]
    assert (after["conv1"]["psum_log_step"] == before["conv1"]["psum_log_step"]).all()
    assert not (after["conv3"]["psum_log_step"] == before["conv3"]["psum_log_step"]).all()
    assert (after["conv3"]["weight_log_step"] == before["conv3"]["weight_log_step"]).all()


def test_the_same_again_trains_nothing_and_measures_nothing(studied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, study, given = studied

    def refused(*_: Any) -> None:
        raise AssertionError("a run was read, or begun")

    monkeypatch.setattr("cimjax.analysis.studies.sensitivity.restore", refused)
    monkeypatch.setattr("cimjax.analysis.sweep._start", refused)
    before = {file: file.read_bytes() for file in folder.glob("*") if file.is_file()}
    assert study_bits(Runs(f"{DIGITS}:smoke", folder, [0], FIELDS), **given) == study
    assert {file: file.read_bytes() for file in before} == before


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--bits", "1,two"], "--bits is '1,two'; give different numbers from 1 to 16, whole ones or 1.5"),
        (["--bits", "2,2"], "--bits is '2,2'; give different numbers"),
        (["--budget", "none"], "--budget is 'none'; give a part of the base run's energy above 0, as in 0.5"),
        (["--budget", "0"], "--budget is '0'; give a part"),
        (["--budget", "0.2"], "--budget is 0.2, but 1 bits everywhere take 0.25 of the base run's energy; give at"),
        (["--bits", "2,3", "--budget", "0.4"], "2 bits everywhere take 0.5 of the base run's energy"),
        (["--config", f"{DIGITS}:psum=none"], "has an ADC, so that there are no bits to choose"),
        (["--config", f"{DIGITS}:psum=layer", "--by", "plane"], "planes cannot have their own bits, give --by layer"),
        (["--config", f"{DIGITS}:adc_step=fixed,full_scale=9", "--by", "plane"], "planes cannot have their own bits"),
    ],
)
def test_refusals_are_one_line_before_anything_is_trained(
    words: list[str], refusal: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--config" in words else ["--config", f"{DIGITS}:smoke"]
    assert main(["study", "bits", *given, "--workdir", str(tmp_path / "none"), *words]) == 2
    error = capsys.readouterr().err
    assert refusal in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_words_are_read_as_numbers() -> None:
    assert parse_bits(["4", "1.5", "1"]) == [1, 1.5, 4]
    assert parse_budget("0.3") * 10 == 3
