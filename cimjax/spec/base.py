"""The base of every specification: conversion to and from plain dictionaries, and one way to refuse a value.

What the fields mean, and which combinations are refused, is in `cimjax.spec`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, Self


class Spec:
    """Conversion to and from plain dictionaries, and one way to refuse a value."""

    def to_dict(self) -> dict[str, Any]:
        """A plain, JSON-compatible dictionary of every field; `from_dict` inverts it."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a plain dictionary; missing fields take their defaults.

        Raises:
          ValueError: for an unknown field (the nearest valid name is given) or a refused value.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"`{cls.__name__}` is built from a dictionary of its fields, got {values!r}.")
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        for name in values:
            if name not in known:
                raise ValueError(f"`{cls.__name__}` has no field {name!r}{nearest(str(name), sorted(known))}.")
        return cls(**values)

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _enum(self, name: str, kind: type[enum.StrEnum]) -> None:
        value = getattr(self, name)
        allowed = [str(member) for member in kind]
        if value not in allowed:
            raise ValueError(f"`{name}` is {value!r}{nearest(str(value), allowed)}; allowed: {', '.join(allowed)}.")
        self._set(name, kind(value))

    def _bits(self, name: str, low: int, high: int, *, half: bool) -> None:
        value = getattr(self, name)
        whole = is_number(value) and float(value).is_integer() and low <= value <= high
        if not (whole or (half and value == 1.5)):
            extra = ", or 1.5 (three codes)" if half else ""
            raise ValueError(f"`{name}` is {value!r}; give a whole number of bits from {low} to {high}{extra}.")
        self._set(name, int(value) if whole else 1.5)

    def _count(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"`{name}` is {value!r}; give a whole number of at least 1.")
        self._set(name, int(value))

    def _flag(self, name: str) -> None:
        if not isinstance(getattr(self, name), bool):
            raise ValueError(f"`{name}` is {getattr(self, name)!r}; give True or False.")

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if not is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"`{name}` is {value!r}; give a positive finite number.")
        self._set(name, float(value))

    def _nested(self, name: str, kind: type[Spec], *, optional: bool = False) -> None:
        value = getattr(self, name)
        if isinstance(value, Mapping):
            self._set(name, kind.from_dict(value))
        elif not (isinstance(value, kind) or (optional and value is None)):
            none = " or None" if optional else ""
            raise ValueError(f"`{name}` is {value!r}; give a {kind.__name__}{none}.")


def is_number(value: Any) -> bool:
    """True for a real number that is not a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_dict()
    return str(value) if isinstance(value, enum.StrEnum) else value


def nearest(name: str, allowed: Iterable[str]) -> str:
    """The nearest valid name, as the end of a sentence, or nothing."""
    allowed = list(allowed)
    match = difflib.get_close_matches(name, allowed, n=1)
    return f" (did you mean {match[0]!r}?)" if match else f" (known: {', '.join(allowed)})"
