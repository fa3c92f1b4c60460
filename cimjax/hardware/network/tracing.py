"""A network as a graph of real-valued operations around its array layers, read off its traced program.

Whatever does not come out of array layers is computed as it stands: what depends on parameters alone, and a first
convolution in full precision. Where that meets array layers it enters the graph. Normalization becomes a factor and a
number for each channel. Nothing here is rounded: `cimjax.hardware.network.fold` makes integers of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import batching

from cimjax.core import lsq
from cimjax.core.window import output_size
from cimjax.hardware.freeze import FrozenLayer
from cimjax.hardware.network.nodes import Node, NotIntegersError, Seen
from cimjax.hardware.network.rules import RULES
from cimjax.nn.layers import CIMConv, CIMDense, Quantize
from cimjax.spec import ActivationSpec

_codes, _arrays = core.Primitive("cimjax_codes"), core.Primitive("cimjax_arrays")
_codes.def_abstract_eval(lambda x, *, step, spec: jax.core.ShapedArray(x.shape, jnp.float32))
_codes.def_impl(lambda x, *, step, spec: lsq.quantize(x, step, spec.code_range))
_arrays.def_abstract_eval(lambda codes, *, shape, layer, step: jax.core.ShapedArray(shape, jnp.float32))


def _refuse_vmap(operands: Any, axes: Any, **_: Any) -> Any:
    raise NotIntegersError("array layers are called in `vmap`")


for _primitive in (_codes, _arrays):
    batching.primitive_batchers[_primitive] = _refuse_vmap


# Of which layers a network is traced: a part of what every trace depends on, as of `nn.jit`.
_of = jax.make_user_context(None)
_numbers = itertools.count()


class Layers:
    """The array layers of one network, by path.

    number: no other network's.
    """

    def __init__(self, by_path: Mapping[str, FrozenLayer]) -> None:
        self.by_path, self.number = by_path, next(_numbers)


class Graph:
    """The graph of one network on some images.

    entries: the nodes that enter, in order.
    result: what the network gives.
    """

    def __init__(self, network: Callable[[Any], Any], layers: Layers, images: Any) -> None:
        """Trace a network.

        Args:
          network: of images, as trained: `model.apply` with its variables.
          layers: its array layers.
          images: (N, H, W, C), N at least 2: the axis of one image could be taken for one that broadcasts.

        Raises:
          NotIntegersError: where what stands between array layers is none of the operations of `Node`.
        """
        self.entries: list[Node] = []
        images = jnp.asarray(images)

        def apply(x: Any) -> Any:
            with nn.intercept_methods(_through_primitives(layers.by_path)), _of(layers.number):
                return network(x)

        program = jax.make_jaxpr(apply)(images)
        if len(program.jaxpr.outvars) != 1:
            raise NotIntegersError(f"the network has {len(program.jaxpr.outvars)} results")
        (self.result,) = self._run(program.jaxpr, program.consts, [Seen(images)])
        if not isinstance(self.result, Node):
            raise NotIntegersError("the network's result does not come out of its array layers")

    def entry(self, seen: Seen, largest: int | None = None) -> Node:
        """The node of an array that enters; the same one for the same array.

        Args:
          largest: magnitude of a code, where it enters as codes.
        """
        fields = {"value": seen.value, "largest": largest}
        for each in self.entries:
            if each.fields["value"] is seen.value and each.fields["largest"] == largest:
                return each
        self.entries.append(Node("entry", (), jnp.shape(seen.value), fields))
        return self.entries[-1]

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
            largest = eqn.params["layer"].spec.activation.code_range.magnitude
            (codes,) = (each if isinstance(each, Node) else self.entry(each, largest) for each in inputs)
            return [Node("arrays", (codes,), eqn.params["shape"], eqn.params)]
        if name in _LOOPS and "cimjax_" in str(eqn.params):
            raise NotIntegersError(f"array layers are called in a loop (`{name}`)")
        if not any(isinstance(each, Node) for each in inputs):
            seen = any(isinstance(each, Seen) for each in inputs)
            arrays = [each.value if isinstance(each, Seen) else each for each in inputs]
            result = eqn.primitive.bind(*arrays, **eqn.params)
            results = list(result) if eqn.primitive.multiple_results else [result]
            return [Seen(each) for each in results] if seen else results
        if name not in RULES:
            raise NotIntegersError(
                f"`{name}` stands behind array layers, where there may be sums, factors and numbers of channels, ReLU "
                "and other limits, pooling, rearrangements and matrix products"
            )
        return [RULES[name](self.entry, inputs, eqn)]


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
        layer = layer.moved_over(module.window(tuple(spatial)))
        size = output_size(spatial, layer.kernel_size, layer.window)
        if isinstance(step, jax.core.Tracer):
            raise NotIntegersError(f"{layer.name} reads codes whose step is computed from the images")
        y = _arrays.bind(codes, shape=(*leading, *size, layer.features), layer=layer, step=float(step))
        return y + module.get_variable("params", "bias") if module.use_bias else y

    return through


def _quantized(x: Any, step: float, spec: ActivationSpec) -> Any:
    return _codes.bind(jnp.asarray(x), step=step, spec=spec)
