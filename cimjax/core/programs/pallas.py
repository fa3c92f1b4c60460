"""Array product, ADC and sum in one GPU kernel: partial sums stay in registers and are never written to memory.

A program of the kernel computes a block of output positions for a block of outputs. Over the read groups, one after
the other, it multiplies what the positions see by the digits, converts each plane's sums by their ADC, scales and adds.
The gradients are two more kernels (`pallas_backward`).

Written in Pallas for its Triton backend; a program that is lowered for the CPU interprets it, for tests.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cimjax.core import lsq
from cimjax.core.cells import StoredArrays
from cimjax.core.programs import joined, pallas_backward
from cimjax.core.programs import pallas_blocks as parts
from cimjax.core.programs.contract import Layer
from cimjax.core.programs.joined import Columns
from cimjax.core.programs.ladders import Ladders, SliceADC
from cimjax.core.programs.pallas_blocks import POSITIONS, Blocks, fits
from cimjax.core.step_sizes import StepSizes

__all__ = ["fits", "run"]


def run(codes: Array, arrays: StoredArrays, steps: StepSizes, layer: Layer) -> Array:
    """As `contract.ArrayProgram`.

    Raises:
      ValueError: where the program is lowered for anything but a GPU or the CPU.
    """
    return joined.run(codes, arrays, steps, layer, kernels=joined.Kernels(_forward, pallas_backward.gradients))


def _forward(layer: Layer, inputs: Array, columns: Columns) -> Array:
    """As `joined.Forward`."""
    blocks = Blocks.of(layer, inputs, columns.digits)
    if not blocks.positions:
        return jnp.zeros((0, blocks.features), jnp.float32)
    slices = enumerate(jnp.split(inputs, len(SliceADC.of_layer(layer).significances)))
    return functools.reduce(jnp.add, (_read_slice(layer, t, blocks, part, columns) for t, part in slices))


def _read_slice(layer: Layer, index: int, blocks: Blocks, inputs: Array, columns: Columns) -> Array:
    """`g_t sum_{r,k} output_scale P^` of slice `index`, (M, O)."""
    operands = parts.operands_of(layer, blocks, inputs, columns.digits, columns.scales)
    (y,) = parts.call(
        functools.partial(_kernel, layer, index, blocks),
        ((blocks.padded_positions, blocks.padded_outputs),),
        (blocks.programs, blocks.padded_outputs // blocks.outputs),
        "array_and_adc",
        [pl.BlockSpec((POSITIONS, blocks.outputs), lambda i, j: (i, j))],
    )(*operands)
    significance = SliceADC.of_layer(layer).significances[index].item()
    return significance * y[: blocks.positions, : blocks.features]


def _kernel(
    layer: Layer, index: int, blocks: Blocks, base: Any, inputs: Any, digits: Any, ladders: Ladders, y: Any
) -> None:
    outputs = pl.program_id(1) * blocks.outputs + parts.count(blocks.outputs)
    rows = triton.load(base.at[pl.program_id(0) * POSITIONS + parts.count(POSITIONS)])

    def add_group(group: Array, total: Array) -> Array:
        for plane, psums in enumerate(parts.psums(blocks, group, outputs, rows, inputs, digits)):
            ladder = parts.load_ladders(blocks, group, plane, outputs, ladders)
            bounds = parts.bounds(layer, index, plane)
            if bounds is None:
                total += psums * ladder.output_scale
                continue
            u = lsq.in_steps(psums, ladder.reciprocal, ladder.offset)
            total += lsq.round_to_codes(u, psums, ladder.offset, bounds, half_up=True) * ladder.read_scale
            if ladder.offset is not None:
                total += ladder.offset * ladder.output_scale
        return total

    y[...] = lax.fori_loop(
        jnp.int32(0), jnp.int32(blocks.groups), add_group, jnp.zeros((POSITIONS, blocks.outputs), jnp.float32)
    )
