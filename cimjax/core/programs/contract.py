"""The seam: what a program for array product, ADC and sum has to keep, which there are, and which one is chosen.

The definition is the program `reference`; every other row of the table gives the same values and gradients. Within
`joined`, what suits a platform is decided where a program is lowered (`platforms`), so that one traced on a CPU host
for a GPU is the GPU's. Decided while a layer is traced, by JAX's default device: whether kernels compute it (`fuses`),
and what was measured on that device (`tuned`). Whoever lowers for another platform than that names a program.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from cimjax.core.cells import StoredArrays
from cimjax.core.programs import tuning
from cimjax.core.programs.platforms import compute_capability, default_device
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import Tiling
from cimjax.core.window import Window
from cimjax.spec import CIMSpec, Execution, Operands, Product, Program, Residuals


class Layer(NamedTuple):
    """What is fixed about a layer before any array exists."""

    tiling: Tiling
    window: Window
    spec: CIMSpec
    execution: Execution


class ArrayProgram(Protocol):
    """Steps 3.5 to 3.7 of the design: from activation codes to the sum of what all ADCs give.

    Args:
      codes: (N, H, W, C) float32, integer-valued.
      arrays: what the cells hold.
      steps: real steps > 0; all are used but `activation`.
      layer: what is fixed.

    Returns:
      (M, O) float32, not yet multiplied by the activation's step. Values as `reference` gives them, up to the order of
      float32 sums; gradients to codes, steps and the weight codes that `arrays` were made of, likewise.
    """

    def __call__(self, codes: Array, arrays: StoredArrays, steps: StepSizes, layer: Layer) -> Array: ...


# Modules whose `run` is the program; they are imported when first chosen, since Pallas takes a while.
PROGRAMS: dict[Program, str] = {
    Program.REFERENCE: "cimjax.core.programs.reference",
    Program.JOINED: "cimjax.core.programs.joined",
    Program.PALLAS: "cimjax.core.programs.pallas",
}


# The first NVIDIA GPUs whose tensor cores multiply bfloat16.
FUSES_FROM = 8.0


def built_in(spec: CIMSpec, *, cpu: bool) -> Execution:
    """What `auto` is where no table says more: `joined`, by one convolution per tile, the fastest on CPU and on an
    H100; in float32 on CPU, elsewhere in bfloat16 where that is exact."""
    operands = Operands.BFLOAT16 if not cpu and exact_in(spec, Operands.BFLOAT16) else Operands.FLOAT32
    return Execution(program=Program.JOINED, product=Product.CONV_PER_TILE, operands=operands)


def tuned(layer: Layer, input_shape: tuple[int, ...]) -> Execution:
    """The execution of a layer with what this device's table (`cimjax tune`) says in the fields that are `auto`.

    An entry of another program than the one that is asked for says nothing, and a kernel is not chosen for who asks for
    a product or for residuals, of which it knows none. The device is JAX's default one, as a table cannot wait until a
    program is lowered.

    Args:
      input_shape: of the codes, (N, H, W, C).

    Returns:
      The layer's own execution where there is no table, or it has no such layer.
    """
    asked = layer.execution
    table = tuning.table(default_device().device_kind)
    if table is None:
        return asked
    found = table.layers.get(tuning.key(layer.tiling, layer.window, layer.spec, input_shape))
    if found is None or asked.program not in (Program.AUTO, found.program) or not exact_in(layer.spec, found.operands):
        return asked
    if found.program == Program.PALLAS and (asked.product != Product.AUTO or asked.residuals != Residuals.AUTO):
        return asked
    fields = {field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)}
    return dataclasses.replace(found, **{name: value for name, value in fields.items() if value != "auto"})


def choose(layer: Layer) -> ArrayProgram:
    """The program for a layer; `auto` is the fused kernels where a GPU has them for it (`fuses`), else `joined`.

    Raises:
      ValueError: for operands that cannot hold the layer's integers.
    """
    execution = layer.execution
    require_exact(layer.spec, execution.operands)
    program = execution.program
    if program == Program.AUTO:
        program = Program.PALLAS if fuses(layer) else Program.JOINED
    run: ArrayProgram = importlib.import_module(PROGRAMS[program]).run
    return run


def fuses(layer: Layer) -> bool:
    """Whether `auto` computes a layer by fused kernels, as was measured to be faster on an H200 (docs/speed.md).

    On NVIDIA GPUs of compute capability 8 and more, where operands are bfloat16 and neither product nor residuals are
    asked for, of which kernels know none. Like a table's, the device is asked for while a layer is traced.
    """
    spec, asked = layer.spec, layer.execution
    if compute_capability() < FUSES_FROM or asked.product != Product.AUTO or asked.residuals != Residuals.AUTO:
        return False
    if operand_type(layer, cpu=False) != jnp.bfloat16 or (spec.adc is not None and spec.adc.gradient_bumps):
        return False
    fits: bool = importlib.import_module(PROGRAMS[Program.PALLAS]).fits(layer)
    return fits


def exact_in(spec: CIMSpec, operands: Operands) -> bool:
    """Whether the array product loses nothing in these numbers (`auto` never does)."""
    if operands in (Operands.AUTO, Operands.FLOAT32):
        return True
    return spec.variation is None and spec.largest_operand <= operands.largest_integer


def require_exact(spec: CIMSpec, operands: Operands) -> None:
    """Refuse operands in which a layer's product would lose something.

    Raises:
      ValueError: with the reason.
    """
    if exact_in(spec, operands):
        return
    reason = f"inputs and digits reach {spec.largest_operand}, beyond its {operands.largest_integer}"
    if spec.variation is not None:
        reason = "cells with `variation` hold real numbers"
    raise ValueError(f"`operands` is {operands!s}, but {reason}; use 'auto' or 'float32'.")


def operand_type(layer: Layer, *, cpu: bool) -> DTypeLike:
    """The dtype that inputs and digits are multiplied in."""
    operands = layer.execution.operands
    return jnp.dtype((built_in(layer.spec, cpu=cpu).operands if operands == Operands.AUTO else operands).value)
