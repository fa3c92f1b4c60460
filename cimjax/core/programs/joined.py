"""Array product, ADC and sum as one function with one gradient: the default on every platform.

It keeps nothing of the partial sums but small integers, and computes one weight gradient for all planes. Layers of few
read groups are written out, one group after the other; those of many are a loop, whose program and memory do not grow
with the groups, and whose partial sums are computed again in the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cimjax.core import adc, encoding, lsq, readout
from cimjax.core.array_mac import snap_to_integers
from cimjax.core.cells import StoredArrays
from cimjax.core.programs import products
from cimjax.core.programs.contract import Layer
from cimjax.core.programs.cpu import materialize, sum_over_positions
from cimjax.core.step_sizes import StepSizes, expand_outputs, expand_weight
from cimjax.core.tiling import tile_inputs
from cimjax.core.window import output_size
from cimjax.spec import CodeRange, Product, Residuals

# With more read groups than these a layer is a loop.
MOST_WRITTEN_OUT = 8
# The largest magnitude of a partial sum that 16 bits keep.
SMALL_INTEGERS = 2**15 - 1


class ColumnScales(NamedTuple):
    """What every column's ADC and its result are scaled by: (R, K O) float32 or, of one read group, (K O,).

    step: in psum units, > 0; None behind an ideal ADC.
    offset: the partial sum of code 0; None where there is none.
    output_scale: what a partial sum counts but for its slice, `f_k s_w`.
    """

    step: Any
    offset: Any
    output_scale: Any


class Ladders(NamedTuple):
    """What the passes over one read group's partial sums look up, computed once; (K O,) float32.

    reciprocal: `1 / step`; with step, offset and read_scale None behind an ideal ADC.
    read_scale: what a code counts but for its slice, `step f_k s_w`.
    """

    step: Any
    reciprocal: Any
    offset: Any
    output_scale: Any
    read_scale: Any

    @classmethod
    def of_groups(cls, scales: ColumnScales) -> Ladders:
        """Those of all read groups, (R, K O)."""
        if scales.step is None:
            return cls(None, None, None, _written(scales.output_scale), None)
        step, offset, scale = scales
        written = _written(jnp.stack([step, 1.0 / step, scale, step * scale, *([] if offset is None else [offset])]))
        return cls(written[0], written[1], None if offset is None else written[4], written[2], written[3])

    def of_group(self, group: int) -> Ladders:
        return Ladders(*(None if values is None else values[group] for values in self))


def _written(values: Array) -> Array:
    # XLA's CPU backend would compute them anew for each partial sum.
    return materialize(lambda values: values, values)


class SliceADC(NamedTuple):
    """What is fixed about the ADCs of a read group's columns, in all slices.

    bounds: of the codes, broadcastable to (T, positions, K O); None for ideal ADCs.
    significances: `g_t`, (T, 1, 1).
    features: `O`.
    """

    bounds: lsq.Bounds | None
    significances: np.ndarray
    features: int

    def read(self, psums: Array, ladders: Ladders) -> Array:
        """`sum_{t,k} g_t output_scale P^`: (T, positions, K O) to (positions, O), all float32."""
        if self.bounds is None:
            return self._add(psums * ladders.output_scale)
        u = lsq.in_steps(psums, ladders.reciprocal, ladders.offset)
        codes = lsq.round_to_codes(u, psums, ladders.offset, self.bounds, half_up=True)
        # `s w p + z w`, of which the second part is the same at all positions.
        total = self._add(codes * ladders.read_scale)
        if ladders.offset is None:
            return total
        constant = ladders.offset * ladders.output_scale
        return total + self._add(jnp.broadcast_to(constant, (len(self.significances), 1, psums.shape[-1])))

    def gradients(self, psums: Array, ladders: Ladders, gradient: Array) -> tuple[Array, ColumnScales]:
        """Of `read`, with LSQ's for the ADC (`lsq.passes`): to partial sums, (T, positions, K O), and to scales.

        Args:
          psums: (T, positions, K O), float32 or small integers.
          gradient: (positions, O) float32.
        """
        psums = psums.astype(jnp.float32)
        planes = psums.shape[-1] // self.features
        to_columns = jnp.concatenate([gradient] * planes, axis=-1) * self.significances
        if self.bounds is None:
            return to_columns * ladders.output_scale, ColumnScales(None, None, sum_over_positions(to_columns * psums))
        u = lsq.in_steps(psums, ladders.reciprocal, ladders.offset)
        codes = lsq.round_to_codes(u, psums, ladders.offset, self.bounds, half_up=True)
        inside, rest = lsq.passes(u, self.bounds)
        to_psums = jnp.where(inside, to_columns * ladders.output_scale, 0.0)
        # Small terms are added up: the difference of the sums of codes and of `u` would lose what matters.
        to_step = ladders.output_scale * sum_over_positions(to_columns * (codes - rest))
        to_scale = ladders.step * sum_over_positions(to_columns * codes)
        if ladders.offset is None:
            return to_psums, ColumnScales(to_step, None, to_scale)
        to_offset = ladders.output_scale * sum_over_positions(jnp.where(inside, 0.0, to_columns))
        return to_psums, ColumnScales(to_step, to_offset, to_scale + ladders.offset * sum_over_positions(to_columns))

    def _add(self, values: Array) -> Array:
        """The sum over slices and planes."""
        values = functools.reduce(jnp.add, list(values * self.significances))
        planes = values.shape[-1] // self.features
        # Sums over a short middle axis are slow on CPU.
        return functools.reduce(jnp.add, jnp.split(values, planes, axis=-1))


# `forward(layer, inputs, digits, scales)`: what all columns add up to and the sums of the further columns, as `_joined`
# gives them, of slices stacked in the batch, (T N, H, W, C).
Forward = Callable[[Layer, Array, Array, ColumnScales], tuple[Array, Array | None]]


def run(codes: Array, arrays: StoredArrays, steps: StepSizes, layer: Layer, *, forward: Forward | None = None) -> Array:
    """As `contract.ArrayProgram`; `forward` takes the place of this program's own way forwards."""
    tiling, _, spec, _ = layer
    scales = column_scales(steps, layer)
    if spec.skips_decomposition:
        return _joined(layer, None, codes, by_column(arrays.codes[None]), None, scales)[0]
    digits, weight_codes = by_column(arrays.digits), None
    if arrays.reference is not None:
        digits = jnp.concatenate([digits, arrays.reference[..., None]], axis=-1)
    if _has_one_weight_gradient(spec):
        weight_codes = by_column(encoding.split_by_sign(arrays.codes, spec.weight))
    total, reference = _joined(layer, forward, codes, digits, weight_codes, scales)
    if reference is None:
        return total
    reference = adc.convert_reference(snap_to_integers(reference, spec), steps, spec)
    return total + readout.add_reference(reference, steps, tiling, spec)


