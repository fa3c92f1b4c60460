"""Code ranges and planes: the integer facts that a specification implies, as plain Python.

Everything here is known before any array exists: which codes a quantizer of so many bits has, and into which
planes (significances and digit ranges) a code is split. Arrays are split in `cimjax.core.encoding`; what a user
chooses, and its validation, is in `cimjax.spec`.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class CodeRange(NamedTuple):
    """The codes of one quantizer: `q_min .. q_max`, or only the two ends when `size` is 2 and `q_min` is -1.

    Where parts of a tensor have different codes, the entries are arrays that broadcast to it (`core.adc.psum_ranges`).

    q_min, q_max: the lowest and the highest code.
    size: how many codes there are; `{-1, +1}` has 2 and no 0, `{-1, 0, +1}` has 3.
    """

    q_min: Any
    q_max: Any
    size: Any

    @property
    def magnitude(self) -> Any:
        """`max(|q_min|, |q_max|)`, never zero: LSQ's `q`."""
        return max(abs(self.q_min), abs(self.q_max))

    @property
    def binary(self) -> Any:
        """True for `{-1, +1}`, whose code is the sign of the input."""
        return (self.q_min == -1) & (self.size == 2)


class Plane(NamedTuple):
    """All digits of equal significance.

    significance: the integer that one digit unit counts for; negative for a subtracting plane.
    d_min, d_max: the lowest and the highest digit; `d_min < 0` makes the plane signed.
    """

    significance: int
    d_min: int
    d_max: int

    @property
    def signed(self) -> bool:
        """True when digits may be negative: a pair of cells subtracted before one ADC."""
        return self.d_min < 0

    @property
    def magnitude(self) -> int:
        """`max |digit|`."""
        return max(-self.d_min, self.d_max)


def code_range(bits: float, *, signed: bool) -> CodeRange:
    """The codes of an activation or ADC quantizer (weights: `weight_range`).

    One bit is `0..1` or `{-1, +1}`, 1.5 bits are `0..2` or `{-1, 0, +1}`, `b >= 2` bits are `0..2^b-1` or
    `-2^(b-1)..2^(b-1)-1`.
    """
    if bits == 1:
        return CodeRange(-1, 1, 2) if signed else CodeRange(0, 1, 2)
    if bits == 1.5:
        return CodeRange(-1, 1, 3) if signed else CodeRange(0, 2, 3)
    size = 2 ** int(bits)
    return CodeRange(-size // 2, size // 2 - 1, size) if signed else CodeRange(0, size - 1, size)


def weight_range(bits: float, *, symmetric: bool) -> CodeRange:
    """The codes of a weight quantizer; `symmetric` drops `-2^(b-1)`, which a magnitude cannot store."""
    q_min, q_max, size = code_range(bits, signed=True)
    return CodeRange(-q_max, q_max, size - 1) if symmetric and bits >= 2 else CodeRange(q_min, q_max, size)


def unsigned_planes(bits: int, digit_bits: int, sign: int = 1) -> tuple[Plane, ...]:
    """Planes of a non-negative integer of `bits` bits, lowest first; the top digit may be narrower."""
    return tuple(
        Plane(sign * 2**shift, 0, 2 ** min(digit_bits, bits - shift) - 1) for shift in range(0, bits, digit_bits)
    )


def twos_complement_planes(bits: int, digit_bits: int) -> tuple[Plane, ...]:
    """Planes of a two's complement integer: lower planes unsigned, the top one signed, or subtracting if 1 bit wide."""
    *lower, top = unsigned_planes(bits, digit_bits)
    if top.d_max == 1:
        return (*lower, Plane(-top.significance, 0, 1))
    half = (top.d_max + 1) // 2
    return (*lower, Plane(top.significance, -half, half - 1))


def magnitude_planes(bits: int, digit_bits: int, *, analog: bool) -> tuple[Plane, ...]:
    """Planes of a sign and a magnitude of `bits` bits.

    `analog`: one signed plane per digit. Otherwise the plus planes, then the minus planes (negative significance).
    """
    plus = unsigned_planes(bits, digit_bits)
    if analog:
        return tuple(Plane(p.significance, -p.d_max, p.d_max) for p in plus)
    return plus + unsigned_planes(bits, digit_bits, sign=-1)
