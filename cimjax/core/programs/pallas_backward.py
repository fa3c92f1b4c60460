"""The gradients of `pallas`, in two GPU kernels.

The first computes the partial sums of a block of positions again, what of the gradient passes their ADCs, the sums that
the gradients to ladders are made of, and the gradient to what the columns hold, all while the partial sums are in
registers; only what passed is written. The second carries that back to the inputs, read group after read group.
Gradients are multiplied by integers in three parts of 8 bits each, so that products are float32's.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cimjax.core import lsq
from cimjax.core.programs import joined
from cimjax.core.programs import pallas_blocks as parts
from cimjax.core.programs.contract import Layer
from cimjax.core.programs.joined import Columns
from cimjax.core.programs.ladders import Ladders, LadderSums, SliceADC, ladder_gradients, ladder_terms
from cimjax.core.programs.pallas_blocks import POSITIONS, Blocks
from cimjax.core.tiling import tile_inputs
from cimjax.core.window import Window

# About so many programs share a layer.
_PROGRAMS = 1056


def gradients(layer: Layer, inputs: Array, columns: Columns, gradient: Array) -> tuple[Array, Columns]:
    """As `joined.Backward`."""
    blocks = Blocks.of(layer, inputs, columns.digits, programs=_PROGRAMS)
    if not blocks.positions or not parts.fits(layer):
        return joined.loop_backward(layer, inputs, columns, gradient)
    slices = enumerate(jnp.split(inputs, len(SliceADC.of_layer(layer).significances)))
    each = [_of_slice(layer, t, blocks, part, columns, gradient) for t, part in slices]
    to_inputs = jnp.concatenate([of_inputs for of_inputs, _ in each])
    to_stored, to_scales = jax.tree.map(lambda *values: functools.reduce(jnp.add, values), *(rest for _, rest in each))
    if columns.weight_codes is None:
        return to_inputs, Columns(to_stored, None, to_scales)
    to_digits: Any = None
    return to_inputs, Columns(to_digits, to_stored, to_scales)


def _of_slice(
    layer: Layer, index: int, blocks: Blocks, inputs: Array, columns: Columns, gradient: Array
) -> tuple[Array, tuple[Array, Any]]:
    """Of slice `index`: to inputs (N, H, W, C), to stored (kh, kw, R, c, G O) and to scales (R, K O)."""
    operands = parts.operands_of(layer, blocks, inputs, columns.digits, columns.scales)
    wide = ((0, blocks.padded_positions - blocks.positions), (0, blocks.padded_outputs - blocks.features))
    slice_adc = SliceADC.of_layer(layer)
    gradient = slice_adc.significances[index].item() * gradient
    ladders = Ladders.of_groups(columns.scales)
    kinds = _kinds(ladders)
    width = blocks.planes * blocks.padded_outputs
    per_program = blocks.programs * blocks.groups
    shapes = (
        (blocks.groups * blocks.padded_positions, width),
        (per_program * blocks.planes * kinds.num_leaves, blocks.padded_outputs),
        (
            per_program * len(blocks.places) * blocks.channels,
            len(parts.gradient_weights(layer)) * blocks.padded_outputs,
        ),
    )
    passed, sums, stored = parts.call(
        functools.partial(_kernel, layer, index, blocks),
        shapes,
        (blocks.programs, blocks.padded_outputs // blocks.outputs, blocks.groups),
        "array_and_adc_gradients",
    )(*operands, jnp.pad(gradient, wide))
    sums = jnp.sum(sums.reshape(blocks.programs, blocks.groups, blocks.planes, -1, blocks.padded_outputs), axis=0)
    of_kinds = [sums[:, :, kind, : blocks.features].reshape(blocks.groups, -1) for kind in range(kinds.num_leaves)]
    all_columns = jnp.tile(jnp.sum(gradient, axis=0), (blocks.groups, blocks.planes))
    added = jax.tree.unflatten(kinds, of_kinds)._replace(gradient=all_columns)
    to_scales = ladder_gradients(added, ladders, slice_adc.bounds)
    stored = jnp.sum(stored.reshape(blocks.programs, blocks.groups, -1, blocks.channels, stored.shape[-1]), axis=0)
    stored = parts.without_padded_outputs(blocks, stored[..., : layer.tiling.channels.shape[1], :])
    to_stored = jnp.moveaxis(stored, 0, 1).reshape(*columns.digits.shape[:-1], -1)
    return _to_inputs(layer, blocks, inputs, operands.digits, passed), (to_stored, to_scales)


def _kinds(ladders: Ladders) -> Any:
    """The structure of the sums that the gradients to ladders are made of, but for that which all columns share."""
    adc, offset = (None if values is None else 0 for values in (ladders.step, ladders.offset))
    return jax.tree.structure(LadderSums(adc, 0, offset, None))


def _to_inputs(layer: Layer, blocks: Blocks, inputs: Array, digits: Array, passed: Array) -> Array:
    """What passed the ADCs, (R M, K O), carried back to inputs (N, H, W, C)."""
    positions = math.prod(inputs.shape[:-1])
    programs = pl.cdiv(positions, POSITIONS)
    shape = (programs * POSITIONS, blocks.groups * blocks.channels)
    kernel = functools.partial(_to_inputs_kernel, layer, blocks)
    (to_rows,) = parts.call(kernel, (shape,), (programs, blocks.groups), "array_to_inputs")(digits, passed)
    groups, channels = layer.tiling.channels.shape
    to_tiled = to_rows[:positions].reshape(*inputs.shape[:-1], groups, blocks.channels)[..., :channels]
    tile_back = jax.linear_transpose(lambda inputs: tile_inputs(inputs, layer.tiling), inputs)
    return tile_back(to_tiled.reshape(*inputs.shape[:-1], groups * channels))[0]


def _kernel(
    layer: Layer,
    index: int,
    blocks: Blocks,
    base: Any,
    inputs: Any,
    digits: Any,
    ladders: Ladders,
    gradient: Any,
    passed: Any,
    sums: Any,
    stored: Any,
) -> None:
    program, group = pl.program_id(0), pl.program_id(2)
    outputs = pl.program_id(1) * blocks.outputs + parts.count(blocks.outputs)
    of_planes = [parts.load_ladders(blocks, group, plane, outputs, ladders) for plane in range(blocks.planes)]
    places, kinds, weights = range(len(blocks.places)), _kinds(ladders).num_leaves, parts.gradient_weights(layer)

    def add_block(block: Array, carry: Any) -> Any:
        positions = (program * blocks.per_program + block) * POSITIONS + parts.count(POSITIONS)
        rows = triton.load(base.at[positions])
        to_columns = triton.load(gradient.at[positions[:, None], outputs[None, :]])
        through, added = [], []
        for plane, psums in enumerate(parts.psums(blocks, group, outputs, rows, inputs, digits)):
            ladder, bounds = of_planes[plane], parts.bounds(layer, index, plane)
            to_psums = to_columns * ladder.output_scale
            if bounds is not None:
                to_psums = lsq.passed(to_psums, lsq.in_steps(psums, ladder.reciprocal, ladder.offset), bounds)
            at = (group * blocks.padded_positions + positions)[:, None]
            triton.store(passed.at[at, (plane * blocks.padded_outputs + outputs)[None, :]], to_psums)
            through.append(to_psums)
            of_plane = ladder_terms(psums, to_psums, to_columns, ladder, bounds)
            added += [jnp.sum(values, axis=0) for values in jax.tree.leaves(of_plane._replace(gradient=None))]
        mixed = [
            functools.reduce(jnp.add, (weight * values for weight, values in zip(row, through, strict=True) if weight))
            for row in weights
        ]
        in_parts, products = [_in_parts(values, inputs.dtype) for values in mixed], []
        for place in places:
            seen = parts.load_seen(blocks, group, place, rows, inputs)
            products += [sum(_product(part, seen, (0, 0)) for part in each) for each in in_parts]
        return jax.tree.map(jnp.add, carry, (added, products))

    start = (
        [jnp.zeros((blocks.outputs,), jnp.float32)] * (blocks.planes * kinds),
        [jnp.zeros((blocks.outputs, blocks.channels), jnp.float32)] * (len(places) * len(weights)),
    )
    added, products = lax.fori_loop(jnp.int32(0), jnp.int32(blocks.per_program), add_block, start)
    which = program * blocks.groups + group
    for term, values in enumerate(added):
        triton.store(sums.at[which * blocks.planes * kinds + term, outputs], values)
    for (place, row), values in zip(itertools.product(places, range(len(weights))), products, strict=True):
        at = parts.rows_of(blocks, which, place)[:, None]
        triton.store(stored.at[at, (row * blocks.padded_outputs + outputs)[None, :]], values.T)


def _to_inputs_kernel(layer: Layer, blocks: Blocks, digits: Any, passed: Any, to_rows: Any) -> None:
    group = pl.program_id(1)
    positions = pl.program_id(0) * POSITIONS + parts.count(POSITIONS)
    image, place_of = _unravel(positions, blocks.size)
    total = jnp.zeros((POSITIONS, blocks.channels), jnp.float32)
    for index, place in enumerate(np.ndindex(*layer.tiling.kernel_size)):
        source, inside = _met_by(blocks, layer.window, place, image, place_of)
        at = (group * blocks.padded_positions + source)[:, None]
        for plane, first in itertools.product(range(blocks.planes), range(0, blocks.padded_outputs, blocks.outputs)):
            outputs = first + parts.count(blocks.outputs)
            columns = (plane * blocks.padded_outputs + outputs)[None, :]
            values = triton.load(passed.at[at, columns], mask=inside[:, None], other=0.0)
            stored = parts.load_digits(blocks, group, index, plane, outputs, digits)
            for part in _in_parts(values, stored.dtype):
                total += _product(part, stored, (1, 1))
    channels = group * blocks.channels + parts.count(blocks.channels)
    triton.store(to_rows.at[positions[:, None], channels[None, :]], total)


def _unravel(positions: Array, size: tuple[int, ...]) -> tuple[Array, list[Array]]:
    """The image and the place in it of each position."""
    place: list[Array] = []
    for count in reversed(size):
        place.insert(0, lax.rem(positions, jnp.int32(count)))
        positions = lax.div(positions, jnp.int32(count))
    return positions, place


def _met_by(
    blocks: Blocks, window: Window, place: tuple[int, ...], image: Array, place_of: list[Array]
) -> tuple[Array, Array]:
    """The output position whose place of the kernel meets each input position, and whether there is one."""
    source, inside = image, image < blocks.images
    for axis, (index, of_axis, count) in enumerate(zip(place, place_of, blocks.output, strict=True)):
        first = of_axis * window.input_dilation[axis] + window.padding[axis][0] - index * window.kernel_dilation[axis]
        stride = jnp.int32(window.strides[axis])
        output = lax.div(first, stride)
        inside = inside & (first >= 0) & (lax.rem(first, stride) == 0) & (output < count)
        source = source * count + output
    return jnp.where(inside, source, 0), inside


def _in_parts(values: Array, integers: Any) -> list[Array]:
    """float32 as the sum of parts that are multiplied by integers of this dtype without loss, the largest first."""
    if integers == jnp.float32:
        return [values]
    found = []
    for _ in range(3):
        found.append(values.astype(jnp.bfloat16))
        values = values - found[-1].astype(jnp.float32)
    return found


def _product(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    """A matrix product of float32, or of bfloat16 and integers that it holds, in float32."""
    if a.dtype != jnp.float32:
        a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
