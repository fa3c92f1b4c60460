"""Array product, ADC and sum as one function with one gradient: the default but on NVIDIA's GPUs.

It keeps nothing of the partial sums but small integers, and computes one weight gradient for all planes. Layers of few
read groups are written out, one group after the other; those of many are a loop, whose program and memory do not grow
with the groups, and whose partial sums are computed again in the backward pass. Layers without ADCs are `dequantized`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from cimjax.core import adc, encoding, readout
from cimjax.core.array_mac import by_column, snap_to_integers, sum_columns
from cimjax.core.cells import StoredArrays
from cimjax.core.programs import dequantized, products
from cimjax.core.programs.contract import Layer
from cimjax.core.programs.cpu import materialize
from cimjax.core.programs.kept_codes import smallest_type
from cimjax.core.programs.ladders import ColumnScales, Ladders, SliceADC
from cimjax.core.step_sizes import StepSizes, expand_outputs, expand_weight
from cimjax.core.tiling import tile_inputs
from cimjax.core.window import output_size
from cimjax.spec import CIMSpec, Execution, Product, Residuals

# With more read groups than these a layer is a loop.
MOST_WRITTEN_OUT = 8
# The largest magnitude of a partial sum that 16 bits keep.
SMALL_INTEGERS = 2**15 - 1


class Columns(NamedTuple):
    """What is differentiated, besides the inputs.

    digits: (kh, kw, R, c, K O) float32.
    weight_codes: (kh, kw, R, c, G O), what the gradient goes to instead of to digits (`encoding.split_by_sign`): one
      for all planes. None where digits are differentiated themselves.
    scales: (R, K O).
    """

    digits: Array
    weight_codes: Array | None
    scales: ColumnScales


# `forward(layer, inputs, columns)`: what all columns add up to, (M, O), of slices stacked in the batch, (T N, H, W, C).
Forward = Callable[[Layer, Array, Columns], Array]
# `backward(layer, inputs, columns, gradient)`: the gradients to inputs and columns of that to what they add up to.
Backward = Callable[[Layer, Array, Columns, Array], tuple[Array, Columns]]


class Kernels(NamedTuple):
    """What takes the place of this program's own way forwards and back; nothing is kept between them but codes."""

    forward: Forward
    backward: Backward


def run(codes: Array, arrays: StoredArrays, steps: StepSizes, layer: Layer, *, kernels: Kernels | None = None) -> Array:
    """As `contract.ArrayProgram`, by other kernels where they are given."""
    tiling, window, spec, _ = layer
    if spec.adc is None and kernels is None:
        return dequantized.run(codes, arrays, steps, layer)
    if spec.skips_decomposition:
        return _joined(layer, kernels, codes, Columns(by_column(arrays.codes[None]), None, _scales(steps, layer)))
    one_gradient = has_one_gradient(spec)
    weight_codes = by_column(encoding.split_by_sign(arrays.codes, spec.weight)) if one_gradient else None
    total = _joined(layer, kernels, codes, Columns(by_column(arrays.digits), weight_codes, _scales(steps, layer)))
    if arrays.reference is None:
        return total
    slices = encoding.slice_codes(codes, spec.activation)
    sums = sum_columns(slices, arrays.reference[..., None], tiling, window, spec)[..., 0]
    return total + readout.add_reference(adc.convert_reference(sums, steps, spec), steps, tiling, spec)


def has_one_gradient(spec: CIMSpec) -> bool:
    """Whether weight codes are differentiated, instead of every plane's digits."""
    return spec.variation is None and not spec.weight.step_per_plane


def _scales(steps: StepSizes, layer: Layer) -> ColumnScales:
    """The scales of all columns, (R, K O); without planes where codes are not divided."""
    tiling, _, spec, _ = layer
    scale = (
        expand_weight(steps.weight, tiling) if spec.skips_decomposition else readout.output_scale(steps, tiling, spec)
    )
    shape = (tiling.groups, 1 if spec.skips_decomposition else len(spec.weight.planes), tiling.features)
    each = ColumnScales(
        None if spec.adc is None else expand_outputs(steps.psum, tiling),
        None if spec.adc is None or steps.offset is None else expand_outputs(steps.offset, tiling),
        scale,
    )
    return jax.tree.map(lambda values: jnp.broadcast_to(values, shape).reshape(tiling.groups, -1), each)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _joined(layer: Layer, kernels: Kernels | None, codes: Array, columns: Columns) -> Array:
    """What all columns add up to, (M, O), of codes (N, H, W, C)."""
    return _forward(layer, kernels, codes, columns)[0]


