"""What to build, and how to compute it: frozen, hashable specifications that hold all validation and no arrays.

`codes`: the code ranges and planes that bits imply; `layer`: one layer on the chip; `rules`: layers of a network that
differ; `execution`: how a layer's computation is programmed, which changes no result and belongs to no checkpoint.
"""

from cimjax.spec.codes import CodeRange, Plane
from cimjax.spec.execution import Execution, Operands, Product, Program, Residuals
from cimjax.spec.layer import (
    ActivationSpec,
    ADCRange,
    ADCSpec,
    ArraySpec,
    CIMSpec,
    Encoding,
    Granularity,
    LadderStart,
    PlaneShares,
    Reference,
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
    "Execution",
    "Granularity",
    "LadderStart",
    "Operands",
    "Plane",
    "PlaneShares",
    "Product",
    "Program",
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