def _has_one_weight_gradient(spec: Any) -> bool:
    """Whether the gradient of a weight code is a fixed mixture of those of its digits."""
    return not spec.skips_decomposition and spec.variation is None and not spec.weight.step_per_plane


def by_column(values: Array) -> Array:
    """Planes (or the like) side by side: (K, kh, kw, R, c, O) to (kh, kw, R, c, K O)."""
    columns = jnp.moveaxis(values, 0, -2)
    return columns.reshape(*columns.shape[:-2], -1)


def column_scales(steps: StepSizes, layer: Layer) -> ColumnScales:
    """The scales of all columns, (R, K O); without planes where these are not divided."""
    tiling, _, spec, _ = layer
    planes = 1 if spec.skips_decomposition else len(spec.weight.planes)

    def by_group(values: Array) -> Array:
        """Values broadcastable to (R, K, O) as (R, K O)."""
        return jnp.broadcast_to(values, (tiling.groups, planes, tiling.features)).reshape(tiling.groups, -1)

    undivided = spec.skips_decomposition
    scale = expand_weight(steps.weight, tiling) if undivided else readout.output_scale(steps, tiling, spec)
    if spec.adc is None:
        return ColumnScales(None, None, by_group(scale))
    offset = None if steps.offset is None else by_group(expand_outputs(steps.offset, tiling))
    return ColumnScales(by_group(expand_outputs(steps.psum, tiling)), offset, by_group(scale))


def _slice_adc(layer: Layer) -> SliceADC:
    spec, features = layer.spec, layer.tiling.features
    if spec.skips_decomposition:
        return SliceADC(None, np.ones((1, 1, 1), np.float32), features)
    significances = readout.slice_significances(spec)[:, None, None]
    if spec.adc is None:
        return SliceADC(None, significances, features)
    entries = [np.repeat(entry[:, :, 0, :, 0], features, axis=-1) for entry in adc.psum_ranges(spec)]
    same = all(np.all(entry == entry.flat[0]) for entry in entries)
    code_range = CodeRange(*(entry.flat[0] if same else entry for entry in entries))
    return SliceADC(lsq.Bounds.of(code_range, spec.adc.gradient_margin), significances, features)


