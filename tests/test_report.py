"""Reports of runs: what stands on the page, that it needs nothing else, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from test_plot import run_folder
from test_training import config, quiet

import cimjax
from cimjax.analysis.report.gather import gather, grouped
from cimjax.analysis.report.page import report
from cimjax.cli import main
from cimjax.training.run.files import RunFolderWarning
from cimjax.training.run.folder import read_records

NAME = 'a <b>"run" & | more'
# Elements that have no end.
VOID = {"meta", "link", "br", "wbr", "img", "hr", "input"}


class Page(HTMLParser):
    """A page as a browser reads it: every element with its attributes, and the texts of tables' cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs)
        self._open += [] if tag in VOID else [tag]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & set(self._open) and "svg" not in self._open:
            self.cells[-1][-1] += data


def read(path: Path) -> Page:
    return Page(path.read_text())


def require_self_contained(page: Page) -> None:
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image", "b"}
    for tag, attributes in page.elements:
        assert not {"src", "href", "style", "xlink:href"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes)
        assert not any("//" in (value or "") or "url(" in (value or "") for value in attributes.values())
    style = page.texts[page.texts.index(next(text for text in page.texts if ":root" in text))]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose name would be markup, with ADCs from its second epoch on."""
    folder = tmp_path_factory.mktemp("report") / NAME
    cimjax.train(config(epochs=3.0, ideal_share=0.34), workdir=folder, display=quiet())
    return folder


@pytest.fixture(scope="module")
def page(trained: Path) -> Page:
    report([trained], trained.parent / "one.html")
    return read(trained.parent / "one.html")


def test_a_page_needs_nothing_else_and_says_what_was_recorded(trained: Path, page: Page) -> None:
    require_self_contained(page)
    records = read_records(trained)
    test = [record for record in records if record["split"] == "test"][-1]
    head, row = next((page.cells[i], page.cells[i + 1]) for i, cells in enumerate(page.cells) if "accuracy" in cells)
    found = dict(zip(head, row, strict=True))
    assert found["run"] == NAME
    assert found["accuracy"] == f"{100 * test['accuracy']:.2f} %" and found["loss"] == f"{test['loss']:.4f}"
    assert found["epochs"] == "3" and found["seconds"] == f"{records[-1]['seconds']:,.1f}"
    health = [record for record in records if record["split"] == "health" and record["step"] == records[-1]["step"]]
    for record in health:
        (cells,) = [cells for cells in page.cells if cells[0] == record["layer"] and " of 8" in cells[2]]
        assert cells[1] == f"{100 * record['saturated']:.2f} %" and cells[2] == f"{record['codes_used']:.2f} of 8"
    assert health and ["spec.adc.bits", "3"] in page.cells
    assert {NAME, "ADCs on", "test accuracy, %", "epoch", "ADC step, units of a partial sum"} <= set(page.texts)


def test_every_drawing_is_named_and_has_numbers_at_its_axes(page: Page) -> None:
    drawings = [attributes for tag, attributes in page.elements if tag == "svg" and "role" in attributes]
    # Loss and accuracy; steps, offsets, ladders and weight codes of the one layer that has a step in each column.
    assert all(attributes["aria-label"] for attributes in drawings) and len(drawings) == 2 + 4
    paths = [attributes["d"] for tag, attributes in page.elements if tag == "path"]
    assert paths and not any("nan" in path or "inf" in path for path in paths if path)


def test_the_same_runs_give_the_same_file(trained: Path, page: Page, capsys: pytest.CaptureFixture[str]) -> None:
    again = trained.parent / "again.html"
    assert main(["report", str(trained), str(trained), "--save", str(again)]) == 0
    assert capsys.readouterr().out == f"{again}\n"
    assert again.read_bytes() == (trained.parent / "one.html").read_bytes()


def test_ladders_are_those_that_the_run_computes_with(trained: Path) -> None:
    (facts,) = gather([trained], say=lambda text: None)
    params = cimjax.load(trained).variables["params"]
    assert [state.layer for state in facts.states] == [row["layer"] for row in facts.layers.rows if "arrays" in row]
    for state in facts.states:
        stored = params
        for part in state.layer.split("/"):
            stored = stored[part]
        assert state.ladders is not None and state.ladders.offset is not None
        np.testing.assert_allclose(state.ladders.step, np.exp(stored["psum_log_step"]).ravel(), rtol=1e-6)
        # An offset is stored as the middle of its ladder.
        middles = state.ladders.offset + state.ladders.step * (state.ladders.q_min + state.ladders.q_max) / 2
        ratio = middles.reshape(stored["psum_offset"].shape) / np.asarray(stored["psum_offset"])
        np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :, :1], ratio.shape), rtol=1e-4)
        assert state.weight_counts.sum() == stored["kernel"].size
        assert {*state.weight_codes} <= {*range(-4, 4)} and state.ladders.codes == 8


def test_several_runs_stand_side_by_side_also_where_a_state_is_damaged(trained: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("seed=0", "seed=1", "layer")]
    for seed, folder in enumerate(folders):
        shutil.copytree(trained, folder)
        options = json.loads((folder / "config.json").read_text())
        options["seed"] = seed % 2
        if seed == 2:
            options["spec"] = None
        (folder / "config.json").write_text(json.dumps(options))
    for file in (folders[0] / "checkpoints").rglob("*"):
        if file.is_file():
            file.write_text("x")
    with pytest.warns(RunFolderWarning, match="from its records alone"):
        report(folders, tmp_path / "all.html")
    page = read(tmp_path / "all.html")
    require_self_contained(page)
    assert sum("could not be read" in text for text in page.texts) == 3  # options are not those of the state either
    rows = {cells[0]: cells for cells in page.cells if cells}
    assert rows["option"] == ["option", "value"] and ["spec.adc.bits", "3"] in page.cells
    differing = next(cells for cells in page.cells if "spec" in cells)
    place = page.cells.index(differing)
    assert differing == ["run", "seed", "spec"]
    assert page.cells[place + 1 : place + 4] == [
        ["seed=0", "0", "given"],
        ["seed=1", "1", "given"],
        ["layer", "0", "null"],
    ]


def test_seeds_are_gathered(tmp_path: Path) -> None:
    accuracies = {"a/seed=0": 0.5, "a/seed=1": 0.7, "b/seed=0": 0.9}
    folders = [run_folder(tmp_path / name, [0.1, accuracy], held_out=True) for name, accuracy in accuracies.items()]
    for folder, options in zip(folders, ({"seed": 0}, {"seed": 1}, {"seed": 0, "ema": 0.9}), strict=True):
        (folder / "config.json").write_text(json.dumps({**options, "data_dir": str(folder), "epochs": 3}))
    with pytest.warns(RunFolderWarning):
        facts = gather(folders, say=lambda text: None)
        report(folders, tmp_path / "x.html")
        report(folders, tmp_path / "x.md")
    assert [tuple(group) for group in grouped(facts)] == [("a", [0, 1]), ("b/seed=0", [2])]
    page = read(tmp_path / "x.html")
    assert ["a", "0, 1", "60.00 %", "50.00 %", "70.00 %", "0.0"] in page.cells
    assert ["b/seed=0", "90.00 %", "1.0000", "2 of 3"] in [cells[:4] for cells in page.cells]
    text = (tmp_path / "x.md").read_text()
    assert "| a | 0, 1 | 60.00 % | 50.00 % | 70.00 % | 0.0 |" in text and "| a/seed=1 | 10 | 70 |" in text
    assert "<" not in text.replace("\\<", "")


def test_markdown_has_the_tables_and_no_markup_of_names(trained: Path) -> None:
    file = trained.parent / "one.md"
    report([trained], file)
    text = file.read_text()
    assert text.startswith('# a \\<b\\>"run" \\& \\| more\n') and "<" not in text.replace("\\<", "")
    for before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if before.startswith("|") and line.startswith("|"):
            assert before.replace("\\|", "").count("|") == line.replace("\\|", "").count("|")


def test_what_cannot_be_reported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, empty = run_folder(tmp_path / "run", [0.5]), run_folder(tmp_path / "empty", [])
    (tmp_path / "folder.html").mkdir()
    for words, message in (
        (["nowhere"], "nowhere is no run folder"),
        ([str(tmp_path)], "is no run folder"),
        ([str(empty)], "empty has no finished epoch to report"),
        ([str(run), str(empty)], "empty has no finished epoch to report"),
        ([str(run), "--save", str(tmp_path / "x.pdf")], "give a name that ends in .html or .md"),
        ([str(run), "--save", str(tmp_path / "no" / "x.html")], "create it first"),
        ([str(run), "--save", str(tmp_path / "folder.html")], "is a folder"),
        ([], "the following arguments are required: RUN"),
    ):
        save = [] if "--save" in words else ["--save", str(tmp_path / "x.html")]
        assert main(["report", *words, *save]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "x.html").exists()
