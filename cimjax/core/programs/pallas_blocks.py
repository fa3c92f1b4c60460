"""How the GPU kernels of `pallas` and `pallas_backward` cut a layer into blocks, and what both of them compute."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cimjax.core import encoding, lsq
from cimjax.core.convolution import sum_type
from cimjax.core.programs import joined
from cimjax.core.programs.contract import Layer, operand_type
from cimjax.core.programs.ladders import ColumnScales, Ladders, SliceADC
from cimjax.core.programs.platforms import by_platform
from cimjax.core.tiling import tile_inputs
from cimjax.core.window import output_size, pad

# Output positions of a block, and outputs at most.
POSITIONS = 64
MOST_OUTPUTS = 32
# A program adds up the gradients to its columns in registers, at most so many numbers.
MOST_SUMS = 9 * 32 * 32
_WARPS = 4


class Blocks(NamedTuple):
    """How one slice of a layer's inputs is cut; sizes of blocks are powers of two, as Triton needs them.

    images: of the batch.
    size, output: the spatial shapes of input and output.
    positions, padded_positions: output positions of the batch, and up to whole programs.
    per_program: blocks of positions that a program computes, one after the other.
    channels: of a read group, padded.
    outputs, padded_outputs: outputs of a block, and of all blocks.
    pitches: how many rows further the next image, the next place of the first axis, ... lies in the padded input.
    places: how many rows further each place of the kernel lies.
    """

    images: int
    size: tuple[int, ...]
    output: tuple[int, ...]
    positions: int
    padded_positions: int
    per_program: int
    groups: int
    planes: int
    channels: int
    features: int
    outputs: int
    padded_outputs: int
    pitches: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, layer: Layer, inputs: Array, digits: Array, *, programs: int | None = None) -> Blocks:
        """The blocks of inputs (T N, H, W, C) and digits (kh, kw, R, c, K O).

        Args:
          programs: about how many share a layer; None is one for each block of positions.
        """
        tiling, window = layer.tiling, layer.window
        images, *size = inputs.shape[0] // len(SliceADC.of_layer(layer).significances), *inputs.shape[1:-1]
        output = output_size(tuple(size), tiling.kernel_size, window)
        padded = [
            low + high + (count - 1) * gap + 1 for count, (low, high), gap in zip(size, *window[1:3], strict=True)
        ]
        pitches = tuple(math.prod(padded[axis:]) for axis in range(len(padded) + 1))
        positions = images * math.prod(output)
        outputs = _outputs(layer)
        padded_outputs = pl.cdiv(tiling.features, outputs) * outputs
        per_program = 1
        if programs is not None:
            all_blocks = pl.cdiv(positions, POSITIONS) * tiling.groups * (padded_outputs // outputs)
            per_program = max(1, all_blocks // programs)
        return cls(
            images=images,
            size=tuple(size),
            output=output,
            positions=positions,
            padded_positions=pl.cdiv(positions, POSITIONS * per_program) * POSITIONS * per_program,
            per_program=per_program,
            groups=tiling.groups,
            planes=digits.shape[-1] // tiling.features,
            channels=_channels(layer),
            features=tiling.features,
            outputs=outputs,
            padded_outputs=padded_outputs,
            pitches=pitches,
            places=tuple(
                sum(
                    index * gap * pitch
                    for index, gap, pitch in zip(place, window.kernel_dilation, pitches[1:], strict=True)
                )
                for place in np.ndindex(*tiling.kernel_size)
            ),
        )

    @property
    def programs(self) -> int:
        """How many programs share the positions."""
        return self.padded_positions // (POSITIONS * self.per_program)

    def base(self, strides: tuple[int, ...]) -> Array:
        """(padded_positions,) int32: the row of the padded input that the kernel's first place meets."""
        rows = self.pitches[0] * jnp.arange(self.images)
        for stride, pitch, count in zip(strides, self.pitches[1:], self.output, strict=True):
            rows = rows[..., None] + stride * pitch * jnp.arange(count)
        return jnp.pad(rows.reshape(-1), (0, self.padded_positions - self.positions)).astype(jnp.int32)


def _channels(layer: Layer) -> int:
    """Channels of a read group in a block."""
    return max(_least(layer), pl.next_power_of_2(layer.tiling.channels.shape[1]))


def _outputs(layer: Layer) -> int:
    """Outputs of a block."""
    return min(MOST_OUTPUTS, max(_least(layer), pl.next_power_of_2(layer.tiling.features)))


def _least(layer: Layer) -> int:
    """The least depth of a matrix product on tensor cores."""
    return 32 if operand_type(layer, cpu=False) == jnp.int8 else 16


def fits(layer: Layer) -> bool:
    """Whether the gradients to what a layer's columns hold fit into the registers of a program."""
    sums = math.prod(layer.tiling.kernel_size) * _channels(layer) * _outputs(layer)
    return len(gradient_weights(layer)) * sums <= MOST_SUMS


def gradient_weights(layer: Layer) -> tuple[tuple[float, ...], ...]:
    """What each plane's gradient counts in that of what is differentiated: weight codes, or every digit by itself."""
    spec = layer.spec
    if spec.skips_decomposition:
        return ((1.0,),)
    if joined.has_one_gradient(spec):
        return encoding.plane_gradient_weights(spec.weight)
    planes = range(len(spec.weight.planes))
    return tuple(tuple(float(plane == other) for other in planes) for plane in planes)


class Operands(NamedTuple):
    """What kernels read, in rows and columns.

    base: as `Blocks.base`.
    inputs: (N H W, R c), padded in space too.
    digits: (R kh kw c, K O).
    ladders: (R, K O) each; 0 for padded outputs.
    """

    base: Any
    inputs: Any
    digits: Any
    ladders: Ladders


