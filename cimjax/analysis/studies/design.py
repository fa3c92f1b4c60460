"""What to choose where the paper leaves a choice: one thing is done otherwise at a time, and accuracies compared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cimjax.analysis import figures
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
from cimjax.spec.base import nearest, shortened
from cimjax.training.config.file import load_config, take_overrides

BASE = "the config"


class Answer(NamedTuple):
    """One answer to a question, other than the config's own: as options, or as fields of the config.

    `{half}` and `{quarter}` of the rows of an array are put in.
    """

    options: str = ""
    fields: tuple[str, ...] = ()


# By what is asked, the answers by name; those that a config gives itself are left out.
QUESTIONS: dict[str, dict[str, Answer]] = {
    "weight steps": {
        "one for each plane": Answer("step_per_plane=true"),
        "started by LSQ's rule": Answer("weight_start=magnitude"),
        "started by least squares": Answer("weight_start=least_squares"),
    },
    "encoding": {
        "differential": Answer("encoding=differential"),
        "differential, subtracted in analog": Answer("encoding=differential,subtract=analog"),
        "offset": Answer("encoding=offset"),
        "learned scales": Answer("encoding=learned_scales,cell_bits=1"),
    },
    "gradient of planes": {
        "by significance": Answer(fields=("--config.spec.weight.plane_shares=significance",)),
        "the lowest alone": Answer(fields=("--config.spec.weight.plane_shares=lowest",)),
    },
    "offset before the ADC": {"none": Answer("offset=false"), "one in every column": Answer("offset=true")},
    "codes of the ADC": {"always signed": Answer("offset=true", ("--config.spec.adc.range=signed",))},
    "steps of the ADC": {
        "calibrated, not trained": Answer("adc_step=calibrated"),
        "powers of two": Answer("adc_step=power_of_two"),
        "started by LSQ's rule": Answer("adc_start=magnitude"),
    },
    "gradient beyond the ADC's codes": {
        "up to half a step": Answer(fields=("--config.spec.adc.gradient_margin=0.5",)),
        "up to two steps": Answer(fields=("--config.spec.adc.gradient_margin=2.0",)),
    },
    "tiling": {"balanced": Answer("tiling=balanced"), "im2col": Answer("tiling=im2col")},
    "rows read at once": {"half": Answer("active_rows={half}"), "a quarter": Answer("active_rows={quarter}")},
    "stages": {"one": Answer("training=one_stage"), "two": Answer("training=two_stage")},
}


def cases(runs: Runs, questions: Sequence[str]) -> list[Case]:
    """The config as it is, and every other answer to the questions.

    Raises:
      ValueError: for an unknown question, or a config without arrays.
    """
    own = load_config(runs.config, take_overrides(runs.fields)[0])
    if own.spec is None:
        raise ValueError(f"{shortened(runs.config)} has no layer in arrays, so that there is nothing to choose.")
    rows = own.spec.array.rows
    for name in questions:
        if name not in QUESTIONS:
            raise ValueError(f"--questions names {name!r}{nearest(name, QUESTIONS)}.")
    found = [Case(BASE, "")]
    for question in questions:
        for answer, (options, fields) in QUESTIONS[question].items():
            options = options.format(half=rows // 2, quarter=rows // 4)
            given = take_overrides([*runs.fields, *fields])[0]
            case = Case(f"{question}: {answer}", options, None, fields, replaces=True)
            if load_config(case.of_config(runs.config), given).to_dict() != own.to_dict():
                found.append(case)
    return found


def study_design(runs: Runs, *, questions: Sequence[str] = tuple(QUESTIONS)) -> Study:
    """Train the config, and again with one thing otherwise at a time; differences are of runs of the same seed.

    Args:
      runs: their folder also gets the table (`design.md`, `.json`) and the figure.
      questions: names of `QUESTIONS`.

    Raises:
      ValueError, Stopped: as `study_granularity` does.
    """
    figures.require_matplotlib()
    outcomes = train_cases(runs, cases(runs, questions))
    costs = {one.case.name: costs_of(runs, one.case) for one in outcomes}
    against = {one.case.name: difference(one, outcomes[0]) for one in outcomes[1:]}
    head = ["done otherwise", "accuracy %", "lowest", "highest", "runs", "difference", "error", "conversions", "energy"]
    rows = []
    for one in outcomes:
        name = one.case.name
        counts = [f"{costs[name][count]:,.0f}" for count in ("conversions", "energy")]
        differs = [f"{value:+.2f}" for value in against.get(name, ())] or ["-", "-"]
        rows.append([name, *accuracy_cells(one, len(runs.seeds)), differs[0], differs[1].lstrip("+"), *counts])
    legend = (
        "difference: to the config, in points, mean over seeds; error: its standard error over seeds (nan: one seed);\n"
        "conversions and energy (conversions x codes) per image"
    )
    text, data = f"{markdown(head, rows)}\n\n{legend}", [data_of(one, **costs[one.case.name]) for one in outcomes]
    return finished(runs, "design", text, data, outcomes, design=_figure(against))


def difference(one: Outcome, base: Outcome) -> tuple[float, float]:
    """By how many points a case is more accurate than another, mean over the seeds that both have, and its standard
    error; NaN where there are none, or one."""
    own, others = ({row["seed"]: row["accuracy"] for row in each.rows if "accuracy" in row} for each in (one, base))
    points = [100 * (own[seed] - others[seed]) for seed in own if seed in others]
    mean = statistics.fmean(points) if points else math.nan
    error = statistics.stdev(points) / math.sqrt(len(points)) if len(points) > 1 else math.nan
    return mean, error


def _figure(against: Mapping[str, tuple[float, float]]) -> Any:
    """A bar for each answer, with its standard error."""
    figure, (axes,) = figures.panels(height=0.6 + 0.28 * len(against))
    names = list(against)[::-1]
    means, errors = zip(*(against[name] for name in names), strict=True)
    axes.barh(range(len(names)), means, xerr=errors, color="0.75", edgecolor="0.2", capsize=3, height=0.7)
    axes.axvline(0, color="0.2", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("difference of test accuracy to the config, points", fontsize=9)
    return figure
