"""Which layer of a network is built how: the network's own convolution, unless a rule names the layer.

A network takes its convolution as an argument and a table of rules, so that one network serves full precision and
every array.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
from jax import Array

from cimjax.core.lsq import Codes
from cimjax.nn.layers import CIMConv, CIMDense, Quantize
from cimjax.spec import ActivationSpec, CIMSpec, Execution
from cimjax.spec.base import shown

# Builds a convolution from (features, kernel_size, ...), as `flax.linen.Conv` and `partial(CIMConv, spec=spec)` do.
ConvMaker = Callable[..., nn.Module]
plain_conv: ConvMaker = nn.Conv
# (pattern, specification) pairs; the pattern matches a layer's whole path, "block2/conv1"; None is full precision.
Rules = tuple[tuple[str, CIMSpec | None], ...]


def conv_maker(spec: CIMSpec | None, execution: Execution = Execution()) -> ConvMaker:
    """The convolution of a specification; `plain_conv` for None."""
    return plain_conv if spec is None else functools.partial(CIMConv, spec=spec, execution=execution)


def conv_for(parent: nn.Module, name: str, default: ConvMaker, rules: Rules) -> ConvMaker:
    """The convolution for the layer `name` inside `parent`: the first rule that matches its path, else `default`."""
    found = decided("/".join((*parent.path, name)), rules, default)
    maker = default if found is default else conv_maker(found, _keyword(default, "execution", Execution()))
    return functools.partial(maker, name=name)


def shared_input(parent: nn.Module, names: Sequence[str], default: ConvMaker, rules: Rules, x: Array) -> Array | Codes:
    """The input of several layers inside `parent`: quantized once if all of them are array layers that read the same
    codes, else `x` itself, which each layer quantizes as it needs; a single reader does that anyway.
    """
    specs = [conv_for(parent, name, default, rules) for name in names]
    activation, *others = [_activation_of(maker) for maker in specs]
    if not others or activation is None or any(other != activation for other in others):
        return x
    return Quantize(activation, name="quantize")(x)


def _activation_of(maker: Any) -> ActivationSpec | None:
    """The activation that a convolution maker quantizes its input to; None for other convolutions."""
    spec = _keyword(maker, "spec", None)
    return None if spec is None else spec.activation


def _keyword(maker: Any, name: str, default: Any) -> Any:
    """A keyword argument that a maker was given beforehand."""
    while isinstance(maker, functools.partial):
        if name in maker.keywords:
            return maker.keywords[name]
        maker = maker.func
    return default


def dense_for(parent: nn.Module, name: str, conv: ConvMaker, rules: Rules) -> Callable[..., nn.Module]:
    """The matrix product for the layer `name` inside `parent`: full precision unless a rule matches its path, and then
    executed as the network's convolutions are.
    """
    spec = decided("/".join((*parent.path, name)), rules, None)
    if spec is None:
        return functools.partial(nn.Dense, name=name)
    return functools.partial(CIMDense, spec=spec, execution=_keyword(conv, "execution", Execution()), name=name)


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
