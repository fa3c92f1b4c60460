"""Array product, ADC and sum in one GPU kernel: partial sums stay in registers and are never written to memory.

A program of the kernel computes a block of output positions for a block of outputs. Over the read groups, one after
the other, it multiplies what the positions see by the digits, converts each plane's sums by their ADC, scales and adds.
The backward pass is `joined`'s, one read group after the other.

Written in Pallas for its Triton backend. Block sizes have not been tuned on a GPU yet, which is why no `auto` chooses
this; a program that is lowered for the CPU interprets it, for tests.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cimjax.core import lsq
from cimjax.core.cells import StoredArrays
from cimjax.core.convolution import sum_type
from cimjax.core.numerics import reciprocal
from cimjax.core.programs import joined
from cimjax.core.programs.contract import Layer, by_platform, operand_type
from cimjax.core.programs.joined import Columns, ColumnScales
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import tile_inputs
from cimjax.core.window import output_size
from cimjax.spec import Operands

# Output positions of a program, and outputs at most.
_POSITIONS = 64
_OUTPUTS = 32
_WARPS = 4


def run(codes: Array, arrays: StoredArrays, steps: StepSizes, layer: Layer) -> Array:
    """As `contract.ArrayProgram`.

    Raises:
      ValueError: where the program is lowered for anything but a GPU or the CPU.
    """
    return joined.run(codes, arrays, steps, layer, forward=_forward)


def _forward(layer: Layer, inputs: Array, columns: Columns) -> Array:
    """As `joined.Forward`."""
    slices = len(layer.spec.activation.slices)
    sizes = _Sizes.of(layer, (inputs.shape[0] // slices, *inputs.shape[1:]))
    if not sizes.positions:
        return jnp.zeros((0, sizes.features), jnp.float32)
    parts = enumerate(jnp.split(inputs, slices))
    return sum(
        (_read_slice(layer, t, sizes, part, columns.digits, columns.scales) for t, part in parts), jnp.float32(0)
    )


def _read_slice(layer: Layer, index: int, sizes: _Sizes, inputs: Array, digits: Array, scales: ColumnScales) -> Array:
    """`g_t sum_{r,k} output_scale P^` of slice `index`, (M, O)."""
    position, anywhere = pl.BlockSpec((_POSITIONS,), lambda i, j: (i,)), pl.BlockSpec(memory_space=pl.ANY)
    on_gpu, on_cpu = (
        pl.pallas_call(
            functools.partial(_kernel, layer, index, sizes),
            out_shape=jax.ShapeDtypeStruct((sizes.padded_positions, sizes.padded_outputs), jnp.float32),
            grid=(sizes.padded_positions // _POSITIONS, sizes.padded_outputs // sizes.outputs),
            in_specs=[position, *[anywhere] * 6],
            out_specs=pl.BlockSpec((_POSITIONS, sizes.outputs), lambda i, j: (i, j)),
            interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=2),
            name="array_and_adc",
        )
        for interpret in (False, True)
    )
    y = by_platform(on_gpu, cpu=on_cpu, tpu=_refuse)(*_operands(layer, sizes, inputs, digits, scales))
    significance = float(layer.spec.activation.slices[index].significance)
    return significance * y[: sizes.positions, : sizes.features]


def _refuse(*operands: Array) -> Array:
    raise ValueError("`program` is 'pallas', a kernel for GPUs, and this is a TPU; use program='auto'.")


class _Sizes(NamedTuple):
    """How a layer is cut into blocks; sizes of blocks are powers of two, as Triton needs them.

    output: the spatial shape of the output.
    positions, padded_positions: output positions of the batch, and up to whole blocks.
    channels: of a read group, padded.
    outputs, padded_outputs: outputs of a block, and of all blocks.
    base: (padded_positions,) int32, the row of the padded input that the kernel's first place meets.
    places: how many rows further each place of the kernel lies.
    """

    output: tuple[int, ...]
    positions: int
    padded_positions: int
    groups: int
    channels: int
    features: int
    outputs: int
    padded_outputs: int
    padding: tuple[tuple[int, int, int], ...]
    strides: tuple[int, ...]
    pitches: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, layer: Layer, shape: tuple[int, ...]) -> _Sizes:
        tiling, window = layer.tiling, layer.window
        output = output_size(shape[1:-1], tiling.kernel_size, window)
        gaps = [gap - 1 for gap in window.input_dilation]
        padding = tuple((low, high, gap) for (low, high), gap in zip(window.padding, gaps, strict=True))
        padded = [
            low + high + (size - 1) * (gap + 1) + 1 for size, (low, high, gap) in zip(shape[1:-1], padding, strict=True)
        ]
        pitches = tuple(math.prod(padded[axis:]) for axis in range(len(padded) + 1))
        places = [
            sum(
                index * gap * pitch
                for index, gap, pitch in zip(place, window.kernel_dilation, pitches[1:], strict=True)
            )
            for place in np.ndindex(*tiling.kernel_size)
        ]
        positions = shape[0] * math.prod(output)
        # The least depth of a matrix product on tensor cores.
        least = 32 if layer.execution.operands == Operands.INT8 else 16
        outputs = min(_OUTPUTS, max(16, pl.next_power_of_2(tiling.features)))
        return cls(
            output=output,
            positions=positions,
            padded_positions=pl.cdiv(positions, _POSITIONS) * _POSITIONS,
            groups=tiling.groups,
            channels=max(least, pl.next_power_of_2(tiling.channels.shape[1])),
            features=tiling.features,
            outputs=outputs,
            padded_outputs=pl.cdiv(tiling.features, outputs) * outputs,
            padding=padding,
            strides=window.strides,
            pitches=pitches,
            places=tuple(places),
        )

    def base(self, images: int) -> Array:
        rows = self.pitches[0] * jnp.arange(images)
        for stride, pitch, count in zip(self.strides, self.pitches[1:], self.output, strict=True):
            rows = rows[..., None] + stride * pitch * jnp.arange(count)
        return jnp.pad(rows.reshape(-1), (0, self.padded_positions - self.positions)).astype(jnp.int32)


def _operands(layer: Layer, sizes: _Sizes, inputs: Array, digits: Array, scales: ColumnScales) -> tuple[Array, ...]:
    """What the kernel reads, in rows and columns.

    inputs (N H W, R c), digits (R kh kw c, K O), and step, its reciprocal, offset and weight (R, K O); padded.
    """
    # The kernel is for GPUs: their choice, also where it is interpreted.
    tiling, dtype = layer.tiling, operand_type(layer, cpu=False)
    groups, channels, more = tiling.groups, tiling.channels.shape[1], sizes.channels - tiling.channels.shape[1]
    padded = lax.pad(inputs, jnp.float32(0), [(0, 0, 0), *sizes.padding, (0, 0, 0)])
    rows = tile_inputs(padded.astype(dtype), tiling).reshape(-1, groups, channels)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, more))).reshape(-1, groups * sizes.channels)
    kernel = jnp.moveaxis(digits.reshape(-1, groups, channels, digits.shape[-1]), 0, 1).astype(dtype)
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))

    def columns(values: Array, filling: float = 0.0) -> Array:
        by_plane = values.reshape(*values.shape[:-1], -1, sizes.features)
        wide = [(0, 0)] * (by_plane.ndim - 1) + [(0, sizes.padded_outputs - sizes.features)]
        return jnp.pad(by_plane, wide, constant_values=filling).reshape(*values.shape[:-1], -1)

    kernel = columns(kernel).reshape(groups * len(sizes.places) * sizes.channels, -1)
    zero = jnp.zeros_like(scales.step) if scales.offset is None else scales.offset
    parameters = (
        columns(scales.step, 1.0),
        columns(reciprocal(scales.step), 1.0),
        columns(zero),
        columns(scales.output_scale),
    )
    return sizes.base(inputs.shape[0]), rows, kernel, *parameters


def _psums(
    sizes: _Sizes, planes: int, group: Array, outputs: Array, base: Any, inputs: Any, digits: Any
) -> list[Array]:
    """One read group's partial sums, (positions, outputs) float32 for each plane."""
    rows, channels = base[...], jnp.arange(sizes.channels)
    sums = [jnp.zeros((_POSITIONS, sizes.outputs), sum_type(inputs.dtype)) for _ in range(planes)]
    for index, place in enumerate(sizes.places):
        seen = triton.load(inputs.at[(rows + place)[:, None], (group * sizes.channels + channels)[None, :]])
        stored = (group * len(sizes.places) + index) * sizes.channels + channels
        for plane in range(planes):
            columns = plane * sizes.padded_outputs + outputs
            of_plane = triton.load(digits.at[stored[:, None], columns[None, :]])
            sums[plane] += jnp.dot(
                seen, of_plane, precision=lax.Precision.HIGHEST, preferred_element_type=sums[plane].dtype
            )
    return [values.astype(jnp.float32) for values in sums]


