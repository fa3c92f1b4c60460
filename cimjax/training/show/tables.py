"""A table on a console, whole: the columns that fit, what they mean, and which ones a wider terminal shows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cimjax.hardware.table import Column, TextTable


def print_table(console: Console, table: TextTable) -> None:
    """Print a table; columns that say nothing are left out, and of those that do not fit the least important first."""
    useful = [column for column in table.columns if any(row.get(column.header, "-") != "-" for row in table.rows)]
    kept = list(useful)
    # What a table needs to be printed unbroken, however wide the console is.
    unbounded = console.options.update(max_width=10_000)
    while Measurement.get(console, unbounded, drawn := _draw(kept, table)).maximum > console.width:
        least = max(kept, key=lambda column: column.drop)
        if least.drop == 0:
            break
        kept.remove(least)
    legend = Table.grid(padding=(0, 2, 0, 0))
    for column in kept:
        if column.legend:
            legend.add_row(column.header.replace("\n", " "), column.legend)
    console.print("", drawn, "")
    console.print(legend, style="dim")
    if missing := [column.header.replace("\n", " ") for column in useful if column not in kept]:
        console.print(f"A wider terminal also shows: {', '.join(missing)}.", style="dim")


def _draw(columns: Sequence[Column], table: TextTable) -> Table:
    drawn = Table(box=SIMPLE, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False, show_footer=bool(table.totals))
    for column in columns:
        drawn.add_column(
            column.header,
            table.totals.get(column.header, ""),
            justify="right" if column is not columns[0] else "left",
            style=column.style,
            footer_style=column.style,
            no_wrap=True,
        )
    for row in table.rows:
        drawn.add_row(*(row.get(column.header, "-") for column in columns), style=row.get("style"))
    return drawn
