"""What a person sees of a training run: the layers before it, a live bar during it, a table after it.

On a terminal the bar is live and lines are coloured (`rich`; NO_COLOR is respected); elsewhere plain lines come out,
without escape codes or carriage returns. What does not fit the width is left out, least important first, so that no
row is broken. Nothing is measured, judged or stored here, and whatever happens to the stream, training goes on.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self, TextIO, cast

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cimjax.hardware.cost import LayerCost

# Seconds between plain progress lines; a long run waits longer, this part of its time so far.
_PLAIN_SECONDS, _PLAIN_PART = 15.0, 0.02
# Width of plain output where neither COLUMNS nor a terminal tells it.
_PLAIN_WIDTH = 120
# What is used beyond ASCII, here and by rich, and what stands for it in a stream that cannot hold it.
_TIMES, _SPINNER = "\N{MULTIPLICATION SIGN}", "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_ASCII = str.maketrans("─━╸╺…" + _TIMES + _SPINNER, "-== .x" + r"|/-\|/-\|/")


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """One line of the table before training."""

    # Path in the network: "conv1", "block2/conv1".
    name: str
    # "cim", or "full precision" for a layer that is not computed in arrays.
    kind: str
    # Shape of the kernel: (kh, kw, C, O) or (C, O).
    kernel: tuple[int, ...]
    # Spatial shape of the output; () for a dense layer.
    output: tuple[int, ...]
    # Bits as they are shown: "A3 W3/1 P3"; "-" in full precision.
    bits: str
    # What the layer takes on the chip; None in full precision.
    cost: LayerCost | None
    # Parameters of a layer in full precision; None counts the kernel alone.
    parameters: int | None = None


class _Column(NamedTuple):
    """A column of a table; the one with the greatest `drop` is left out first, 0 stays."""

    header: str
    drop: int
    legend: str = ""
    style: str = ""


# From header to text; "style" is that of the whole row, and what is absent is shown as "-".
_Row = dict[str, str]

_LAYER_COLUMNS = (
    _Column("layer", 0),
    _Column("kernel", 7),
    _Column("output", 10),
    _Column("tiles", 6, f"how the layer is cut: rows {_TIMES} columns of arrays"),
    _Column("arrays", 1, "memory arrays that hold the layer"),
    _Column("reads", 5, "times that a column is read, over its row tiles"),
    _Column("cells\nused", 4, "part of all cells that holds weights"),
    _Column("bits", 0, "A activations, W weights/per cell, P partial sums"),
    _Column("conversions\nper image", 2, "partial sums that the ADCs digitise"),
    _Column("multiplies\nper pixel", 3, "by scale factors, per output pixel"),
    _Column("(paper's\ncount)", 8, "the same, as section III-B of the paper counts them", "dim"),
    _Column("parameters", 9),
)

# What the numbers of a kind of step mean; "" for all others.
_DRIFTS = {"offset": "mean |z - z0|, in steps of the ADC", "": "mean |log(s/s0)|, 0.01 is 1 %"}


class Display:
    """Prints one run; as a context manager it leaves the terminal in order, however the run ends."""

    def __init__(self, *, stream: TextIO | None = None, plain: bool | None = None) -> None:
        """Nothing is printed yet.

        Args:
          stream: where to print; standard output unless told otherwise.
          plain: whether to print plain lines; None decides by whether the stream is a terminal.
        """
        stream = stream or sys.stdout
        if plain is None:
            plain = not stream.isatty() or os.environ.get("TERM") == "dumb"
        self._plain = plain
        self._console = _Console(
            file=cast(TextIO, _Stream(stream, strip=plain)),
            force_terminal=not plain,
            force_jupyter=False,
            color_system=None if plain else "auto",
            width=_plain_width() if plain else None,
            markup=False,
            highlight=False,
            emoji=False,
        )
        self._bar = _Bar()
        self._live: Live | None = None
        self._begin = self._printed = time.monotonic()

    def start(self, title: str, facts: Mapping[str, str], layers: Sequence[LayerRow]) -> None:
        """Print what is going to be trained, and begin the live bar.

        Args:
          title: one line.
          facts: label and text of each line of the header; texts are not broken, so that a path can be copied.
          layers: the layers in network order.
        """
        self._print(Text(title, "bold"))
        self._facts(facts)
        if layers:
            several = any(layer.cost and layer.cost.read_groups != layer.cost.row_tiles for layer in layers)
            columns = [column for column in _LAYER_COLUMNS if several or column.header != "reads"]
            self._table(columns, [_layer_row(layer) for layer in layers], _totals(layers))
        self._console.print()
        self._bar.forget()
        self._begin = time.monotonic()
        if not self._plain and self._live is None:
            self._live = Live(
                self._bar,
                console=self._console,
                refresh_per_second=5,
                transient=True,
                redirect_stdout=sys.stdout.isatty(),
                redirect_stderr=sys.stderr.isatty(),
            )
            self._live.start()

    def resume(self, step: int, epoch: float) -> None:
        """Say that the run goes on after `step` steps, which are `epoch` epochs (a fraction too)."""
        self.note(f"resumed after step {step:,} (epoch {_show(epoch)})")
        self._bar.forget()

    def progress(
        self, step: int, total: int, epoch: float, loss: float, accuracy: float, images_per_second: float
    ) -> None:
        """Move the live bar; as plain lines at most one every 15 seconds, fewer in a long run.

        Args:
          step: steps done, 0 to `total`.
          total: steps of the whole run.
          epoch: epochs done; a fraction too.
          loss, accuracy: of the last training steps; the accuracy from 0 to 1.
          images_per_second: the training speed.
        """
        self._bar.move(step, total, epoch, loss, accuracy, images_per_second)
        now = time.monotonic()
        if self._plain and now - self._printed >= max(_PLAIN_SECONDS, _PLAIN_PART * (now - self._begin)):
            self._print(_fit(self._bar.parts(), self._console.width))

    def epoch(self, epoch: int, epochs: int, record: Mapping[str, Any]) -> None:
        """Print the line of one epoch.

        Args:
          epoch, epochs: epochs done, and those of the whole run.
          record: `test_accuracy`, `best` (whether that is the best so far), `train_accuracy`, `train_loss`,
            `learning_rate`, `images_per_second`; accuracies from 0 to 1. What is absent or None is shown as "-".
        """
        best, get = bool(record.get("best")), record.get
        parts = [
            Text(f"epoch {epoch:>{len(str(epochs))}}/{epochs}"),
            _labelled("test", f"{_show(get('test_accuracy'), '.2%'):>8}", "bold green" if best else "bold"),
            Text("best" if best else "    ", "green"),
            _labelled("train", f"{_show(get('train_accuracy'), '.2%'):>8}"),
            _labelled("loss", f"{_show(get('train_loss'), '.4f'):>7}"),
            _labelled("lr", f"{_show(get('learning_rate')):>8}"),
            Text(f"{count(get('images_per_second')):>6} images/s", "dim"),
        ]
        self._print(_fit(parts, self._console.width))

    def warn(self, message: str) -> None:
        """Print a warning that stays."""
        self._message(Text.assemble(("warning: ", "bold"), message, style="yellow"))

    def note(self, message: str) -> None:
        """Print a remark that stays; a line of it that begins with a space, as a command may, is not broken."""
        self._message(Text(message))

    def finish(self, rows: Mapping[str, str], steps: Sequence[Mapping[str, Any]]) -> None:
        """End the live bar and print what came out, the most important part last.

        Args:
          rows: label and text of each line of the result.
          steps: one for each layer that has steps: `layer` (its name), `drift` (how far each kind of step moved,
            mean `|log(s/s0)|`; offsets in ADC steps: `{"activation": 0.02, "weight": 0.01, "psum": 0.08}`),
            `saturated` (part of the conversions beyond the ADC's ladder, 0 to 1), `codes_used` (mean over columns)
            and `codes` (`2^b`). What is absent or None is shown as "-".
        """
        self.close()
        drifts: dict[str, list[float]] = {}
        for step in steps:
            for kind, drift in step["drift"].items():
                drifts.setdefault(kind, []).append(math.nan if drift is None else drift)
        columns = [
            _Column("layer", 0),
            *(_Column(f"{kind}\nmoved", 3, _DRIFTS.get(kind, _DRIFTS[""])) for kind in drifts),
            _Column("saturated", 1, "conversions beyond the ADC's outer codes"),
            _Column("codes\nused", 0, "codes that a column gives, on average"),
        ]
        if steps:
            self._table(columns, [_step_row(step) for step in steps], {})
        self._console.print()
        moved = ", ".join(f"{kind} {_show(sum(values) / len(values))}" for kind, values in drifts.items())
        self._facts({**({"steps moved": moved} if moved else {}), **rows})

    def close(self) -> None:
        """Take the live bar away; may be called again."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _print(self, text: Text) -> None:
        self._console.print(text, soft_wrap=True)
        self._printed = time.monotonic()

    def _message(self, text: Text) -> None:
        for line in text.split("\n"):
            self._console.print(line, soft_wrap=self._plain or line.plain.startswith(" "))
        self._printed = time.monotonic()

    def _facts(self, facts: Mapping[str, str]) -> None:
        width = max(map(len, facts), default=0)
        for label, text in facts.items():
            self._print(Text.assemble((f"{label:<{width}}  ", "dim"), text))

    def _table(self, columns: Sequence[_Column], rows: Sequence[_Row], totals: _Row) -> None:
        """Print the columns that fit, what they mean, and which ones a wider terminal shows."""
        known = [column for column in columns if any(row.get(column.header, "-") != "-" for row in rows)]
        kept = list(known)
        while _width(self._console, table := _table(kept, rows, totals)) > self._console.width:
            least = max(kept, key=lambda column: column.drop)
            if least.drop == 0:
                break
            kept.remove(least)
        legend = Table.grid(padding=(0, 2, 0, 0))
        for column in kept:
            if column.legend:
                legend.add_row(column.header.replace("\n", " "), column.legend)
        self._console.print("", table, "")
        self._console.print(legend, style="dim")
        missing = [column.header.replace("\n", " ") for column in known if column not in kept]
        if missing:
            self._console.print(f"A wider terminal also shows: {', '.join(missing)}.", style="dim")


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


class _Bar:
    """The live line; moved by the training loop, drawn by rich's thread."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, with nothing known of the speed."""
        self._begin = time.monotonic()
        self._state: tuple[int, int, float, float, float, float] | None = None
        # Times and steps of the last minutes, which tell the time left; the first compilation is soon forgotten.
        self._samples: collections.deque[tuple[float, int]] = collections.deque(maxlen=120)

    def move(self, *state: Any) -> None:
        """Take the arguments of `Display.progress`."""
        now, step = time.monotonic(), state[0]
        if step > 0 and (not self._samples or now - self._samples[-1][0] >= 1):
            self._samples.append((now, step))
        self._state = cast(tuple[int, int, float, float, float, float], state)

    def parts(self) -> list[Text]:
        """What there is to say, the most important first."""
        if self._state is None:
            return [Text(f"preparing the first steps {_duration(time.monotonic() - self._begin)}")]
        step, total, epoch, loss, accuracy, speed = self._state
        epochs = _show(round(epoch * total / step, 1) if step else None)
        return [
            Text(f"epoch {epoch:>{len(epochs) + 2}.1f}/{epochs} {step / max(total, 1):>4.0%}"),
            Text(f"{_duration(self._seconds_left(step, total)):>7} left"),
            _labelled("loss", f"{_show(loss, '.4f'):>7}"),
            _labelled("accuracy", f"{_show(accuracy, '.1%'):>7}"),
            Text(f"{count(speed):>6} images/s", "dim"),
        ]

    def _seconds_left(self, step: int, total: int) -> float:
        if len(self._samples) < 2:
            return math.nan
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        return (end - begin) / (last - first) * (total - step) if last > first else math.nan

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head, *rest = self.parts()
        spinner = _SPINNER[int(time.monotonic() * 10) % len(_SPINNER)]
        row: list[Text | ProgressBar] = [Text.assemble((spinner, "cyan"), " ", head)]
        if self._state is not None:
            step, total, *_ = self._state
            room = options.max_width - len(head) - 6
            text = _fit(rest, room - 10)
            bar = ProgressBar(total, step, width=max(1, min(40, room - len(text))), complete_style="cyan")
            row += [bar, text]
        grid = Table.grid(padding=(0, 2, 0, 0))
        for _ in row:
            grid.add_column(no_wrap=True)
        grid.add_row(*row)
        yield grid


class _Console(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave it visible, always: a process that is killed could not bring it back."""
        return False


class _Stream:
    """A stream that takes every character, and that may break without an exception."""

    encoding = "utf-8"

    def __init__(self, stream: TextIO, *, strip: bool) -> None:
        self._stream, self._strip = stream, strip
        self._encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> None:
        """Write what the encoding can hold; lines without trailing spaces if `strip`."""
        if not self._encoding.lower().startswith("utf"):
            text = text.translate(_ASCII)
        if self._strip:
            text = re.sub(r" +(?=\n)", "", text)
        # A closed pipe or a full disk must not end the training.
        with contextlib.suppress(OSError):
            self._stream.write(text.encode(self._encoding, "replace").decode(self._encoding))

    def flush(self) -> None:
        """Flush if the stream still can."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _layer_row(layer: LayerRow) -> _Row:
    """One layer's own; in full precision it has no place on the chip."""
    row = {
        "layer": layer.name,
        "kernel": _TIMES.join(map(str, layer.kernel)),
        "output": _TIMES.join(map(str, layer.output)) or "-",
        "bits": layer.bits,
    }
    totals = _totals([layer])
    if layer.cost is None:
        return {**row, "parameters": totals["parameters"], "style": "dim"}
    tiles = f"{layer.cost.row_tiles}{_TIMES}{layer.cost.column_tiles}"
    return {**totals, **row, "tiles": tiles, "reads": count(layer.cost.read_groups)}


def _totals(layers: Sequence[LayerRow]) -> _Row:
    """What adds up over layers."""
    costs = [layer.cost for layer in layers if layer.cost]
    full = [layer for layer in layers if not layer.cost]
    parameters = [math.prod(layer.kernel) if layer.parameters is None else layer.parameters for layer in full]
    used, cells = sum(cost.used_cells for cost in costs), sum(cost.cells for cost in costs)
    return {
        "layer": "total",
        "arrays": count(sum(cost.arrays for cost in costs)),
        "cells\nused": _show(used / max(cells, 1), ".0%"),
        "conversions\nper image": count(sum(cost.adc_conversions for cost in costs) or None),
        "multiplies\nper pixel": count(sum(cost.dequantization_multiplications for cost in costs)),
        "(paper's\ncount)": f"({count(sum(cost.dequantization_multiplications_of_paper for cost in costs))})",
        "parameters": count(sum(parameters) + sum(cost.parameters for cost in costs)),
    }


def _step_row(step: Mapping[str, Any]) -> _Row:
    moved = {f"{kind}\nmoved": _show(drift) for kind, drift in step["drift"].items()}
    saturated, used, codes = (step.get(key) for key in ("saturated", "codes_used", "codes"))
    row = {"layer": step["layer"], "saturated": _show(saturated, ".1%"), **moved}
    return row if used is None else {**row, "codes\nused": f"{_show(used)} of {codes}"}


def _table(columns: Sequence[_Column], rows: Sequence[_Row], totals: _Row) -> Table:
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


def _width(console: Console, table: Table) -> int:
    """What a table needs to be printed unbroken."""
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum


def _fit(parts: Sequence[Text], width: int) -> Text:
    """As many of the parts, from the first one on, as fit in one line; at least one."""
    line, *rest = parts
    for part in rest:
        if len(line) + 2 + len(part) > width:
            break
        line = line + "  " + part
    return line


def _labelled(label: str, value: str, style: str = "") -> Text:
    return Text.assemble((f"{label} ", "dim"), (value, style))


def _show(value: float | None, form: str = ".3g") -> str:
    return "-" if value is None else format(value, form).replace("%", " %")


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"


def _plain_width() -> int:
    """Columns of the terminal that may stand behind a pipe (`| tee`), else enough for everything."""
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"])
    for descriptor in (2, 1, 0):
        with contextlib.suppress(OSError):
            return os.get_terminal_size(descriptor).columns or _PLAIN_WIDTH
    return _PLAIN_WIDTH
