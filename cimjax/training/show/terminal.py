"""The terminal beneath the display: characters that a stream cannot hold, streams that break, and their width."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any, TextIO, cast

from rich.console import Console

# Width of plain output where neither COLUMNS nor a terminal tells it.
_PLAIN_WIDTH = 120
# What is used beyond ASCII, here and by rich, and what stands for it in a stream that cannot hold it.
SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_ASCII = str.maketrans("─━╸╺…\N{MULTIPLICATION SIGN}" + SPINNER, "-== .x" + r"|/-\|/-\|/")


def is_plain(stream: TextIO) -> bool:
    """Whether a stream gets plain lines: it is no terminal, or one that knows no escape codes."""
    return not stream.isatty() or os.environ.get("TERM") == "dumb"


def console_on(stream: TextIO, *, plain: bool) -> Console:
    """A console that prints text as it is, whatever happens to the stream."""
    return _VisibleConsole(
        file=cast(TextIO, _SafeStream(stream, strip=plain)),
        force_terminal=not plain,
        force_jupyter=False,
        color_system=None if plain else "auto",
        width=_plain_width() if plain else None,
        markup=False,
        highlight=False,
        emoji=False,
    )


class _VisibleConsole(Console):
    def show_cursor(self, show: bool = True) -> bool:
        """Leave it visible, always: a process that is killed could not bring it back."""
        return False


class _SafeStream:
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


def _plain_width() -> int:
    """Columns of the terminal that may stand behind a pipe (`| tee`), else enough for everything."""
    if os.environ.get("COLUMNS", "").isdigit():
        return int(os.environ["COLUMNS"])
    for descriptor in (2, 1, 0):
        with contextlib.suppress(OSError):
            return os.get_terminal_size(descriptor).columns or _PLAIN_WIDTH
    return _PLAIN_WIDTH
