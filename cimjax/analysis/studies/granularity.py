"""What shares a step: every granularity pair, no partial-sum quantization, full precision and the named schemes.

The paper's section IV-B and IV-C: accuracy (Fig. 7), and accuracy over dequantization overhead (Fig. 8).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from cimjax.analysis import figures
from cimjax.analysis.studies.drawing import accuracy_axis, draw, level
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
    train_cases,
)
from cimjax.spec import Granularity
from cimjax.training.config.options import SCHEMES

GRANULARITIES = tuple(str(one) for one in Granularity)
FULL = "full precision"
# Schemes that are one and the same here, under the name of the first.
_SAME = {"bai2024": "bai2023"}


def cases() -> list[Case]:
    """Full precision, 3 weight granularities with ideal ADCs, 9 pairs, and the schemes of the paper's Table I."""
    found = [Case(FULL, "weight=none")]
    found += [Case(f"{weight}/ideal", f"weight={weight},psum=none") for weight in GRANULARITIES]
    pairs = itertools.product(GRANULARITIES, GRANULARITIES)
    found += [Case(f"{weight}/{psum}", f"weight={weight},psum={psum}") for weight, psum in pairs]
    for scheme, meant in SCHEMES.items():
        if scheme not in _SAME:
            start = FULL if meant["training"] == "post_training" else None
            found.append(Case(f"scheme {scheme}", f"scheme={scheme}", start))
    return found


def study_granularity(
    runs: Runs,
) -> Study:
    """Train every granularity pair and scheme over seeds; what is finished is kept, and starts are shared.

    Args:
      runs: their config has options for all, as the ADC's bits; their folder also gets the table (`granularity.md`,
        `.json`) and the figures.

    Raises:
      ValueError: before any run starts: for a case that cannot be trained, or where no figure can be drawn.
      Stopped: as `sweep` does.
    """
    figures.require_matplotlib()
    outcomes = train_cases(runs, cases())
    costs = {outcome.case.name: costs_of(runs, outcome.case) for outcome in outcomes}
    head = ["weight/psum", "accuracy %", "lowest", "highest", "runs", "multiplies per pixel", "paper's count"]
    rows = [
        [outcome.case.name, *accuracy_cells(outcome, len(runs.seeds)), *_counts(costs, outcome)] for outcome in outcomes
    ]
    table = markdown(head, rows)
    same = [
        f"{one} is {other} here: they differ in what the paper's Table I leaves out." for one, other in _SAME.items()
    ]
    text = "\n".join([table, "", *same])
    data = [data_of(one, **costs[one.case.name]) for one in outcomes]
    drawn = {"granularity": _accuracies(outcomes), "overhead": _overhead(outcomes, costs)}
    return finished(runs, "granularity", text, data, outcomes, **drawn)


def _counts(costs: dict[str, dict[str, float]], outcome: Outcome) -> list[str]:
    found = costs[outcome.case.name]
    return [f"{found[name]:,.0f}" if found["conversions"] else "-" for name in ("multiplies", "multiplies_of_paper")]


def _accuracies(outcomes: Sequence[Outcome]) -> Any:
    """The form of Fig. 7: accuracy over the granularity of psums, a line for each granularity of weights."""
    of = {outcome.case.name: outcome for outcome in outcomes}
    figure, (pairs, schemes) = figures.panels(2)
    for index, weight in enumerate(GRANULARITIES):
        own = [of[f"{weight}/{psum}"] for psum in GRANULARITIES]
        draw(pairs, [number + 0.06 * (index - 1) for number in range(3)], own, index, label=f"{weight} weights")
        level(pairs, of[f"{weight}/ideal"], color=figures.COLOURS[index], linestyle="--", linewidth=1)
    level(pairs, of[FULL])
    pairs.set_xticks(range(3), GRANULARITIES)
    pairs.set_xlabel("granularity of partial sums\n(dashed: not quantized; dotted: full precision)", fontsize=9)
    accuracy_axis(pairs)
    named = [outcome for outcome in outcomes if outcome.case.name.startswith("scheme ")]
    for number, outcome in enumerate(named):
        draw(schemes, [number], [outcome], number, linestyle="none")
    level(schemes, of[FULL])
    names = [outcome.case.name.removeprefix("scheme ").replace("20", "\n20") for outcome in named]
    schemes.set_xticks(range(len(named)), names, fontsize=9)
    schemes.margins(x=0.15)
    schemes.set_xlabel("scheme of the paper's Table I\n(dotted: full precision)", fontsize=9)
    return figure


def _overhead(outcomes: Sequence[Outcome], costs: dict[str, dict[str, float]]) -> Any:
    """The form of Fig. 8: accuracy over multiplications by scale factors, counted here and as the paper counts."""
    figure, panels = figures.panels(2)
    titles = {"multiplies": "multiplications per output pixel", "multiplies_of_paper": "the same, as the paper counts"}
    of = {outcome.case.name: outcome for outcome in outcomes}
    for axes, (count, title) in zip(panels, titles.items(), strict=True):
        for index, weight in enumerate(GRANULARITIES):
            own = [of[f"{weight}/{psum}"] for psum in GRANULARITIES]
            # Points of equal cost stand side by side.
            where = [costs[one.case.name][count] * 1.05 ** (index - 1) for one in own]
            draw(axes, where, own, index, label=f"{weight} weights", linestyle="none")
            for x, one, psum in zip(where, own, GRANULARITIES, strict=True):
                if one.accuracies:
                    place, side = [((-5, -3), "right"), ((6, 3), "left"), ((6, -9), "left")][index]
                    at = x, 100 * one.mean
                    axes.annotate(psum, at, place, textcoords="offset points", horizontalalignment=side, fontsize=7)
        figures.logarithmic(axes)
        axes.margins(x=0.15)
        axes.set_xlabel(f"{title}, all layers\n(beside points: granularity of partial sums)", fontsize=9)
    accuracy_axis(panels[0])
    return figure
