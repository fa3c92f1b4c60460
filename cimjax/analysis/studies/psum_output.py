"""What a study of partial sums leaves: its table, its numbers as JSON, and a figure of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cimjax
from cimjax.analysis import figures
from cimjax.analysis.studies.output import create_folder, markdown, write_text
from cimjax.analysis.studies.psums import COLUMNS, QUANTILES, LayerPsums, PsumStudy
from cimjax.training.run.files import write_json

# Levels of a ladder that are drawn one by one, at most; of more only the ends.
_DRAWN_LEVELS = 32


def table(study: PsumStudy) -> str:
    """Ranges, saturation and unused codes of each layer, as Markdown."""
    rows = [["columns", "psums", "saturated", "worst", "unused", "worst", "layer"]]
    for layer in study.layers:
        columns = int(np.prod(layer.lowest.shape[1:]))
        span = f"{_short(layer.lowest.min())} to {_short(layer.highest.max())}"
        use = ["-"] * 4
        if layer.step is not None:
            codes = "/".join(str(count) for count in sorted(set(layer.codes)))
            saturated, unused = layer.saturated, layer.unused
            use = [f"{saturated.mean():.2%}", f"{saturated.max():.1%}", f"{unused.mean():.2f} of {codes}"]
            use.append(str(unused.max()))
        rows.append([f"{columns:,}", span, *use, layer.name])
    head = (
        f"Partial sums on {study.images} calibration images. Saturated: conversions whose\n"
        "partial sum lies more than half a step beyond the ladder; unused: codes that a\n"
        "column never gives. Mean of all columns, and the worst column."
    )
    return f"{head}\n\n{markdown(rows[0], rows[1:])}"


def _short(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def as_dict(study: PsumStudy) -> dict[str, Any]:
    """Everything that was found, as JSON takes it: lists of columns are nested [slice][group][plane][output]."""
    fields = {"cimjax": cimjax.__version__, "run": str(study.run), "images": study.images}
    return {**fields, "layers": [_layer_as_dict(layer) for layer in study.layers]}


def _layer_as_dict(layer: LayerPsums) -> dict[str, Any]:
    slices, groups, _, outputs = layer.lowest.shape
    ranges = {"lowest": layer.lowest, "highest": layer.highest}
    for part, values in zip(QUANTILES, np.quantile(layer.sample, QUANTILES, axis=1), strict=True):
        ranges[f"{part:.0%}"] = values
    found = {
        "layer": layer.name,
        "slices": [part.significance for part in layer.spec.activation.slices],
        "planes": [plane.significance for plane in layer.spec.weight.planes],
        "read_groups": groups,
        "outputs": outputs,
        "conversions_per_column": slices * layer.positions,
        "sampled_per_column": slices * layer.sample.shape[1],
        "psums": {name: _plain(values) for name, values in ranges.items()},
    }
    if layer.step is None:
        return {**found, "adc": None}
    saturated, unused = layer.saturated, layer.unused
    return {
        **found,
        "adc": {
            "codes": [int(count) for count in layer.codes],
            "saturated": {"mean": float(saturated.mean()), "worst": float(saturated.max())},
            "unused_codes": {"mean": float(unused.mean()), "worst": int(unused.max())},
            "of_columns": {
                "step": _plain(layer.step),
                "level_of_code_0": _plain(layer.offset),
                "saturated": _plain(saturated),
                "unused_codes": unused.tolist(),
            },
        },
    }


def _plain(values: Any) -> Any:
    """Nested lists of numbers of six digits, which are as many as float32 has."""
    return np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])(values).tolist()


def save_psums(study: PsumStudy, folder: str | Path) -> list[Path]:
    """Write `psums.md`, `psums.json` and for each layer `psums-NAME.svg` and `.png`, which are replaced.

    Raises:
      ValueError: in one line, where the folder cannot be written or matplotlib is missing.
    """
    figures.require_matplotlib()
    folder = create_folder(folder)
    files = [write_text(folder / "psums.md", table(study)), folder / "psums.json"]
    write_json(folder / "psums.json", as_dict(study))
    for layer in study.layers:
        files += figures.save(draw(layer, study.columns), folder, f"psums-{layer.name.replace('/', '-')}")
    return files


def draw(layer: LayerPsums, columns: int = COLUMNS) -> Any:
    """A layer's columns of one slice, read group and plane: their ranges, and the distributions of some of them.

    The slice and the plane that count most are shown, of the first read group: there an error costs most.

    Args:
      columns: whose distributions are drawn, spread evenly from the narrowest range to the widest; at least 1.
    """
    slices, planes = layer.spec.activation.slices, layer.spec.weight.planes
    t = int(np.argmax([abs(part.significance) for part in slices]))
    k = int(np.argmax([abs(plane.significance) for plane in planes]))
    order = np.argsort((layer.highest - layer.lowest)[t, 0, k], kind="stable")
    shown_columns = np.unique(np.linspace(0, len(order) - 1, min(columns, len(order))).round().astype(int))
    figure, (first, *others) = figures.panels(1, 1 + len(shown_columns))
    figure.set_size_inches(6.0, 3.4 + 1.3 * len(shown_columns))
    first.get_subplotspec().get_gridspec().set_height_ratios([2.6, *[1.0] * len(others)])
    _draw_ranges(first, layer, (t, 0, k), order)
    where = [f"plane {k + 1} of {len(planes)}", f"read group 1 of {layer.lowest.shape[1]}"]
    where += [f"slice {t + 1} of {len(slices)}"] * (len(slices) > 1)
    first.set_title(f"{layer.name}: {', '.join(where)}", fontsize=10)
    _draw_distributions(others, layer, (t, 0, k), [(int(rank), int(order[rank])) for rank in shown_columns])
    legend = figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    for handle in legend.legend_handles:
        if hasattr(handle, "set_markersize"):
            handle.set_markersize(5)
    return figure


def _draw_ranges(axes: Any, layer: LayerPsums, place: tuple[int, int, int], order: np.ndarray) -> None:
    """A bar for each column: all of its psums, 98 % of them, and their median; and the ends of its ladder."""
    t, r, k = place
    low, middle, high = np.quantile(layer.sample[t, :, r, k], QUANTILES, axis=0)[:, order]
    rank = np.arange(1, len(order) + 1)
    lowest, highest = layer.lowest[t, r, k, order], layer.highest[t, r, k, order]
    # Of many columns, marks so small that they do not run into each other.
    size = float(np.clip(130 / len(order), 1.2, 4.5))
    width = 0.9 if len(order) <= 64 else 1.0
    axes.bar(rank, highest - lowest, width, lowest, color="0.87", label="all partial sums")
    axes.bar(rank, high - low, width, low, color="0.7", label="1 % to 99 %")
    axes.plot(rank, middle, "_", color="black", markersize=size, markeredgewidth=min(1.5, size / 2), label="median")
    if layer.step is not None:
        levels = np.asarray([layer.levels(t, r, k, int(o))[[0, -1]] for o in order])
        for end, style, name in ((0, "v", "lowest level"), (1, "^", "highest level")):
            look = {"color": figures.COLOURS[end], "markersize": size, "linestyle": "none"}
            axes.plot(rank, levels[:, end], style, label=name, **look)
    axes.set_xlabel("column, by range")
    axes.set_ylabel("partial sum")
    axes.set_xlim(0.4, len(order) + 0.6)
    if len(order) < 6:
        axes.set_xticks(rank)
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)


def _draw_distributions(
    panels: Sequence[Any], layer: LayerPsums, place: tuple[int, int, int], columns: Sequence[tuple[int, int]]
) -> None:
    """A histogram for each column, one below the other on one axis of psums, with the levels of its ladder."""
    t, r, k = place
    values = layer.sample[t, :, r, k]
    ladders = [layer.levels(t, r, k, o) for _, o in columns]
    edges = _edges(np.concatenate([values[:, o] for _, o in columns]))
    ends = np.concatenate([edges, *(levels[[0, -1]] for levels in ladders if len(levels))])
    margin = 0.03 * np.ptp(ends)
    for axes, (rank, o), levels in zip(panels, columns, ladders, strict=True):
        share = 100 * np.histogram(values[:, o], edges)[0] / len(values)
        axes.stairs(share, edges, fill=True, color="0.75")
        each = len(levels) <= _DRAWN_LEVELS
        name = "level of the ADC" if each else "ends of the ADC"
        for number, level in enumerate(levels if each else levels[[0, -1]]):
            label = name if axes is panels[0] and not number else None
            axes.axvline(level, color="black", linewidth=1, linestyle="--", label=label)
        axes.set_xlim(ends.min() - margin, ends.max() + margin)
        axes.set_ylim(0, 1.15 * share.max())
        axes.set_ylabel("share, %")
        axes.set_title(f"column {rank + 1}", fontsize=10, loc="right", pad=2)
        axes.tick_params(labelbottom=axes is panels[-1])
    panels[-1].set_xlabel("partial sum")


def _edges(values: np.ndarray) -> np.ndarray:
    """Edges of a histogram's bins: around integers, several of them where there are many."""
    low, high = np.floor(values.min()), np.ceil(values.max())
    width = max(1.0, np.ceil((high - low + 1) / 64))
    return np.arange(low - 0.5, high + width + 0.5, width)
