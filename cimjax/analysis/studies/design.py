"""What to choose where the paper leaves a choice: one thing is done otherwise at a time, and accuracies compared.

`study_design` asks about the chip, `study_recipe` about the training.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

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

    Numbers that follow from the config (`numbers_of`) are put in, as in "{half_of_rows}".

    start, teacher: the run that it starts or learns from, of `BEFORE`.
    measure: as of a `Case`.
    """

    options: str = ""
    fields: tuple[str, ...] = ()
    start: str | None = None
    teacher: str | None = None
    measure: str = "accuracy"


Questions = Mapping[str, Mapping[str, Answer]]

# By what is asked, the answers by name; those that a config gives itself are left out.
DESIGN: Questions = {
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
    "rows read at once": {
        "half": Answer("active_rows={half_of_rows}"),
        "a quarter": Answer("active_rows={quarter_of_rows}"),
    },
    "stages": {"one": Answer("training=one_stage"), "two": Answer("training=two_stage")},
}

_HALF = "--config.epochs={half_of_epochs}"
_NEVER_IDEAL = "--config.ideal_share=0.0"
# The runs that others start or learn from.
BEFORE: dict[str, Answer] = {
    "half as long in full precision": Answer("weight=none", (_HALF,)),
    "half as long with ideal ADCs": Answer("psum=none", (_HALF,)),
    "half as long with one more bit": Answer("adc_bits={one_more_bit}", (_HALF,)),
    "full precision": Answer("weight=none"),
    "full precision, twice as wide": Answer("weight=none", ("--config.model.width={twice_the_width}",)),
}
RECIPE: Questions = {
    "ADCs ideal at first": {
        "never": Answer(fields=(_NEVER_IDEAL,)),
        "half of the epochs": Answer(fields=("--config.ideal_share=0.5",)),
        "three quarters": Answer(fields=("--config.ideal_share=0.75",)),
        "nine tenths": Answer(fields=("--config.ideal_share=0.9",)),
    },
    "second half starts from a run": {
        "in full precision": Answer("", (_HALF,), "half as long in full precision"),
        "with ideal ADCs": Answer("", (_HALF, _NEVER_IDEAL), "half as long with ideal ADCs"),
        "with one more bit": Answer("", (_HALF, _NEVER_IDEAL), "half as long with one more bit"),
    },
    "teacher": {
        "full precision": Answer(teacher="full precision"),
        "full precision, twice as wide": Answer(teacher="full precision, twice as wide"),
    },
    "gradient of the ADC": {
        "bumps of a quarter step": Answer(fields=("--config.spec.adc.gradient_bumps=0.25",)),
        "bumps of half a step": Answer(fields=("--config.spec.adc.gradient_bumps=0.5",)),
        "two steps beyond the codes": Answer(fields=("--config.spec.adc.gradient_margin=2.0",)),
    },
    "digital factor": {"a learned gain": Answer(fields=("--config.spec.adc.digital_gain=True",))},
    "rate of ADC steps": {"ten times": Answer(fields=("--config.spec.adc.gradient_factor={ten_times_adc_factor}",))},
    "weight decay": {
        "half": Answer(fields=("--config.optimizer.weight_decay={half_of_decay}",)),
        "twice": Answer(fields=("--config.optimizer.weight_decay={twice_the_decay}",)),
    },
    "average of weights": {
        "over 1,000 steps": Answer(fields=("--config.ema=0.999",), measure="average_accuracy"),
    },
    "oscillating weights": {"frozen": Answer(fields=("--config.optimizer.freeze_oscillating=0.01",))},
    "batch normalisation": {"statistics taken anew": Answer(fields=("--config.batch_norm_images=5000",))},
    "length": {"twice the epochs": Answer(fields=("--config.epochs={twice_the_epochs}",))},
}


