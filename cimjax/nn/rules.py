"""Which layer of a network is built how: the network's own convolution, unless a rule names the layer.

A network takes its convolution as an argument and a table of rules, so that one network serves full precision and
every array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
from jax import Array

from cimjax.core.lsq import Codes
from cimjax.nn.layers import CIMConv, CIMDense, Quantize
from cimjax.spec import ActivationSpec, CIMSpec, Execution
from cimjax.spec.rules import Rules, decided

# Builds a convolution from (features, kernel_size, ...), as `flax.linen.Conv` and `partial(CIMConv, spec=spec)` do.
ConvMaker = Callable[..., nn.Module]
plain_conv: ConvMaker = nn.Conv


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
