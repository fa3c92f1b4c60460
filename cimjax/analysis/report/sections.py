"""What is told of runs, in order: sections of tables and drawings, in words that HTML and Markdown have in common."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cimjax.analysis.report import drawing
from cimjax.analysis.report.gather import ArrayState, Facts, Group
from cimjax.hardware.table import TextTable
from cimjax.spec.base import is_number

# Epochs that a table of curves shows at most.
_EPOCHS_SHOWN = 8
# Curves over epochs: split, field, and what they are called.
_CURVES = (
    ("train", "loss", "training loss, nats"),
    ("test", "accuracy", "test accuracy, %"),
    ("test", "average_accuracy", "test accuracy of averaged parameters, %"),
    ("validation", "accuracy", "accuracy on held-out images, %"),
)


class Table(NamedTuple):
    """Rows of text under a head; `groups` gives the group that a row is of, if it is of one, and `total` a last row."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[int] = ()
    total: Sequence[str] = ()


class Figure(NamedTuple):
    """A drawing, as SVG, and what Markdown has in its place, if anything."""

    svg: str
    table: Table | None = None


class Section(NamedTuple):
    """A part of the report. notes: each a paragraph. folded: whether a page shows its title only, until it is asked."""

    title: str
    notes: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    parts: Sequence[Section] = ()
    folded: bool = False


def sections_of(facts: Sequence[Facts], groups: Sequence[Group]) -> list[Section]:
    """All sections that say something of these runs."""
    group_of = {index: number for number, group in enumerate(groups) for index in group.members}
    marks = [group_of[index] for index in range(len(facts))] if len(facts) > 1 else []
    sections = [
        _results(facts, groups, marks),
        _differences(facts, marks),
        _curves(facts, marks),
        _layers(facts),
        _adcs(facts),
        _options(facts),
        _starts(facts),
    ]
    return [section for section in sections if section.tables or section.figures or section.parts]


def _results(facts: Sequence[Facts], groups: Sequence[Group], marks: Sequence[int]) -> Section:
    rows = [{"run": one.run.label, **_result(one)} for one in facts]
    tables = [_table(rows, marks)]
    several = [number for number, group in enumerate(groups) if len(group.members) > 1]
    if several:
        seeds = [_over_seeds(groups[number], [facts[index] for index in groups[number].members]) for number in several]
        tables.insert(0, _table(seeds, several))
    notes = ["Of the last epoch, on the test images; accuracy and time are those that the run recorded."]
    notes += ["Mean and range are over runs that differ in their seeds alone."] if several else []
    unread = "could not be read, and its layers, ladders and weights are not shown"
    notes += [f"The state of {one.run.label} {unread}: {one.trouble}" for one in facts if one.trouble]
    return Section("Results", notes, tables)


def _result(one: Facts) -> dict[str, str]:
    test, train = ((one.run.records[split] or [{}])[-1] for split in ("test", "train"))
    done, planned, result = test.get("epoch", 0), one.config.get("epochs"), one.result
    fresh = _percent(result.get("fresh_chips"))
    if "fresh_chips_spread" in result:
        fresh = f"{100 * result['fresh_chips']:.2f} ± {_percent(result['fresh_chips_spread'])}"
    return {
        "accuracy": _percent(accuracy_of(one)),
        "loss": _number(test.get("loss"), ".4f"),
        "averaged": _percent({**test, **result}.get("average_accuracy")),
        "best held out": _percent(result.get("best_accuracy")),
        "fresh chips": fresh,
        "epochs": f"{done:g}" if result or not is_number(planned) else f"{done:g} of {planned:g}",
        "seconds": _number(one.seconds, ",.1f"),
        "images/s": _number(train.get("images_per_second"), ",.0f"),
    }


def accuracy_of(one: Facts) -> float | None:
    """The test accuracy of the last epoch, or of the end of a run without any, 0 to 1."""
    return (one.run.records["test"] or [one.result])[-1].get("accuracy")


