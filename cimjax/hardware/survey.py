"""What a network consists of: its layers in order, with shapes and specifications, found without computing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from cimjax.hardware.cost import LayerCost, layer_cost
from cimjax.nn.calibrate import without_calibration
from cimjax.nn.layers import CIMConv, CIMDense
from cimjax.spec import CIMSpec


@dataclasses.dataclass(frozen=True)
class Layer:
    """One convolution or matrix product of a network.

    name: its path, "block1/conv2".
    kernel: the kernel's shape, (kh, kw, C, O) or (C, O).
    output: the output's spatial shape, `()` for a matrix product.
    spec: None for full precision.
    use_bias: whether it has a bias.
    """

    name: str
    kernel: tuple[int, ...]
    output: tuple[int, ...]
    spec: CIMSpec | None
    use_bias: bool

    @property
    def cost(self) -> LayerCost | None:
        """What it takes on the chip; None for full precision."""
        if self.spec is None:
            return None
        return layer_cost(self.kernel, self.output, self.spec, use_bias=self.use_bias)

    @property
    def parameters(self) -> int:
        """Weights and biases."""
        return math.prod(self.kernel) + (self.kernel[-1] if self.use_bias else 0)


def layers_of(model: nn.Module, *args: Any, **kwargs: Any) -> list[Layer]:
    """The layers of a network, in the order in which they run.

    Args:
      model: any Flax module.
      *args, **kwargs: what `model.init` takes after the key; `jax.ShapeDtypeStruct`s will do for arrays.

    Raises:
      ValueError: for layers that cannot be built, as `init` would.
    """
    found: list[Layer] = []

    def record(call: Callable[..., Any], given: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        result = call(*given, **named)
        module = context.module
        if context.method_name == "__call__" and isinstance(module, CIMConv | CIMDense | nn.Conv | nn.Dense):
            kernel: tuple[int, ...] = module.get_variable("params", "kernel").shape
            spatial = result.shape[1:-1] if len(kernel) > 2 else ()
            spec = getattr(module, "spec", None)
            found.append(Layer("/".join(module.path), kernel, spatial, spec, module.use_bias))
        return result

    with nn.intercept_methods(record), without_calibration():
        jax.eval_shape(lambda *a: model.init(jax.random.key(0), *a, **kwargs), *args)
    return found
