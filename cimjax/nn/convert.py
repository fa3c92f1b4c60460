"""A network of plain Flax layers put into arrays as it stands: not a line of it is rewritten.

Flax lets the calls of a network's layers be intercepted. What an `nn.Conv` or `nn.Dense` would compute, a `CIMConv` or
`CIMDense` computes in its scope, so that the parameters are the layer's own, with steps beside them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import flax.linen as nn
import jax

from cimjax.nn.calibrate import RULES_OF_ARRAYS
from cimjax.nn.layers import CIMConv, CIMDense
from cimjax.spec import CIMSpec, Execution
from cimjax.spec.base import shown
from cimjax.spec.rules import Rules, check_rules, decided

# What stands in the arrays for a layer; other classes, also those made of these two, stay what they are.
_IN_ARRAYS: Mapping[type[nn.Module], type[CIMConv | CIMDense]] = {nn.Conv: CIMConv, nn.Dense: CIMDense}
# Fields that say nothing in arrays: sums are exact whatever the precision, and a layer has its place already.
_WITHOUT_MEANING = ("precision", "parent", "name")
# How the layers of the network that is called are built: a part of what every trace depends on, as of `nn.jit`.
_converting = jax.make_user_context(None)

Network = TypeVar("Network", bound=nn.Module)


def convert_network(
    network: Network,
    spec: CIMSpec | None,
    *,
    rules: Sequence[tuple[str, CIMSpec | None]] = (),
    execution: Execution = Execution(),
) -> Network:
    """The network with its `nn.Conv` and `nn.Dense` layers in arrays, whatever class, loop or transform they are in.

    The same methods, arguments and parameter names, so that trained weights drop in: `calibrate` and
    `cimjax.train(..., variables=)` take the variables of the network in full precision as they are. Layers of other
    classes, as those of attention (`nn.DenseGeneral`) and `nn.ConvTranspose`, stay in full precision, and tables of a
    network's layers do not list them.

    >>> import cimjax
    >>> network = nn.Sequential([nn.Conv(8, (3, 3)), nn.relu, nn.Conv(8, (3, 3))])
    >>> images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    >>> variables = network.init(jax.random.key(1), images)
    >>> chip = convert_network(network, CIMSpec(), rules=[("layers_0", None)])  # the first in full precision
    >>> in_arrays = cimjax.calibrate(chip, variables, images)
    >>> sorted(in_arrays["params"]["layers_2"])
    ['activation_log_step', 'bias', 'kernel', 'psum_log_step', 'weight_log_step']

    Args:
      network: a Flax module of the caller's own, not bound to variables.
      spec: what to build of every layer; None to leave in full precision those that no rule names.
      rules: (pattern, specification or None) pairs; the first pattern, a regular expression, that matches a layer's
        whole path, "block1/conv2", decides. `calibrate` warns of one that decides nothing.
      execution: by which program; changes no result.

    Raises:
      ValueError: for what is no unbound Flax module, or no rules; and, when the converted network is called, for a
        layer that arrays cannot compute, such as a grouped convolution, naming it.
    """
    if not isinstance(network, nn.Module):
        of_nnx = any(base.__module__.startswith("flax.nnx") for base in type(network).__mro__)
        raise ValueError(
            f"`network` is of type {type(network).__name__}; give a module of flax.linen"
            + (", or put nnx.bridge.ToNNX(CIMConv(...), rngs=rngs) into this one." if of_nnx else ".")
        )
    if network.scope is not None:
        raise ValueError(f"`network` is a {type(network).__name__} bound to variables; give it as it was before.")
    if spec is not None and not isinstance(spec, CIMSpec):
        raise ValueError(f"`spec` is {shown(spec)}; give a `CIMSpec`, or None and `rules` for single layers.")
    of_network: Any = type(network)
    rules = check_rules(rules)
    if of_network in _IN_ARRAYS:
        built = decided("", rules, spec)
        return network if built is None else _in_arrays(network, built, execution, parent=None)
    fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network) if field.init}
    return _class_in_arrays(of_network, spec, rules, execution)(**fields)


@functools.cache
def _class_in_arrays(network: type[nn.Module], spec: CIMSpec | None, rules: Rules, execution: Execution) -> Any:
    """A network's class with every method intercepting the calls of layers; one for each way to build it, so that equal
    networks are equal when they are converted."""

    how = (spec, rules, execution)

    def call(run: Callable[..., Any], given: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        nearest = _converting.value == how  # of networks that are converted inside one that is
        if nearest and context.method_name == "__call__" and type(layer) in _IN_ARRAYS:
            built = decided("/".join(layer.path), rules, spec)
            if built is not None:
                return _in_arrays(layer, built, execution, parent=layer.scope)(*given, **named)
        return run(*given, **named)

    def intercepting(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def intercepted(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(call), _converting(how):
                return method(self, *args, **kwargs)

        return intercepted

    def is_entered(name: str, method: Callable[..., Any]) -> bool:
        if isinstance(inspect.getattr_static(network, name), staticmethod):
            return False
        own = method is not getattr(nn.Module, name, None) and not name.startswith("__")
        return own or name in ("__call__", "apply", "init_with_output")  # these two run any function

    methods = {
        name: intercepting(method)
        for name, method in inspect.getmembers(network, inspect.isfunction)
        if is_entered(name, method)
    }
    about = {"__doc__": network.__doc__, "__module__": network.__module__, RULES_OF_ARRAYS: rules}
    return type(network.__name__, (network,), {**about, **methods})


def _in_arrays(layer: nn.Module, spec: CIMSpec, execution: Execution, *, parent: Any) -> Any:
    """The array layer that computes what a plain one would, in its place `parent`.

    Raises:
      ValueError: for a field that arrays have no counterpart of.
    """
    kind = _IN_ARRAYS[type(layer)]
    names = {field.name for field in dataclasses.fields(kind)}
    fields = {}
    for field in dataclasses.fields(layer):
        name, value = field.name, getattr(layer, field.name)
        if name in _WITHOUT_MEANING:
            continue
        if value is not field.default and (name not in names or _beyond_arrays(name, value)):
            path, shown_value = "/".join(layer.path) if layer.scope else "", f" {value!r}" if name in names else ""
            raise ValueError(
                f"`{path or type(layer).__name__}` has `{name}`{shown_value}, which arrays do not compute; leave the "
                f'layer in full precision: rules=[("{path}", None), ...].'
            )
        if name in names:
            fields[name] = value
    return kind(**fields, spec=spec, execution=execution, parent=parent)


def _beyond_arrays(name: str, value: Any) -> bool:
    """Whether array layers have a field, but not with this value: grouped convolutions, and padding with an image's own
    pixels."""
    return (name == "feature_group_count" and value != 1) or (
        name == "padding" and isinstance(value, str) and value not in ("SAME", "VALID")
    )