def _forward(
    layer: Layer, kernels: Kernels | None, codes: Array, columns: Columns
) -> tuple[Array, tuple[Array, Columns, tuple[Array, ...] | None]]:
    # Codes are written once, on CPU, instead of computed again by each read group.
    codes = materialize(lambda codes: codes, codes)
    inputs, keep = _sliced(codes, layer), codes.astype(smallest_type(layer.spec.activation.code_range))
    kernels = kernels or _kernels(layer)
    if kernels is not None:
        return kernels.forward(layer, inputs, columns), (keep, columns, None)
    slice_adc, ladders = SliceADC.of_layer(layer), Ladders.of_groups(columns.scales)
    psums = [_psums(layer, sums) for sums in products.sums(layer, inputs, columns.digits)]
    total = functools.reduce(jnp.add, (slice_adc.read(p, ladders.of_group(r)) for r, p in enumerate(psums)))
    return total, (keep, columns, tuple(_as_small(p, layer) for p in psums))


def _backward(
    layer: Layer, kernels: Kernels | None, residuals: tuple[Array, Columns, Any], gradient: Array
) -> tuple[Array, Columns]:
    keep, columns, psums = residuals
    inputs, pull = jax.vjp(functools.partial(_sliced, layer=layer), keep.astype(jnp.float32))
    kernels = kernels or _kernels(layer)
    if kernels is not None:
        to_inputs, to_columns = kernels.backward(layer, inputs, columns, gradient)
    else:
        slice_adc, ladders = SliceADC.of_layer(layer), Ladders.of_groups(columns.scales)
        each = [slice_adc.gradients(p, ladders.of_group(r), gradient) for r, p in enumerate(psums)]
        to_sums = tuple(_as_product(layer, to_psums, keep.shape) for to_psums, _ in each)
        to_scales = jax.tree.map(lambda *rows: jnp.stack(rows), *(to_group for _, to_group in each))
        to_inputs, to_columns = _product_gradients(layer, inputs, columns._replace(scales=to_scales), to_sums)
    return pull(to_inputs)[0], to_columns


_joined.defvjp(_forward, _backward)


def is_loop(execution: Execution, read_groups: int) -> bool:
    """Whether a layer with ADCs is a loop over its read groups, which computes its partial sums again going back."""
    many = read_groups > MOST_WRITTEN_OUT
    return execution.residuals == Residuals.INPUTS or (execution.residuals == Residuals.AUTO and many)


def _kernels(layer: Layer) -> Kernels | None:
    return Kernels(_loop, loop_backward) if is_loop(layer.execution, layer.tiling.groups) else None


def _sliced(codes: Array, layer: Layer) -> Array:
    """Slices stacked in the batch, (T N, H, W, C); codes as they are where these are not divided."""
    if layer.spec.skips_decomposition:
        return codes
    slices = encoding.slice_codes(codes, layer.spec.activation)
    return slices.reshape(slices.shape[0] * slices.shape[1], *slices.shape[2:])


