"""What to build: frozen, hashable specifications that hold all validation and no arrays.

`codes`: the code ranges and planes that bits imply; `layer`: one layer on the chip.
"""

from cimjax.spec.codes import CodeRange, Plane
from cimjax.spec.layer import (
    ActivationSpec,
    ADCRange,
    ADCSpec,
    ArraySpec,
    CIMSpec,
    Encoding,
    Granularity,
    LadderStart,
    Lowering,
    Operands,
    Reference,
    Residuals,
    SignedCells,
    StepKind,
    StepStart,
    Subtract,
    TilingRule,
    VariationSpec,
    VariationTarget,
    WeightSpec,
)

__all__ = [
    "ADCRange",
    "ADCSpec",
    "ActivationSpec",
    "ArraySpec",
    "CIMSpec",
    "CodeRange",
    "Encoding",
    "Granularity",
    "LadderStart",
    "Lowering",
    "Operands",
    "Plane",
    "Reference",
    "Residuals",
    "SignedCells",
    "StepKind",
    "StepStart",
    "Subtract",
    "TilingRule",
    "VariationSpec",
    "VariationTarget",
    "WeightSpec",
]
