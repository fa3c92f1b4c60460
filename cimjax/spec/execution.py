"""How a layer is computed: programs, products, operands and what is kept. No result, file or run depends on it."""

from __future__ import annotations

import dataclasses
import enum

from cimjax.spec.base import Spec


class Program(enum.StrEnum):
    """Which row of `core.programs.contract` computes array product, ADC and sum; all give the same values."""

    AUTO = "auto"
    # The definition: one function of `core/` after the other, differentiated by JAX.
    REFERENCE = "reference"
    # Product and ADC with one gradient.
    JOINED = "joined"
    # Kernels for NVIDIA's GPUs: one forwards, two back.
    PALLAS = "pallas"


class Product(enum.StrEnum):
    """Which row of `core.programs.products` multiplies inputs and digits; all give the same integers."""

    AUTO = "auto"
    GROUPED_CONV = "grouped_conv"
    CONV_PER_TILE = "conv_per_tile"
    PATCHES = "patches"


class Operands(enum.StrEnum):
    """In which numbers inputs and digits are multiplied on the way forwards; sums are wide, and all are exact."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"

    @property
    def largest_integer(self) -> int:
        """Up to which magnitude every integer is such a number."""
        return {Operands.BFLOAT16: 2**8, Operands.FLOAT16: 2**11, Operands.INT8: 2**7 - 1}.get(self, 2**24)


class Residuals(enum.StrEnum):
    """What a layer keeps for the backward pass: its partial sums, or its inputs alone, from which they are computed
    again."""

    AUTO = "auto"
    PSUMS = "psums"
    INPUTS = "inputs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution(Spec):
    """How a layer is computed. `auto` is what `cimjax tune` measured to be the fastest on this device; where it was not
    asked to, `program` is chosen for JAX's default device, the rest for the platform that a program is lowered for.

    Hashable, so that it can be a static argument of a jitted function.
    """

    # The program between activation codes and output.
    program: Program = Program.AUTO
    # `joined` only: the product of inputs and digits.
    product: Product = Product.AUTO
    # The numbers that are multiplied; `auto`: float32 on CPU, elsewhere bfloat16 where that is exact. By `joined`,
    # layers without ADCs are always multiplied in float32.
    operands: Operands = Operands.AUTO
    # `psums`: fast; `inputs`: a fraction of the memory, for one more array product in the backward pass. `auto` is
    # `psums`, but `inputs` for layers of more than 8 read groups, whose partial sums would fill the memory.
    residuals: Residuals = Residuals.AUTO

    def __post_init__(self) -> None:
        self._enum("program", Program)
        self._enum("product", Product)
        self._enum("operands", Operands)
        self._enum("residuals", Residuals)
