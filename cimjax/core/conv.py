"""The array layer: a convolution (or matrix product) as the memory arrays and their ADCs compute it.

`cim_conv` is steps 3.1 to 3.7 of the design in a row. From the array product on they are a program behind
`cimjax.core.programs.contract`; the one that runs them as they are defined is `programs.reference`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float

from cimjax.core import cells
from cimjax.core import window as window_lib
from cimjax.core.gradients import differentiable_once
from cimjax.core.lsq import Codes, quantize_activation
from cimjax.core.programs import contract
from cimjax.core.step_sizes import StepSizes, require_shapes
from cimjax.core.tiling import tile
from cimjax.core.window import Padding, PerAxis
from cimjax.spec import CIMSpec, Execution, Program


def cim_conv(
    x: ArrayLike | Codes,
    kernel: ArrayLike,
    steps: StepSizes,
    spec: CIMSpec,
    *,
    strides: PerAxis = None,
    padding: Padding = "SAME",
    input_dilation: PerAxis = None,
    kernel_dilation: PerAxis = None,
    variation_key: Array | None = None,
    execution: Execution = Execution(),
) -> Float[Array, "N *output O"]:
    """A convolution through memory arrays: `y = s_a * sum_{t,r,k} g_t f_k s_w P^`.

    `P^` is what the ADC makes of `P[t,r,k,o] = sum over the rows of read group r of a_t * d_k`. With an ideal ADC
    `y` is the convolution of the quantized input with the quantized kernel. Source: the paper's eqs. 1-3 and Fig. 5;
    gradients by LSQ through every quantizer.

    Args:
      x: (N, H, W, C) real, quantized here with `steps.activation`; or `Codes`, quantized before.
      kernel: (kh, kw, C, O) real; any number of spatial axes.
      steps: real steps > 0, used in float32, of the shapes that `core.step_sizes.shapes` gives (or with every size 1).
      spec: what to build.
      strides, padding, input_dilation, kernel_dilation: as for `flax.linen.Conv`; padded places are undriven rows.
      variation_key: the random key of the chip; needed with `spec.variation`.
      execution: by which program; changes no result.

    Returns:
      (N, OH, OW, O) float32.

    Raises:
      ValueError: for a kernel that does not fit the arrays, sums that float32 cannot hold exactly, channel counts that
        differ, codes of another specification, steps of other shapes or a missing one, strides, padding or dilations
        that `flax.linen.Conv` would not take, `execution.operands` that cannot hold the layer's integers, or a missing
        `variation_key`.
      NotImplementedError: in a second derivative.
    """
    steps = jax.tree.map(lambda step: _differentiable_once(jnp.asarray(step, jnp.float32)), steps)
    x = jax.tree.map(_differentiable_once, x if isinstance(x, Codes) else jnp.asarray(x))
    kernel = _differentiable_once(jnp.asarray(kernel))
    inputs = quantize_activation(x, steps.activation, spec.activation)
    _require_image(inputs.codes, kernel)
    tiling = tile(kernel.shape, spec)
    require_shapes(steps, tiling, spec)
    images, *spatial, _ = inputs.codes.shape
    gaps = {"input_dilation": input_dilation, "kernel_dilation": kernel_dilation}
    window = window_lib.resolve(tuple(spatial), tiling.kernel_size, strides=strides, padding=padding, **gaps)
    layer = contract.Layer(tiling, window, spec, execution)
    layer = layer._replace(execution=contract.tuned(layer, inputs.codes.shape))
    # The definition is left open to debuggers and to whoever replaces a part of it.
    compute = _through_arrays if layer.execution.program == Program.REFERENCE else _traced_once
    y = compute(inputs.codes, kernel, steps, variation_key, layer)
    size = window_lib.output_size(tuple(spatial), tiling.kernel_size, window)
    return (inputs.step * y).reshape(images, *size, tiling.features)


def _differentiable_once(x: Array) -> Array:
    return differentiable_once(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _through_arrays(codes: Array, kernel: Array, steps: StepSizes, key: Array | None, layer: contract.Layer) -> Array:
    """The layer between its activation's codes and their step: (M, O)."""
    tiling, _, spec, _ = layer
    weight_codes = cells.quantize_weight(kernel, steps.weight, tiling, spec)
    arrays = cells.store(weight_codes, tiling, spec, key)
    return contract.choose(layer)(codes, arrays, steps, layer)


# Layers of equal shapes are traced once.
_traced_once = jax.jit(_through_arrays, static_argnames="layer")


def cim_dense(
    x: ArrayLike | Codes,
    kernel: ArrayLike,
    steps: StepSizes,
    spec: CIMSpec,
    *,
    variation_key: Array | None = None,
    execution: Execution = Execution(),
) -> Float[Array, "*leading O"]:
    """A matrix product through memory arrays: `cim_conv` without spatial axes.

    Args:
      x: (..., C) real or `Codes`, any leading axes.
      kernel: (C, O) real.
      steps, spec, variation_key, execution: as for `cim_conv`.

    Returns:
      (..., O) float32.

    Raises:
      ValueError, NotImplementedError: as `cim_conv`.
    """
    inputs = quantize_activation(x, steps.activation, spec.activation)
    leading = inputs.codes.shape[:-1]
    flat = Codes(inputs.codes.reshape(math.prod(leading), inputs.codes.shape[-1]), inputs.step, inputs.spec)
    y = cim_conv(flat, kernel, steps, spec, padding=(), variation_key=variation_key, execution=execution)
    return y.reshape(*leading, y.shape[-1])


def _require_image(codes: Array, kernel: Array) -> None:
    if codes.ndim != kernel.ndim:
        raise ValueError(
            f"`x` has shape {codes.shape}; a kernel of shape {kernel.shape} takes one batch axis, {kernel.ndim - 2} "
            "spatial axes and the channels last."
        )
    require_channels(codes.shape, kernel.shape, "`x`")


def require_channels(shape: tuple[int, ...], kernel_shape: tuple[int, ...], what: str) -> None:
    """Refuse an input, named `what`, of other channels than the kernel's.

    Raises:
      ValueError: with what may be meant.
    """
    channels = kernel_shape[-2]
    if shape[-1] != channels:
        first = len(shape) > 2 and shape[-len(kernel_shape) + 1] == channels
        hint = "; move the channels last" if first else ""
        raise ValueError(
            f"{what} has {shape[-1]} channels but the kernel of shape {kernel_shape} takes {channels}{hint}."
        )