def _psums(layer: Layer, sums: Array) -> Array:
    """The result of a product, (T N, OH, OW, m), as partial sums (T, positions, m)."""
    slices = len(SliceADC.of_layer(layer).significances)
    return snap_to_integers(sums, layer.spec).reshape(slices, math.prod(sums.shape[:-1]) // slices, sums.shape[-1])


def _as_product(layer: Layer, to_psums: Array, codes_shape: tuple[int, ...]) -> Array:
    """The inverse of `_psums`."""
    images, *spatial, _ = codes_shape
    size = output_size(tuple(spatial), layer.tiling.kernel_size, layer.window)
    return to_psums.reshape(to_psums.shape[0] * images, *size, to_psums.shape[-1])


def _as_small(psums: Array, layer: Layer) -> Array:
    """Partial sums as they are kept: as 16-bit integers where these hold them."""
    spec = layer.spec
    if spec.variation is not None or layer.tiling.largest_psum(spec) > SMALL_INTEGERS:
        return psums
    # XLA's CPU backend would keep the numbers that these are made of instead.
    return materialize(lambda psums: psums.astype(jnp.int16), psums)


def _product_gradients(
    layer: Layer, inputs: Array, columns: Columns, to_sums: tuple[Array, ...]
) -> tuple[Array, Columns]:
    """To inputs, and to weight codes or else to digits; the scales are passed on."""
    digits, weight_codes, scales = columns
    to_inputs = products.to_inputs(layer, inputs, digits, to_sums)
    if weight_codes is None:
        return to_inputs, Columns(products.to_columns(layer, inputs, digits, to_sums), None, scales)
    mixed = tuple(materialize(functools.partial(_mix_planes, layer), part) for part in to_sums)
    to_digits: Any = None
    return to_inputs, Columns(to_digits, products.to_columns(layer, inputs, weight_codes, mixed), scales)


def _mix_planes(layer: Layer, to_sums: Array) -> Array:
    """The gradients of the columns of weight codes, (..., G O), from those of their digits' columns."""
    planes = jnp.split(to_sums, to_sums.shape[-1] // layer.tiling.features, axis=-1)
    rows = [
        functools.reduce(jnp.add, (weight * plane for weight, plane in zip(weights, planes, strict=True) if weight))
        for weights in encoding.plane_gradient_weights(layer.spec.weight)
    ]
    return jnp.concatenate(rows, axis=-1)


def _loop(layer: Layer, inputs: Array, columns: Columns) -> Array:
    """As `Forward`, one read group after the other."""
    one, slice_adc = _one_group(layer), SliceADC.of_layer(layer)

    def step(total: Array, group: tuple[Array, Array, Ladders]) -> tuple[Array, None]:
        driven, digits, ladders = group
        return total + slice_adc.read(_psums(layer, products.sums(one, driven, digits)[0]), ladders), None

    images, *spatial, _ = inputs.shape
    size = output_size(tuple(spatial), layer.tiling.kernel_size, layer.window)
    positions = images // len(slice_adc.significances) * math.prod(size)
    start = jnp.zeros((positions, layer.tiling.features), jnp.float32)
    groups = _driven(inputs, layer), _each_group(columns.digits), Ladders.of_groups(columns.scales)
    return lax.scan(step, start, groups)[0]


def loop_backward(layer: Layer, inputs: Array, columns: Columns, gradient: Array) -> tuple[Array, Columns]:
    """To inputs and columns, one read group after the other; partial sums are computed again."""
    one, slice_adc = _one_group(layer), SliceADC.of_layer(layer)
    shape = (inputs.shape[0] // len(slice_adc.significances), *inputs.shape[1:])

    def step(_: None, group: tuple[Any, ...]) -> tuple[None, tuple[Array, Columns]]:
        driven, digits, weight_codes, ladders = group
        psums = _psums(layer, products.sums(one, driven, digits)[0])
        to_psums, to_scales = slice_adc.gradients(psums, ladders, gradient)
        to_sums = (_as_product(layer, to_psums, shape),)
        return None, _product_gradients(one, driven, Columns(digits, weight_codes, to_scales), to_sums)

    driven, tile_back = jax.vjp(functools.partial(_driven, layer=layer), inputs)
    stored = jax.tree.map(_each_group, columns[:2])
    _, (to_driven, to_columns) = lax.scan(step, None, (driven, *stored, Ladders.of_groups(columns.scales)))
    to_stored = jax.tree.map(lambda each: jnp.moveaxis(each[..., 0, :, :], 0, -3), to_columns[:2])
    return tile_back(to_driven)[0], Columns(to_stored[0], to_stored[1], to_columns.scales)


def _driven(inputs: Array, layer: Layer) -> Array:
    """The channels that drive each read group: (B, H, W, C) to (R, B, H, W, c)."""
    tiled = tile_inputs(inputs, layer.tiling)
    return jnp.moveaxis(tiled.reshape(*inputs.shape[:-1], *layer.tiling.channels.shape), -2, 0)


def _each_group(columns: Array) -> Array:
    """(kh, kw, R, c, m) to (R, kh, kw, 1, c, m)."""
    return jnp.moveaxis(columns, -3, 0)[..., None, :, :]


def _one_group(layer: Layer) -> Layer:
    """The layer of one read group, whose channels are all its inputs; XLA's CPU backend computes the convolutions in
    a loop on one core, but not its matrix products."""
    execution = dataclasses.replace(layer.execution, product=Product.PATCHES)
    return layer._replace(tiling=layer.tiling.of_one_group, execution=execution)
