"""What a person sees of a training run: the layers before it, a live bar during it, a table after it.

On a terminal the bar is live and lines are coloured (`rich`; NO_COLOR is respected); elsewhere plain lines come out,
without escape codes or carriage returns. What does not fit the width is left out, least important first, so that no
row is broken. Nothing is measured, judged or stored here, and whatever happens to the stream, training goes on.
"""

from __future__ import annotations

import collections
import datetime
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cimjax.training.show.tables import (
    Column,
    LayerRow,
    Row,
    count,
    layer_columns,
    layer_row,
    make_table,
    show,
    step_columns,
    step_row,
    totals_of,
    width_of,
)
from cimjax.training.show.terminal import SPINNER, SafeStream, VisibleConsole, plain_width

# Seconds between plain progress lines; a long run waits longer, this part of its time so far.
_PLAIN_SECONDS, _PLAIN_PART = 15.0, 0.02


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
        self._console = VisibleConsole(
            file=cast(TextIO, SafeStream(stream, strip=plain)),
            force_terminal=not plain,
            force_jupyter=False,
            color_system=None if plain else "auto",
            width=plain_width() if plain else None,
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
            self._table(layer_columns(layers), [layer_row(layer) for layer in layers], totals_of(layers))
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

    def compiling(self, what: str) -> None:
        """Say, in the bar, that nothing moves because something is being compiled."""
        self._bar.wait(f"compiling {what}")

    def resume(self, step: int, epoch: float) -> None:
        """Say that the run goes on after `step` steps, which are `epoch` epochs (a fraction too)."""
        self.note(f"resumed after step {step:,} (epoch {show(epoch)})")
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
          record: `test_accuracy`, `validation_accuracy` (where images are held out), `best` (whether that is the best
            so far), `train_accuracy`, `train_loss`, `learning_rate`, `images_per_second`; accuracies from 0 to 1. What
            is absent or None is shown as "-".
        """
        best, get = bool(record.get("best")), record.get
        held_out = _labelled("held out", f"{show(get('validation_accuracy'), '.2%'):>8}", "bold green" if best else "")
        parts = [
            Text(f"epoch {epoch:>{len(str(epochs))}}/{epochs}"),
            _labelled("test", f"{show(get('test_accuracy'), '.2%'):>8}", "bold"),
            *([] if get("validation_accuracy") is None else [held_out, Text("best" if best else "    ", "green")]),
            _labelled("train", f"{show(get('train_accuracy'), '.2%'):>8}"),
            _labelled("loss", f"{show(get('train_loss'), '.4f'):>7}"),
            _labelled("lr", f"{show(get('learning_rate')):>8}"),
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
        columns = step_columns(drifts)
        if steps:
            self._table(columns, [step_row(step) for step in steps], {})
        self._console.print()
        moved = ", ".join(f"{kind} {show(sum(values) / len(values))}" for kind, values in drifts.items())
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

    def _table(self, columns: Sequence[Column], rows: Sequence[Row], totals: Row) -> None:
        """Print the columns that fit, what they mean, and which ones a wider terminal shows."""
        known = [column for column in columns if any(row.get(column.header, "-") != "-" for row in rows)]
        kept = list(known)
        while width_of(self._console, table := make_table(kept, rows, totals)) > self._console.width:
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


class _Bar:
    """The live line; moved by the training loop, drawn by rich's thread."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Begin anew, with nothing known of the speed."""
        self._begin = time.monotonic()
        self._state: tuple[int, int, float, float, float, float] | None = None
        self._waiting = "preparing the first steps"
        # Times and steps of the last minutes, which tell the time left; the first compilation is soon forgotten.
        self._samples: collections.deque[tuple[float, int]] = collections.deque(maxlen=120)

    def wait(self, what: str) -> None:
        """Nothing will move for a while, because of `what`."""
        self._begin, self._waiting = time.monotonic(), what

    def move(self, *state: Any) -> None:
        """Take the arguments of `Display.progress`."""
        now, step = time.monotonic(), state[0]
        self._waiting = ""
        if step > 0 and (not self._samples or now - self._samples[-1][0] >= 1):
            self._samples.append((now, step))
        self._state = cast(tuple[int, int, float, float, float, float], state)

    def parts(self) -> list[Text]:
        """What there is to say, the most important first."""
        if self._waiting or self._state is None:
            return [Text(f"{self._waiting} {_duration(time.monotonic() - self._begin)}")]
        step, total, epoch, loss, accuracy, speed = self._state
        epochs = show(round(epoch * total / step, 1) if step else None)
        return [
            Text(f"epoch {epoch:>{len(epochs) + 2}.1f}/{epochs} {step / max(total, 1):>4.0%}"),
            Text(f"{_duration(self._seconds_left(step, total)):>7} left"),
            _labelled("loss", f"{show(loss, '.4f'):>7}"),
            _labelled("accuracy", f"{show(accuracy, '.1%'):>7}"),
            Text(f"{count(speed):>6} images/s", "dim"),
        ]

    def _seconds_left(self, step: int, total: int) -> float:
        if len(self._samples) < 2:
            return math.nan
        (begin, first), (end, last) = self._samples[0], self._samples[-1]
        since = time.monotonic() - end
        if last == first or since > 10 + 3 * (end - begin) / len(self._samples):
            return math.nan  # what moved then says nothing of now
        return max(0.0, (end - begin) / (last - first) * (total - step) - since)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head, *rest = self.parts()
        spinner = SPINNER[int(time.monotonic() * 10) % len(SPINNER)]
        row: list[Text | ProgressBar] = [Text.assemble((spinner, "cyan"), " ", head)]
        if self._state is not None and not self._waiting:
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


def _duration(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds))) if math.isfinite(seconds) else "-"
