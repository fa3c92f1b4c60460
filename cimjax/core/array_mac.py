"""The array product: what every column sums up before its ADC (3.5 of the design; the paper's Fig. 5)."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from cimjax.core.cells import StoredArrays, quantize_weight, store
from cimjax.core.encoding import slice_codes
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import Tiling, tile_inputs
from cimjax.core.window import Window, dimension_numbers
from cimjax.spec import CIMSpec


class PartialSums(NamedTuple):
    """A number for every column at every output position: sums before the ADC, or what the ADC makes of them.

    Positions share one axis because XLA's CPU backend crashes on sums over arrays of seven axes.

    columns: (T, M, R, K, O) float32; sums are exact integers unless the specification has `variation`.
    reference: (T, M, R) float32, the sum of the inputs that drive each read group; None without an `offset` encoding.
    """

    columns: Array
    reference: Array | None


def array_mac(slices: Array, arrays: StoredArrays, tiling: Tiling, window: Window, spec: CIMSpec) -> PartialSums:
    """`P[t,r,k,o] = sum over the rows of read group r of a_t * d_k`, by ONE grouped convolution.

    Groups are read groups; the output channels of a group are its planes' columns and its dummy column, if it has one.

    Args:
      slices: (T, N, H, W, C) float32, integer-valued.
      arrays: what the cells hold.
      window: strides, padding and dilations; padded places are undriven rows.

    Returns:
      `PartialSums`, exact integers in the integer path.
    """
    count, images = slices.shape[:2]
    planes, *kernel_size, groups, channels, outputs = arrays.digits.shape
    driven = tile_inputs(slices.reshape(count * images, *slices.shape[2:]), tiling)
    columns = jnp.moveaxis(arrays.digits, 0, -2).reshape(*kernel_size, groups, channels, planes * outputs)
    if arrays.reference is not None:
        columns = jnp.concatenate([columns, arrays.reference[..., None]], axis=-1)
    kernel = jnp.moveaxis(columns, -3, -2)
    sums = convolution(driven, kernel.reshape(*kernel_size, channels, groups * columns.shape[-1]), window, groups)
    positions = images * math.prod(sums.shape[1:-1])
    sums = snap_to_integers(sums, spec).reshape(count, positions, groups, columns.shape[-1])
    reference = None if arrays.reference is None else sums[..., -1]
    columns = sums[..., : planes * outputs].reshape(count, positions, groups, planes, outputs)
    return PartialSums(columns, reference)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolution(inputs: Array, kernel: Array, window: Window, groups: int = 1) -> Array:
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


def partial_sums(
    codes: Array,
    kernel: Array,
    steps: StepSizes,
    tiling: Tiling,
    window: Window,
    spec: CIMSpec,
    variation_key: Array | None = None,
) -> PartialSums:
    """The partial sums of a layer from its activation codes and its real kernel: steps 3.2 to 3.5 of the design.

    Args:
      codes: (N, H, W, C) float32.
      kernel: (kh, kw, C, O) real.
      steps: `weight` is used.
      variation_key: the random key of the chip; needed with `spec.variation`.
    """
    arrays = store(quantize_weight(kernel, steps.weight, tiling, spec), tiling, spec, variation_key)
    return array_mac(slice_codes(codes, spec.activation), arrays, tiling, window, spec)


def snap_to_integers(sums: Array, spec: CIMSpec) -> Array:
    """Sums that are integers by construction, freed from the rounding of inexact convolution algorithms; others as they
    are."""
    return sums if spec.variation is not None else _rounded(sums)


@jax.custom_jvp
def _rounded(sums: Array) -> Array:
    return jnp.rint(sums)


@_rounded.defjvp
def _rounded_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _rounded(primals[0]), tangents[0]
