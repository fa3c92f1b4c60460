"""One convolution: exact sums of cheap operands forwards, float32 backwards."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from cimjax.core.schedule import apart
from cimjax.core.window import Window, positions, shifted

# On CPU the gradient to the input is a matrix product where a kernel has at least so many times as many output as input
# channels, and meets at least so many positions; see `docs/speed.md`.
WIDENING = 3
POSITIONS = 2048
# It writes what each place of the kernel gives to each position: only up to so many numbers.
PLACES = 10_000_000


def convolve(inputs: Array, kernel: Array, window: Window, groups: int = 1) -> Array:
    """A convolution without any rounding of operands: no TF32, no bfloat16 passes.

    Integers must stay exact, and step gradients are small differences of large terms.

    Args:
      inputs: (N, H, W, C), any number of spatial axes; float32, bfloat16, float16 or int8.
      kernel: (kh, kw, C / groups, O), of the same dtype.

    Returns:
      (N, OH, OW, O) float32; integer sums are exact below 2^24.
    """
    if groups == 1 and jax.default_backend() == "cpu" and kernel.shape[-1] >= WIDENING * kernel.shape[-2]:
        met = inputs.shape[0] * positions(inputs.shape[1:-1], kernel.shape[:-2], window)
        if met >= POSITIONS:
            return _convolve_widening(window, inputs, kernel)
    return _convolve(window, groups, inputs, kernel)


def sum_type(operands: DTypeLike) -> DTypeLike:
    """What sums of such products are added up in."""
    return jnp.int32 if jnp.issubdtype(operands, jnp.integer) else jnp.float32


def _convolve(window: Window, groups: int, inputs: Array, kernel: Array) -> Array:
    spatial = "".join(chr(ord("a") + axis) for axis in range(kernel.ndim - 2))
    return lax.conv_general_dilated(
        inputs,
        kernel,
        window_strides=window.strides,
        padding=window.padding,
        lhs_dilation=window.input_dilation,
        rhs_dilation=window.kernel_dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=groups,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=sum_type(inputs.dtype),
    ).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve_widening(window: Window, inputs: Array, kernel: Array) -> Array:
    return _convolve(window, 1, inputs, kernel)


def _widening_forward(window: Window, inputs: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(window, 1, inputs, kernel), (inputs, kernel)


def _widening_backward(window: Window, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    inputs, kernel = kept
    flat, by_place = gradient.reshape(-1, gradient.shape[-1]), kernel.reshape(-1, kernel.shape[-1])
    if flat.shape[0] * by_place.shape[0] <= PLACES:
        given = jnp.matmul(flat, by_place.T, precision=lax.Precision.HIGHEST)
        given = given.reshape(*gradient.shape[:-1], -1, inputs.shape[-1])

        def add(given: Array) -> Array:
            places = [given[..., place, :] for place in range(given.shape[-2])]
            return jax.linear_transpose(lambda x: shifted(x, kernel.shape[:-2], window), inputs)(places)[0]

        to_inputs = apart(add, given, known=kernel)
    else:
        (to_inputs,) = jax.linear_transpose(lambda x: _convolve(window, 1, x, kernel), inputs)(gradient)
    (to_kernel,) = jax.linear_transpose(lambda k: _convolve(window, 1, inputs, k), kernel)(gradient)
    return to_inputs, to_kernel


_convolve_widening.defvjp(_widening_forward, _widening_backward)
