"""The tables of a run: which columns there are, what they mean, and rows of plain data for them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cimjax.hardware.cost import LayerCost

TIMES = "\N{MULTIPLICATION SIGN}"


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One line of the table before training."""

    # Path in the network: "conv1", "block2/conv1".
    name: str
    # "cim", or "full precision" for a layer that is not computed in arrays.
    kind: str
    # Shape of the kernel: (kh, kw, C, O) or (C, O).
    kernel: tuple[int, ...]
    # Where one image has outputs: (OH, OW); () for a dense layer; more axes where the layer is used several times.
    output: tuple[int, ...]
    # Bits as they are shown: "A4/1 W3/1 P3"; "-" in full precision.
    bits: str
    # What the layer takes on the chip; None in full precision.
    cost: LayerCost | None
    # Parameters of a layer in full precision; None counts the kernel alone.
    parameters: int | None = None
    # Layers of this kind, each with its own parameters, that the line stands for.
    copies: int = 1


class Column(NamedTuple):
    """A column of a table; the one with the greatest `drop` is left out first, 0 stays."""

    header: str
    drop: int
    legend: str = ""
    style: str = ""


# From header to text; "style" is that of the whole row, and what is absent is shown as "-".
Row = dict[str, str]

LAYER_COLUMNS = (
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


def layer_columns(layers: Sequence[LayerRow]) -> list[Column]:
    """The columns that say something of these layers: neither reads nor slices are counted where there is one."""
    costs = [layer.cost for layer in layers if layer.cost]
    in_parts = any(cost.read_groups != cost.row_tiles for cost in costs)
    sliced = any(cost.slices > 1 for cost in costs)
    said = {"reads": in_parts, "rows\nread": in_parts, "slices": sliced}
    return [column for column in LAYER_COLUMNS if said.get(column.header, True)]


def layer_row(layer: LayerRow) -> Row:
    """One layer's own; in full precision it has no place on the chip."""
    row = {
        "layer": layer.name if layer.copies == 1 else f"{layer.name} {TIMES}{layer.copies}",
        "kernel": TIMES.join(map(str, layer.kernel)),
        "output": TIMES.join(map(str, layer.output)) or "-",
        "bits": layer.bits,
    }
    totals = totals_of([layer])
    if layer.cost is None:
        return {**row, "parameters": totals["parameters"], "style": "dim"}
    geometry = {
        "tiles": f"{layer.cost.row_tiles}{TIMES}{layer.cost.column_tiles}",
        "reads": count(layer.cost.read_groups),
        "rows\nread": f"{layer.cost.rows_driven}/{layer.cost.rows_per_read}",
        "slices": count(layer.cost.slices),
    }
    return {**totals, **row, **geometry}


def totals_of(layers: Sequence[LayerRow]) -> Row:
    """What adds up over layers."""
    costs = [layer.cost for layer in layers if layer.cost]
    full = [layer for layer in layers if not layer.cost]
    parameters = [math.prod(layer.kernel) if layer.parameters is None else layer.parameters for layer in full]
    used, cells = sum(cost.used_cells for cost in costs), sum(cost.cells for cost in costs)
    return {
        "layer": "total",
        "arrays": count(sum(cost.arrays for cost in costs)),
        "cells\nused": show(used / max(cells, 1), ".0%"),
        "conversions\nper image": count(sum(cost.adc_conversions for cost in costs) or None),
        "multiplies\nper pixel": count(sum(cost.dequantization_multiplications for cost in costs)),
        "(paper's\ncount)": f"({count(sum(cost.dequantization_multiplications_of_paper for cost in costs))})",
        "parameters": count(sum(parameters) + sum(cost.parameters for cost in costs)),
    }


def step_columns(kinds: Iterable[str]) -> list[Column]:
    """The columns of the table after training, for the kinds of steps that there are."""
    drifts = {"offset": "mean move of the ladder's middle, in about its first step"}
    return [
        Column("layer", 0),
        *(Column(f"{kind}\nmoved", 3, drifts.get(kind, "mean |log(s/s0)|, 0.01 is 1 %")) for kind in kinds),
        Column("saturated", 1, "conversions beyond the ADC's outer codes"),
        Column("codes\nused", 0, "codes that a column gives, on average"),
    ]


def step_row(step: Mapping[str, Any]) -> Row:
    moved = {f"{kind}\nmoved": show(drift) for kind, drift in step["drift"].items()}
    saturated, used, codes = (step.get(key) for key in ("saturated", "codes_used", "codes"))
    row = {"layer": step["layer"], "saturated": show(saturated, ".1%"), **moved}
    return row if used is None else {**row, "codes\nused": f"{show(used)} of {codes}"}


def make_table(columns: Sequence[Column], rows: Sequence[Row], totals: Row) -> Table:
    table = Table(box=SIMPLE, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False, show_footer=bool(totals))
    for column in columns:
        table.add_column(
            column.header,
            totals.get(column.header, ""),
            justify="right" if column is not columns[0] else "left",
            style=column.style,
            footer_style=column.style,
            no_wrap=True,
        )
    for row in rows:
        table.add_row(*(row.get(column.header, "-") for column in columns), style=row.get("style"))
    return table


def width_of(console: Console, table: Table) -> int:
    """What a table needs to be printed unbroken."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


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
