"""Studies of trained runs: accuracy over variation, and partial sums with the ladders that read them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from test_training import config, quiet

import cimjax
from cimjax.analysis.studies import psum_output, psums, variation
from cimjax.analysis.studies.commands import STUDIES
from cimjax.cli import main
from cimjax.core import lsq
from cimjax.nn.layers import PARTIAL_SUMS, CIMConv
from cimjax.spec import ADCSpec, CIMSpec, VariationSpec
from cimjax.training.evaluate import Evaluator, Health, restore
from cimjax.training.random_streams import Stream, stream_key

CHIPS = jax.vmap(lambda number: stream_key(0, Stream.OTHER_CHIP, number))(np.arange(5))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "a run"
    cimjax.train(config(epochs=1.0), workdir=folder, display=quiet())
    return folder


@pytest.fixture(scope="module")
def full_precision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studies") / "full"
    cimjax.train(config("smoke,weight=none", epochs=0.1, warmup_epochs=0.0), workdir=folder, display=quiet())
    return folder


@pytest.fixture(scope="module")
def study(run: Path) -> variation.VariationStudy:
    return variation.study_variation([run], sigmas=(0.3, 0.0), chips=5, chips_at_once=2)


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    """The one line with which a command ends."""
    assert main(["study", *map(str, words)]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and said.splitlines()[-1].startswith("cimjax: ")
    assert not [line for line in said.splitlines() if "Traceback" in line or "Error" in line]
    return said.splitlines()[-1].removeprefix("cimjax: ")


def test_without_variation_a_run_has_its_own_accuracy(run: Path, study: variation.VariationStudy) -> None:
    (measured,) = study.runs
    assert list(measured.accuracies) == [0.0, 0.3] and (study.chips, measured.images) == (5, 360)
    own = cimjax.evaluate(run)["accuracy"]
    assert measured.accuracies[0.0] == [own] * 5
    assert len(set(measured.accuracies[0.3])) > 1 and np.mean(measured.accuracies[0.3]) < own + 0.05


def test_chips_together_are_chips_one_by_one(run: Path, study: variation.VariationStudy) -> None:
    experiment, state, _ = restore(run, images=True)
    varied = variation.with_variation(experiment, VariationSpec(sigma=0.3))
    # As `study_variation` builds it, the network differs in its variation alone.
    assert varied.specs["conv3"] == dataclasses.replace(
        experiment.specs["conv3"], variation=VariationSpec(sigma=0.3, on="weights")
    )
    evaluator = Evaluator(varied, experiment.dataset.test)
    one_by_one = [evaluator(state, chip=chip)["accuracy"] for chip in CHIPS]
    # Sums of varied digits depend on their order in the last bits: an image may be read otherwise.
    np.testing.assert_allclose(study.runs[0].accuracies[0.3], one_by_one, atol=2.5 / 360)


def test_runs_are_compared_on_the_same_chips(run: Path, tmp_path: Path, study: variation.VariationStudy) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(run, target_is_directory=True)
    assert len(variation.study_variation([run, copy, run], sigmas=[0.0], chips=1).runs) == 1
    copy = Path(shutil.copytree(run, tmp_path / "b" / "copied"))
    both = variation.study_variation([run, copy], sigmas=[0.3], chips=5, chips_at_once=5)
    first, second = both.runs
    assert first.accuracies == second.accuracies and (first.label, second.label) == ("a run", "copied")
    np.testing.assert_allclose(first.accuracies[0.3], study.runs[0].accuracies[0.3], atol=2.5 / 360)


def test_a_run_that_trained_on_varied_cells_has_its_variation_replaced(run: Path) -> None:
    experiment, _, _ = restore(run)
    cells = variation.with_variation(experiment, VariationSpec(sigma=0.2, on="cells"))
    assert cells.specs["conv3"].variation == VariationSpec(sigma=0.2, on="cells")
    assert variation.with_variation(cells, None).specs == experiment.specs


def test_the_table_and_the_numbers_of_variation(run: Path) -> None:
    accuracies = {0.0: [0.5, 0.5, 0.5], 0.1: [0.25, 0.5, 0.75]}
    some = variation.VariationStudy("cells", 3, 0, [variation.VariedRun(run, "a|b", 4, accuracies)])
    assert variation.table(some).splitlines() == [
        "Test accuracy, percent, with variation of cells: 3 chips, 4 images",
        "",
        "| sigma |  mean |   std |    5% |   50% |   95% | run |",
        "| ----: | ----: | ----: | ----: | ----: | ----: | --- |",
        "|     0 | 50.00 |  0.00 | 50.00 | 50.00 | 50.00 | a/b |",
        "|   0.1 | 50.00 | 25.00 | 27.50 | 50.00 | 72.50 | a/b |",
    ]
    assert variation.summary([0.5])["std"] is None
    single = variation.VariationStudy("cells", 1, 0, [variation.VariedRun(run, "a", 4, {0.1: [0.5]})])
    assert "1 chip, 4 images" in variation.table(single) and "| - |" in variation.table(single).replace("   -", " -")


def test_the_command_leaves_table_numbers_and_figure(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    command = ["study", "variation", str(run), "--sigma", "0,0.3", "--chips", "5", "--chips-at-once", "2"]
    assert main(command) == 0
    printed, said = capsys.readouterr()
    folder = Path("studies", "variation")
    text = (folder / "variation.md").read_text()
    files = [f"studies/variation/variation.{kind}" for kind in ("md", "json", "svg", "png")]
    assert printed == text + "\n" + "\n".join(files) + "\n"
    assert max(map(len, printed.splitlines())) <= 80
    assert said.splitlines()[-1] == "a run: sigma 0.3, 5 chips"
    found = json.loads((folder / "variation.json").read_text())
    assert [found[name] for name in ("on", "chips", "seed")] == ["weights", 5, 0]
    (of_run,) = found["runs"]
    assert (of_run["run"], of_run["images"]) == (str(run), 360)
    assert [row["sigma"] for row in of_run["sigmas"]] == [0, 0.3]
    for row in of_run["sigmas"]:
        assert row["mean"] == pytest.approx(np.mean(row["accuracies"])) and len(row["accuracies"]) == 5
        assert row["95%"] == pytest.approx(np.quantile(row["accuracies"], 0.95))
        assert row["std"] == pytest.approx(np.std(row["accuracies"], ddof=1))
    svg = (folder / "variation.svg").read_text()
    assert "test accuracy, %" in svg and "a run" in svg and (folder / "variation.png").read_bytes()[:4] == b"\x89PNG"


def test_partial_sums_are_those_of_the_definition(run: Path) -> None:
    """Against NumPy, patch by patch: codes times digits over the rows of each read group."""
    experiment, state, _ = restore(run, images=True)
    (layer,) = psums.study_psums(run).layers
    assert layer.name == "conv3" and layer.step is not None and layer.offset is not None
    images = experiment.calibration_images()[:2]
    inputs: list[Any] = []

    def keep(call: Any, given: Any, named: Any, context: Any) -> Any:
        if isinstance(context.module, CIMConv) and context.method_name == "__call__":
            inputs.append(given[0])
        return call(*given, **named)

    with nn.intercept_methods(keep):
        _, left = experiment.model.apply(state.variables, images, train=False, mutable=[PARTIAL_SUMS])
    ((columns, steps),) = left[PARTIAL_SUMS]["conv3"]["adc"]
    expected = by_hand(np.asarray(inputs[0]), state.variables["params"]["conv3"], experiment.specs["conv3"])
    np.testing.assert_array_equal(np.asarray(columns)[0], expected)
    np.testing.assert_array_equal(layer.step, np.broadcast_to(steps.psum, layer.step.shape))
    assert (layer.lowest[0] <= expected.min(axis=0)).all() and (layer.highest[0] >= expected.max(axis=0)).all()


def by_hand(x: np.ndarray, params: Any, spec: CIMSpec) -> np.ndarray:
    """(M, R, K, O) of a 3 x 3 layer of two's complement and packed tiles, of which the padding is undriven."""
    codes = np.asarray(lsq.quantize(x, np.exp(params["activation_log_step"]), spec.activation.code_range))
    kernel, step = np.asarray(params["kernel"]), np.exp(np.asarray(params["weight_log_step"]))
    size, (channels, outputs) = kernel.shape[0], kernel.shape[2:]
    per_array = spec.array.rows // size**2
    q = np.empty(kernel.shape, int)
    for c in range(channels):
        scaled = kernel[:, :, c] * (np.float32(1) / np.broadcast_to(step, (step.shape[0], outputs))[c // per_array])
        q[:, :, c] = np.clip(np.rint(scaled), spec.weight.code_range.q_min, spec.weight.code_range.q_max)
    digits = [(q >> bit) & 1 for bit in range(int(spec.weight.bits))]
    padded = np.pad(codes, ((0, 0), (1, 1), (1, 1), (0, 0)))
    n, height, width, _ = codes.shape
    groups = -(-channels // per_array)
    sums = np.zeros((n, height, width, groups, len(digits), outputs))
    for i, j, r, k in np.ndindex(height, width, groups, len(digits)):
        of_group = slice(r * per_array, (r + 1) * per_array)
        patch = padded[:, i : i + size, j : j + size, of_group]
        sums[:, i, j, r, k] = np.einsum("nijc,ijco->no", patch, digits[k][:, :, of_group])
    return sums.reshape(-1, groups, len(digits), outputs)


def test_saturation_and_codes_are_those_that_training_reports(run: Path) -> None:
    experiment, state, _ = restore(run, images=True)
    study = psums.study_psums(run, layers=["conv3", "conv3"], columns=1)
    (layer,) = study.layers
    health = Health(experiment)(state)["conv3"]
    assert layer.saturated.mean() == pytest.approx(health["saturated"], rel=1e-5)
    assert layer.used is not None and layer.used.mean() == pytest.approx(health["codes_used"], rel=1e-6)
    assert (layer.unused == 8 - layer.used).all() and list(layer.codes) == [8] * 3
    assert layer.saturated.shape == layer.unused.shape == layer.lowest.shape[1:]
    assert study.images == 256 and layer.positions % 256 == 0


def test_levels_of_ladders() -> None:
    ones = np.ones((1, 2, 3))

    def layer(**adc: Any) -> psums.LayerPsums:
        spec = CIMSpec(adc=ADCSpec(**adc))
        sums = np.zeros((1, *ones.shape))
        return psums.LayerPsums(
            "a", spec, 4, sums, sums, np.zeros((1, 4, *ones.shape)), 2 * ones, 5 * ones, sums, ones.astype(int)
        )

    # The lower plane of two's complement is unsigned, its top plane signed; with an offset both codes count from 0.
    assert layer(bits=2).levels(0, 0, 0, 0).tolist() == [5, 7, 9, 11]
    assert layer(bits=2).levels(0, 0, 1, 0).tolist() == [1, 3, 5, 7]
    assert layer(bits=1, range="signed", offset=True).levels(0, 0, 0, 0).tolist() == [3, 7]
    assert layer(bits=1, range="signed", offset=True).codes.tolist() == [2, 2]
    ideal = dataclasses.replace(layer(bits=2), spec=CIMSpec(adc=None), step=None, offset=None, beyond=None, used=None)
    assert ideal.levels(0, 0, 0, 0).size == 0
    table = psum_output.table(psums.PsumStudy(Path("r"), 2, 1, [layer(bits=2), ideal]))
    assert table.splitlines()[-2:] == [
        "|       6 | 0 to 0 |     0.00% |  0.0% | 3.00 of 4 |     3 | a |",
        "|       6 | 0 to 0 |         - |     - |         - |     - | a |",
    ]
    (written,) = psum_output.as_dict(psums.PsumStudy(Path("r"), 2, 1, [ideal]))["layers"]
    assert json.loads(json.dumps(written))["adc"] is None


def test_the_command_leaves_partial_sums(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "a b"
    assert main(["study", "psums", str(run), "--layers", "conv3", "--columns", "2", "--save", str(folder)]) == 0
    printed, _ = capsys.readouterr()
    text = (folder / "psums.md").read_text()
    names = ("psums.md", "psums.json", "psums-conv3.svg", "psums-conv3.png")
    assert printed == text + "\n" + "\n".join(f"'{folder / name}'" for name in names) + "\n"
    assert max(map(len, text.splitlines())) <= 80
    (layer,) = json.loads((folder / "psums.json").read_text())["layers"]
    assert (layer["layer"], layer["planes"], layer["adc"]["codes"]) == ("conv3", [1, 2, -4], [8, 8, 8])
    shape = (1, layer["read_groups"], 3, layer["outputs"])
    for name in ("lowest", "1%", "50%", "99%", "highest"):
        assert np.shape(layer["psums"][name]) == shape
    assert (np.asarray(layer["psums"]["lowest"]) <= layer["psums"]["1%"]).all()
    saturated = layer["adc"]["of_columns"]["saturated"]
    assert layer["adc"]["saturated"]["worst"] == pytest.approx(np.max(saturated), rel=1e-5)
    assert layer["adc"]["unused_codes"]["mean"] == pytest.approx(np.mean(layer["adc"]["of_columns"]["unused_codes"]))
    svg = (folder / "psums-conv3.svg").read_text()
    assert "level of the ADC" in svg and svg.count("share, %") == 2 and "highest level" in svg


def test_partial_sums_behind_ideal_adcs_are_drawn_without_levels() -> None:
    pytest.importorskip("matplotlib")
    values = np.random.default_rng(0).integers(0, 9, (1, 50, 1, 2, 4)).astype(np.float32)
    ideal = psums.LayerPsums("conv", CIMSpec(adc=None), 50, values.min(1), values.max(1), values)
    figure = psum_output.draw(ideal, 9)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sorted(labels) == ["1 % to 99 %", "all partial sums", "median"]
    # There are no more columns to draw.
    assert len(figure.axes) == 1 + 4


def test_what_cannot_be_studied_is_refused_in_one_line(
    run: Path,
    full_precision: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("variation", "psums"):
        assert "is no run folder" in refused(capsys, name, tmp_path / "none")
        assert "run of full precision" in refused(capsys, name, full_precision)
        assert "is a file, not a folder; give another folder by --save" in refused(
            capsys, name, run, "--save", "file/a"
        )
    assert "is no run folder" in refused(capsys, "variation", run, tmp_path / "none")
    assert "run of full precision" in refused(capsys, "variation", run, full_precision)
    assert "`sigma` is -0.1; give a number from 0 to 2" in refused(capsys, "variation", run, "--sigma=-0.1")
    assert "`sigma` is nan" in refused(capsys, "variation", run, "--sigma", "0,nan")
    assert "--sigma is '0,x'; give numbers" in refused(capsys, "variation", run, "--sigma", "0,x")
    assert "`chips` is 0; give a whole number" in refused(capsys, "variation", run, "--chips", "0")
    assert "`chips_at_once` is 0" in refused(capsys, "variation", run, "--chips-at-once", "0")
    assert "invalid choice" in refused(capsys, "variation", run, "--on", "cell")
    assert "no array layer 'conv4' (did you mean 'conv3'?)" in refused(capsys, "psums", run, "--layers", "conv4")
    assert "`columns` is 0; give a whole number" in refused(capsys, "psums", run, "--columns", "0")
    assert not (tmp_path / "studies").exists()
    with pytest.raises(ValueError, match="`sigmas` is empty"):
        variation.study_variation([run], sigmas=[])
    with pytest.raises(ValueError, match="no run is given"):
        variation.study_variation([])


def test_a_damaged_run_is_refused_before_others_are_measured(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    damaged = Path(shutil.copytree(run, tmp_path / "damaged"))
    for file in [path for path in (damaged / "checkpoints").rglob("*") if path.is_file()]:
        file.write_bytes(b"")
    assert main(["study", "variation", str(run), str(damaged)]) == 2
    printed, said = capsys.readouterr()
    assert printed == "" and "sigma" not in said and said.splitlines()[-1].startswith("cimjax: ")


def test_without_matplotlib_nothing_is_begun(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for name in ("variation", "psums"):
        assert refused(capsys, name, run) == "a plot needs matplotlib: pip install 'cimjax[plot]'."


def test_help_of_studies_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for name in STUDIES:
        assert main([*name.split(), "--help"]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
