"""Studies that train: their cases, what they cost, their tables and figures; how runs start from others."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from test_sweep import fake_runs

from cimjax.analysis import sweep as sweep_module
from cimjax.analysis.executors import Processes
from cimjax.analysis.studies import adc_range, design, encodings, granularity, runs, training_cost
from cimjax.analysis.studies.output import markdown
from cimjax.analysis.studies.runs import Case, Outcome, Runs
from cimjax.analysis.sweep_plan import PlannedRun
from cimjax.cli import main
from cimjax.training.config.file import load_config

THREE_EPOCHS = ["--config.epochs=3"]
DIGITS = str(Path(__file__).parents[1] / "configs" / "digits.py")
# The layer of several row tiles alone goes through arrays, and is narrow.
NARROW = ["--config.model.width=4", "--config.rules=(('conv[12]',None),)"]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[PlannedRun]:
    """Runs are not trained but planned: they come to accuracies by their number, one of them fails."""
    planned: list[PlannedRun] = []

    def train_all(runs: Sequence[PlannedRun], workdir: Any, **options: Any) -> list[dict[str, Any]]:
        planned.extend(runs)
        rows: list[dict[str, Any]] = []
        for number, run in enumerate(runs):
            found = {"accuracy": 0.5 + number / 1000} if number != 4 else {"failed": "no | luck\nat all"}
            rows.append({**run.values, "workdir": str(run.folder), **found})
        return rows

    monkeypatch.setattr(sweep_module, "train_all", train_all)
    return planned


def test_every_case_of_every_study_can_be_planned(trained: list[PlannedRun], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    studies = (
        lambda where: granularity.study_granularity(Runs(f"{DIGITS}:adc_bits=2", where, seeds=(0, 3))),
        lambda where: encodings.study_encodings(
            Runs(DIGITS, where), encodings=list(encodings.ENCODINGS), bits=["1.5", "3"]
        ),
        lambda where: adc_range.study_adc_range(
            Runs(f"{DIGITS}:smoke", where, fields=["--config.epochs=3"]), bits=["2"]
        ),
    )
    for number, study in enumerate(studies):
        trained.clear()
        found = study(tmp_path / str(number))
        folders = [run.folder for run in trained]
        assert len(set(folders)) == len(folders)
        assert all(run.start is None or run.start in folders for run in trained)
        for run in trained:
            config = load_config(run.config)
            assert (config.start == "run") == (run.start is not None)
            assert f"seed={config.seed}" == run.folder.name
        assert found.failed == 1 and "failed: no | luck at all" in found.table
        assert all(file.stat().st_size > 0 for file in found.files)
        assert {file.suffix for file in found.files} == {".md", ".json", ".svg", ".png"}
        rows = json.loads(next(file for file in found.files if file.suffix == ".json").read_text())
        assert len(rows) == len({run.values["case"] for run in trained})
        assert found.table == next(file for file in found.files if file.suffix == ".md").read_text().rstrip("\n")


def test_a_difference_is_of_runs_of_the_same_seed() -> None:
    def outcome(accuracies: dict[str, float]) -> Outcome:
        rows = [{"seed": seed, "accuracy": value} for seed, value in accuracies.items()]
        return Outcome(Case("", ""), list(accuracies.values()), {}, [*rows, {"seed": "9", "failed": "x"}])

    base = outcome({"0": 0.5, "1": 0.6, "2": 0.1})
    mean, error = design.difference(outcome({"1": 0.62, "0": 0.51, "5": 0.9}), base)
    assert mean == pytest.approx(1.5) and error == pytest.approx(0.5)
    mean, error = design.difference(outcome({"2": 0.11}), base)
    assert mean == pytest.approx(1) and math.isnan(error)
    assert all(map(math.isnan, design.difference(outcome({}), base)))


def test_every_answer_is_another_network_than_the_config() -> None:
    base = Runs(f"{DIGITS}:adc_bits=2", "", fields=["--config.epochs=3"])
    own, *others = design.cases(base, design.DESIGN, list(design.DESIGN))
    names = {case.name for case in others}
    assert own == Case(design.BASE, "") and len(names) == len(others) >= 18
    assert "offset before the ADC: none" in names and "offset before the ADC: one in every column" not in names
    assert "rows read at once: half" in names and "active_rows=32" in [case.options for case in others]
    # Those that a config gives itself are another's.
    two_stages = base._replace(config=f"{DIGITS}:adc_bits=2,training=two_stage,offset=false")
    other = design.cases(two_stages, design.DESIGN, ["stages"])
    assert [case.name for case in other] == [design.BASE, "stages: one"]
    with pytest.raises(ValueError, match=r"^--questions names 'tilling' \(did you mean 'tiling'"):
        design.cases(base, design.DESIGN, ["tilling"])
    with pytest.raises(ValueError, match="weight=none has no layer in arrays"):
        design.cases(Runs(f"{DIGITS}:weight=none", ""), design.DESIGN, ["tiling"])


def test_a_case_may_count_another_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(
        monkeypatch, ENDS.replace('"accuracy": 0.5, "moved"', '"accuracy": 0.5, "average_accuracy": 0.75, "moved"')
    )
    cases = [Case("last", ""), Case("averaged", "", fields=("--config.ema=0.9",), measure="average_accuracy")]
    found = runs.train_cases(Runs(DIGITS, tmp_path, [0], executor=Processes(2)), cases)
    assert [one.accuracies for one in found] == [[0.5], [0.75]]
    assert design.difference(found[1], found[0])[0] == pytest.approx(25)


def test_every_recipe_is_another_training_and_brings_the_runs_that_it_needs() -> None:
    base = Runs(f"{DIGITS}:adc_bits=2", "", fields=["--config.epochs=3"])
    _, *others = design.cases(base, design.RECIPE, list(design.RECIPE))
    cases = {case.name: case for case in others}
    assert len(cases) == len(others) and "ADCs ideal at first: half of the epochs" in cases
    assert "ADCs ideal at first: never" not in cases  # the config's own answer
    assert cases["second half starts from a run: with one more bit"].start == "half as long with one more bit"
    assert cases["half as long with one more bit"].options == "adc_bits=3"
    assert cases["half as long with one more bit"].fields == ("--config.epochs=1.5",)
    assert {case.start for case in others} | {case.teacher for case in others} == {*design.BEFORE, None}
    assert cases["full precision, twice as wide"].fields == ("--config.model.width=32",)
    few = {case.name for case in design.cases(base, design.RECIPE, ["weight decay"])}
    assert few == {design.BASE, "weight decay: half", "weight decay: twice"}


@pytest.mark.full
def test_a_recipe_is_trained_after_its_teacher_and_compared(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fields = [*NARROW, "--config.epochs=1", "--config.subset.images=260"]
    runs = Runs(f"{DIGITS}:smoke,adc_bits=2", tmp_path, [0], fields, Processes(2))
    found = design.study_recipe(runs, questions=["teacher"])
    assert found.failed == 0, found.table
    rows = {line.split("|")[1].strip(): line for line in found.table.splitlines() if line.startswith("|")}
    assert {"the config", "teacher: full precision", "full precision"} <= set(rows)
    config = json.loads((runs.folder("teacher: full precision", 0) / "config.json").read_text())
    assert config["teacher"] == str(runs.folder("full precision", 0))
    assert (tmp_path / "recipe.svg").exists()


def test_the_study_of_granularity_has_every_pair_and_every_scheme() -> None:
    names = {case.name: case for case in granularity.cases()}
    kinds = ("layer", "array", "column")
    assert all(f"{weight}/{psum}" in names for weight, psum in itertools.product(kinds, (*kinds, "ideal")))
    assert names["scheme kim2022"].start == names["scheme bai2023"].start == "full precision"
    assert names["scheme column"].start is None and "scheme bai2024" not in names


def test_misuses_end_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    study = ["--config", DIGITS, "--workdir", str(tmp_path / "runs")]
    for words, message in (
        (["study"], "give a command: study granularity, "),
        (["study", "granularity"], "required: --config, --workdir"),
        (["study", "granularity", *study, "--seeds", "0,x"], "--seeds is '0,x'; give different whole numbers"),
        (["study", "granularity", *study, "--seeds", "1,1"], "--seeds is '1,1'"),
        (["study", "granularity", *study, "--jobs", "0"], "`jobs` is 0"),
        (["study", "encodings", *study, "--encodings", "two"], "--encodings names 'two'"),
        (["study", "encodings", *study, "--pairs", "column"], "--pairs names 'column'; give granularities"),
        (["study", "encodings", *study, "--bits", "99"], "twos_complement P99: "),
        (
            ["study", "granularity", "--config", f"{DIGITS}:weight=layer", "--workdir", "x"],
            "weight is given twice",
        ),
    ):
        if "--config" in words:
            pytest.importorskip("matplotlib")
        assert main(words) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err, err
    assert not (tmp_path / "runs").exists()


def test_costs_are_those_of_the_layers() -> None:
    one, two = (runs.costs_of(Runs(DIGITS, ""), Case("", f"adc_bits={bits}")) for bits in (2, 3))
    assert two["conversions"] == one["conversions"] > 0
    assert (one["energy"], two["energy"]) == (4 * one["conversions"], 8 * one["conversions"])
    assert set(runs.costs_of(Runs(DIGITS, ""), Case("", "weight=none")).values()) == {0.0}
    assert runs.costs_of(Runs(DIGITS, ""), Case("", "scheme=kim2022"))["multiplies_of_paper"] == 3


@hypothesis.given(st.dictionaries(st.text("abcdefgh", min_size=1), st.tuples(st.integers(0, 5), st.integers(0, 5))))
def test_on_the_pareto_front_nothing_is_beaten_and_all_else_is(points: Any) -> None:
    front = runs.pareto(points)
    for name, (cost, accuracy) in points.items():
        better = [p for p in points.values() if p[0] <= cost and p[1] >= accuracy and p != (cost, accuracy)]
        assert (name in front) == (not better)
    assert [points[name][0] for name in front] == sorted(points[name][0] for name in front)


def test_tables_are_markdown_with_aligned_numbers() -> None:
    text = markdown(["case", "n"], [["a", "1,000"], ["bc", "-"]])
    assert text == "| case |     n |\n| ---- | ----: |\n| a    | 1,000 |\n| bc   |     - |"


def test_a_case_is_compared_by_when_it_is_first_as_accurate() -> None:
    slow, quick = (training_cost.Curve([10.0, 20.0, scale], [1, 2, 3], [0.2, 0.8, 0.9]) for scale in (40.0, 30.0))
    low = training_cost.Curve([10.0], [1], [0.1])
    assert "i reaches the 90.00 % of ii with 25.0 % fewer seconds and 0.0 % fewer steps" in training_cost._sentence(
        1, 0, "*", [quick, slow, low, low]
    )
    assert "i never reaches the 90.00 % of ii" in training_cost._sentence(1, 0, "*", [low, slow, low, low])
    nothing = training_cost.Curve([], [], [])
    assert "no run of one of them has ended" in training_cost._sentence(1, 0, "*", [nothing, slow, low, low])


ENDS = """if 1:
    import json, pathlib, sys
    folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
    if "bad" in str(folder) and "--from" not in sys.argv: sys.exit("out of luck")
    start = sys.argv[sys.argv.index("--from") + 1] if "--from" in sys.argv else None
    if start: assert (pathlib.Path(start) / "metrics.jsonl").exists()
    result = {"split": "result", "step": 1, "accuracy": 0.5, "moved": {}, "seconds": 1.0, "start": start}
    epochs = [{"split": "test", "step": 1, "epoch": 99, "seconds": 1.0, "accuracy": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\\n" for one in [*epochs, result]))
"""


def test_runs_wait_for_what_they_start_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(monkeypatch, ENDS)
    cases = [
        Case("second", "training=post_training", "first"),
        Case("first", "weight=none"),
        Case("third", "training=post_training,adc_bits=2", "bad"),
        Case("bad", "weight=none"),
    ]
    found = {one.case.name: one for one in runs.train_cases(Runs(DIGITS, tmp_path, [0], executor=Processes(2)), cases)}
    assert found["second"].accuracies == found["first"].accuracies == [0.5]
    assert found["second"].rows[0]["start"] == str(tmp_path / "first" / "seed=0")
    assert found["bad"].failed == {0: "out of luck"} and math.isnan(found["bad"].mean)
    assert "bad/seed=0, which it starts from, has not ended" in found["third"].failed[0]
    # Nothing is trained twice.
    fake_runs(monkeypatch, "raise SystemExit('again')")
    again = runs.train_cases(Runs(DIGITS, tmp_path, [0]), cases[:2])
    assert [one.accuracies for one in again] == [[0.5], [0.5]]
    with pytest.raises(ValueError, match="wrong: adc_bits is 'x'"):
        runs.train_cases(Runs(DIGITS, tmp_path, [0]), [Case("wrong", "adc_bits=x")])


@pytest.mark.full
def test_a_study_trains_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    command = ["study", "training-cost", "--config", f"{DIGITS}:smoke", "--workdir", str(tmp_path), "--seeds", "0"]
    command += NARROW
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert "4 of 4: case=iv layer/column, two stages seed=0: " in err and "| iii column/column, two stages |" in out
    assert str(tmp_path / "training_cost.png") in out
    assert main(command) == 0
    again, err = capsys.readouterr()
    assert again == out and "4 runs: 4 finished, 0 to train" in err
