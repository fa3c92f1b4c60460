"""Curves of runs: what is drawn, and that what keeps a figure from being written is said before anything is done."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cimjax.analysis import plot
from cimjax.cli import main

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")


def run_folder(
    folder: Path, accuracies: Sequence[float | None], *, ideal: int = 0, held_out: bool = False, end: str = "\n"
) -> Path:
    """A run folder as training leaves it, with an epoch for each accuracy."""
    records: list[dict[str, Any]] = []
    for epoch, accuracy in enumerate(accuracies, start=1):
        about = {"step": 10 * epoch, "epoch": epoch}
        switch = {"ideal_adcs": True} if epoch <= ideal else {}
        records.append({**about, "split": "train", "loss": 1 / epoch, "learning_rate": 0.1, "weight_moved": 0.1})
        records.append({**about, "split": "test", "loss": 2 / epoch, "accuracy": accuracy, **switch})
        if held_out:
            records.append({**about, "split": "validation", "accuracy": 0.5, "loss": 1.0, "best": epoch == 1, **switch})
    records.append({"step": 99, "split": "health", "layer": "conv1", "saturated": 0.1})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + end)
    return folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that were drawn."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *words, **all: (drawn.append(self), save(self, *words, **all))
    )
    return drawn


def curves(axes: Any) -> dict[tuple[str, str], list[float]]:
    """What a panel shows, by colour and style; lines across are not curves."""
    return {
        (line.get_color(), line.get_linestyle()): [round(float(value), 3) for value in line.get_ydata()]
        for line in axes.lines
        if line.get_linestyle() != ":"
    }


def test_runs_are_drawn_over_their_epochs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figures: list[Any]
) -> None:
    one = run_folder(tmp_path / "a" / "seed=0", [0.1, 0.5, None], ideal=2, held_out=True, end='\n{"step": 3')
    two = run_folder(tmp_path / "b" / "seed=0", [0.2, 0.4], ideal=2)
    file = tmp_path / "a b.png"
    assert main(["plot", str(one), str(two), f"{one}/", "--save", str(file)]) == 0
    assert capsys.readouterr().out == f"'{file}'\n" and file.read_bytes().startswith(b"\x89PNG")
    loss, accuracy = figures[0].axes
    blue, orange = "#0072B2", "#D55E00"
    assert curves(loss) == {(blue, "-"): [1.0, 0.5, 0.333], (orange, "-"): [1.0, 0.5]}
    found = curves(accuracy)
    assert str(found.pop((blue, "-"))) == "[10.0, 50.0, nan]"
    assert found == {(blue, "--"): [50.0, 50.0, 50.0], (orange, "-"): [20.0, 40.0]}
    assert [axes.get_title() for axes in (loss, accuracy)] == [
        "train loss",
        "test accuracy (dashed: held out), percent",
    ]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a/seed=0", "b/seed=0"]
    # The second run has not come to its ADCs yet.
    (switch,) = [line for line in accuracy.lines if line.get_linestyle() == ":"]
    assert (switch.get_xdata()[0], switch.get_color()) == (2, blue) and accuracy.texts[0].get_text() == " ADCs on"
    # What is seen at 900 pixels: nine inches, letters of 9 points and more.
    assert figures[0].get_figwidth() == 9 and figures[0].legends[0].get_texts()[0].get_fontsize() >= 9


def test_any_number_of_an_epoch_can_be_drawn_of_many_runs(tmp_path: Path, figures: list[Any]) -> None:
    runs = [run_folder(tmp_path / (f"{index}-" + "x" * 150), [0.5]) for index in range(9)]
    plot.plot(runs, tmp_path / "all.svg", over=["learning_rate", "test.loss", "weight_moved"])
    assert "<svg" in (tmp_path / "all.svg").read_text()
    assert [axes.get_title() for axes in figures[0].axes] == ["learning rate", "test loss", "weight moved"]
    kinds = {(line.get_color(), line.get_marker()) for line in figures[0].axes[0].lines}
    assert len(kinds) == 9 and max(len(text.get_text()) for text in figures[0].legends[0].get_texts()) <= 100


def test_what_cannot_be_drawn_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    run, empty = run_folder(tmp_path / "run", [0.5]), run_folder(tmp_path / "empty", [])
    file = str(tmp_path / "x.png")
    for words, message in (
        ([str(tmp_path), "--save", file], "is no run folder"),
        ([str(empty), "--save", file], "empty has no finished epoch to draw"),
        ([str(run), "--save", file, "--over", "los"], "no run has recorded 'los' in its epochs (did you mean 'loss'?)"),
        ([str(run), "--save", file, "--over", "test.learning_rate"], "no run has recorded 'test.learning_rate'"),
        ([str(run), "--save", file, "--over", "best"], "no run has recorded 'best'"),
        ([str(run), "--save", file, "--over", ""], "no run has recorded ''"),
        (["nowhere", "--save", str(tmp_path / "x.pdf")], "give a name that ends in .png or .svg"),
        (["nowhere", "--save", str(tmp_path / "no" / "x.png")], "create it first"),
    ):
        assert main(["plot", *words]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err
    assert not Path(file).exists()


def test_a_figure_that_cannot_be_written_is_refused_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.png").mkdir()
    bench = ["bench", "--config", "no_such_config.py"]
    for words, message in (
        (["--plot", str(tmp_path / "folder.png")], "is a folder"),
        (["--plot", str(tmp_path / "bench.jpg")], "ends in .png or .svg"),
        (["--save", str(tmp_path / "no" / "x.json")], "create it first"),
    ):
        assert main([*bench, *words]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    for command in (["plot", "nowhere"], [*bench, "--plot", str(tmp_path / "bench.png")]):
        assert main(command) == 2
        assert "a plot needs matplotlib: pip install 'cimjax[plot]'." in capsys.readouterr().err
