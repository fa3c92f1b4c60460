"""What to build, and how to compute it: frozen, hashable specifications that hold all validation and no arrays.

`layer`: one layer on the chip, of `activation`, `weight` and `adc`, by `choices`; `codes`: the code ranges and planes
that bits imply; `rules`: layers of a network that differ; `execution`: how a layer's computation is programmed, which
changes no result and belongs to no checkpoint.
"""

from cimjax.spec.activation import ActivationSpec
from cimjax.spec.adc import ADCSpec
from cimjax.spec.choices import (
    ADCRange,
    Encoding,
    Granularity,
    PlaneShares,
    Reference,
    SignedCells,
    StartRule,
    StepKind,
    Subtract,
    TilingRule,
    VariationTarget,
)
from cimjax.spec.codes import CodeRange, Plane
from cimjax.spec.execution import Execution, Operands, Product, Program, Residuals
from cimjax.spec.layer import ArraySpec, CIMSpec, VariationSpec
from cimjax.spec.weight import WeightSpec

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
    "Operands",
    "Plane",
    "PlaneShares",
    "Product",
    "Program",
    "Reference",
    "Residuals",
    "SignedCells",
    "StartRule",
    "StepKind",
    "Subtract",
    "TilingRule",
    "VariationSpec",
    "VariationTarget",
    "WeightSpec",
]
