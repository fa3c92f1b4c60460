"""What a network consists of: its layers in order, with shapes and specifications, found without computing.

A network is traced, and every layer leaves a mark on its result. How often an image passes a layer is then read off
the traced program, where loops have their lengths and mapped axes their sizes: inside such a transform a layer itself
sees one turn only. What a layer takes on the chip is in `cimjax.hardware.cost`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.extend import core

from cimjax.core.lsq import Codes
from cimjax.core.programs import contract
from cimjax.core.tiling import tile
from cimjax.core.window import Window
from cimjax.hardware.cost import LayerCost, layer_cost
from cimjax.nn.calibrate import without_calibration
from cimjax.nn.layers import CIMConv, CIMDense
from cimjax.spec import CIMSpec, Execution

# The name of a mark in a traced program; the layer's number follows.
_MARK = "cimjax_layer_"


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution or matrix product of a network, or several of one shape that a lifted transform stacks.

    name: its path, "block1/conv2".
    kernel: the kernel's shape, (kh, kw, C, O) or (C, O).
    output: where one image has outputs: (OH, OW), with more axes in front for several windows, calls or turns of a
      loop, or one axis for all positions together; `()` for a single matrix product.
    spec: None for full precision.
    use_bias: whether it has a bias.
    copies: layers with parameters of their own, as `nn.scan` and `nn.vmap` stack them; 1 otherwise.
    input: what an image brings to its first call, (n, H, W, C) or (n, C) with n of 1 but for merged axes.
    window, execution: of a layer in arrays: how the kernel moves over its input, and how it is computed.
    """

    name: str
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    spec: CIMSpec | None
    use_bias: bool
    copies: int = 1
    input: tuple[int, ...] = ()
    window: Window | None = None
    execution: Execution = Execution()

    def behind_seam(self, images: int) -> tuple[contract.Layer, tuple[int, ...]]:
        """What `core.programs.contract` sees of a layer in arrays, and the shape of its inputs, for so many images."""
        assert self.spec is not None and self.window is not None
        rows, *rest = self.input
        layer = contract.Layer(tile(self.kernel, self.spec), self.window, self.spec, self.execution)
        return layer, (rows * images, *rest)

    @property
    def cost(self) -> LayerCost | None:
        """What it takes on the chip, all copies together; None for full precision."""
        if self.spec is None:
            return None
        return layer_cost(self.kernel, self.output, self.spec, use_bias=self.use_bias).times(self.copies)

    @property
    def parameters(self) -> int:
        """Weights and biases, counted once however often they are used."""
        return self.copies * (math.prod(self.kernel) + (self.kernel[-1] if self.use_bias else 0))


def layers_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[Layer]:
    """The layers of a network, in the order in which they run.

    A module that is called twice is one layer, which is read twice as often. In `nn.scan` and `nn.vmap`, layers whose
    parameters are stacked are one entry of so many `copies`, and one with shared parameters is a layer that is read so
    many times. Of a condition all branches count: the chip holds them all. Modules that share one class of `nn.jit` are
    traced once, and counted as further calls of the first.

    Args:
      model: any Flax module.
      *args, **kwargs: what `model.init` takes after the key; `jax.ShapeDtypeStruct`s will do for arrays. The first
        axis of the first array is the batch; a prime tells it best from axes of the network's own.

    Raises:
      ValueError: for layers that cannot be built, as `init` would; for one in a loop of unknown length, such as
        `nn.while_loop`, whose conversions cannot be counted.
    """
    found: dict[str, Layer] = {}
    calls = [0]

    def record(call: Callable[..., Any], given: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        before = calls[0]
        result = call(*given, **named)
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, CIMConv | CIMDense | nn.Conv | nn.Dense):
            return result
        if calls[0] > before:  # an array layer stood in for this one, as in `cimjax.convert_network`
            return result
        calls[0] += 1
        kernel: tuple[int, ...] = module.get_variable("params", "kernel").shape
        batched = result.ndim > len(kernel) - 1
        output, spec = result.shape[1:-1] if batched else result.shape[:-1], getattr(module, "spec", None)
        name = "/".join(module.path)
        x = next(iter((*given, *named.values())))
        size = _of_image(jnp.shape(x.codes if isinstance(x, Codes) else x), len(kernel) - 2, batch)
        layer = Layer(name, kernel, output, spec, module.use_bias, input=size)
        if isinstance(module, CIMConv | CIMDense):
            window = module.window(size[1:-1])
            layer = dataclasses.replace(layer, window=window, execution=module.execution)
        found.setdefault(name, layer)
        return _marked(result, list(found).index(name))

    # Switches such as `train` must not be traced.
    named = {name: value for name, value in kwargs.items() if hasattr(value, "ndim")}
    switches = {name: value for name, value in kwargs.items() if name not in named}
    batch = next((leaf.shape[0] for leaf in jax.tree.leaves((args, named)) if leaf.ndim), 1)

    def init(*arrays: Any, **named: Any) -> Any:
        return model.init(jax.random.key(0), *arrays, **named, **switches)

    with nn.intercept_methods(record), without_calibration():
        traced, variables = jax.make_jaxpr(init, return_shape=True)(*args, **named)
    layers = list(found.values())
    positions = [0] * len(layers)
    for number, shape, turns in _marks(traced.jaxpr, layers):
        positions[number] += turns * _per_image(shape, layers[number], batch)
    return [_counted(layer, total, variables) for layer, total in zip(layers, positions, strict=True)]


