"""What the layers of a network take on the chip, as a table of text: its columns, what they mean, and its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cimjax.hardware.survey import Layer
from cimjax.spec.words import describe_bits

TIMES = "\N{MULTIPLICATION SIGN}"


class Column(NamedTuple):
    """A column of a table; the one with the greatest `drop` is left out first, 0 stays."""

    header: str
    drop: int
    legend: str = ""
    style: str = ""


# From header to text; "style" is that of the whole row, and what is absent is shown as "-".
Row = dict[str, str]


class TextTable(NamedTuple):
    """A table of text; `totals` is the row of what adds up, empty where nothing does."""

    columns: Sequence[Column]
    rows: Sequence[Row]
    totals: Row


_COLUMNS = (
    Column("layer", 0),
    Column("kernel", 9),
    Column("output", 12),
    Column("tiles", 8, f"how the layer is cut: rows {TIMES} columns of arrays"),
    Column("arrays", 1, "memory arrays that hold the layer"),
    Column("reads", 6, "times that a column is read, over its row tiles"),
    Column("rows\nread", 3, "at once, of those that may be"),
    Column("slices", 5, "cycles in which the DAC drives an activation"),
    Column("cells\nused", 7, "part of all cells that holds weights"),
    Column("bits", 0, "A activations/slice, W weights/cell, P partial sums"),
    Column("conversions\nper image", 2, "partial sums that the ADCs digitise"),
    Column("multiplies\nper pixel", 4, "by scale factors, per output pixel"),
    Column("(paper's\ncount)", 10, "the same, as section III-B of the paper counts them", "dim"),
    Column("parameters", 11),
)


def layer_table(layers: Sequence[Layer]) -> TextTable:
    """A row for each layer; columns of reads and slices only where there are others than one for each row tile."""
    costs = [layer.cost for layer in layers if layer.cost]
    in_parts = any(cost.read_groups != cost.row_tiles for cost in costs)
    sliced = any(cost.slices > 1 for cost in costs)
    said = {"reads": in_parts, "rows\nread": in_parts, "slices": sliced}
    columns = [column for column in _COLUMNS if said.get(column.header, True)]
    return TextTable(columns, [_row(layer) for layer in layers], _totals(layers))


def _row(layer: Layer) -> Row:
    """One layer's own; in full precision it has no place on the chip."""
    row = {
        "layer": layer.name if layer.copies == 1 else f"{layer.name} {TIMES}{layer.copies}",
        "kernel": TIMES.join(map(str, layer.kernel)),
        "output": TIMES.join(map(str, layer.output)) or "-",
        "bits": "-" if layer.spec is None else describe_bits(layer.spec),
    }
    cost = layer.cost
    if cost is None:
        return {**row, "parameters": count(layer.parameters), "style": "dim"}
    geometry = {
        "tiles": f"{cost.row_tiles}{TIMES}{cost.column_tiles}",
        "reads": count(cost.read_groups),
        "rows\nread": f"{cost.rows_driven}/{cost.rows_per_read}",
        "slices": count(cost.slices),
    }
    return {**_totals([layer]), **row, **geometry}


def _totals(layers: Sequence[Layer]) -> Row:
    """What adds up over layers."""
    costs = [layer.cost for layer in layers if layer.cost]
    used, cells = sum(cost.used_cells for cost in costs), sum(cost.cells for cost in costs)
    return {
        "layer": "total",
        "arrays": count(sum(cost.arrays for cost in costs)),
        "cells\nused": show(used / max(cells, 1), ".0%"),
        "conversions\nper image": count(sum(cost.adc_conversions for cost in costs) or None),
        "multiplies\nper pixel": count(sum(cost.dequantization_multiplications for cost in costs)),
        "(paper's\ncount)": f"({count(sum(cost.dequantization_multiplications_of_paper for cost in costs))})",
        "parameters": count(sum(layer.parameters for layer in layers)),
    }


def count(value: float | None) -> str:
    """A number of things for a person; "-" for None.

    >>> [count(value) for value in (None, 0.512, 12345, 269722, 1.2e6)]
    ['-', '0.512', '12,345', '270 k', '1.2 M']
    """
    if value is None:
        return "-"
    if not math.isfinite(value) or (abs(value) < 100 and value != int(value)):
        return f"{value:.3g}"
    if abs(value) < 100_000:
        return f"{value:,.0f}"
    power = next((power for power in (1, 2, 3) if abs(value) < 999.5 * 1000**power), 4)
    return f"{value / 1000**power:.3g} {' kMGT'[power]}"


def show(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form).replace("%", " %")
