"""Array product, ADC and sum in one GPU kernel: partial sums stay in registers and are never written to memory.

A program of the kernel computes a block of output positions for a block of outputs. Over the read groups, one after
the other, it multiplies what the positions see by the digits, converts each plane's sums by their ADC, scales and adds.
Backwards a second kernel computes one read group's partial sums again and gives their gradients, and convolutions take
them on to inputs and digits, so that the gradients of one group at a time are held.

Written in Pallas for its Triton backend. Block sizes have not been tuned on a GPU yet, which is why no `auto` chooses
this; on CPU it is interpreted, for tests.
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
from cimjax.core.conversion import Conversion
from cimjax.core.convolution import convolve, sum_type
from cimjax.core.tiling import Tiling, tile_inputs
from cimjax.core.window import Window, output_size
from cimjax.spec import Operands

# Output positions of a program, and outputs at most.
_POSITIONS = 64
_OUTPUTS = 32
_WARPS = 4


class Layer(NamedTuple):
    """What is fixed about a layer's kernels.

    conversion: codes and kind of the ADCs of one slice.
    operands: what inputs and digits are multiplied as.
    """

    conversion: Conversion
    tiling: Tiling
    window: Window
    operands: Operands


def product_and_conversion(
    layer: Layer, inputs: Array, digits: Array, step: Array, offset: Array | None, weight: Array
) -> Array:
    """`sum_{r,k} weight P^` of one slice, with the gradients of `core.digitise`.

    Args:
      inputs: (N, H, W, C) float32, integer-valued in the integer path; any number of spatial axes.
      digits: (kh, kw, R, c, K O) float32.
      step, offset, weight: (R, K O) float32, the step (> 0) and the offset of every column's ADC, and what its value
        counts.

    Returns:
      (N, OH, OW, O) float32.

    Raises:
      ValueError: on a backend that is neither a GPU nor the CPU.
    """
    platform = jax.default_backend()
    if platform not in ("cpu", "gpu", "cuda", "rocm"):
        raise ValueError(f"`lowering` is 'pallas', a kernel for GPUs, and this is a {platform}; use lowering='auto'.")
    return _fused(layer, inputs, digits, step, offset, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(layer: Layer, inputs: Array, digits: Array, step: Array, offset: Array | None, weight: Array) -> Array:
    sizes = _Sizes.of(layer, inputs.shape)
    if not sizes.positions:
        return jnp.zeros((inputs.shape[0], *sizes.output, layer.tiling.features), jnp.float32)
    operands = _operands(layer, sizes, inputs, digits, step, offset, weight)
    y = _call(
        functools.partial(_forward_kernel, layer.conversion, sizes),
        sizes,
        operands,
        jax.ShapeDtypeStruct((sizes.padded_positions, sizes.padded_outputs), jnp.float32),
        pl.BlockSpec((_POSITIONS, sizes.outputs), lambda i, j: (i, j)),
    )
    return sizes.unpadded(y)


def _fused_forward(
    layer: Layer, inputs: Array, digits: Array, step: Array, offset: Array | None, weight: Array
) -> tuple[Array, tuple[Any, ...]]:
    return _fused(layer, inputs, digits, step, offset, weight), (inputs, digits, step, offset, weight)


def _fused_backward(layer: Layer, kept: tuple[Any, ...], gradient: Array) -> tuple[Any, ...]:
    inputs, digits, step, offset, weight = kept
    tiling, window, features = layer.tiling, layer.window, layer.tiling.features
    sizes = _Sizes.of(layer, inputs.shape)
    if not sizes.positions:
        return jax.tree.map(jnp.zeros_like, kept)
    operands = _operands(layer, sizes, inputs, digits, step, offset, weight)
    tiled, to_tiled = jax.vjp(lambda inputs: tile_inputs(inputs, tiling), inputs)
    shares = jnp.split(tiled, tiling.groups, axis=-1)
    planes, blocks = len(layer.conversion.ranges), sizes.padded_positions // _POSITIONS
    to_shares, to_digits, sums = [], [], []
    for group in range(tiling.groups):
        to_psums, of_group = _call(
            functools.partial(_backward_kernel, layer.conversion, sizes),
            sizes,
            (*operands, jnp.full((1,), group, jnp.int32), sizes.padded(gradient)),
            (
                jax.ShapeDtypeStruct((sizes.padded_positions, planes, sizes.padded_outputs), jnp.float32),
                jax.ShapeDtypeStruct((blocks, 3, planes, sizes.padded_outputs), jnp.float32),
            ),
            (
                pl.BlockSpec((_POSITIONS, planes, sizes.outputs), lambda i, j: (i, 0, j)),
                pl.BlockSpec((1, 3, planes, sizes.outputs), lambda i, j: (i, 0, 0, j)),
            ),
        )
        to_psums = to_psums[: sizes.positions, :, :features].reshape(*gradient.shape[:-1], planes * features)
        pull = jax.vjp(lambda share, kernel: convolve(share, kernel, window), shares[group], digits[..., group, :, :])
        to_share, to_kernel = pull[1](to_psums)
        to_shares.append(to_share)
        to_digits.append(to_kernel)
        sums.append(jnp.sum(of_group, axis=0)[..., :features].reshape(3, -1))
    for_step, for_offset, for_codes = jnp.moveaxis(jnp.stack(sums), 1, 0)
    whole = jnp.tile(jnp.sum(gradient.reshape(-1, features), axis=0), planes)
    return (
        to_tiled(jnp.concatenate(to_shares, axis=-1))[0],
        jnp.stack(to_digits, axis=-3),
        weight * for_step,
        None if offset is None else weight * for_offset,
        step * for_codes + (0 if offset is None else offset * whole),
    )


_fused.defvjp(_fused_forward, _fused_backward)


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
        least = 32 if layer.operands == Operands.INT8 else 16
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

    def padded(self, values: Array) -> Array:
        """(N, OH, OW, O) as whole blocks of positions and outputs, filled up with 0."""
        rows = self.padded_positions - self.positions
        return jnp.pad(values.reshape(self.positions, -1), ((0, rows), (0, self.padded_outputs - self.features)))

    def unpadded(self, values: Array) -> Array:
        return values[: self.positions, : self.features].reshape(-1, *self.output, self.features)


def _operands(
    layer: Layer, sizes: _Sizes, inputs: Array, digits: Array, step: Array, offset: Array | None, weight: Array
) -> tuple[Array, ...]:
    """What both kernels read, in rows and columns.

    inputs (N H W, R c), digits (R kh kw c, K O), and step, its reciprocal, offset and weight (R, K O); padded.
    """
    tiling, dtype = layer.tiling, jnp.dtype(layer.operands.value)
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
    zero = jnp.zeros_like(step) if offset is None else offset
    parameters = (columns(step, 1.0), columns(1.0 / step, 1.0), columns(zero), columns(weight))
    return sizes.base(inputs.shape[0]), rows, kernel, *parameters


def _call(kernel: Any, sizes: _Sizes, operands: tuple[Array, ...], out_shape: Any, out_specs: Any) -> Any:
    by_position = pl.BlockSpec((_POSITIONS,), lambda i, j: (i,))
    anywhere = [pl.BlockSpec(memory_space=pl.ANY)] * 6
    of_gradient = [
        pl.BlockSpec((1,), lambda i, j: (0,)),
        pl.BlockSpec((_POSITIONS, sizes.outputs), lambda i, j: (i, j)),
    ]
    return pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(sizes.padded_positions // _POSITIONS, sizes.padded_outputs // sizes.outputs),
        in_specs=[by_position, *anywhere, *of_gradient[: len(operands) - 7]],
        out_specs=out_specs,
        interpret=jax.default_backend() == "cpu",
        compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=2),
        name="array_and_adc",
    )(*operands)


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


def _codes(
    conversion: Conversion, plane: int, psums: Array, reciprocal: Array, offset: Array
) -> tuple[Array, Array, tuple[Any, Any, Any]]:
    """`u` and the codes of a plane's partial sums, and the bounds of these; as `lsq.quantize` computes them."""
    codes = conversion.ranges[plane]
    bounds = (float(codes.q_min), float(codes.q_max), True if codes.binary else None)
    u = (psums - offset) * reciprocal
    return u, lsq.round_to_codes(u, psums, offset, bounds, half_up=True), bounds


