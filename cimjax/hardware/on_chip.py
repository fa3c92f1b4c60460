"""A network whose array layers are computed from their frozen form, while all else of it is computed as it stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cimjax.core import lsq
from cimjax.core.lsq import Codes
from cimjax.hardware import engine
from cimjax.hardware.engine import Readings
from cimjax.hardware.freeze import FrozenLayer
from cimjax.nn.layers import CIMConv, CIMDense


class Call(NamedTuple):
    """One call of an array layer: the codes that came in, (N, H, W, C) int32, and what the engine makes of them."""

    layer: str
    codes: np.ndarray
    readings: Readings


def apply_on_chip(
    model: nn.Module,
    variables: Mapping[str, Any],
    frozen: Mapping[str, FrozenLayer],
    images: Any,
    *,
    watch: Callable[[Call], None] = lambda call: None,
    feeds_on: bool = True,
    **kwargs: Any,
) -> Any:
    """What `model.apply` gives, with the array layers in integers: codes in, accumulators out.

    Args:
      model, variables: of which `frozen` was made.
      frozen: from `cimjax.freeze`.
      images: (N, H, W, C), of the size that it was frozen for.
      watch: is called with every call of a layer, in order.
      feeds_on: whether later layers see what the integers give; else what the network gives, so that each layer can be
        compared with it.
      **kwargs: what `model.apply` takes besides, such as `train=False`.

    Raises:
      ValueError: for a layer that is not in `frozen`; inside a traced program, where there are no numbers.
    """

    def in_integers(run: Callable[..., Any], given: Any, named: Any, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, CIMConv | CIMDense):
            return run(*given, **named)
        name = "/".join(module.path)
        if name not in frozen:
            raise ValueError(f"the array layer {name} is not among the frozen ones, {', '.join(frozen)}.")
        layer, x = frozen[name], next(iter((*given, *named.values())))
        if isinstance(x.codes if isinstance(x, Codes) else x, jax.core.Tracer):
            raise ValueError(f"{name} is called in a traced program (jax.jit, nn.scan); the engine computes numbers.")
        step = None if layer.activation_step is None else jnp.float32(layer.activation_step)
        inputs = lsq.quantize_activation(x, step, layer.spec.activation)
        leading = inputs.codes.ndim - len(layer.kernel_size) - 1
        codes = np.asarray(inputs.codes, np.int32).reshape(-1, *inputs.codes.shape[leading:])
        readings = engine.run(layer.moved_over(module.window(codes.shape[1:-1])), codes)
        watch(Call(name, codes, readings))
        if not feeds_on:
            return run(*given, **named)
        y = np.ldexp(readings.accumulators.astype(np.float64), layer.exponent) * float(inputs.step)
        if module.use_bias:
            y = y + np.asarray(module.get_variable("params", "bias"), np.float64)
        dtype = module.dtype or jnp.result_type(x.codes if isinstance(x, Codes) else x, jnp.float32)
        return jnp.asarray(y.reshape(*inputs.codes.shape[:leading], *y.shape[1:]), dtype)

    with nn.intercept_methods(in_integers):
        return model.apply(variables, images, **kwargs)
