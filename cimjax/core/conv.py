"""The array layer: a convolution (or matrix product) as the memory arrays and their ADCs compute it.

`cim_conv` and `cim_dense` run the steps of the computation: quantize the activation, quantize and encode the weight,
then, in one function (`cimjax.core.digitise`), multiply in the arrays, convert by ADC, dequantize and add.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cimjax.core import encoding, lsq
from cimjax.core import window as window_lib
from cimjax.core.cells import quantize_weight, stored_columns, with_ones
from cimjax.core.conversion import Conversion
from cimjax.core.digitise import digitised
from cimjax.core.lowering import Columns, array_product, choose_operands
from cimjax.core.lsq import Codes
from cimjax.core.readout import Part, add_up, read_reference, scales_of, whole
from cimjax.core.recompute import recomputed
from cimjax.core.schedule import codes_once
from cimjax.core.step_sizes import StepSizes, require_shapes
from cimjax.core.tiling import Tiling, tile
from cimjax.core.window import Padding, PerAxis, Window
from cimjax.spec import ActivationSpec, CIMSpec, Lowering, Residuals


class PartialSums(NamedTuple):
    """What the columns give before the ADC, at every output position: `M = N OH OW`.

    Positions share one axis because XLA's CPU backend crashes on sums over arrays of seven axes.

    columns: (T, M, R, K, O) float32, for every slice, read group, plane and output; exact integers unless the
      specification has `variation`.
    reference: (T, M, R) float32, the sum of the inputs that drive each read group; None without an `offset` encoding.
    """

    columns: Array
    reference: Array | None


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
) -> Array:
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

    Returns:
      (N, OH, OW, O) float32.

    Raises:
      ValueError: for a kernel that does not fit the arrays, sums that float32 cannot hold exactly, channel counts that
        differ, codes of another specification, or a missing `variation_key`.
    """
    steps = jax.tree.map(lambda step: jnp.asarray(step, jnp.float32), steps)
    inputs = quantize_activation(x, steps.activation, spec.activation)
    kernel = jnp.asarray(kernel)
    if inputs.codes.shape[-1] != kernel.shape[-2]:
        raise ValueError(
            f"`x` has {inputs.codes.shape[-1]} channels but the kernel of shape {kernel.shape} takes "
            f"{kernel.shape[-2]}; grouped convolutions are not supported."
        )
    tiling = tile(kernel.shape, spec)
    require_shapes(steps, tiling, spec)
    window = window_lib.resolve(
        inputs.codes.shape[1:-1],
        tiling.kernel_size,
        strides=strides,
        padding=padding,
        input_dilation=input_dilation,
        kernel_dilation=kernel_dilation,
    )

    y = inputs.step * _through_arrays(inputs.codes, inputs.step, kernel, steps, variation_key, window=window, spec=spec)
    spatial = window_lib.output_size(inputs.codes.shape[1:-1], tiling.kernel_size, window)
    return y.reshape(inputs.codes.shape[0], *spatial, tiling.features)


# Layers of equal shapes are traced once.
@functools.partial(jax.jit, static_argnames=("window", "spec"))
def _through_arrays(
    codes: Array, code_step: Array, kernel: Array, steps: StepSizes, key: Array | None, *, window: Window, spec: CIMSpec
) -> Array:
    """The layer between its activation's codes and their step."""
    tiling = tile(kernel.shape, spec)
    if tiling.groups > 1 or len(spec.activation.slices) > 1:
        codes = codes_once(codes, code_step, spec.activation.code_range)

    def through_arrays(codes: Array, kernel: Array, steps: StepSizes, key: Array | None) -> Array:
        if spec.skips_decomposition:
            return add_up(_whole_product(codes, kernel, steps, tiling, window, spec), steps, tiling, spec)
        if spec.adc is None:
            return add_up(_product(codes, kernel, steps, tiling, window, spec, key), steps, tiling, spec)
        program = _fused if spec.lowering == Lowering.PALLAS else _digitised
        return program(codes, kernel, steps, tiling, window, spec, key)

    # Without ADCs all is linear in the partial sums, and nothing keeps them.
    if spec.residuals == Residuals.INPUTS and spec.adc is not None:
        code_range = spec.activation.code_range
        return recomputed(through_arrays, codes, kernel, steps, key, code_range=code_range)
    return through_arrays(codes, kernel, steps, key)


def cim_dense(
    x: ArrayLike | Codes,
    kernel: ArrayLike,
    steps: StepSizes,
    spec: CIMSpec,
    *,
    variation_key: Array | None = None,
) -> Array:
    """A matrix product through memory arrays: `cim_conv` without spatial axes.

    Args:
      x: (..., C) real or `Codes`, any leading axes.
      kernel: (C, O) real.
      steps, spec, variation_key: as for `cim_conv`.

    Returns:
      (..., O) float32.
    """
    inputs = quantize_activation(x, steps.activation, spec.activation)
    leading = inputs.codes.shape[:-1]
    flat = Codes(inputs.codes.reshape(math.prod(leading), inputs.codes.shape[-1]), inputs.step, inputs.spec)
    y = cim_conv(flat, kernel, steps, spec, padding=(), variation_key=variation_key)
    return y.reshape(*leading, y.shape[-1])


