"""In which units the integers of a network are counted, and its steps while they are planned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from cimjax.hardware.factors import INT32, exponent_of_bits
from cimjax.hardware.network.operations import Operation

# Room for what rounding adds to the largest value.
_ROOM = 0.98 * INT32
# Makes the operation of a step of its exponent and the bounds of its inputs' integers.
Make = Callable[[int, Sequence[int]], Operation]


class Unit:
    """The power of two that some values are counted in.

    exponent: of it; not yet known while the plan is made.
    largest: the largest real magnitude of these values.
    factor: the largest real factor behind ADCs that gives one of them.
    least: units whose exponents this one's exceeds by so much at least: of values that are shifted into it.
    """

    def __init__(self, largest: float, factor: float = 0.0, least: Sequence[tuple[Unit, int]] = ()) -> None:
        self.largest, self.factor, self.least, self.exponent = largest, factor, list(least), 0
        self._same: Unit | None = None

    def root(self) -> Unit:
        return self if self._same is None else self._same.root()

    def joined(self, other: Unit) -> Unit:
        """The unit of both, from now on."""
        mine, theirs = self.root(), other.root()
        if mine is not theirs:
            theirs._same = mine
            mine.largest, mine.factor = max(mine.largest, theirs.largest), max(mine.factor, theirs.factor)
            mine.least += theirs.least
        return mine


def choose(units: Sequence[Unit], bits: int) -> None:
    """The least exponents with which values fit, and factors behind ADCs have no more than so many bits."""
    for unit in units:
        unit.exponent = math.ceil(math.log2(max(unit.largest, 1e-30) / _ROOM))
        if unit.factor:
            unit.exponent = max(unit.exponent, exponent_of_bits(unit.factor, bits))
    for _ in units:
        for unit in units:
            unit.exponent = max([unit.exponent, *(other.root().exponent + by for other, by in unit.least)])


@dataclasses.dataclass(eq=False)
class Value:
    """A step that is planned.

    reach: the largest real magnitude, of codes the largest code.
    unit: None of codes.
    make: the operation, when the exponent of the step and the bounds of its inputs' integers are known.
    """

    inputs: tuple[Value, ...]
    reach: float
    unit: Unit | None
    make: Make

    @property
    def exponent(self) -> int:
        return 0 if self.unit is None else self.unit.root().exponent


def ordered(result: Any) -> list[Any]:
    """A thing behind all its `inputs`, and these likewise, each once; without recursion, which networks are too deep
    for."""
    found: list[Any] = []
    waiting, started = [(result, iter(result.inputs))], {result}
    while waiting:
        current, inputs = waiting[-1]
        following = next((each for each in inputs if each not in started), None)
        if following is None:
            found.append(current)
            waiting.pop()
        else:
            started.add(following)
            waiting.append((following, iter(following.inputs)))
    return found