def _over_seeds(group: Group, members: Sequence[Facts]) -> dict[str, str]:
    accuracies = [accuracy for accuracy in map(accuracy_of, members) if accuracy is not None]
    measures: dict[str, Callable[[Any], float]] = {"mean accuracy": statistics.fmean, "lowest": min, "highest": max}
    return {
        "configuration": group.name,
        "seeds": ", ".join(_value(one.config.get("seed")) for one in members),
        **{name: _percent(measure(accuracies) if accuracies else None) for name, measure in measures.items()},
        "median seconds": _number(statistics.median(one.seconds for one in members), ",.1f"),
    }


def _differences(facts: Sequence[Facts], marks: Sequence[int]) -> Section:
    names = _differing(facts)
    rows = [{"run": one.run.label, **{name: _option(one, name) for name in names}} for one in facts]
    return Section("What differs", tables=[_table(rows, marks)] if names else [])


def _differing(facts: Sequence[Facts]) -> list[str]:
    names = dict.fromkeys(name for one in facts for name in one.config)
    return [name for name in names if len({_option(one, name) for one in facts} - {"-"}) > 1]


def _option(one: Facts, name: str) -> str:
    """An option of a run; "-" where it has none because a whole group of them, such as `spec`, is not given."""
    if name in one.config:
        return _value(one.config[name])
    parts = name.split(".")
    if any(".".join(parts[:count]) in one.config for count in range(1, len(parts))):
        return "-"
    return "given" if any(other.startswith(f"{name}.") for other in one.config) else "absent"


def _options(facts: Sequence[Facts]) -> Section:
    names = dict.fromkeys(name for one in facts for name in one.config)
    common = [name for name in names if name not in _differing(facts)]
    rows = [[name, next(_value(one.config[name]) for one in facts if name in one.config)] for name in common]
    title = "All options" if len(facts) == 1 else "Options that all runs have in common"
    return Section(title, tables=[Table(["option", "value"], rows)] if rows else [], folded=True)


def _starts(facts: Sequence[Facts]) -> Section:
    def row(label: str, start: Mapping[str, Any]) -> list[str]:
        versions, git = start.get("versions") or {}, start.get("git") or {}
        commit = f"{git['commit'][:12]}{', changed' if git.get('dirty') else ''}" if git.get("commit") else "-"
        names = ", ".join(f"{name} {version}" for name, version in versions.items())
        return [label, str(start.get("time", "-")), names or "-", commit, str(start.get("command", "-"))]

    rows = [row(one.run.label, start) for one in facts for start in one.starts]
    head = ["run", "started", "versions", "commit", "command"]
    return Section("How they were made", tables=[Table(head, rows)] if rows else [], folded=True)


def _curves(facts: Sequence[Facts], marks: Sequence[int]) -> Section:
    switches, figures = sorted({one.run.ideal_epochs for one in facts} - {0}), []
    for split, field, title in _CURVES:
        scale = 100 if field.endswith("accuracy") else 1
        points = [
            [(record["epoch"], scale * record[field]) for record in records if record.get(field) is not None]
            for records in (one.run.records[split] for one in facts)
        ]
        if any(points):
            labels = [one.run.label for one in facts]
            curves = list(map(drawing.Curve, labels, marks or [0], points))
            svg = drawing.curves(curves, switches, title, to_zero=field == "loss")
            figures.append(Figure(svg, _at_some_epochs(title, labels, points)))
    ideal = "; up to the dotted line ADCs were ideal" if switches else ""
    return Section("Curves", [f"After every epoch{ideal}."], figures=figures)


def _at_some_epochs(title: str, labels: Sequence[str], curves: Sequence[Sequence[tuple[float, float]]]) -> Table:
    epochs = sorted({epoch for curve in curves for epoch, _ in curve})
    chosen = [epochs[round(place)] for place in np.linspace(0, len(epochs) - 1, min(len(epochs), _EPOCHS_SHOWN))]
    cells = [[_number(dict(curve).get(epoch), ".4g") for epoch in chosen] for curve in curves]
    head = [f"{title}, after epoch", *(f"{epoch:g}" for epoch in chosen)]
    return Table(head, [[label, *row] for label, row in zip(labels, cells, strict=True)])


