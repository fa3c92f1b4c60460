"""What every operation of a traced program becomes where its inputs come out of array layers.

What is not here is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from cimjax.hardware.network.nodes import Node, NotIntegersError, Seen

# Makes a node of an array that enters.
Enter = Callable[[Seen], Node]
# What an equation with nodes among its inputs becomes.
Rule = Callable[[Enter, list[Any], Any], Node]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _of_channels(value: Any, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Numbers that are the same at all places of a tensor of a shape: (C,) or (1,) float64."""
    value = np.asarray(value, np.float64)
    if value.ndim and value.shape[-1] not in (1, shape[-1]):
        raise NotIntegersError(f"{what} have shape {value.shape} for a tensor of {shape}, not of its channels")
    rows = value.reshape(-1, value.shape[-1] if value.ndim else 1)
    if (rows != rows[0]).any():
        raise NotIntegersError(f"{what} differ from place to place, not only by channel")
    return rows[0]


def _affine(x: Node, factor: Any = 1.0, added: Any = 0.0) -> Node:
    """`factor x + added`, of channels; one node for a chain of them."""
    factor, added = np.atleast_1d(np.asarray(factor, np.float64)), np.atleast_1d(np.asarray(added, np.float64))
    if x.kind == "affine":
        added = factor * x.fields["added"] + added
        (x,), factor = x.inputs, factor * x.fields["factor"]
    return Node("affine", (x,), x.shape, {"factor": factor, "added": added})


def _two(enter: Enter, inputs: list[Any], what: str) -> tuple[Node, Any, bool]:
    """A node, what it is combined with (a node, or numbers of channels), and whether these were exchanged."""
    swapped = not isinstance(inputs[0], Node)
    x, other = reversed(inputs) if swapped else inputs
    if isinstance(other, Seen):
        other = enter(other)
    if isinstance(other, Node):
        return x, other, swapped
    if np.broadcast_shapes(x.shape, np.shape(other)) != x.shape:
        raise NotIntegersError(f"{what} of {np.shape(other)} spread a tensor of {x.shape} over more places")
    return x, _of_channels(other, x.shape, what), swapped


