"""Which part of every batch a process has."""

from __future__ import annotations

from typing import NamedTuple


class Share(NamedTuple):
    """One of `out_of` equal parts, `number` counted from 0."""

    number: int = 0
    out_of: int = 1

    def range_of(self, batch_size: int) -> slice:
        """Where the part stands in a batch, whose size `out_of` divides."""
        mine = batch_size // self.out_of
        return slice(self.number * mine, (self.number + 1) * mine)


WHOLE = Share()
