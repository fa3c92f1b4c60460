"""What a traced network is made of: tensors and how they come about, before anything is rounded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple


class NotIntegersError(ValueError):
    """Something behind array layers is no operation on integers."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}: a network in integers cannot do that; use another operation there, or `cimjax.freeze`, which "
            "leaves what stands between array layers as it is."
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A tensor that comes out of array layers, or enters between them.

    kind: how it comes about, with its `fields` in parentheses: "entry" (value, an array; largest, the largest
      magnitude of its codes or None), "codes" (step, spec), "arrays" (layer, step of its codes), "affine" (factor,
      added, of channels), "limit" (low, high), "rising" (function), "add", "product" (weights), "sum" (axes),
      "largest" (axes), "window" (size, strides, padding, largest), "join" (axis), or a rearrangement, "pick", "pad",
      "reshape" or "transpose" (to).
    inputs: what it is made of.
    shape: (N, ..., C).
    """

    kind: str
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Seen(NamedTuple):
    """An array that depends on the images, but on no array layer."""

    value: Any
