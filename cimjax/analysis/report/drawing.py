"""Drawings as inline SVG: curves, histograms, bars and ladders, each with its axes.

What is drawn has classes, which the style sheet of the page colours for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from cimjax.analysis.report.gather import Ladders

# Width and height of curves and of a small drawing: about the pixels that they take on a page.
LARGE, SMALL = (470, 262), (256, 190)
# Room for the numbers of axes and their titles.
_LEFT, _TOP, _RIGHT, _BOTTOM = 46, 24, 10, 38
# Ladders beside each other, and rungs of one, that can be told apart.
_MOST_LADDERS, _MOST_RUNGS = 48, 16
# How groups are told apart in grey, as SVG has dashes; and how many colours the style sheet has.
_DASHES, _COLOURS = ("", "7 3", "2 3", "9 3 2 3"), 6
# Epochs from which on the first ones may lie below a drawing of accuracies, and the part of all that may.
_MANY_EPOCHS, _BELOW = 10, 0.2


class Curve(NamedTuple):
    """What a run has at its epochs, (epoch, value), in the look of its group."""

    label: str
    group: int
    points: Sequence[tuple[float, float]]


class _Axes(NamedTuple):
    """Where numbers lie in a drawing of `size`, between the ends of `x` and `y`."""

    size: tuple[int, int]
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        return _LEFT + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.size[0] - _LEFT - _RIGHT)

    def up(self, value: float) -> float:
        return self.size[1] - _BOTTOM - (value - self.y[0]) / (self.y[1] - self.y[0]) * (self.size[1] - _TOP - _BOTTOM)


def curves(found: Sequence[Curve], switches: Iterable[float], title: str, *, to_zero: bool) -> str:
    """Curves over epochs, with a dotted line at every epoch after which ADCs were switched on.

    Args:
      to_zero: whether values fall to zero, as losses do, and are drawn over a logarithm when they fall far. If not, the
        axis begins with what most epochs reach, and curves of many epochs come in from below.
    """
    epochs, values = map(np.asarray, zip(*(point for curve in found for point in curve.points), strict=True))
    logarithmic = to_zero and 0 < 20 * values.min() < values.max()
    lowest = values.min() if to_zero or epochs.max() < _MANY_EPOCHS else np.quantile(values, _BELOW)
    marks = _powers(lowest, values.max()) if logarithmic else _numbered(ticks(lowest, values.max(), outward=True))
    axes = _Axes(LARGE, (0, float(epochs.max())), (min(marks), max(marks)))
    base, parts = LARGE[1] - _BOTTOM, []
    for number, epoch in enumerate(switches):
        place = axes.across(epoch)
        parts.append(f'<path class="switch" d="M{place:.1f} {_TOP}V{base}"/>')
        parts.append(_text(place + 4, base - 6 - 14 * (number % 3), "ADCs on"))
    for curve in found:
        if curve.points:
            drawn = [(axes.across(x), axes.up(math.log10(y) if logarithmic else y)) for x, y in curve.points]
            path, (x, y) = "L".join(f"{x:.1f} {y:.1f}" for x, y in drawn), drawn[-1]
            last = f"{curve.label}: {curve.points[-1][1]:.4g} after epoch {curve.points[-1][0]:g}"
            parts.append(
                f'<g class="g{curve.group % _COLOURS}"><title>{escape(last)}</title>'
                f'<path class="curve" d="M{path}"{_dash(curve.group)}/><circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/></g>'
            )
    # What lies below the axis is cut off.
    title = title if lowest == values.min() else f"{title} (first epochs lie below)"
    parts = [f'<svg width="{LARGE[0]}" height="{base}">', *parts, "</svg>"]
    return _drawing(axes, parts, (_numbered(_whole(ticks(0, axes.x[1]))), marks), title, "epoch")


def histogram(values: np.ndarray, title: str, along: str) -> str:
    """How many of some values lie where."""
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-6 * max(abs(low), abs(high)):
        # All alike, but for rounding.
        low, high = low - 0.5 * max(abs(low), 1.0), high + 0.5 * max(abs(high), 1.0)
    counts, edges = np.histogram(values, bins=int(np.clip(2 * math.sqrt(values.size), 5, 24)), range=(low, high))
    marks = _whole(ticks(0, counts.max(), 4, outward=True))
    axes = _Axes(SMALL, (low, high), (0, marks[-1]))
    parts = [_bars(axes, edges[:-1], edges[1:], counts)]
    return _drawing(axes, parts, (_numbered(ticks(low, high, 4)), _numbered(marks)), title, along)


def bars(codes: np.ndarray, shares: np.ndarray, title: str, along: str) -> str:
    """A bar for each code."""
    marks = ticks(0, shares.max(), 4, outward=True)
    axes = _Axes(SMALL, (codes.min() - 0.5, codes.max() + 0.5), (0, marks[-1]))
    every = codes.max() - codes.min() + 1
    codes_shown = _whole(ticks(*axes.x, int(every) if every <= 9 else 5))
    parts = [_bars(axes, codes - 0.42, codes + 0.42, shares)]
    return _drawing(axes, parts, (_numbered(codes_shown), _numbered(marks)), title, along)


def ladders(found: Ladders, title: str) -> str:
    """Ladders beside each other, from the finest to the coarsest, with a rung at every code where these are few."""
    total, offset = found.step.size, np.zeros(found.step.size) if found.offset is None else found.offset
    order = np.argsort(found.step, kind="stable")
    order = order[np.linspace(0, total - 1, min(total, _MOST_LADDERS)).round().astype(int)]
    low, high = (offset + found.step * end for end in (found.q_min, found.q_max))
    ends = min(0.0, low[order].min()), max(0.0, high[order].max())
    axes = _Axes(SMALL, (0, len(order)), ends)
    width = min(24.0, 0.7 * (axes.across(1) - axes.across(0)))
    sides, rungs = [], []
    for place, index in enumerate(order):
        x = axes.across(place + 0.5)
        sides.append(f"M{x:.1f} {axes.up(low[index]):.1f}V{axes.up(high[index]):.1f}")
        codes = np.arange(found.q_min[index], found.q_max[index] + 1)
        # Of one bit, and of more than can be told apart, the ends alone.
        codes = codes if 2 < found.codes <= _MOST_RUNGS else codes[[0, -1]]
        levels = offset[index] + found.step[index] * codes
        rungs += [f"M{x - width / 2:.1f} {axes.up(level):.1f}h{width:.1f}" for level in levels]
    lines = {"zero": [f"M{_LEFT} {axes.up(0):.1f}H{SMALL[0] - _RIGHT}"], "side": sides, "rung": rungs}
    parts = [f'<path class="{kind}" d="{"".join(path)}"/>' for kind, path in lines.items()]
    some = f"{len(order)} of {total:,} {found.shared_by}s, by step" if total > 1 else "one ladder for all columns"
    return _drawing(axes, parts, ({}, _numbered(ticks(*ends))), title, some)


def swatch(group: int) -> str:
    """The mark of a group: a piece of its curves."""
    path = f'<path class="curve" d="M1 4H23"{_dash(group)}/>'
    return f'<svg class="swatch g{group % _COLOURS}" viewBox="0 0 24 8" aria-hidden="true">{path}</svg>'


def ticks(low: float, high: float, count: int = 5, *, outward: bool = False) -> list[float]:
    """About so many round numbers from `low` to `high`; `outward`: from just below to just above them.

    >>> ticks(0, 24), ticks(0.2, 2.16, outward=True)
    ([0.0, 5.0, 10.0, 15.0, 20.0], [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    """
    if not high > low:
        low, high = low - 0.5 * max(abs(low), 1.0), high + 0.5 * max(abs(high), 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= 0.999 * rough)
    down, up = (math.floor, math.ceil) if outward else (math.ceil, math.floor)
    nudge = 1e-9 if outward else -1e-9
    first, last = down(low / step + nudge), up(high / step - nudge)
    return [round(number * step, 12) + 0.0 for number in range(first, last + 1)]


def _powers(low: float, high: float) -> dict[float, str]:
    """Marks at 1, 2 and 5 times powers of ten around two numbers, by their logarithms."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    first, last = (
        max(mark for mark in marks if mark <= low * 1.001),
        min(mark for mark in marks if mark >= high * 0.999),
    )
    return {math.log10(mark): f"{mark:g}" for mark in marks if first <= mark <= last}


def _numbered(marks: Iterable[float]) -> dict[float, str]:
    texts = {mark: f"{mark:,.0f}" if abs(mark) >= 1000 else f"{mark:g}" for mark in marks}
    return {mark: text.replace("-", "\N{MINUS SIGN}") for mark, text in texts.items()}


def _whole(marks: Iterable[float]) -> list[float]:
    return [mark for mark in marks if mark == int(mark)]


def _bars(axes: _Axes, left: np.ndarray, right: np.ndarray, heights: np.ndarray) -> str:
    base, path = axes.up(0), []
    for start, end, height in zip(left, right, heights, strict=True):
        if height > 0:
            x, width = axes.across(start) + 0.4, max(axes.across(end) - axes.across(start) - 0.8, 0.8)
            path.append(f"M{x:.1f} {base:.1f}V{axes.up(height):.1f}h{width:.1f}V{base:.1f}z")
    return f'<path class="bar" d="{"".join(path)}"/>'


def _drawing(
    axes: _Axes, parts: Iterable[str], at: tuple[Mapping[float, str], Mapping[float, str]], title: str, along: str
) -> str:
    """Parts in front of a grid; the numbers at both axes, and what they are, above and below."""
    (width, height), base = axes.size, axes.size[1] - _BOTTOM
    grid = "".join(f"M{_LEFT} {axes.up(mark):.1f}H{width - _RIGHT}" for mark in at[1])
    notches = "".join(f"M{axes.across(mark):.1f} {base}v4" for mark in at[0])
    texts = [_text(_LEFT - 6, axes.up(mark) + 4, text, "end") for mark, text in at[1].items()]
    texts += [_text(axes.across(mark), base + 16, text, "middle") for mark, text in at[0].items()]
    texts += [_text(2, 12, title, kind="title"), _text(width - _RIGHT, height - 5, along, "end", "title")]
    axis = f'<path class="axis" d="M{_LEFT} {base}H{width - _RIGHT}{notches}"/>'
    inside = "".join([f'<path class="grid" d="{grid}"/>', *parts, axis, *texts])
    name = escape(f"{title} over {along}")
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">{inside}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "number") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _dash(group: int) -> str:
    dash = _DASHES[group % len(_DASHES)]
    return f' stroke-dasharray="{dash}"' if dash else ""
