"""What the study of bits comes to, as tables, as data and as a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cimjax.analysis import figures
from cimjax.analysis.studies.output import markdown
from cimjax.analysis.studies.runs import Outcome, accuracy_cells

# By how much the loss rises, by columns and bits, for each seed.
Increases = Mapping[str, Mapping[float, Sequence[float]]]


class Columns(NamedTuple):
    """Columns whose ADCs get their bits together: all of a layer, or those of one of its planes.

    path: of the layer, "block1/conv2".
    plane: from the lowest, 0; None for all.
    bits: of the config.
    conversions: per image.
    energies: by number of bits, conversions times codes.
    """

    path: str
    plane: int | None
    bits: float
    conversions: int
    energies: Mapping[float, int]

    @property
    def name(self) -> str:
        """As tables show it."""
        return self.path if self.plane is None else f"{self.path}, plane {self.plane}"


class Choice(NamedTuple):
    """Bits for all columns, by the name of each, and what they come to.

    name: of its runs.
    energy: of all columns, per image.
    expected: by how much the loss rises before fine-tuning, as the sum over columns; mean over seeds.
    measured: the same, of the network with all of these bits.
    """

    name: str
    bits: dict[str, float]
    energy: int
    expected: float
    measured: float


def text_of(
    groups: Sequence[Columns], increases: Increases, chosen: Sequence[Choice], outcomes: Sequence[Outcome], planned: int
) -> str:
    """Both tables as Markdown: of networks, base run first, and of columns.

    Args:
      chosen: what was fine-tuned, the best choice first.
      outcomes: of the base run and of each choice.
      planned: runs of each.
    """
    own = sum(group.energies[group.bits] for group in groups)
    whole = [Choice("", {}, own, 0.0, 0.0), *chosen]
    head = [
        "network",
        "accuracy %",
        "lowest",
        "highest",
        "runs",
        "ADC energy",
        "of base %",
        "loss rise",
        "expected",
    ]
    rows = []
    for outcome, choice in zip(outcomes, whole, strict=True):
        cost = [f"{choice.energy:,}", f"{100 * choice.energy / own:.1f}"]
        losses = [f"{choice.measured:.4f}", f"{choice.expected:.4f}"] if choice.bits else ["-", "-"]
        rows.append([outcome.case.name, *accuracy_cells(outcome, planned), *cost, *losses])
    networks = markdown(head, rows)
    options = list(next(iter(increases.values())))
    head = ["columns", "conversions", "energy %", "base bits", *(f"P{one:g}" for one in options), "chosen"]
    rows = []
    for group in groups:
        means = [f"{statistics.fmean(increases[group.name][one]):.4f}" for one in options]
        share = f"{100 * group.energies[group.bits] / own:.1f}"
        bits = f"{chosen[0].bits[group.name]:g}"
        rows.append([group.name, f"{group.conversions:,}", share, f"{group.bits:g}", *means, bits])
    legend = (
        "accuracy: on the test images, after fine-tuning; energy: per image, a conversion counts as the codes of its "
        "ADC\nloss rise: by how much the loss on training images rises before fine-tuning; expected: as the sum over "
        "rows\nP1, P2 ...: by how much it rises where these columns alone have so many bits"
    )
    alone = "" if len(chosen) > 1 else "\nno other choice loses less than the same bits for all"
    return f"{networks}\n\n{markdown(head, rows)}\n\n{legend}{alone}"


def data_of(
    groups: Sequence[Columns], increases: Increases, chosen: Sequence[Choice], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """The same as plain data."""
    networks = [
        {"case": outcome.case.name, "accuracies": outcome.accuracies, "failed": outcome.failed} for outcome in outcomes
    ]
    for network, choice in zip(networks[1:], chosen, strict=True):
        network |= {name: value for name, value in choice._asdict().items() if name != "name"}
    of_columns = [group._asdict() | {"increases": increases[group.name]} for group in groups]
    return {"networks": networks, "columns": of_columns}


def figure_of(groups: Sequence[Columns], increases: Increases, chosen: Sequence[Choice]) -> Any:
    """Above, what columns lose at each number of bits; below, the bits that were chosen for them."""
    names, places = [group.name for group in groups], range(len(groups))
    many = len(names) > 8
    figure, (above, below) = figures.panels(1, 2, height=3.2 if many else 2.5)
    largest = 0.0
    for index, one in enumerate(next(iter(increases.values()))):
        each = [increases[group.name][one] for group in groups]
        means = [statistics.fmean(values) for values in each]
        # Rounding may leave a mean outside its range.
        below_mean = [max(0.0, mean - min(values)) for mean, values in zip(means, each, strict=True)]
        above_mean = [max(0.0, max(values) - mean) for mean, values in zip(means, each, strict=True)]
        look = figures.look(index) | {"linewidth": 1, "capsize": 3, "elinewidth": 1}
        above.errorbar(places, means, yerr=[below_mean, above_mean], label=_bits(one), **look)
        largest = max(largest, *means)
    # Three decades, and what is smaller on a line through 0: noise, of either sign.
    decade = math.floor(math.log10(largest)) if largest > 0 else 0
    above.set_yscale("symlog", linthresh=10.0 ** (decade - 2), linscale=0.5)
    above.set_ylabel("rise of the training loss")
    chosen_bits = [chosen[0].bits[name] for name in names]
    bars = below.bar(places, chosen_bits, width=0.5, color="0.75", edgecolor="0.2", label="chosen")
    below.bar_label(bars, [f"{one:g}" for one in chosen_bits], fontsize=9, padding=2)
    own, ends = [group.bits for group in groups], [[place + side for place in places] for side in (-0.4, 0.4)]
    below.hlines(own, *ends, color="black", linestyle="--", linewidth=1.2, label="base run")
    below.set_ylabel("bits of the ADC")
    highest = math.ceil(max(*chosen_bits, *own))
    below.set_yticks(range(highest + 1))
    below.set_ylim(0, highest + 0.6)
    for axes in (above, below):
        axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
        axes.set_xticks(places, names if axes is below else [""] * len(names), fontsize=9)
        axes.set_xlim(-0.6, len(names) - 0.4)
    below.tick_params(axis="x", rotation=90 if many else 0)
    return figure


def _bits(number: float) -> str:
    return f"{number:g} bit" if number == 1 else f"{number:g} bits"
