"""One convolution: exact sums of cheap operands forwards, float32 backwards."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from cimjax.core.schedule import apart
from cimjax.core.window import Window, positions, shifted

# What is quicker on CPU, see `docs/speed.md`, and takes longer to compile, is for kernels that meet at least so many
# positions.
POSITIONS = 2048
# A convolution is written out as a sum of products where a kernel has at most so many weights for each output channel.
FEW = 27
# The gradient to the input is a matrix product where a kernel has at least so many times as many output as input
# channels.
WIDENING = 3
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
    if jax.default_backend() == "cpu" and groups == 1:
        met = inputs.shape[0] * positions(inputs.shape[1:-1], kernel.shape[:-2], window)
        if met >= POSITIONS:
            return _convolve_on_cpu(window, inputs, kernel)
    return _convolve(window, groups, inputs, kernel)


def sum_type(operands: DTypeLike) -> DTypeLike:
    """What sums of such products are added up in."""
    return jnp.int32 if jnp.issubdtype(operands, jnp.integer) else jnp.float32


def conv_general_dilated(inputs: Array, kernel: Array, *args: Any, **options: Any) -> Array:
    """`lax.conv_general_dilated` with quicker gradients on CPU, for the argument of that name of `flax.linen.Conv`.

    On CPU it has gradients, and derivatives of these, but no forward-mode derivative of its own.

    Args:
      inputs, kernel: as `dimension_numbers` says.
      *args, **options: those of `lax.conv_general_dilated`; no arrays.
    """

    def convolution(inputs: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(inputs, kernel, *args, **options)

    if jax.default_backend() != "cpu":
        return convolution(inputs, kernel)
    differentiated = jax.custom_vjp(convolution)

    def backward(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        inputs, kernel = kept
        (to_inputs,) = jax.linear_transpose(lambda x: convolution(x, kernel), inputs)(gradient)
        return to_inputs, _to_kernel(convolution, inputs, kernel, gradient)

    differentiated.defvjp(lambda *operands: (convolution(*operands), operands), backward)
    return differentiated(inputs, kernel)


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
def _convolve_on_cpu(window: Window, inputs: Array, kernel: Array) -> Array:
    weights = math.prod(kernel.shape[:-1])
    if not 0 < weights <= FEW or inputs.dtype != jnp.float32:
        return _convolve(window, 1, inputs, kernel)
    return apart(functools.partial(_written_out, window), inputs, kernel, known=kernel)


def _written_out(window: Window, inputs: Array, kernel: Array) -> Array:
    size, channels = kernel.shape[:-2], range(kernel.shape[-2])
    places = zip(shifted(inputs, size, window), kernel.reshape(-1, *kernel.shape[-2:]), strict=True)
    return functools.reduce(jnp.add, (seen[..., c : c + 1] * weights[c] for seen, weights in places for c in channels))


def _forward(window: Window, inputs: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve_on_cpu(window, inputs, kernel), (inputs, kernel)


def _backward(window: Window, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    inputs, kernel = kept
    to_kernel = _to_kernel(functools.partial(_convolve, window, 1), inputs, kernel, gradient)
    return _to_inputs(window, inputs, kernel, gradient), to_kernel


_convolve_on_cpu.defvjp(_forward, _backward)


def _to_inputs(window: Window, inputs: Array, kernel: Array, gradient: Array) -> Array:
    flat, by_place = gradient.reshape(-1, gradient.shape[-1]), kernel.reshape(-1, kernel.shape[-1])
    widens = kernel.shape[-1] >= WIDENING * kernel.shape[-2]
    if not widens or flat.shape[0] * by_place.shape[0] > PLACES:
        return jax.linear_transpose(lambda x: _convolve(window, 1, x, kernel), inputs)(gradient)[0]
    given = jnp.matmul(flat, by_place.T, precision=lax.Precision.HIGHEST)
    given = given.reshape(*gradient.shape[:-1], -1, inputs.shape[-1])

    def add(given: Array) -> Array:
        places = [given[..., place, :] for place in range(given.shape[-2])]
        return jax.linear_transpose(lambda x: shifted(x, kernel.shape[:-2], window), inputs)(places)[0]

    return apart(add, given, known=kernel)


def _to_kernel(convolution: Callable[[Array, Array], Array], inputs: Array, kernel: Array, gradient: Array) -> Array:
    # XLA transposes the inputs for it, and would compute them again for that, element by element.
    written = apart(lambda inputs: inputs, inputs, known=kernel)
    (to_kernel,) = jax.linear_transpose(lambda kernel: convolution(written, kernel), kernel)(gradient)
    return to_kernel
