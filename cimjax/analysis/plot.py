"""Curves of training runs over their epochs, drawn from the records in their folders; jax is not imported here.

`check_figure` is what every command calls that ends in a figure, before it does anything else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cimjax.analysis.figures import COLOURS, DPI, HEIGHT, MARKERS, WIDTH, plain, require_matplotlib
from cimjax.spec.base import nearest, shown
from cimjax.training.run.folder import read_config, read_records

# Splits that have a record for every epoch.
_SPLITS = ("train", "test", "validation")


class Run(NamedTuple):
    """What is drawn of a run: its folder and label, its records by split, and the epoch after which its ADCs were
    switched on; 0 where they were on all the time, or are still off."""

    folder: Path
    label: str
    records: Mapping[str, Sequence[Mapping[str, Any]]]
    ideal_epochs: float


def check_figure(path: str | Path) -> None:
    """Refuse a figure that could not be written.

    Raises:
      ValueError: in one line: for a name that ends in neither .png nor .svg, as `check_writable` does, and where
        matplotlib is not installed.
    """
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"a plot is a PNG or SVG file, not {shown(str(path))}; give a name that ends in .png or .svg.")
    check_writable(path)
    require_matplotlib()


def check_writable(path: str | Path) -> None:
    """Refuse a file that cannot be written, before the work is done whose result it is to hold.

    Raises:
      ValueError: in one line.
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file} is a folder; give the name of a file.")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {file.absolute().parent} to write {file.name} in; create it first.")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise ValueError(f"{file} cannot be written; give another file.")


def plot(runs: Sequence[str | Path], path: str | Path, *, over: Sequence[str] = ("loss", "accuracy")) -> None:
    """Draw curves of runs over epochs into a PNG or SVG file.

    Args:
      runs: run folders; also of runs that still go on.
      path: the file, which is replaced.
      over: what is drawn, each in a panel: `loss` (of training), `accuracy` (on the test images, and dashed on those
        held out), or any number recorded in every epoch, as `learning_rate` or, of one split, `test.loss`.

    Raises:
      ValueError: in one line: as `check_figure` does, where a folder holds no run or no finished epoch, and for a
        name of `over` that no run has recorded.
    """
    check_figure(path)
    found = read_runs(runs)
    for run in found:
        if not run.records["test"]:
            raise ValueError(f"{run.folder} has no finished epoch to draw; wait for its first one, or leave it out.")
    curves = {name: _curves_of(name, found) for name in dict.fromkeys(over)}
    if not curves:
        raise ValueError("nothing is to be drawn; give --over, as in --over loss,accuracy.")
    _draw(found, curves).savefig(path, dpi=DPI)


def read_runs(runs: Sequence[str | Path]) -> list[Run]:
    """The runs, each once.

    Raises:
      ValueError: in one line, where a folder holds no run, or its records cannot be read.
    """
    folders = list({Path(run).absolute().resolve(): Path(run) for run in runs}.values())
    labels = labels_of([folder.absolute() for folder in folders])
    found = []
    for folder, label in zip(folders, labels, strict=True):
        read_config(folder)
        records = read_records(folder)
        by_split = {
            split: [one for one in records if one.get("split") == split and "epoch" in one] for split in _SPLITS
        }
        ideal = [record["epoch"] for record in by_split["test"] if record.get("ideal_adcs")]
        # A run that has not come to its ADCs yet has no switch.
        switched = len(ideal) < len(by_split["test"])
        found.append(Run(folder, label, by_split, max(ideal, default=0) if switched else 0))
    return found


def labels_of(folders: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many as tell them apart; without their middle where they are too long."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        labels = [str(Path(*folder.parts[-count:])) for folder in folders]
        if len(set(labels)) == len(labels):
            break
    return [label if len(label) <= 100 else f"{label[:48]}...{label[-48:]}" for label in labels]


def _curves_of(name: str, runs: Sequence[Run]) -> list[tuple[str, str]]:
    """The splits and fields that a name of `over` stands for."""
    there = {
        (split, field): None
        for run in runs
        for split in _SPLITS
        for record in run.records[split]
        for field, value in record.items()
        if isinstance(value, int | float | None) and field not in ("step", "epoch", "best", "ideal_adcs")
    }
    if name == "accuracy":
        return [("test", name), ("validation", name)]
    split, _, field = name.rpartition(".")
    first = next(((one, field) for one in ([split] if split else _SPLITS) if (one, field) in there), None)
    if first is None:
        fields = {field: None for _, field in there}
        hint = nearest(name, fields)
        raise ValueError(f"no run has recorded {shown(name)} in its epochs{hint}; a split may go before it: test.loss.")
    return [first]


def _draw(runs: Sequence[Run], curves: Mapping[str, Sequence[tuple[str, str]]]) -> Any:
    from matplotlib.figure import Figure

    columns = 2 if len(curves) > 1 else 1
    rows, width = -(-len(curves) // columns), max(len(run.label) for run in runs)
    # Columns of the legend that fit, at about ten letters to an inch.
    across = max(1, min(len(runs), int(10 * WIDTH) // (width + 10)))
    figure = Figure(figsize=(WIDTH, HEIGHT * rows + 0.22 * -(-len(runs) // across)), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (name, lines) in zip(panels, curves.items(), strict=False):
        _panel(axes, name, lines, runs)
    for axes in panels[len(curves) :]:
        axes.remove()
    entries = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=across, frameon=False, fontsize=9)
    return figure


def _panel(axes: Any, name: str, lines: Sequence[tuple[str, str]], runs: Sequence[Run]) -> None:
    percent, dashed = name.endswith("accuracy"), False
    for index, run in enumerate(runs):
        for (split, field), style in zip(lines, ("-", "--"), strict=False):
            records = run.records[split]
            values = [_number(record.get(field)) for record in records]
            if not records or all(map(math.isnan, values)):
                continue
            dashed |= style == "--"
            every = max(1, len(records) // 8)
            axes.plot(
                [record["epoch"] for record in records],
                [100 * value for value in values] if percent else values,
                style,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)] if style == "-" else None,
                markevery=(index % every, every),  # not on those of others
                markersize=4,
                linewidth=1.5 if style == "-" else 1,
                label=run.label if style == "-" else None,
            )
    _switches(axes, runs, at_bottom=percent)
    split, field = lines[0]
    what = f"{split} {field.replace('_', ' ')}" if field in ("loss", "accuracy") else field.replace("_", " ")
    axes.set_title(f"{what}{' (dashed: held out)' if dashed else ''}{', percent' if percent else ''}", fontsize=10)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    plain(axes)


def _switches(axes: Any, runs: Sequence[Run], *, at_bottom: bool) -> None:
    """A line at every epoch after which ADCs were switched on, with its words where curves have left room by then."""
    for index, epochs in enumerate(sorted({run.ideal_epochs for run in runs} - {0})):
        own = [number for number, run in enumerate(runs) if run.ideal_epochs == epochs]
        colour = COLOURS[own[0] % len(COLOURS)] if len(own) == 1 < len(runs) else "0.35"
        height = 0.02 + 0.07 * (index % 3)
        y, side = (height, "bottom") if at_bottom else (1 - height, "top")
        axes.axvline(epochs, color=colour, linestyle=":", linewidth=1.2)
        where = axes.get_xaxis_transform()
        axes.text(epochs, y, " ADCs on", color=colour, fontsize=9, va=side, transform=where)


def _number(value: Any) -> float:
    """A recorded number; NaN where there is none, or was none that JSON can hold."""
    return math.nan if value is None else float(value)