class _Sums(NamedTuple):
    """The sums of one read group's columns.

    psums: (T, positions, K O) float32.
    reference: (T, positions) float32, of its further column; None where there is none.
    """

    psums: Array
    reference: Array | None

    @classmethod
    def of_product(cls, product: Array, layer: Layer, width: int) -> _Sums:
        """From the result of a product, (T N, OH, OW, K O [+ 1])."""
        slices = 1 if layer.spec.skips_decomposition else len(layer.spec.activation.slices)
        count = math.prod(product.shape[:-1]) // slices
        sums = snap_to_integers(product, layer.spec).reshape(slices, count, product.shape[-1])
        return cls(sums, None) if sums.shape[-1] == width else cls(sums[..., :width], sums[..., width])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _joined(
    layer: Layer,
    forward: Forward | None,
    codes: Array,
    digits: Array,
    weight_codes: Array | None,
    scales: ColumnScales,
) -> tuple[Array, Array | None]:
    """What all columns add up to, and the sums of the further columns.

    Args:
      codes: (N, H, W, C) float32.
      digits: (kh, kw, R, c, K O) float32; one column more where each read group has a further one.
      weight_codes: (kh, kw, R, c, G O), what the gradient goes to instead of to digits (`encoding.split_by_sign`).
      scales: (R, K O).

    Returns:
      (M, O) and (T, M, R) or None.
    """
    return _forward(layer, forward, codes, digits, weight_codes, scales)[0]


def _forward(
    layer: Layer,
    forward: Forward | None,
    codes: Array,
    digits: Array,
    weight_codes: Array | None,
    scales: ColumnScales,
) -> tuple[tuple[Array, Array | None], tuple[Any, ...]]:
    inputs = _sliced(codes, layer)
    keep = codes.astype(smallest_type(layer.spec.activation.code_range))
    if forward is not None or _is_loop(layer):
        return (forward or _loop_forward)(layer, inputs, digits, scales), (keep, digits, weight_codes, scales, None)
    read, ladders, width = _slice_adc(layer).read, Ladders.of_groups(scales), scales.output_scale.shape[-1]
    sums = [_Sums.of_product(part, layer, width) for part in products.sums(layer, inputs, digits)]
    total = functools.reduce(jnp.add, (read(group.psums, ladders.of_group(r)) for r, group in enumerate(sums)))
    references = [s.reference for s in sums if s.reference is not None]
    residuals = tuple(_as_small(s.psums, layer) for s in sums)
    reference = jnp.stack(references, axis=-1) if references else None
    return (total, reference), (keep, digits, weight_codes, scales, residuals)


def _backward(
    layer: Layer, forward: Forward | None, residuals: tuple[Any, ...], gradient: tuple[Array, Array | None]
) -> tuple[Array, Array | None, Array | None, ColumnScales]:
    keep, digits, weight_codes, scales, psums = residuals
    codes = keep.astype(jnp.float32)
    inputs, to_codes = jax.vjp(functools.partial(_sliced, layer=layer), codes)
    if psums is None:
        to_inputs, to_columns, to_scales = _loop_backward(layer, inputs, digits, weight_codes, scales, gradient)
    else:
        gradients, ladders = _slice_adc(layer).gradients, Ladders.of_groups(scales)
        each = [gradients(group, ladders.of_group(r), gradient[0]) for r, group in enumerate(psums)]
        to_sums = [
            _with_reference(to_psums, gradient[1], r, layer, codes.shape) for r, (to_psums, _) in enumerate(each)
        ]
        to_inputs, to_columns = _product_gradients(layer, inputs, digits, weight_codes, tuple(to_sums))
        to_scales = jax.tree.map(lambda *rows: jnp.stack(rows), *(to_group for _, to_group in each))
    to_digits, to_weights = (to_columns, None) if weight_codes is None else (None, to_columns)
    return to_codes(to_inputs)[0], to_digits, to_weights, to_scales


_joined.defvjp(_forward, _backward)


def _is_loop(layer: Layer) -> bool:
    residuals, groups = layer.execution.residuals, layer.tiling.groups
    return residuals == Residuals.INPUTS or (residuals == Residuals.AUTO and groups > MOST_WRITTEN_OUT)


def _sliced(codes: Array, layer: Layer) -> Array:
    """Slices stacked in the batch, (T N, H, W, C); codes as they are where these are not divided."""
    if layer.spec.skips_decomposition:
        return codes
    slices = encoding.slice_codes(codes, layer.spec.activation)
    return slices.reshape(slices.shape[0] * slices.shape[1], *slices.shape[2:])


def _as_small(psums: Array, layer: Layer) -> Array:
    """Partial sums as they are kept: as 16-bit integers where these hold them."""
    spec = layer.spec
    if spec.variation is not None or layer.tiling.largest_psum(spec) > SMALL_INTEGERS or spec.skips_decomposition:
        return psums
    # XLA's CPU backend would keep the numbers that these are made of instead.
    return materialize(lambda psums: psums.astype(jnp.int16), psums)


