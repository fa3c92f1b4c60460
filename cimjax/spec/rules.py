"""Rules: which layers of a network are specified otherwise, told by patterns of their paths.

Which layer is built by a rule, and which where none matches, is told in `cimjax.nn.rules`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cimjax.spec.base import shown
from cimjax.spec.layer import CIMSpec

# (pattern, specification) pairs; the pattern matches a layer's whole path, "block2/conv1"; None is full precision.
Rules = tuple[tuple[str, CIMSpec | None], ...]


def check_rules(rules: Any) -> Rules:
    """Rules from plain data: specifications as dictionaries or `CIMSpec`.

    Raises:
      ValueError: for a rule that is not a pair, a pattern that is no regular expression, or a refused specification.
    """
    if isinstance(rules, str | Mapping) or not isinstance(rules, Iterable):
        raise ValueError(f"`rules` is {shown(rules)}; give pairs of a path pattern and a specification or None.")
    checked = []
    for rule in rules:
        if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[0], str):
            raise ValueError(f"`rules` has {shown(rule)}; give pairs of a path pattern and a specification or None.")
        pattern, spec = rule
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"`rules` has the pattern {shown(pattern)}, which is no regular expression: {error}."
            ) from None
        checked.append((pattern, spec if spec is None or isinstance(spec, CIMSpec) else CIMSpec.from_dict(spec)))
    return tuple(checked)


def decided(path: str, rules: Rules, otherwise: Any) -> Any:
    """What the first rule that matches a layer's path says, a specification or None; `otherwise` where none does."""
    return next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), otherwise)


def rules_without_layer(rules: Rules, paths: Iterable[str]) -> list[str]:
    """The patterns that match no layer, or only layers that rules before them match."""
    paths, idle = list(paths), []
    for pattern, _ in rules:
        left = [path for path in paths if not re.fullmatch(pattern, path)]
        if len(left) == len(paths):
            idle.append(pattern)
        paths = left
    return idle


def on_rules(rules: Rules, paths: Sequence[str]) -> list[str]:
    """A line for each rule that changes none of the layers at `paths`, as those do in which a path is misspelt."""
    return [
        f"`rules` has the pattern {shown(pattern)}, which names no layer that is left to it; the layers are "
        f"{', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}."
        for pattern in rules_without_layer(rules, paths)
    ]