def _layers(facts: Sequence[Facts]) -> Section:
    """The table of layers, once for all runs that have the same."""
    owners: dict[str, tuple[TextTable, list[str]]] = {}
    for one in facts:
        if one.layers.rows:
            owners.setdefault(str(one.layers), (one.layers, []))[1].append(one.run.label)
    parts: list[Section] = []
    legends: dict[str, str] = {}
    for layers, labels in owners.values():
        columns = {column.header.replace("\n", " "): column for column in layers.columns}
        cells = [{name: row.get(column.header, "-") for name, column in columns.items()} for row in layers.rows]
        table = _table(cells, [])
        total = [layers.totals.get(columns[name].header, "") for name in table.head]
        legends |= {name: columns[name].legend for name in table.head if columns[name].legend}
        parts.append(Section(", ".join(labels), (), [table._replace(total=total)], folded=bool(parts)))
    note = "; ".join(f"{name}: {legend}" for name, legend in legends.items())
    return _unfolded(Section("What the layers take on the chip", [f"{note}."] if note else [], parts=parts))


def _adcs(facts: Sequence[Facts]) -> Section:
    parts = [_adcs_of(one, folded=index > 0) for index, one in enumerate(facts)]
    notes = [
        "A ladder is the partial sums at which an ADC has its codes; their unit is an activation code of 1 through a "
        "digit of 1. Saturated are conversions beyond the outer codes by more than half a step. Steps and offsets are "
        "given at 10, 50 and 90 % of those that a layer has, from the smallest on."
    ]
    shown = [part for part in parts if part.tables]
    return _unfolded(Section("ADCs, ladders and weight codes", notes, parts=shown))


def _unfolded(section: Section) -> Section:
    """With a single part, that part's content as its own."""
    if len(section.parts) != 1:
        return section
    (part,) = section.parts
    return part._replace(title=section.title, notes=[*section.notes, *part.notes], folded=False)


def _adcs_of(one: Facts, *, folded: bool) -> Section:
    states = {state.layer: state for state in one.states}
    layers = dict.fromkeys([*states, *one.health])
    rows = [_adc_row(layer, states.get(layer), one.health.get(layer, {})) for layer in layers]
    said = [f"the state after {one.step:,} steps"] if states else []
    said += [f"saturation and codes used as measured after {one.health_step:,}"] if one.health else []
    parts = [Section(state.layer, figures=list(_figures(state))) for state in one.states]
    notes = [f"Of {', '.join(said)}."] if said else []
    return Section(one.run.label, notes, [_table(rows, ())] if rows else [], parts=parts, folded=folded)


def _adc_row(layer: str, state: ArrayState | None, health: Mapping[str, float]) -> dict[str, str]:
    row, used = (
        {"layer": layer, "saturated": _percent(health.get("saturated"))},
        _number(health.get("codes_used"), ".2f"),
    )
    if state is None or state.ladders is None:
        return {**row, "codes used": used}
    ladders = state.ladders
    row |= {"codes used": f"{used} of {ladders.codes}", "steps": f"{ladders.step.size:,}", "one per": ladders.shared_by}
    for name, values in {"step": ladders.step, "offset": ladders.offset}.items():
        for part in (10, 50, 90):
            quantile = None if values is None else float(np.quantile(values, part / 100))
            row[f"{name} at {part} %"] = _number(quantile, ".2f")
    return row


def _figures(state: ArrayState) -> Iterator[Figure]:
    ladders, unit = state.ladders, "units of a partial sum"
    if ladders is not None:
        if ladders.step.size > 1:
            yield Figure(drawing.histogram(ladders.step, f"{ladders.shared_by}s", f"ADC step, {unit}"))
            if ladders.offset is not None:
                yield Figure(drawing.histogram(ladders.offset, f"{ladders.shared_by}s", f"offset (code 0), {unit}"))
        yield Figure(drawing.ladders(ladders, "partial sum at each code"))
    shares = 100 * state.weight_counts / state.weight_counts.sum()
    yield Figure(drawing.bars(state.weight_codes, shares, "weights, %", "weight code"))


def _table(rows: Sequence[Mapping[str, str]], groups: Sequence[int]) -> Table:
    """Rows under the names that they have, without columns in which nothing stands."""
    names = dict.fromkeys(name for row in rows for name in row)
    said = [name for name in names if any(row.get(name, "-") != "-" for row in rows)]
    return Table(said, [[row.get(name, "-") for name in said] for row in rows], groups)


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
