"""A network as a graph of real-valued operations around its array layers, read off its traced program.

Whatever does not come out of array layers is computed as it stands: what depends on parameters alone, and a first
convolution in full precision. Where that meets array layers it enters the graph. Normalization becomes a factor and a
number for each channel. Nothing here is rounded: `cimjax.hardware.fold` makes integers of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from cimjax.core import lsq
from cimjax.core.window import output_size
from cimjax.hardware.freeze import FrozenLayer
from cimjax.nn.layers import CIMConv, CIMDense, Quantize
from cimjax.spec import ActivationSpec

_codes, _arrays = core.Primitive("cimjax_codes"), core.Primitive("cimjax_arrays")
_codes.def_abstract_eval(lambda x, *, step, spec: jax.core.ShapedArray(x.shape, jnp.float32))
_codes.def_impl(lambda x, *, step, spec: lsq.quantize(x, step, spec.code_range))
_arrays.def_abstract_eval(lambda codes, *, shape, layer, step: jax.core.ShapedArray(shape, jnp.float32))


class NotIntegersError(ValueError):
    """Something behind array layers is no operation on integers."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}: a network in integers cannot do that.")


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A tensor that comes out of array layers, or enters between them.

    kind: how it comes about: "entry" (`fields`: value, an array), "codes" (step, spec), "arrays" (layer, step of its
      codes), "affine" (factor, added, of channels), "limit" (low, high), "rising" (function), "add", "product"
      (weights), "sum" (axes), "largest" (axes), "window" (size, strides, padding, largest), "join" (axis), or a
      rearrangement, "pick", "pad", "reshape" or "transpose" (to).
    inputs: what it is made of.
    shape: (N, ..., C).
    """

    kind: str
    inputs: tuple[Node, ...]
    shape: tuple[int, ...]
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class _Seen(NamedTuple):
    """An array that depends on the images, but on no array layer."""

    value: Any


class Graph:
    """The graph of one network on some images.

    entries: the nodes that enter, in order.
    result: what the network gives.
    """

    def __init__(
        self,
        model: nn.Module,
        variables: Mapping[str, Any],
        layers: Mapping[str, FrozenLayer],
        images: Any,
        **kwargs: Any,
    ) -> None:
        """Trace a network.

        Args:
          model, variables, layers: a trained network, and its array layers.
          images: (N, H, W, C), N at least 2: the axis of one image could be taken for one that broadcasts.
          **kwargs: what `model.apply` takes besides.

        Raises:
          NotIntegersError: where what stands between array layers is none of the operations of `Node`.
        """
        self.entries: list[Node] = []
        images = jnp.asarray(images)

        def apply(x: Any) -> Any:
            with nn.intercept_methods(_through_primitives(layers)):
                return model.apply(variables, x, **kwargs)

        program = jax.make_jaxpr(apply)(images)
        if len(program.jaxpr.outvars) != 1:
            raise NotIntegersError(f"the network has {len(program.jaxpr.outvars)} results")
        (self.result,) = self._run(program.jaxpr, program.consts, [_Seen(images)])
        if not isinstance(self.result, Node):
            raise NotIntegersError("the network's result does not come out of its array layers")

    def entry(self, seen: _Seen) -> Node:
        """The node of an array that enters; the same one for the same array."""
        found = next((each for each in self.entries if each.fields["value"] is seen.value), None)
        if found is None:
            found = Node("entry", (), jnp.shape(seen.value), {"value": seen.value})
            self.entries.append(found)
        return found

    def _run(self, program: core.Jaxpr, consts: Sequence[Any], given: Sequence[Any]) -> list[Any]:
        """The results of a program on arrays, those that depend on the images, and nodes."""
        values: dict[Any, Any] = dict(zip(program.constvars, consts, strict=True))
        values |= dict(zip(program.invars, given, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, core.Literal) else values[atom]

        for eqn in program.eqns:
            values |= dict(zip(eqn.outvars, self._step(eqn, [read(atom) for atom in eqn.invars]), strict=True))
        return [read(atom) for atom in program.outvars]

    def _step(self, eqn: Any, inputs: list[Any]) -> list[Any]:
        """The results of one equation."""
        name = eqn.primitive.name
        inside = next((eqn.params[param] for param in _CALLED if param in eqn.params), None)
        if inside is not None and name not in _LOOPS:
            closed = isinstance(inside, core.ClosedJaxpr)
            return self._run(inside.jaxpr if closed else inside, inside.consts if closed else (), inputs)
        if name == "cimjax_arrays":
            (codes,) = (each if isinstance(each, Node) else self.entry(each) for each in inputs)
            return [Node("arrays", (codes,), eqn.params["shape"], eqn.params)]
        if not any(isinstance(each, Node) for each in inputs):
            seen = any(isinstance(each, _Seen) for each in inputs)
            arrays = [each.value if isinstance(each, _Seen) else each for each in inputs]
            result = eqn.primitive.bind(*arrays, **eqn.params)
            results = list(result) if eqn.primitive.multiple_results else [result]
            return [_Seen(each) for each in results] if seen else results
        if name not in _RULES:
            raise NotIntegersError(
                f"`{name}` stands behind array layers, where there may be sums, factors and numbers of channels, ReLU "
                "and other limits, pooling, rearrangements and matrix products"
            )
        return [_RULES[name](self, inputs, eqn)]


# Where functions that a program calls have theirs, and what calls them more than once or not at all.
_CALLED, _LOOPS = ("jaxpr", "call_jaxpr", "fun_jaxpr"), ("scan", "while", "cond")


def _through_primitives(layers: Mapping[str, FrozenLayer]) -> Callable[..., Any]:
    """An interceptor by which a traced program names array layers, instead of computing them."""

    def through(run: Callable[..., Any], given: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, Quantize | CIMConv | CIMDense):
            return run(*given, **named)
        x = next(iter((*given, *named.values())))
        if isinstance(module, Quantize):
            with jax.ensure_compile_time_eval():
                step = run(jnp.zeros(jnp.shape(x))).step
            return lsq.Codes(_quantized(x, float(step), module.spec), step, module.spec)
        layer = layers["/".join(module.path)]
        if isinstance(x, lsq.Codes):
            codes, step = x.codes, x.step
        else:
            assert layer.activation_step is not None
            codes, step = _quantized(x, layer.activation_step, layer.spec.activation), layer.activation_step
        axes = len(layer.kernel_size) + 1
        leading, spatial = codes.shape[:-axes], codes.shape[codes.ndim - axes : -1]
        size = output_size(spatial, layer.kernel_size, layer.window)
        if isinstance(step, jax.core.Tracer):
            raise NotIntegersError(f"{layer.name} reads codes whose step is computed from the images")
        y = _arrays.bind(codes, shape=(*leading, *size, layer.features), layer=layer, step=float(step))
        return y + module.get_variable("params", "bias") if module.use_bias else y

    return through


def _quantized(x: Any, step: float, spec: ActivationSpec) -> Any:
    return _codes.bind(jnp.asarray(x), step=step, spec=spec)


# What an equation with nodes among its inputs becomes.
Rule = Callable[[Graph, list[Any], Any], Node]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
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


def _two(graph: Graph, inputs: list[Any], what: str) -> tuple[Node, Any, bool]:
    """A node, what it is combined with (a node, or numbers of channels), and whether these were exchanged."""
    swapped = not isinstance(inputs[0], Node)
    x, other = reversed(inputs) if swapped else inputs
    if isinstance(other, _Seen):
        other = graph.entry(other)
    return x, other if isinstance(other, Node) else _of_channels(other, x.shape, what), swapped


@_rule("add", "add_any", "sub")
def _add(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    x, other, swapped = _two(graph, inputs, "numbers that are added")
    if eqn.primitive.name == "sub":
        x = _affine(x, -1.0) if swapped else x
        other = other if swapped else _affine(other, -1.0) if isinstance(other, Node) else -other
    return Node("add", (x, other), x.shape) if isinstance(other, Node) else _affine(x, added=other)


@_rule("mul", "div")
def _multiply(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    x, other, swapped = _two(graph, inputs, "factors")
    divides = eqn.primitive.name == "div"
    if isinstance(other, Node) or (divides and swapped):
        raise NotIntegersError("a result of array layers is a factor or a divisor of another")
    return _affine(x, 1.0 / other if divides else other)


@_rule("neg")
def _negate(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    return _affine(inputs[0], -1.0)


@_rule("max", "min")
def _limit(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    x, other, _ = _two(graph, inputs, "limits")
    if isinstance(other, Node):
        raise NotIntegersError("the larger of two results of array layers is taken")
    low, high = (other, np.inf) if eqn.primitive.name == "max" else (-np.inf, other)
    return Node("limit", (x,), x.shape, {"low": np.atleast_1d(low), "high": np.atleast_1d(high)})


@_rule("clamp")
def _clamp(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    low, x, high = inputs
    if not isinstance(x, Node) or isinstance(low, Node | _Seen) or isinstance(high, Node | _Seen):
        raise NotIntegersError("limits depend on the images")
    limits = {"low": _of_channels(low, x.shape, "limits"), "high": _of_channels(high, x.shape, "limits")}
    return Node("limit", (x,), x.shape, limits)


@_rule("tanh", "logistic")
def _rising(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    function = np.tanh if eqn.primitive.name == "tanh" else lambda x: 0.5 + 0.5 * np.tanh(0.5 * x)
    return Node("rising", tuple(inputs), inputs[0].shape, {"function": function})


@_rule("cimjax_codes")
def _quantize(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    return Node("codes", tuple(inputs), inputs[0].shape, dict(eqn.params))


@_rule("convert_element_type", "copy", "reduce_precision", "stop_gradient", "optimization_barrier")
def _same(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    if not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
        raise NotIntegersError("results of array layers are made whole numbers")
    return inputs[0]


@_rule("reshape", "squeeze", "expand_dims", "broadcast_in_dim")
def _reshape(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    x, shape = inputs[0], tuple(eqn.outvars[0].aval.shape)
    if shape == x.shape:
        return x
    if not shape or shape[0] != x.shape[0] or np.prod(shape) != np.prod(x.shape):
        raise NotIntegersError(f"a tensor of {x.shape} becomes {shape}")
    return Node("reshape", (x,), shape, {"to": shape[1:]})


@_rule("transpose")
def _transpose(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    axes = tuple(eqn.params["permutation"])
    _keep_images(axes[0] == 0)
    return Node("transpose", tuple(inputs), eqn.outvars[0].aval.shape, {"to": axes})


@_rule("slice")
def _pick(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    (x,), params = inputs, eqn.params
    strides = params["strides"] or (1,) * len(x.shape)
    picked = list(zip(params["start_indices"], params["limit_indices"], strides, strict=True))
    _keep_images(picked[0] == (0, x.shape[0], 1))
    return Node("pick", (x,), eqn.outvars[0].aval.shape, {"to": tuple(picked[1:])})


@_rule("pad")
def _pad(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    x, value = inputs
    widths = [tuple(map(int, each)) for each in eqn.params["padding_config"]]
    if isinstance(value, Node | _Seen) or np.any(np.asarray(value)) or min(min(each) for each in widths) < 0:
        raise NotIntegersError("a tensor is padded with other numbers than 0, or cut off")
    if any(inside for _, _, inside in widths):
        raise NotIntegersError("a tensor is padded between its values")
    _keep_images(widths[0] == (0, 0, 0))
    return Node("pad", (x,), eqn.outvars[0].aval.shape, {"to": tuple(each[:2] for each in widths)})


@_rule("concatenate")
def _join(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    parts = [graph.entry(each) if isinstance(each, _Seen) else each for each in inputs]
    if not all(isinstance(each, Node) for each in parts):
        raise NotIntegersError("results of array layers are joined with constants")
    _keep_images(eqn.params["dimension"] != 0)
    return Node("join", tuple(parts), eqn.outvars[0].aval.shape, {"axis": eqn.params["dimension"]})


@_rule("reduce_sum", "reduce_max")
def _reduce(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    axes = tuple(eqn.params["axes"])
    _keep_images(0 not in axes)
    kind = "sum" if eqn.primitive.name == "reduce_sum" else "largest"
    return Node(kind, tuple(inputs), eqn.outvars[0].aval.shape, {"axes": axes})


@_rule("reduce_window_sum", "reduce_window_max")
def _window(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
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
def _product(graph: Graph, inputs: list[Any], eqn: Any) -> Node:
    x, weights = inputs
    contracting, batch = eqn.params["dimension_numbers"]
    if isinstance(weights, Node | _Seen) or not isinstance(x, Node) or any(batch) or np.ndim(weights) != 2:
        raise NotIntegersError("results of array layers are multiplied by something else than a constant matrix")
    if tuple(contracting[0]) != (len(x.shape) - 1,):
        raise NotIntegersError("a matrix product is not over the last axis")
    weights = np.asarray(weights, np.float64)
    weights = weights if tuple(contracting[1]) == (0,) else weights.T
    return Node("product", (x,), eqn.outvars[0].aval.shape, {"weights": weights})


def _keep_images(kept: bool) -> None:
    if not kept:
        raise NotIntegersError("images are mixed, cut or moved")
