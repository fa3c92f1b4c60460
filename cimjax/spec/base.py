"""The base of every specification: conversion to and from plain dictionaries, and one way to refuse a value.

What the fields mean, and which combinations are refused, is in `cimjax.spec`. The words of a refusal, the value got
and the name that was meant, are made here for the whole library.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import numbers
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, Self

# The largest whole number that a field takes: what an int32 holds, and beyond everything that is built.
LARGEST_COUNT = 2**31 - 1
# Beyond these a gradient overflows float32, or a step no longer moves.
_GRADIENT_FACTORS = (1e-6, 1_000_000)
# In units of one psum, of which float32 counts 2^24; far beyond, the step or its reciprocal leaves float32.
_FULL_SCALES = (1e-6, 1_000_000_000)
# Letters of a long text that a message shows at either end.
_ENDS = 60


class Notice(UserWarning):
    """A warning that says all in one line; a command prints that line, and nothing about its place in the code."""


class Spec:
    """What every specification is: a frozen dataclass of keyword-only fields that refuses what it cannot be.

    The fields are those of the dataclass; whatever else is given is refused before they are set, by the name that was
    meant, so that signatures stay the dataclass's own.
    """

    def __new__(cls, *unnamed: Any, **values: Any) -> Self:
        if unnamed:
            first = next(iter(_names(cls)))
            raise ValueError(f"`{cls.__name__}` got {shown(unnamed[0])}; name its fields, as in {first}=VALUE.")
        _require_known(cls, values)
        missing = [f.name for f in dataclasses.fields(cls) if _is_required(f) and f.name not in values]  # type: ignore[arg-type]
        if missing:
            raise ValueError(f"`{cls.__name__}` is given without `{missing[0]}`; it has no default, give it.")
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, Any]]:
        # For `copy` and `pickle`, which call `__new__`, and not `__init__`.
        return (), {name: getattr(self, name) for name in _names(type(self))}

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-compatible dictionary of every field; `from_dict` inverts it."""
        return {name: _plain(getattr(self, name)) for name in _names(type(self))}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a plain dictionary; missing fields take their defaults.

        Raises:
          ValueError: for an unknown field (the nearest valid name is given) or a refused value.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"`{cls.__name__}` is built from a dictionary of its fields, got {shown(values)}.")
        _require_known(cls, values)
        return cls(**values)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _enum(self, name: str, kind: type[enum.StrEnum]) -> None:
        value = getattr(self, name)
        allowed = [str(member) for member in kind]
        if not isinstance(value, str) or value not in allowed:
            meant = nearest(value, allowed) if isinstance(value, str) else ""
            raise ValueError(f"`{name}` is {shown(value)}{meant}; allowed: {', '.join(allowed)}.")
        self._set(name, kind(value))

    def _bits(self, name: str, low: int, high: int, *, half: bool) -> None:
        value = getattr(self, name)
        if not _is_bits(value, low, high, half=half):
            extra = ", or 1.5 (three codes)" if half else ""
            raise ValueError(f"`{name}` is {shown(value)}; give a whole number of bits from {low} to {high}{extra}.")
        self._set(name, _as_bits(value))

    def _several_bits(self, name: str, low: int, high: int) -> None:
        values = getattr(self, name)
        several = isinstance(values, list | tuple) and len(values) > 0
        if not several or not all(_is_bits(value, low, high, half=True) for value in values):
            raise ValueError(
                f"`{name}` is {shown(values)}; give several numbers of bits, from {low} to {high} or 1.5, as in (2, 3)."
            )
        self._set(name, tuple(map(_as_bits, values)))

    def _count(self, name: str) -> None:
        value = getattr(self, name)
        whole = is_number(value) and isinstance(value, numbers.Integral)
        if not whole or not 1 <= value <= LARGEST_COUNT:
            limit = f" and at most {LARGEST_COUNT}" if whole and value > LARGEST_COUNT else ""
            raise ValueError(f"`{name}` is {shown(value)}; give a whole number of at least 1{limit}.")
        self._set(name, int(value))

    def _flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise ValueError(f"`{name}` is {shown(getattr(self, name))}; give True or False.")

    def _number(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not is_number(value) or not low <= value <= high:
            raise ValueError(f"`{name}` is {shown(value)}; give a number from {low:,} to {high:,}.")
        self._set(name, float(value))

    def _full_scale(self, covered: str) -> None:
        """Refuse a `full_scale` without a fixed `step`, and the reverse; `covered` is what it spans."""
        step, full_scale = (getattr(self, name) for name in ("step", "full_scale"))
        if step == "fixed":
            if full_scale is None:
                raise ValueError(f"`full_scale` is None with `step` 'fixed'; give the span of {covered}, as in 64.")
            self._number("full_scale", *_FULL_SCALES)
        elif full_scale is not None:
            raise ValueError(f"`full_scale` is {shown(full_scale)} with `step` {step!s}; it belongs to `step` 'fixed'.")

    def _gradient_factor(self) -> None:
        self._number("gradient_factor", *_GRADIENT_FACTORS)

    def _nested(self, name: str, kind: type[Spec], *, optional: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, Mapping):
            self._set(name, kind.from_dict(value))
        elif not (isinstance(value, kind) or (optional and value is None)):
            none = " or None" if optional else ""
            raise ValueError(f"`{name}` is {shown(value)}; give a {kind.__name__}{none}.")


def _is_bits(value: Any, low: int, high: int, *, half: bool) -> bool:
    # Bounds first: a number of hundreds of digits has no float.
    in_range = is_number(value) and low <= value <= high
    return in_range and (float(value).is_integer() or (half and value == 1.5))


def _as_bits(value: Any) -> float:
    return int(value) if float(value).is_integer() else 1.5


def is_number(value: Any) -> bool:
    """True for a real number that is not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def nearest(name: str, allowed: Iterable[str], *, otherwise_all: bool = True) -> str:
    """The nearest valid name, as the end of a sentence; where none is near all of them, or nothing.

    >>> nearest("colum", ("layer", "column")), nearest("row", ("layer", "column"), otherwise_all=False)
    (" (did you mean 'column'?)", '')
    """
    allowed = list(allowed)
    match = closest(name, allowed)
    if match is not None:
        return f" (did you mean {match!r}?)"
    return f" (known: {', '.join(allowed)})" if otherwise_all else ""


def closest(name: str, allowed: Iterable[str]) -> str | None:
    """The valid name that was meant, or None where none is near."""
    # Nobody means a name by thousands of letters, and comparing them takes its time.
    return next(iter(difflib.get_close_matches(name[:100], list(allowed), n=1)), None)


def shown(value: Any) -> str:
    """A value in a message: its `repr` in one line that can be read, however large or deep or odd it is.

    >>> shown("column"), shown(10**400), shown([[[]]])
    ("'column'", '1000000000000000000000000...0000000000000000000000000', '[[[]]]')
    """
    try:
        return " ".join(_SHORT.repr(value).split())
    except Exception:  # of a `repr` of others; Python itself refuses to write numbers of thousands of digits
        return f"of type {type(value).__name__}"


def shortened(text: str) -> str:
    """A text as it was typed, without its middle where nobody would read that."""
    return text if len(text) <= 2 * _ENDS else f"{text[:_ENDS]}...{text[-_ENDS:]}"


def _short() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 4, 60, 53, 60
    return short


_SHORT = _short()


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    return str(value) if isinstance(value, enum.StrEnum) else value


def _names(kind: type[Spec]) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _require_known(kind: type[Spec], values: Iterable[Any]) -> None:
    known = _names(kind)
    for name in values:
        if name not in known:
            text = name if isinstance(name, str) else shown(name)
            raise ValueError(f"`{kind.__name__}` has no field {shown(name)}{nearest(text, sorted(known))}.")