@_rule("add", "add_any", "sub")
def _add(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    x, other, swapped = _two(enter, inputs, "numbers that are added")
    if eqn.primitive.name == "sub":
        x = _affine(x, -1.0) if swapped else x
        other = other if swapped else _affine(other, -1.0) if isinstance(other, Node) else -other
    if not isinstance(other, Node):
        return _affine(x, added=other)
    return Node("add", (x, other), tuple(eqn.outvars[0].aval.shape))


@_rule("mul", "div")
def _multiply(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    x, other, swapped = _two(enter, inputs, "factors")
    divides = eqn.primitive.name == "div"
    if isinstance(other, Node) or (divides and swapped):
        raise NotIntegersError("a result of array layers is a factor or a divisor of another")
    return _affine(x, 1.0 / other if divides else other)


@_rule("neg")
def _negate(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    return _affine(inputs[0], -1.0)


@_rule("max", "min")
def _limit(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    x, other, _ = _two(enter, inputs, "limits")
    if isinstance(other, Node):
        raise NotIntegersError("the larger of two results of array layers is taken")
    low, high = (other, np.inf) if eqn.primitive.name == "max" else (-np.inf, other)
    return Node("limit", (x,), x.shape, {"low": np.atleast_1d(low), "high": np.atleast_1d(high)})


@_rule("clamp")
def _clamp(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    low, x, high = inputs
    if not isinstance(x, Node) or isinstance(low, Node | Seen) or isinstance(high, Node | Seen):
        raise NotIntegersError("limits depend on the images")
    limits = {"low": _of_channels(low, x.shape, "limits"), "high": _of_channels(high, x.shape, "limits")}
    return Node("limit", (x,), x.shape, limits)


@_rule("tanh", "logistic")
def _rising(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    function = np.tanh if eqn.primitive.name == "tanh" else lambda x: 0.5 + 0.5 * np.tanh(0.5 * x)
    return Node("rising", tuple(inputs), inputs[0].shape, {"function": function})


@_rule("cimjax_codes")
def _quantize(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    return Node("codes", tuple(inputs), inputs[0].shape, dict(eqn.params))


@_rule("convert_element_type", "copy", "reduce_precision", "stop_gradient", "optimization_barrier")
def _same(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        raise NotIntegersError("results of array layers are made whole numbers")
    return inputs[0]


@_rule("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
def _reshape(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    x, shape = inputs[0], tuple(eqn.outvars[0].aval.shape)
    if shape == x.shape:
        return x
    if not shape or shape[0] != x.shape[0] or np.prod(shape) != np.prod(x.shape):
        raise NotIntegersError(f"a tensor of {x.shape} becomes {shape}")
    return Node("reshape", (x,), shape, {"to": shape[1:]})


@_rule("transpose")
def _transpose(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    axes = tuple(eqn.params["permutation"])
    _keep_images(axes[0] == 0)
    return Node("transpose", tuple(inputs), eqn.outvars[0].aval.shape, {"to": axes})


@_rule("slice")
def _pick(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    (x,), params = inputs, eqn.params
    strides = params["strides"] or (1,) * len(x.shape)
    picked = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    _keep_images(picked[0] == (0, x.shape[0], 1))
    return Node("pick", (x,), eqn.outvars[0].aval.shape, {"to": tuple(picked[1:])})


@_rule("pad")
def _pad(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    x, value = inputs
    widths = [tuple(map(int, each)) for each in eqn.params["padding_config"]]
    if isinstance(value, Node | Seen) or np.any(np.asarray(value)) or min(min(each) for each in widths) < 0:
        raise NotIntegersError("a tensor is padded with other numbers than 0, or cut off")
    if any(inside for _, _, inside in widths):
        raise NotIntegersError("a tensor is padded between its values")
    _keep_images(widths[0] == (0, 0, 0))
    return Node("pad", (x,), eqn.outvars[0].aval.shape, {"to": tuple(each[:2] for each in widths)})


@_rule("concatenate")
def _join(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    parts = [enter(each) if isinstance(each, Seen) else each for each in inputs]
    if not all(isinstance(each, Node) for each in parts):
        raise NotIntegersError("results of array layers are joined with constants")
    _keep_images(eqn.params["dimension"] != 0)
    return Node("join", tuple(parts), eqn.outvars[0].aval.shape, {"axis": eqn.params["dimension"]})


@_rule("reduce_sum", "reduce_max")
def _reduce(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    axes = tuple(eqn.params["axes"])
    _keep_images(0 not in axes)
    kind = "sum" if eqn.primitive.name == "reduce_sum" else "largest"
    return Node(kind, tuple(inputs), eqn.outvars[0].aval.shape, {"axes": axes})


@_rule("reduce_window_sum", "reduce_window_max")
def _window(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    params = eqn.params
    if {*params["base_dilation"], *params["window_dilation"]} != {1}:
        raise NotIntegersError("windows of pooling are dilated")
    _keep_images(params["window_dimensions"][0] == params["window_strides"][0] == 1)
    fields = {
        "size": tuple(params["window_dimensions"]),
        "strides": tuple(params["window_strides"]),
        "padding": tuple(map(tuple, params["padding"])),
        "largest": eqn.primitive.name == "reduce_window_max",
    }
    return Node("window", tuple(inputs), eqn.outvars[0].aval.shape, fields)


@_rule("dot_general")
def _product(enter: Enter, inputs: list[Any], eqn: Any) -> Node:
    x, weights = inputs
    contracting, batch = eqn.params["dimension_numbers"]
    if isinstance(weights, Node | Seen) or not isinstance(x, Node) or any(batch) or np.ndim(weights) != 2:
        raise NotIntegersError("results of array layers are multiplied by something else than a constant matrix")
    if tuple(contracting[0]) != (len(x.shape) - 1,):
        raise NotIntegersError("a matrix product is not over the last axis")
    weights = np.asarray(weights, np.float64)
    weights = weights if tuple(contracting[1]) == (0,) else weights.T
    return Node("product", (x,), eqn.outvars[0].aval.shape, {"weights": weights})


def _keep_images(kept: bool) -> None:
    if not kept:
        raise NotIntegersError("images are mixed, cut or moved")
