"""One convolution: exact sums of cheap operands forwards, float32 backwards."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from cimjax.core.schedule import after
from cimjax.core.window import Window, positions, shifted

# On CPU gradients are matrix products where a kernel has at least so many times as many output as input channels, and
# meets at least so many positions; see `docs/speed.md`.
WIDENING = 3
POSITIONS = 2048
# That to the input writes what each place of the kernel gives to each position: only up to so many numbers, about what
# fits in a cache.
PLACES = 5_000_000


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
        places = [given[..., place, :] for place in range(given.shape[-2])]
        (to_inputs,) = jax.linear_transpose(lambda x: shifted(x, kernel.shape[:-2], window), inputs)(places)
    else:
        (to_inputs,) = jax.linear_transpose(lambda x: _convolve(window, 1, x, kernel), inputs)(gradient)
    # Otherwise the shifted copies would be made on the way forwards, and held.
    places = shifted(after(inputs, gradient), kernel.shape[:-2], window)
    # As many places at a time as the kernel's last axis has: fewer programs, and copies that still fit in a cache.
    row = kernel.shape[-3] if kernel.ndim > 2 else 1
    to_kernel = [
        jnp.matmul(_flat(places[first : first + row]).T, flat, precision=lax.Precision.HIGHEST)
        for first in range(0, len(places), row)
    ]
    return to_inputs, jnp.stack(to_kernel).reshape(kernel.shape)


def _flat(places: list[Array]) -> Array:
    """Several arrays (..., C), side by side: (positions, places C)."""
    joined = jnp.concatenate(places, axis=-1)
    return joined.reshape(-1, joined.shape[-1])


_convolve_widening.defvjp(_widening_forward, _widening_backward)
