"""What training costs: in one stage and in two, with granularities that agree and that do not (the paper's Fig. 9)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cimjax.analysis import figures
from cimjax.analysis.studies.output import markdown
from cimjax.analysis.studies.runs import Case, Runs, Study, data_of, finished, percent, train_cases
from cimjax.training.run.folder import read_records

# The four cases of Fig. 9, weight/psum.
CASES = (
    Case("i column/column, one stage", "weight=column,psum=column,training=one_stage"),
    Case("ii layer/column, one stage", "weight=layer,psum=column,training=one_stage"),
    Case("iii column/column, two stages", "weight=column,psum=column,training=two_stage"),
    Case("iv layer/column, two stages", "weight=layer,psum=column,training=two_stage"),
)
# Who is compared by the best accuracy of whom: plus, circle and star marks of Fig. 9.
CROSSINGS = ((3, 1, "+"), (2, 0, "o"), (1, 0, "*"))


class Curve(NamedTuple):
    """A case over training, means over seeds; one entry for each epoch with ADCs on.

    seconds, steps: since the start. best: the best accuracy up to there, 0 to 1.
    """

    seconds: list[float]
    steps: list[int]
    best: list[float]

    def reaches(self, accuracy: float) -> int | None:
        """The first entry that is as accurate."""
        return next((index for index, value in enumerate(self.best) if value >= accuracy), None)


def study_training_cost(
    runs: Runs,
) -> Study:
    """Train the four cases of Fig. 9, and find how much sooner one case is as accurate as another ever is.

    Accuracies are the best up to an epoch on the test images, as in the paper; they compare costs, and are no result.
    Epochs of a first stage, without ADCs, count as time but not as accuracy.

    Args:
      runs: their folder also gets the table (`training_cost.md`, `.json`) and the figure; more than one job at a time
        makes their seconds those of a shared machine.

    Raises:
      ValueError, Stopped: as `study_granularity` does.
    """
    figures.require_matplotlib()
    outcomes = train_cases(runs, CASES)
    curves = [_curve([Path(row["workdir"]) for row in one.rows if "accuracy" in row]) for one in outcomes]
    rows = []
    for one, curve in zip(outcomes, curves, strict=True):
        cost = [f"{curve.seconds[-1]:.1f}", f"{curve.steps[-1]:,}"] if curve.best else ["-", "-"]
        rows.append([one.case.name, percent(one.mean), percent(max(curve.best, default=float("nan"))), *cost])
    text = markdown(["weight/psum", "accuracy %", "best %", "seconds", "steps"], rows)
    text += "\n\n" + "\n".join(_sentence(*pair, curves) for pair in CROSSINGS)
    data = [data_of(one, **curve._asdict()) for one, curve in zip(outcomes, curves, strict=True)]
    return finished(runs, "training_cost", text, data, outcomes, training_cost=_figure(curves))


def _curve(runs: Sequence[Path]) -> Curve:
    epochs: list[list[dict[str, Any]]] = []
    for run in runs:
        tests = [record for record in read_records(run) if record.get("split") == "test" and "epoch" in record]
        epochs.append([record for record in tests if not record.get("ideal_adcs")])
    together = list(zip(*epochs, strict=False))
    best = [0.0] * len(runs)
    curve = Curve([], [], [])
    for records in together:
        best = [max(old, record["accuracy"]) for old, record in zip(best, records, strict=True)]
        curve.seconds.append(statistics.fmean(record["seconds"] for record in records))
        curve.steps.append(records[0]["step"])
        curve.best.append(statistics.fmean(best))
    return curve


def _sentence(later: int, sooner: int, mark: str, curves: Sequence[Curve]) -> str:
    """When one case is first as accurate as another at its best."""
    names = [case.name.split()[0] for case in CASES]
    if not (curves[later].best and curves[sooner].best):
        return f"{mark} {names[sooner]} and {names[later]}: no run of one of them has ended."
    accuracy = curves[later].best[-1]
    own, other = curves[later].reaches(accuracy), curves[sooner].reaches(accuracy)
    assert own is not None
    if other is None:
        return f"{mark} {names[sooner]} never reaches the {percent(accuracy)} % of {names[later]}."
    seconds, steps = (
        100 * (1 - getattr(curves[sooner], name)[other] / getattr(curves[later], name)[own])
        for name in ("seconds", "steps")
    )
    return (
        f"{mark} {names[sooner]} reaches the {percent(accuracy)} % of {names[later]} with {_less(seconds)} seconds and "
        f"{_less(steps)} steps."
    )


def _less(share: float) -> str:
    return f"{abs(share):.1f} % {'fewer' if share >= 0 else 'more'}"


def _figure(curves: Sequence[Curve]) -> Any:
    figure, panels = figures.panels(2)
    for axes, count in zip(panels, ("seconds", "steps"), strict=True):
        for index, (case, curve) in enumerate(zip(CASES, curves, strict=True)):
            look = figures.look(index) | {"markevery": max(1, len(curve.best) // 8)}
            axes.plot(getattr(curve, count), [100 * value for value in curve.best], label=case.name, **look)
        for of, sooner, mark in CROSSINGS:
            for index in (of, sooner):
                if curves[of].best and (place := curves[index].reaches(curves[of].best[-1])) is not None:
                    at = getattr(curves[index], count)[place], 100 * curves[index].best[place]
                    axes.plot(*at, mark, color="black", markersize=12, markerfacecolor="none", markeredgewidth=1.5)
        axes.set_xlabel(f"training, {count}")
        axes.set_xlim(left=0)
    # The first rise of all curves would leave no room for what tells them apart.
    ended = [curve.best for curve in curves if curve.best]
    if ended:
        low, high = min(best[len(best) // 4] for best in ended), max(best[-1] for best in ended)
        room = 0.1 * (high - low) + 0.001
        for axes in panels:
            axes.set_ylim(100 * (low - room), 100 * (high + room))
    panels[0].set_ylabel("best test accuracy so far, percent")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return figure
