"""The benchmark: it times what it says, on networks small enough for a test; never how fast they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cimjax.analysis import bench, timing
from cimjax.cli import main
from cimjax.core.programs.products import PRODUCTS
from cimjax.spec import CIMSpec
from cimjax.training.config.file import load_config

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")


def test_steps_are_timed_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bench, "variants", lambda spec: {"full precision": bench.Variant(None), "psum column": bench.Variant(spec)}
    )
    saved = tmp_path / "bench.json"
    small = ["--config.batch_size=4", "--config.model.width=4", "--config.rules=(('conv[12]',None),)"]
    command = ["bench", "--config", f"{CONFIG}:smoke", *small, "--runs", "2", "--save", str(saved)]
    assert main(command) == 0
    printed, said = capsys.readouterr()
    names = ("full precision", "psum column")
    assert said.splitlines() == [
        *(f"compiling {name}, train and evaluate" for name in names),
        "warming up 4 programs",
        *(f"timing 4 programs, run {run} of 2" for run in (1, 2)),
    ]
    figures: dict[str, Any] = json.loads(saved.read_text())
    assert [row["name"] for row in figures["timings"]] == [
        f"{name}, {kind}" for name in names for kind in ("train", "evaluate")
    ]
    for row in figures["timings"]:
        assert row["images"] == 4 and row["compile_seconds"] > 0 and row["whole_mb"] >= row["temporary_mb"] >= 0
        assert 0 < row["fastest"] <= row["milliseconds"] <= row["slowest"]
        assert row["images_per_second"] == pytest.approx(4e3 / row["milliseconds"])
    assert figures["jax"] in printed and "| psum column, evaluate" in printed
    assert main(["bench", "--config", f"{CONFIG}:weight=none", "--runs", "1"]) == 2


def test_a_training_step_is_timed_as_a_run_dispatches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several in one program, of which each counts."""
    config = load_config(f"{CONFIG}:smoke,weight=none", [])
    with config.unlocked():
        config.batch_size, config.model.width, config.steps_per_dispatch = 4, 4, 3
    timed = bench.training_step("train", config, bench.random_images(4, (8, 8, 1), 10))
    monkeypatch.setattr(timing.time, "perf_counter", iter((0.0, 6.0)).__next__)
    assert timed.once() == 2.0
    assert int(timed.arguments[0].step) == 3


@pytest.mark.full
def test_layers_are_timed_by_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "LAYERS", ((4, 16, 3, 2),))
    said: list[str] = []
    timings = bench.bench_layers(CIMSpec(), batch=2, runs=1, say=said.append)
    assert said[:2] == [f"compiling 4x4 16-3/2, {name}, forward and gradients" for name in ("plain", "reference")]
    assert [timing.name for timing in timings] == [
        f"4x4 16-3/2, {name}, {kind}"
        for name in ("plain", "reference", *map(str, PRODUCTS))
        for kind in ("forward", "gradients")
    ]
    lines = timing.show(timings).splitlines()
    # Ratios are to the plain convolution of the same kind.
    assert [line.split("|")[4].strip() for line in lines[2:4]] == ["1.00", "1.00"]


def test_memory_is_told_by_parts_of_a_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "memory.json"
    small = ["--config.batch_size=6", "--config.model.width=4", "--config.rules=(('conv[12]',None),)"]
    # Parts of a data set belong to training alone.
    small += ["--config.subset.images=500", "--config.validation=0.1"]
    command = ["bench", "--of", "memory", "--config", f"{CONFIG}:smoke", *small]
    assert main([*command, "--save", str(saved)]) == 0
    rows = json.loads(saved.read_text())["needs"]
    assert [(row["parts"], row["residuals"], row["images"]) for row in rows] == [
        (parts, kept, 6 // parts) for parts in (1, 2) for kept in ("auto", "inputs")
    ]
    whole, parts = rows[0], rows[-2]
    assert whole["whole_mb"] > whole["temporary_mb"] > parts["temporary_mb"] > 0
    assert capsys.readouterr().out.count("| inputs ") == 2
    assert main([*command, "--plot", str(tmp_path / "memory.png")]) == 2
    assert "--plot draws programs" in capsys.readouterr().err


@pytest.mark.full
def test_growth_is_shown_on_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("GROWING", (4, 8, 4, 1)), ("PLANES", (3,)), ("TILES", (8,)), ("ACTIVE_ROWS", (16,))):
        monkeypatch.setattr(bench, name, value)
    timings = bench.bench_growth(CIMSpec(), batch=2, runs=1)
    kinds = ["3 planes", "8 tiles"]
    names = ["plain", *kinds, *(f"{kind} recomputed" for kind in kinds), "16 active rows"]
    assert [one.name for one in timings] == [f"4x4 8-4, {name}, gradients" for name in names]


def test_programs_change_no_result() -> None:
    found = bench.programs_of(CIMSpec())
    names = {"default", "reference", "patches", "int8 operands", "recomputed psums"}
    assert names <= set(found) and "pallas" not in found
    assert {variant.spec for variant in found.values()} == {CIMSpec()}
    assert len({variant.execution for variant in found.values()}) == len(found)


def test_without_adcs_there_is_nothing_to_recompute() -> None:
    found = bench.programs_of(CIMSpec(adc=None))
    assert list(found) == ["default", "reference", "grouped_conv", "conv_per_tile", "patches"]


def test_variants_change_the_adc_only() -> None:
    config = load_config(CONFIG, [])
    assert list(bench.variants(CIMSpec())) == ["full precision", "ideal ADC", "psum layer", "psum array", "psum column"]
    spec = CIMSpec.from_dict(config.spec.to_dict())
    variants = {name: variant.spec for name, variant in bench.variants(spec).items()}
    assert variants["full precision"] is None
    assert variants["ideal ADC"].adc is None and variants["ideal ADC"].weight == spec.weight
    assert variants["psum column"] == spec
    assert {str(variants[f"psum {name}"].adc.granularity) for name in ("layer", "array")} == {"layer", "array"}


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    timings = [timing.Timing(f"one, {kind}", 2.0, 1.0, 3.0, 0.5, 10.0, 12.0, 4) for kind in ("train", "evaluate")]
    timing.plot(timings, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