def numbers_of(config: ConfigDict) -> dict[str, Any]:
    """What answers put in, from the config that is asked about."""
    rows, adc, optimizer = config.spec.array.rows, config.spec.adc, config.optimizer
    bits, factor = (3, 10.0) if adc is None else (adc.bits, adc.gradient_factor)
    return {
        "half_of_rows": rows // 2,
        "quarter_of_rows": rows // 4,
        "one_more_bit": int(bits) + 1,
        "ten_times_adc_factor": 10 * factor,
        "half_of_decay": optimizer.weight_decay / 2,
        "twice_the_decay": 2 * optimizer.weight_decay,
        "half_of_epochs": config.epochs / 2,
        "twice_the_epochs": 2 * config.epochs,
        "twice_the_width": 2 * config.model.get("width", 1.0),
    }


def cases(runs: Runs, table: Questions, questions: Sequence[str]) -> list[Case]:
    """The config as it is, every other answer to the questions, and the runs of `BEFORE` that they need.

    Raises:
      ValueError: for an unknown question, or a config without arrays.
    """
    own = load_config(runs.config, take_overrides(runs.fields)[0])
    if own.spec is None:
        raise ValueError(f"{shortened(runs.config)} has no layer in arrays, so that there is nothing to choose.")
    for name in questions:
        if name not in table:
            raise ValueError(f"--questions names {name!r}{nearest(name, table)}.")
    numbers = numbers_of(own)

    def case(name: str, answer: Answer) -> Case:
        fields = tuple(field.format(**numbers) for field in answer.fields)
        return Case(
            name,
            answer.options.format(**numbers),
            answer.start,
            fields,
            replaces=True,
            teacher=answer.teacher,
            measure=answer.measure,
        )

    found, before = [Case(BASE, "")], dict[str, Case]()
    for question in questions:
        for name, answer in table[question].items():
            one = case(f"{question}: {name}", answer)
            given = take_overrides([*runs.fields, *one.fields])[0]
            same = load_config(one.of_config(runs.config), given).to_dict() == own.to_dict()
            if same and not (one.start or one.teacher):
                continue
            found.append(one)
            before |= {name: case(name, BEFORE[name]) for name in (one.start, one.teacher) if name}
    return [*found, *before.values()]


def study_design(runs: Runs, *, questions: Sequence[str] = tuple(DESIGN)) -> Study:
    """Train the config, and again with one thing of the chip otherwise at a time; differences are of runs of the same
    seed.

    Args:
      runs: their folder also gets the table (`design.md`, `.json`) and the figure.
      questions: names of `DESIGN`.

    Raises:
      ValueError, Stopped: as `study_granularity` does.
    """
    return _compare(runs, "design", DESIGN, questions)


def study_recipe(runs: Runs, *, questions: Sequence[str] = tuple(RECIPE)) -> Study:
    """As `study_design`, of the training: what `RECIPE` asks, in `recipe.md`.

    A run that starts from another has half of the epochs, and the other the first half; a teacher's are not counted.
    """
    return _compare(runs, "recipe", RECIPE, questions)


def _compare(runs: Runs, name: str, table: Questions, questions: Sequence[str]) -> Study:
    figures.require_matplotlib()
    outcomes = train_cases(runs, cases(runs, table, questions))
    costs = {one.case.name: costs_of(runs, one.case) for one in outcomes}
    against = {one.case.name: difference(one, outcomes[0]) for one in outcomes[1:] if one.case.name not in BEFORE}
    head = ["done otherwise", "accuracy %", "lowest", "highest", "runs", "difference", "error", "conversions", "energy"]
    rows = []
    for one in outcomes:
        case = one.case.name
        counts = [f"{costs[case][count]:,.0f}" for count in ("conversions", "energy")]
        differs = [f"{value:+.2f}" for value in against.get(case, ())] or ["-", "-"]
        rows.append([case, *accuracy_cells(one, len(runs.seeds)), differs[0], differs[1].lstrip("+"), *counts])
    legend = (
        "difference: to the config, in points, mean over seeds; error: its standard error over seeds (nan: one seed);\n"
        "conversions and energy (conversions x codes) per image"
    )
    text, data = f"{markdown(head, rows)}\n\n{legend}", [data_of(one, **costs[one.case.name]) for one in outcomes]
    return finished(runs, name, text, data, outcomes, **{name: _figure(against)})


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