def _of_image(shape: tuple[int, ...], spatial: int, batch: int) -> tuple[int, ...]:
    """What an image brings to a call on an input of a shape, (n, H, W, C) or (n, C)."""
    leading, size = shape[: len(shape) - 1 - spatial], shape[len(shape) - 1 - spatial :]
    rows = math.prod(leading)
    return (rows // batch if rows % batch == 0 else rows, *size)


def _marked(result: Array, number: int) -> Array:
    """A layer's result, through a function that does nothing, but has a name in the traced program."""

    def nothing(x: Array) -> Array:
        return x

    nothing.__name__ = f"{_MARK}{number}"
    return jax.jit(nothing)(result)


def _marks(
    program: core.Jaxpr, layers: Sequence[Layer], turns: int | None = 1
) -> Iterator[tuple[int, tuple[int, ...], int]]:
    """The number of every layer that runs, the shape of its result, and how often; `turns` None: nobody knows."""
    for step in program.eqns:
        name = str(step.params.get("name", ""))
        if name.startswith(_MARK):
            number = int(name.removeprefix(_MARK))
            if turns is None:
                raise ValueError(
                    f"The layer {layers[number].name} is in a loop of unknown length, so that its conversions cannot "
                    "be counted; use `nn.scan`, which has a length."
                )
            # Flax traces the body of a scan once more, and leaves marks without a result.
            for result in step.invars:
                array: Any = result.aval
                yield number, array.shape, turns
            continue
        inside = turns
        if step.primitive.name == "while":
            inside = None
        elif step.primitive.name == "scan" and turns is not None:
            inside = turns * step.params["length"]
        for part in _programs(step):
            yield from _marks(part, layers, inside)


def _programs(step: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    """The programs inside one step: what a loop repeats, the branches of a condition, a compiled function."""
    for value in step.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _per_image(shape: tuple[int, ...], layer: Layer, batch: int) -> int:
    """At how many positions a result (..., OH, OW, O) of one call stands for an image."""
    spatial = len(layer.kernel) - 2
    axes, window = shape[: len(shape) - 1 - spatial], shape[len(shape) - 1 - spatial : -1]
    # Images may be anywhere in front, also merged with other axes; what is no multiple of them is computed for all.
    rows = math.prod(axes)
    return math.prod(window) * (rows // batch if axes and rows % batch == 0 else rows)


def _counted(layer: Layer, positions: int, variables: Mapping[str, Any]) -> Layer:
    """A layer with its copies, and with the outputs of all its calls."""
    stored: Any = variables.get("params", {})
    for part in (*layer.name.split("/"), "kernel"):
        stored = stored.get(part, {}) if isinstance(stored, Mapping) else {}
    copies = math.prod(getattr(stored, "shape", layer.kernel)) // math.prod(layer.kernel)
    each, once = positions // copies, math.prod(layer.output)
    if each == once:
        return dataclasses.replace(layer, copies=copies)
    calls, rest = divmod(each, max(once, 1))
    return dataclasses.replace(layer, copies=copies, output=(each,) if rest else (calls, *layer.output))
