"""What long commands say while they work: lines on standard error, of which the last ones are live on a terminal."""

from __future__ import annotations

import datetime
import sys
import time
from typing import Self, TextIO

from rich.console import Group
from rich.live import Live
from rich.text import Text

from cimjax.training.show.terminal import SPINNER, console_on, is_plain


class Progress:
    """What is being done and what is done; as a context manager it takes the live lines away at its end."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Nothing is printed yet.

        Args:
          stream: where to print; standard error unless told otherwise.
        """
        stream = stream or sys.stderr
        plain = is_plain(stream)
        self._console = console_on(stream, plain=plain)
        self._live = None if plain else Live(self, console=self._console, refresh_per_second=5, transient=True)
        # What is being done, and since when.
        self._since: dict[str, float] = {}

    def doing(self, *texts: str) -> None:
        """What is being done from now on, instead of what was; as plain lines only what was not being done before."""
        now = time.monotonic()
        if self._live is None:
            for text in texts:
                if text not in self._since:
                    self.note(text)
        self._since = {text: self._since.get(text, now) for text in texts}

    def note(self, text: str) -> None:
        """A line that stays."""
        self._console.print(Text(text), soft_wrap=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._since = {}
        if self._live is not None:
            self._live.stop()

    def __rich__(self) -> Group:
        now = time.monotonic()
        spinner = SPINNER[int(now * 10) % len(SPINNER)]
        lines = [
            Text(f"{spinner} {datetime.timedelta(seconds=int(now - since))}  {text}", no_wrap=True, overflow="ellipsis")
            for text, since in self._since.items()
        ]
        return Group(*lines)