def quantize_activation(x: ArrayLike | Codes, step: Array | None, spec: ActivationSpec) -> Codes:
    """Activation codes `a = clip(rint(x / s_a), q_min, q_max)`, one step for the tensor; `Codes` pass unchanged.

    Raises:
      ValueError: for `Codes` of another specification, or a real `x` without a step.
    """
    if isinstance(x, Codes):
        if (x.spec.code_range, x.spec.slices) != (spec.code_range, spec.slices):
            raise ValueError(f"The input was quantized with {x.spec}, but the layer's `activation` is {spec}.")
        return x
    if step is None:
        raise ValueError("`steps.activation` is None: a real input needs a step; give one, or give `Codes`.")
    step = jnp.asarray(step, jnp.float32)
    return Codes(lsq.quantize(x, step, spec.code_range), step, spec)


def partial_sums(
    inputs: Codes,
    kernel: Array,
    steps: StepSizes,
    tiling: Tiling,
    window: Window,
    spec: CIMSpec,
    variation_key: Array | None = None,
) -> PartialSums:
    """The sum of every column, `P[t,r,k,o]`, and of the inputs of every read group where an offset needs them.

    Args:
      inputs: codes of shape (N, H, W, C).
      kernel: (kh, kw, C, O) real.
      steps: `weight` is used.

    Returns:
      `PartialSums`, exact integers in the integer path.
    """
    parts = _product(inputs.codes, kernel, steps, tiling, window, spec, variation_key)
    slices, planes = len(spec.activation.slices), len(spec.weight.planes)
    columns = whole(jnp.concatenate([part.columns for part in parts], axis=-1), spec)
    count = math.prod(columns.shape[:-1]) // slices
    columns = columns.reshape(slices, count, tiling.groups, planes, tiling.features)
    references = [part.reference for part in parts if part.reference is not None]
    if not references:
        return PartialSums(columns, None)
    reference = whole(jnp.concatenate(references, axis=-1), spec)
    return PartialSums(columns, reference.reshape(slices, count, tiling.groups))


def _digitised(
    codes: Array,
    kernel: Array,
    steps: StepSizes,
    tiling: Tiling,
    window: Window,
    spec: CIMSpec,
    variation_key: Array | None,
) -> Array:
    """All columns through their ADCs; the reference's sums through theirs, or exactly."""
    columns = with_ones(*stored_columns(kernel, steps, tiling, spec, variation_key))
    inputs = _stacked(encoding.slice_codes(codes, spec.activation))
    total, sums = digitised(inputs, columns, scales_of(steps, tiling, spec), tiling, window, spec)
    if sums is None:
        return total
    return total + read_reference(sums, slice(0, tiling.groups), steps, tiling, spec)


def _product(
    codes: Array,
    kernel: Array,
    steps: StepSizes,
    tiling: Tiling,
    window: Window,
    spec: CIMSpec,
    variation_key: Array | None,
) -> list[Part]:
    """All columns: the array product of every slice with every plane, not yet freed from rounding (`whole`)."""
    columns, ones = stored_columns(kernel, steps, tiling, spec, variation_key)
    columns = with_ones(columns, ones)
    parts = array_product(_stacked(encoding.slice_codes(codes, spec.activation)), columns, tiling, window, spec)
    return [Part(sums, None) if ones is None else _split_reference(sums, columns.digits.shape[-1]) for sums in parts]


def _fused(
    codes: Array,
    kernel: Array,
    steps: StepSizes,
    tiling: Tiling,
    window: Window,
    spec: CIMSpec,
    variation_key: Array | None,
) -> Array:
    """Product and ADCs in one kernel; only the reference's sums, one column an array, are computed apart."""
    # Pallas takes a while to import, and is not on every platform.
    from cimjax.core import fused

    columns, ones = stored_columns(kernel, steps, tiling, spec, variation_key)
    slices = encoding.slice_codes(codes, spec.activation)
    scales, operands, total = scales_of(steps, tiling, spec), choose_operands(spec), jnp.float32(0)
    if scales.step is None:
        raise ValueError("`adc` is None: there is nothing to fuse with an ideal ADC.")
    for index, part in enumerate(spec.activation.slices):
        layer = fused.Layer(Conversion.of(index, tiling, spec), tiling, window, operands)
        weight = float(part.significance) * scales.weight
        total = total + fused.product_and_conversion(
            layer, slices[index], columns.digits, scales.step, scales.offset, weight
        )
    if ones is not None:
        sums = array_product(_stacked(slices), Columns(ones), tiling, window, spec)
        total = total + read_reference(jnp.concatenate(sums, axis=-1), slice(0, tiling.groups), steps, tiling, spec)
    return total


def _stacked(slices: Array) -> Array:
    """Slices (T, N, H, W, C) in the batch."""
    return slices.reshape(slices.shape[0] * slices.shape[1], *slices.shape[2:])


def _split_reference(sums: Array, columns: int) -> Part:
    """Apart: the columns of each group, and its last one, which sums the inputs."""
    groups = sums.shape[-1] // columns
    by_group = sums.reshape(*sums.shape[:-1], groups, columns)
    return Part(by_group[..., :-1].reshape(*sums.shape[:-1], groups * (columns - 1)), by_group[..., -1])


def _whole_product(
    codes: Array, kernel: Array, steps: StepSizes, tiling: Tiling, window: Window, spec: CIMSpec
) -> list[Part]:
    """What the columns of an ideal ADC add up to, without dividing codes into slices and planes: the same sums."""
    weights = jnp.where(tiling.stored[..., None], quantize_weight(kernel, steps.weight, tiling, spec), 0)
    return [Part(sums, None) for sums in array_product(codes, Columns(weights), tiling, window, spec)]
