"""What a person sees of a training run: the layers before it, a live bar during it, a table after it.

On a terminal the bar is live and lines are coloured (`rich`; NO_COLOR is respected); elsewhere plain lines come out,
without escape codes or carriage returns. What does not fit the width is left out, least important first, so that no
row is broken. Nothing is measured, judged or stored here, and whatever happens to the stream, training goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, Self, TextIO

from rich.text import Text

from cimjax.hardware.table import TextTable, count, show
from cimjax.training.show.bar import Bar, fit, labelled
from cimjax.training.show.tables import print_table
from cimjax.training.show.terminal import console_on, is_plain

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
        self._plain = is_plain(stream) if plain is None else plain
        self._console = console_on(stream, plain=self._plain)
        self._bar = Bar(self._console, plain=self._plain)
        self._begin = self._printed = time.monotonic()

    def start(self, title: str, facts: Mapping[str, str], layers: TextTable) -> None:
        """Print what is going to be trained, and begin the live bar.

        Args:
          title: one line.
          facts: label and text of each line of the header; texts are not broken, so that a path can be copied.
          layers: the layers in network order.
        """
        self._print(Text(title, "bold"))
        self._facts(facts)
        if layers.rows:
            print_table(self._console, layers)
        self._console.print()
        self._begin = time.monotonic()
        self._bar.start()

    def waiting(self, reason: str) -> None:
        """Say, in the bar, why nothing moves for a while."""
        self._bar.wait(reason)

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
            self._print(fit(self._bar.parts(), self._console.width))

    def epoch(
        self, epoch: float, epochs: float, records: Mapping[str, Mapping[str, Any]], images_per_second: float | None
    ) -> None:
        """Print the line of one epoch.

        Args:
          epoch, epochs: epochs done, and those of the whole run.
          records: `accuracy` (from 0 to 1) of "train", "test" and, where images are held out, "validation", which may
            be the `best` so far; `loss` and `learning_rate` of "train". What is absent or None is shown as "-".
          images_per_second: the training speed.
        """
        train, test, held_out = (records.get(split, {}) for split in ("train", "test", "validation"))
        best = held_out.get("best", False)
        parts = [
            Text(f"epoch {epoch:>{len(f'{epochs:g}')}g}/{epochs:g}"),
            labelled("test", f"{show(test.get('accuracy'), '.2%'):>8}", "bold"),
            labelled("train", f"{show(train.get('accuracy'), '.2%'):>8}"),
            labelled("loss", f"{show(train.get('loss'), '.4f'):>7}"),
            labelled("lr", f"{show(train.get('learning_rate')):>8}"),
            Text(f"{count(images_per_second):>6} images/s", "dim"),
        ]
        if held_out:
            accuracy = labelled("held out", f"{show(held_out['accuracy'], '.2%'):>8}", "bold green" if best else "")
            parts[2:2] = [accuracy, Text("best" if best else "    ", "green")]
        self._print(fit(parts, self._console.width))

    def warn(self, message: str) -> None:
        """Print a warning that stays."""
        self._message(Text.assemble(("warning: ", "bold"), message, style="yellow"))

    def note(self, message: str) -> None:
        """Print a remark that stays; a line of it that begins with a space, as a command may, is not broken."""
        self._message(Text(message))

    def finish(self, steps: TextTable, facts: Mapping[str, str]) -> None:
        """End the live bar and print what came out, the most important part last.

        Args:
          steps: what became of each layer's steps.
          facts: label and text of each line of the result.
        """
        self.close()
        if steps.rows:
            print_table(self._console, steps)
        self._console.print()
        self._facts(facts)

    def close(self) -> None:
        """Take the live bar away; may be called again."""
        self._bar.stop()

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
