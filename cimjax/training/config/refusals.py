"""How options and fields of configs are refused: in one line, which names what is wrong as it was typed."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping


class OptionError(ValueError):
    """An option that cannot be: one line that names it as it is typed, and what is allowed."""


@contextlib.contextmanager
def in_other_names(names: Mapping[str, str]) -> Iterator[None]:
    """Turn what a specification refuses into the same line with other names for its fields."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"`(\w+)`", lambda found: f"`{names.get(found[1], found[1])}`", str(error))
        raise OptionError(text) from error
