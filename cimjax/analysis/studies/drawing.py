"""How outcomes of studies are drawn: means over seeds, with their range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cimjax.analysis import figures
from cimjax.analysis.studies.runs import Outcome


def draw(axes: Any, x: Sequence[float], outcomes: Sequence[Outcome], index: int, **look: Any) -> None:
    """Mean accuracies in percent with the range over seeds, as the `index`-th of some curves.

    Args:
      x: where each stands.
      **look: what differs, as matplotlib's `errorbar` takes it; `linestyle="none"` for points alone.
    """
    done = [outcome.accuracies or [float("nan")] for outcome in outcomes]
    means = [100 * sum(some) / len(some) for some in done]
    below = [mean - 100 * min(some) for mean, some in zip(means, done, strict=True)]
    above = [100 * max(some) - mean for mean, some in zip(means, done, strict=True)]
    # Rounding may leave a mean outside its range.
    spread = [[max(0.0, one) for one in side] for side in (below, above)]
    axes.errorbar(x, means, yerr=spread, capsize=3, elinewidth=1, **figures.look(index) | look)


def level(axes: Any, outcome: Outcome, **look: Any) -> None:
    """A line across at the mean accuracy of a case; dotted and grey unless told otherwise."""
    usual = {"color": "0.2", "linestyle": ":", "linewidth": 1.2}
    axes.axhline(100 * outcome.mean, **usual | look)


def accuracy_axis(axes: Any) -> None:
    """The name of the vertical axis, and a legend where there is anything to tell apart."""
    axes.set_ylabel("test accuracy, percent")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=9, frameon=False)