def operands_of(layer: Layer, blocks: Blocks, inputs: Array, digits: Array, scales: ColumnScales) -> Operands:
    """Inputs (N, H, W, C), digits (kh, kw, R, c, K O) and scales (R, K O) as kernels read them."""
    # The kernel is for GPUs: their choice, also where it is interpreted.
    tiling, window, dtype = layer.tiling, layer.window, operand_type(layer, cpu=False)
    groups, channels = tiling.channels.shape
    rows = tile_inputs(pad(inputs.astype(dtype), window), tiling).reshape(-1, groups, channels)
    rows = jnp.pad(rows, ((0, 0), (0, 0), (0, blocks.channels - channels))).reshape(-1, groups * blocks.channels)
    kernel = jnp.moveaxis(digits.reshape(-1, groups, channels, digits.shape[-1]), 0, 1).astype(dtype)
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, blocks.channels - channels), (0, 0)))
    kernel = pad_outputs(blocks, kernel).reshape(-1, blocks.planes * blocks.padded_outputs)
    ladders = jax.tree.map(functools.partial(pad_outputs, blocks), Ladders.of_groups(scales))
    return Operands(blocks.base(window.strides), rows, kernel, ladders)


def pad_outputs(blocks: Blocks, values: Array) -> Array:
    """(..., K O) with the outputs of each plane padded to whole blocks."""
    by_plane = values.reshape(*values.shape[:-1], -1, blocks.features)
    wide = [(0, 0)] * (by_plane.ndim - 1) + [(0, blocks.padded_outputs - blocks.features)]
    return jnp.pad(by_plane, wide).reshape(*values.shape[:-1], -1)


def without_padded_outputs(blocks: Blocks, values: Array) -> Array:
    """The inverse of `pad_outputs`."""
    by_plane = values.reshape(*values.shape[:-1], -1, blocks.padded_outputs)[..., : blocks.features]
    return by_plane.reshape(*values.shape[:-1], -1)


def call(
    kernel: Callable[..., None],
    shapes: Sequence[tuple[int, ...]],
    grid: tuple[int, ...],
    name: str,
    results: Sequence[pl.BlockSpec] | None = None,
) -> Callable[..., Any]:
    """A kernel for GPUs, interpreted where it is lowered for the CPU; operands lie in memory as they are.

    Args:
      shapes: of the results, float32.
      results: what of them a program writes; None is where it likes.

    Raises:
      ValueError: where it is lowered for a TPU.
    """
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def run(*operands: Any, interpret: bool) -> Any:
        return pl.pallas_call(
            kernel,
            out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
            grid=grid,
            in_specs=jax.tree.map(lambda _: anywhere, operands),
            out_specs=results or [anywhere] * len(shapes),
            interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=2),
            name=name,
        )(*operands)

    on_gpu, on_cpu = (functools.partial(run, interpret=interpret) for interpret in (False, True))
    return by_platform(on_gpu, cpu=on_cpu, tpu=_refuse)


def _refuse(*operands: Any) -> Any:
    raise ValueError("`program` is 'pallas', a kernel for GPUs, and this is a TPU; use program='joined'.")


# Inside of kernels.


def count(size: int) -> Array:
    """0 to `size - 1`, int32, also where JAX counts in 64 bits."""
    return jnp.arange(size, dtype=jnp.int32)


def psums(blocks: Blocks, group: Any, outputs: Array, rows: Array, inputs: Any, digits: Any) -> list[Array]:
    """One read group's partial sums, (positions, outputs) float32 for each plane, of positions that start at `rows`."""
    sums = [jnp.zeros((POSITIONS, outputs.shape[0]), sum_type(inputs.dtype)) for _ in range(blocks.planes)]
    for place in range(len(blocks.places)):
        seen = load_seen(blocks, group, place, rows, inputs)
        for plane in range(blocks.planes):
            stored = load_digits(blocks, group, place, plane, outputs, digits)
            sums[plane] += jnp.dot(
                seen, stored, precision=lax.Precision.HIGHEST, preferred_element_type=sums[plane].dtype
            )
    return [values.astype(jnp.float32) for values in sums]


def load_seen(blocks: Blocks, group: Any, place: int, rows: Array, inputs: Any) -> Array:
    """What positions see at a place of the kernel, (positions, channels)."""
    channels = group * blocks.channels + count(blocks.channels)
    return triton.load(inputs.at[(rows + blocks.places[place])[:, None], channels[None, :]])


def load_digits(blocks: Blocks, group: Any, place: int, plane: int, outputs: Array, digits: Any) -> Array:
    """What a plane's columns hold at a place of the kernel, (channels, outputs)."""
    rows = rows_of(blocks, group, place)
    return triton.load(digits.at[rows[:, None], (plane * blocks.padded_outputs + outputs)[None, :]])


def rows_of(blocks: Blocks, group: Any, place: int) -> Array:
    """The rows of a read group's channels at a place of the kernel."""
    return (group * len(blocks.places) + place) * blocks.channels + count(blocks.channels)


def load_ladders(blocks: Blocks, group: Any, plane: int, outputs: Array, ladders: Ladders) -> Ladders:
    """A plane's ladders in a read group, (outputs,) each."""
    at = (group, plane * blocks.padded_outputs + outputs)
    return Ladders(*(None if values is None else triton.load(values.at[at]) for values in ladders))


def bounds(layer: Layer, index: int, plane: int) -> lsq.Bounds | None:
    """Of slice `index` and a plane, as the plain numbers that kernels need; None for ideal ADCs."""
    adc = layer.spec.adc
    if adc is None:
        return None
    found = lsq.Bounds.of(layer.spec.adc_ranges[index][plane], adc.gradient_margin, adc.gradient_bumps)
    return lsq.Bounds(*(None if entry is None else entry.item() for entry in found))
