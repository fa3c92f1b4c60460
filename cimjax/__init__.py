"""cimjax: training neural networks for compute-in-memory chips.

Public names are loaded when first used, so that `import cimjax` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cimjax import analysis as analysis
    from cimjax import core as core
    from cimjax import data as data
    from cimjax import hardware as hardware
    from cimjax import nn as nn
    from cimjax import spec as spec
    from cimjax import training as training
    from cimjax.core.conv import cim_conv, cim_dense
    from cimjax.core.lsq import Codes, dequantize, fake_quantize, quantize
    from cimjax.core.programs.cpu import compiler_options
    from cimjax.core.step_sizes import StepSizes
    from cimjax.hardware.cost import LayerCost, layer_cost
    from cimjax.hardware.freeze import FrozenLayer, freeze
    from cimjax.hardware.network.fold import integer_network
    from cimjax.hardware.network.operations import IntegerNetwork
    from cimjax.nn.batch_norm import update_batch_norm
    from cimjax.nn.calibrate import calibrate, without_calibration
    from cimjax.nn.calibration_warnings import CalibrationWarning
    from cimjax.nn.convert import convert_network
    from cimjax.nn.layers import CIMConv, CIMDense, Quantize
    from cimjax.spec import ActivationSpec, ADCSpec, ArraySpec, CIMSpec, Execution, VariationSpec, WeightSpec
    from cimjax.training.evaluate import evaluate
    from cimjax.training.restore import load
    from cimjax.training.state import Batch
    from cimjax.training.train import train

__version__ = "0.2.0"

_HOMES = {
    "cimjax.spec": (
        "ActivationSpec",
        "ADCSpec",
        "ArraySpec",
        "CIMSpec",
        "Execution",
        "VariationSpec",
        "WeightSpec",
    ),
    "cimjax.core.lsq": ("Codes", "dequantize", "fake_quantize", "quantize"),
    "cimjax.core.step_sizes": ("StepSizes",),
    "cimjax.core.conv": ("cim_conv", "cim_dense"),
    "cimjax.core.programs.cpu": ("compiler_options",),
    "cimjax.nn.layers": ("CIMConv", "CIMDense", "Quantize"),
    "cimjax.nn.batch_norm": ("update_batch_norm",),
    "cimjax.nn.calibrate": ("calibrate", "without_calibration"),
    "cimjax.nn.convert": ("convert_network",),
    "cimjax.nn.calibration_warnings": ("CalibrationWarning",),
    "cimjax.hardware.cost": ("LayerCost", "layer_cost"),
    "cimjax.hardware.freeze": ("FrozenLayer", "freeze"),
    "cimjax.hardware.network.fold": ("integer_network",),
    "cimjax.hardware.network.operations": ("IntegerNetwork",),
    "cimjax.training.state": ("Batch",),
    "cimjax.training.train": ("train",),
    "cimjax.training.evaluate": ("evaluate",),
    "cimjax.training.restore": ("load",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_ROOMS = ("analysis", "core", "data", "hardware", "nn", "spec", "training")

__all__ = [  # noqa: RUF022 (in the order in which a reader meets them)
    "ActivationSpec",
    "WeightSpec",
    "ADCSpec",
    "ArraySpec",
    "VariationSpec",
    "CIMSpec",
    "Execution",
    "CIMConv",
    "CIMDense",
    "Quantize",
    "convert_network",
    "calibrate",
    "without_calibration",
    "CalibrationWarning",
    "update_batch_norm",
    "cim_conv",
    "cim_dense",
    "StepSizes",
    "Codes",
    "quantize",
    "dequantize",
    "fake_quantize",
    "compiler_options",
    "LayerCost",
    "layer_cost",
    "FrozenLayer",
    "freeze",
    "IntegerNetwork",
    "integer_network",
    "Batch",
    "train",
    "load",
    "evaluate",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _ROOMS:
        return importlib.import_module(f"cimjax.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'cimjax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])
