"""Which rule sets an ADC best: ladders of a network that was trained with ideal ADCs, without training and with it."""

from __future__ import annotations

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
    data_of,
    finished,
    train_cases,
)
from cimjax.spec import StartRule

IDEAL = "ideal ADC"
# Rules by name, as options; the first of them train nothing.
RULES = {str(rule).replace("_", " "): f"adc_start={rule},adc_step=calibrated" for rule in StartRule}
RULES |= {
    "least squares, one for the layer": "adc_step=calibrated,psum=layer",
    "learned": "adc_step=learned",
    "learned, power of two": "adc_step=power_of_two",
}


def cases(bits: Sequence[str]) -> list[Case]:
    """The network with ideal ADCs, and from it every rule at every number of bits."""
    found = [Case(IDEAL, "psum=none")]
    for one in bits:
        for name, options in RULES.items():
            found.append(Case(f"{name} P{one}", f"training=post_training,{options},adc_bits={one}", IDEAL))
    return found


def study_adc_range(
    runs: Runs,
    *,
    bits: Sequence[str] = ("2", "3", "4"),
) -> Study:
    """Train a network with ideal ADCs, then set its ADCs by each rule; weights and their steps stay as they are.

    Args:
      runs: their config has no `adc_bits`; their folder also gets the table (`adc_range.md`, `.json`) and the figure.
      bits: of the ADC, as the option `adc_bits` takes them.

    Raises:
      ValueError, Stopped: as `study_granularity` does.
    """
    figures.require_matplotlib()
    outcomes = train_cases(runs, cases(bits))
    head = ["ADC set by", "accuracy %", "lowest", "highest", "runs", "trained"]
    rows = []
    for one in outcomes:
        trains = "adc_step=learned" in one.case.options or "adc_step=power_of_two" in one.case.options
        rows.append([one.case.name, *accuracy_cells(one, len(runs.seeds)), "its steps" if trains else ""])
    text = markdown(head, rows)
    data = [data_of(one) for one in outcomes]
    return finished(runs, "adc_range", text, data, outcomes, adc_range=_figure(outcomes, bits))


def _figure(outcomes: Sequence[Outcome], bits: Sequence[str]) -> Any:
    """Accuracy over bits, a line for each rule."""
    of = {one.case.name: one for one in outcomes}
    figure, (axes,) = figures.panels()
    for index, name in enumerate(RULES):
        own = [of[f"{name} P{one}"] for one in bits]
        trained = "learned" in name
        where = [float(one) + 0.015 * (index - len(RULES) / 2) for one in bits]
        draw(axes, where, own, index, label=name, linestyle="-" if trained else "--")
    level(axes, of[IDEAL])
    axes.set_xticks([float(one) for one in bits], bits)
    axes.set_xlabel("bits of the ADC (solid: its steps are trained; dotted: ideal ADC)", fontsize=9)
    accuracy_axis(axes)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
