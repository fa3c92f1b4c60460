"""What accuracy costs: encodings of weights and bits of ADCs, over conversions and over the energy of ADCs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from cimjax.analysis import figures
from cimjax.analysis.studies.drawing import accuracy_axis, draw, level
from cimjax.analysis.studies.granularity import FULL
from cimjax.analysis.studies.output import markdown
from cimjax.analysis.studies.runs import (
    Case,
    Outcome,
    Runs,
    Study,
    accuracy_cells,
    costs_of,
    data_of,
    finished,
    pareto,
    train_cases,
)
from cimjax.spec.base import nearest

# Encodings by a name of the study, as options.
ENCODINGS = {
    "twos_complement": "encoding=twos_complement",
    "differential": "encoding=differential",
    "differential_analog": "encoding=differential,subtract=analog",
    "offset": "encoding=offset",
    "offset_adc": "encoding=offset,reference=adc",
    "learned_scales": "encoding=learned_scales,cell_bits=1",
}
# What accuracy is set against.
COSTS = {"conversions": "ADC conversions per image", "energy": "ADC energy per image, conversions x codes"}


def cases(encodings: Sequence[str], bits: Sequence[str], pairs: Sequence[str]) -> list[Case]:
    """Full precision, ideal ADCs in the first encoding and pair, and every combination.

    Raises:
      ValueError: for an unknown encoding or pair of granularities.
    """
    for name in encodings:
        if name not in ENCODINGS:
            raise ValueError(f"--encodings names {name!r}{nearest(name, ENCODINGS)}.")
    for pair in pairs:
        if pair.count("/") != 1:
            raise ValueError(f"--pairs names {pair!r}; give granularities of weights and psums, as in column/column.")
    found = [Case(FULL, "weight=none")]
    found += [Case("ideal ADC", f"weight={pairs[0].split('/')[0]},psum=none,{ENCODINGS[encodings[0]]}")]
    for encoding, pair, one in itertools.product(encodings, pairs, bits):
        weight, psum = pair.split("/")
        where = "" if len(pairs) == 1 else f" {pair}"
        options = f"weight={weight},psum={psum},{ENCODINGS[encoding]},adc_bits={one}"
        found.append(Case(f"{encoding}{where} P{one}", options))
    return found


def study_encodings(
    runs: Runs,
    *,
    encodings: Sequence[str] = ("twos_complement", "differential", "differential_analog"),
    bits: Sequence[str] = ("2", "3", "4"),
    pairs: Sequence[str] = ("column/column",),
) -> Study:
    """Train every combination over seeds, and name those that no other beats: the Pareto front.

    Args:
      runs: their folder also gets the table (`encodings.md`, `.json`) and the figure.
      encodings: names of `ENCODINGS`.
      bits: of the ADC, as the option `adc_bits` takes them.
      pairs: granularities of weights and partial sums, "column/column".

    Raises:
      ValueError, Stopped: as `study_granularity` does.
    """
    figures.require_matplotlib()
    planned = cases(encodings, bits, pairs)
    outcomes = train_cases(runs, planned)
    costs = {outcome.case.name: costs_of(runs, outcome.case) for outcome in outcomes}
    done = {one.case.name: one.mean for one in outcomes[2:] if one.accuracies}
    fronts = {cost: pareto({name: (costs[name][cost], mean) for name, mean in done.items()}) for cost in COSTS}
    head = ["encoding and ADC", "accuracy %", "lowest", "highest", "runs", *COSTS, "best for"]
    rows = []
    for one in outcomes:
        name = one.case.name
        counts = [f"{costs[name][cost]:,.0f}" if costs[name]["conversions"] else "-" for cost in COSTS]
        best = ", ".join(cost for cost, front in fronts.items() if name in front)
        rows.append([name, *accuracy_cells(one, len(runs.seeds)), *counts, best])
    legend = (
        "best for: no other is as accurate at as few conversions, or at as little energy (Pareto front);\n"
        "energy: a conversion counts as the codes of its ADC, 2^bits"
    )
    text = f"{markdown(head, rows)}\n\n{legend}"
    data = [data_of(one, **costs[one.case.name]) for one in outcomes]
    return finished(runs, "encodings", text, data, outcomes, encodings=_figure(outcomes, costs, fronts))


def _figure(outcomes: Sequence[Outcome], costs: dict[str, dict[str, float]], fronts: dict[str, list[str]]) -> Any:
    figure, panels = figures.panels(2)
    of = {one.case.name: one for one in outcomes}
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes[2:]:
        groups.setdefault(one.case.name.rpartition(" ")[0], []).append(one)
    for axes, (cost, title) in zip(panels, COSTS.items(), strict=True):
        front = [(costs[name][cost], 100 * of[name].mean) for name in fronts[cost]]
        if front:
            axes.plot(*zip(*front, strict=True), color="0.85", linewidth=7, zorder=1, label="Pareto front")
        for index, (group, own) in enumerate(groups.items()):
            # Points of equal cost stand side by side.
            where = [costs[one.case.name][cost] * 1.03 ** (index - (len(groups) - 1) / 2) for one in own]
            draw(axes, where, own, index, label=group.replace("_", " "), zorder=2)
            for x, one in zip(where, own, strict=True):
                if one.accuracies:
                    label = one.case.name.rpartition(" ")[2]
                    axes.annotate(label, (x, 100 * one.mean), (5, -10), textcoords="offset points", fontsize=8)
        level(axes, of["ideal ADC"], linestyle="--")
        level(axes, of[FULL])
        figures.logarithmic(axes)
        axes.set_xlabel(f"{title}\n(dashed: ideal ADC; dotted: full precision)", fontsize=9)
    accuracy_axis(panels[0])
    return figure