def smallest_type(code_range: CodeRange) -> Any:
    """The smallest of the types that hold all codes; the code of a sign is +1 or -1, and an undriven row is 0."""
    low, high = min(code_range.q_min, 0), code_range.q_max
    for dtype in (np.int8, np.uint8, np.int16, np.uint16):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    return np.float32


def _with_reference(
    to_psums: Array, to_reference: Array | None, group: int | Array, layer: Layer, shape: tuple[int, ...]
) -> Array:
    """Gradients of a read group's sums as those of its product: the inverse of `_Sums.of_product`."""
    if to_reference is not None:
        to_psums = jnp.concatenate([to_psums, to_reference[..., group, None]], axis=-1)
    size = output_size(shape[1:-1], layer.tiling.kernel_size, layer.window)
    return to_psums.reshape(to_psums.shape[0] * shape[0], *size, to_psums.shape[-1])


def _product_gradients(
    layer: Layer, inputs: Array, digits: Array, weight_codes: Array | None, to_sums: tuple[Array, ...]
) -> tuple[Array, Array]:
    """To inputs, and to weight codes or else to digits."""
    to_inputs = products.to_inputs(layer, inputs, digits, to_sums)
    if weight_codes is None:
        return to_inputs, products.to_columns(layer, inputs, digits, to_sums)
    mixed = tuple(materialize(functools.partial(_mix_planes, layer), part) for part in to_sums)
    return to_inputs, products.to_columns(layer, inputs, weight_codes, mixed)


def _mix_planes(layer: Layer, to_sums: Array) -> Array:
    """The gradients of the columns of weight codes, (..., G O), from those of their digits' columns."""
    features = layer.tiling.features
    rows = []
    for weights in encoding.plane_gradient_weights(layer.spec.weight):
        planes = [to_sums[..., k * features : (k + 1) * features] for k in range(len(weights))]
        rows.append(functools.reduce(jnp.add, (w * plane for w, plane in zip(weights, planes, strict=True) if w)))
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=-1)


def _loop_forward(layer: Layer, inputs: Array, digits: Array, scales: ColumnScales) -> tuple[Array, Array | None]:
    """One read group after the other."""
    one, read, width = _one_group(layer), _slice_adc(layer).read, scales.output_scale.shape[-1]

    def step(total: Array, group: tuple[Array, Array, Ladders]) -> tuple[Array, Array | None]:
        driven, stored, ladders = group
        sums = _Sums.of_product(products.sums(one, driven, stored)[0], layer, width)
        return total + read(sums.psums, ladders), sums.reference

    images, *spatial, _ = inputs.shape
    size = output_size(tuple(spatial), layer.tiling.kernel_size, layer.window)
    slices = len(_slice_adc(layer).significances)
    start = jnp.zeros((images // slices * math.prod(size), layer.tiling.features), jnp.float32)
    total, references = lax.scan(step, start, (_driven(inputs, layer), _each_group(digits), Ladders.of_groups(scales)))
    return total, None if references is None else jnp.moveaxis(references, 0, -1)


def _loop_backward(
    layer: Layer,
    inputs: Array,
    digits: Array,
    weight_codes: Array | None,
    scales: ColumnScales,
    gradient: tuple[Array, Array | None],
) -> tuple[Array, Array, ColumnScales]:
    """To inputs, to weight codes or else to digits, and to scales; partial sums are computed again."""
    one, gradients, width = _one_group(layer), _slice_adc(layer).gradients, scales.output_scale.shape[-1]
    to_total, to_reference = gradient
    shape = (inputs.shape[0] // len(_slice_adc(layer).significances), *inputs.shape[1:])

    def step(_: None, group: tuple[Any, ...]) -> tuple[None, tuple[Array, Array, ColumnScales]]:
        driven, stored, weights, ladders, to_reference = group
        sums = _Sums.of_product(products.sums(one, driven, stored)[0], layer, width)
        to_psums, to_group = gradients(sums.psums, ladders, to_total)
        if to_reference is not None:
            to_reference = to_reference[..., None]
        to_sums = (_with_reference(to_psums, to_reference, 0, layer, shape),)
        return None, (*_product_gradients(one, driven, stored, weights, to_sums), to_group)

    driven, tile_back = jax.vjp(functools.partial(_driven, layer=layer), inputs)
    weights = None if weight_codes is None else _each_group(weight_codes)
    references = None if to_reference is None else jnp.moveaxis(to_reference, -1, 0)
    groups = (driven, _each_group(digits), weights, Ladders.of_groups(scales), references)
    _, (to_driven, to_columns, to_scales) = lax.scan(step, None, groups)
    to_columns = jnp.moveaxis(to_columns[..., 0, :, :], 0, -3)
    return tile_back(to_driven)[0], to_columns, to_scales


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