def _forward_kernel(
    conversion: Conversion,
    sizes: _Sizes,
    base: Any,
    inputs: Any,
    digits: Any,
    step: Any,
    reciprocal: Any,
    offset: Any,
    weight: Any,
    y: Any,
) -> None:
    planes, outputs = len(conversion.ranges), _outputs(sizes)

    def add_group(group: Array, total: Array) -> Array:
        for plane, psums in enumerate(_psums(sizes, planes, group, outputs, base, inputs, digits)):
            at = (group, plane * sizes.padded_outputs + outputs)
            zero = triton.load(offset.at[at])
            _, codes, _ = _codes(conversion, plane, psums, triton.load(reciprocal.at[at]), zero)
            total += lsq.dequantize(codes, triton.load(step.at[at]), zero) * triton.load(weight.at[at])
        return total

    y[...] = lax.fori_loop(0, sizes.groups, add_group, jnp.zeros((_POSITIONS, sizes.outputs), jnp.float32))


def _backward_kernel(
    conversion: Conversion,
    sizes: _Sizes,
    base: Any,
    inputs: Any,
    digits: Any,
    step: Any,
    reciprocal: Any,
    offset: Any,
    weight: Any,
    group: Any,
    gradient: Any,
    to_psums: Any,
    sums: Any,
) -> None:
    del step
    number, outputs, of_outputs = group[0], _outputs(sizes), gradient[...]
    for plane, psums in enumerate(_psums(sizes, len(conversion.ranges), number, outputs, base, inputs, digits)):
        at = (number, plane * sizes.padded_outputs + outputs)
        zero = triton.load(offset.at[at])
        u, codes, bounds = _codes(conversion, plane, psums, triton.load(reciprocal.at[at]), zero)
        added = _terms(of_outputs, u, codes, bounds, conversion.margin, triton.load(weight.at[at]))
        to_psums[:, plane, :] = added.psums
        for index, values in enumerate((added.step, added.offset, of_outputs * codes)):
            sums[0, index, plane, :] = jnp.sum(values, axis=0)


class _Gradients(NamedTuple):
    """What each column and position adds to a gradient; those to step and offset are still to be multiplied by what
    the column counts."""

    psums: Array
    step: Array
    offset: Array


def _terms(
    gradient: Array, u: Array, codes: Array, bounds: tuple[Any, Any, Any], margin: float, weight: Array
) -> _Gradients:
    """LSQ's gradients of `weight P^` at every column and position.

    Args:
      gradient: of the output, for each column (..., K O).
      u, codes: distance from the offset in steps, and codes.
      bounds, margin: as for `lsq.passes_gradient`.
      weight: what a column counts.
    """
    inside = lsq.passes_gradient(u, bounds, margin)
    # The operand is selected too: a huge `u` outside must not meet a zero gradient as inf * 0.
    sign = bounds[2]
    rest = jnp.where(inside if sign is None else jnp.logical_and(inside, np.logical_not(sign)), u, 0.0)
    return _Gradients(
        jnp.where(inside, gradient * weight, 0.0), gradient * (codes - rest), jnp.where(inside, 0.0, gradient)
    )