def _outputs(sizes: _Sizes) -> Array:
    return pl.program_id(1) * sizes.outputs + jnp.arange(sizes.outputs)


def _kernel(
    layer: Layer,
    index: int,
    sizes: _Sizes,
    base: Any,
    inputs: Any,
    digits: Any,
    step: Any,
    reciprocal: Any,
    offset: Any,
    scale: Any,
    y: Any,
) -> None:
    ranges, outputs = layer.spec.adc_ranges[index], _outputs(sizes)
    # Plain numbers, as kernels need them.
    bounds = [[None if e is None else e.item() for e in lsq.Bounds.of(one, 0.0)] for one in ranges]

    def add_group(group: Array, total: Array) -> Array:
        for plane, psums in enumerate(_psums(sizes, len(ranges), group, outputs, base, inputs, digits)):
            at = (group, plane * sizes.padded_outputs + outputs)
            zero = triton.load(offset.at[at])
            u = (psums - zero) * triton.load(reciprocal.at[at])
            codes = lsq.round_to_codes(u, psums, zero, lsq.Bounds(*bounds[plane]), half_up=True)
            total += (codes * triton.load(step.at[at]) + zero) * triton.load(scale.at[at])
        return total

    y[...] = lax.fori_loop(0, sizes.groups, add_group, jnp.zeros((_POSITIONS, sizes.outputs), jnp.float32))
