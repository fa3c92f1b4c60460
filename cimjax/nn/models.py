"""Networks by the names that configurations use."""

from __future__ import annotations

import difflib
from typing import Any

import flax.linen as nn

from cimjax.nn.rules import ConvMaker, Rules
from cimjax.nn.small import SmallNet

MODELS: dict[str, type[nn.Module]] = {"small": SmallNet}


def build_model(name: str, *, classes: int, conv: ConvMaker, rules: Rules, **options: Any) -> nn.Module:
    """A network by name; `options` are its own fields, such as `width`.

    Raises:
      ValueError: for an unknown name or option, with the nearest valid one.
    """
    if name not in MODELS:
        raise ValueError(f"`model.name` is {name!r}{_nearest(name, MODELS)}; allowed: {', '.join(MODELS)}.")
    fields = set(MODELS[name].__dataclass_fields__) - {"parent", "name", "classes", "conv", "rules", "axis_name"}
    for option in options:
        if option not in fields:
            known = ", ".join(sorted(fields))
            raise ValueError(f"`model.{option}` is no option of {name!r}{_nearest(option, fields)}; it has: {known}.")
    return MODELS[name](classes=classes, conv=conv, rules=rules, **options)


def _nearest(name: str, allowed: Any) -> str:
    match = difflib.get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
