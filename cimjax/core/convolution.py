"""One convolution, exact, and its gradients; grouped, it is the array product."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Shaped

from cimjax.core.window import Window, dimension_numbers


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(
    inputs: Shaped[Array, "N *space C"], kernel: Shaped[Array, "*kernel c O"], window: Window, groups: int = 1
) -> Shaped[Array, "N *output O"]:
    """A convolution without any rounding of operands: no TF32, no bfloat16 passes.

    Integers must stay exact, and step gradients are small differences of large terms. The gradient to the kernel is one
    grouped convolution as well: the one that JAX derives takes up to 25 times as long on CPU (docs/speed.md), and is
    known to be slow on CUDA (jax-ml/jax#13800).

    Args:
      inputs: (N, H, W, C), any number of spatial axes; float32, bfloat16, float16 or int8.
      kernel: (kh, kw, C / groups, O), of the same dtype.

    Returns:
      (N, OH, OW, O), float32 or, of int8, int32; integer sums are exact below 2^24.
    """
    return _convolve(inputs, kernel, window, groups)


def _convolve(inputs: Array, kernel: Array, window: Window, groups: int) -> Array:
    return lax.conv_general_dilated(
        inputs,
        kernel,
        window_strides=window.strides,
        padding=window.padding,
        lhs_dilation=window.input_dilation,
        rhs_dilation=window.kernel_dilation,
        dimension_numbers=dimension_numbers(kernel.ndim - 2),
        feature_group_count=groups,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=sum_type(inputs.dtype),
    )


def _gradients(window: Window, groups: int, operands: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    inputs, kernel = operands
    if not gradient.size:  # XLA knows no window of nothing
        return jnp.zeros_like(inputs), jnp.zeros_like(kernel)
    to_inputs = jax.linear_transpose(lambda inputs: _convolve(inputs, kernel, window, groups), inputs)
    to_kernel = jax.linear_transpose(lambda kernel: _convolve(inputs, kernel, window, groups), kernel)
    if groups == 1:
        return to_inputs(gradient)[0], to_kernel(gradient)[0]
    return to_inputs(gradient)[0], kernel_gradient(inputs, gradient, kernel.shape[:-2], window, groups)


def _convolution_forward(
    inputs: Array, kernel: Array, window: Window, groups: int
) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(inputs, kernel, window, groups), (inputs, kernel)


convolution.defvjp(_convolution_forward, _gradients)


def kernel_gradient(inputs: Array, gradient: Array, kernel_size: tuple[int, ...], window: Window, groups: int) -> Array:
    """The gradient of `convolution` to its kernel, (kh, kw, C / groups, O): the convolution of the inputs by the
    gradient (N, OH, OW, O), which sums over images as over channels otherwise and exchanges strides and dilations."""
    images, *size, channels = inputs.shape
    by_group = inputs.reshape(images, *size, groups, channels // groups)
    driven = jnp.moveaxis(by_group, (-1, 0), (0, -1)).reshape(channels // groups, *size, groups * images)
    # As much padding behind as gives the kernel's size.
    padding = tuple(
        (low, (places - 1) * dilation + (outputs - 1) * stride - (count - 1) * gap - low)
        for count, places, outputs, stride, (low, _), gap, dilation in zip(
            size, kernel_size, gradient.shape[1:-1], *window, strict=True
        )
    )
    exchanged = Window(window.kernel_dilation, padding, window.input_dilation, window.strides)
    return jnp.moveaxis(_convolve(driven, jnp.moveaxis(gradient, 0, -2), exchanged, groups), 0, -2)


def sum_type(operands: DTypeLike) -> DTypeLike:
    """What sums of such products are added up in."""
    return jnp.int32 if jnp.issubdtype(operands, jnp.integer) else jnp.float32
