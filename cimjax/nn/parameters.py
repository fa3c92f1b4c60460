"""What the parameters of a network are, by the last part of their paths: kernels, stored steps and offsets, others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.traverse_util
from jax import Array

from cimjax.core import step_sizes
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import tile
from cimjax.spec import CIMSpec, StepKind

# The parameter that stores each field of `StepSizes`.
PARAMETERS = StepSizes(
    activation="activation_log_step",
    weight="weight_log_step",
    psum="psum_log_step",
    offset="psum_offset",
    reference="reference_log_step",
    reference_offset="reference_offset",
    gain="psum_log_gain",
)

# The kind of each stored step and offset, by name.
STEP_KINDS = {
    PARAMETERS.activation: "activation",
    "log_step": "activation",  # of a `Quantize` module
    PARAMETERS.weight: "weight",
    PARAMETERS.psum: "psum",
    PARAMETERS.reference: "psum",
    PARAMETERS.offset: "offset",
    PARAMETERS.reference_offset: "offset",
    PARAMETERS.gain: "gain",
}


def stored_shapes(shapes: StepSizes, spec: CIMSpec, *, has_step: bool) -> StepSizes:
    """Of the `shapes` of all steps those that a layer stores; others are None.

    Args:
      has_step: whether the step of its input is the layer's own.
    """
    if not has_step or spec.activation.step == StepKind.FIXED:
        shapes = shapes._replace(activation=None)
    if spec.adc is not None and spec.adc.step == StepKind.FIXED:
        shapes = shapes._replace(psum=None, reference=None)
    return shapes


def lacks_step(layer: str, step: str) -> ValueError:
    """What is wrong with variables of full precision where those of arrays are needed."""
    name = f"`{layer}`" if layer else "the layer"
    return ValueError(
        f"{name} has no `{step}` in these variables: its steps were never set; call "
        "cimjax.calibrate(model, variables, images) first."
    )


def steps_of_layer(params: Mapping[str, Any], name: str, kernel_shape: tuple[int, ...], spec: CIMSpec) -> StepSizes:
    """The real steps of an array layer, from the parameters of its network by path ("conv1/kernel")."""
    tiling = tile(kernel_shape, spec)
    # An input of codes brings their step, and the layer stores none.
    needed = stored_shapes(step_sizes.shapes(tiling, spec), spec, has_step=False)
    for step, shape in zip(PARAMETERS, needed, strict=True):
        if shape is not None and f"{name}/{step}".lstrip("/") not in params:
            raise lacks_step(name, step)
    stored = StepSizes(*(params.get(f"{name}/{step}".lstrip("/")) for step in PARAMETERS))
    # Factors of gradients change no value.
    factors = step_sizes.gradient_factors(tiling, spec, 1, 1)
    return step_sizes.real_steps(stored, factors, step_sizes.offset_units(tiling, spec), spec)


# "params/conv1/psum_log_step", or the path of a leaf in a tree of parameters or of what an optimizer keeps of them.
Path = str | tuple[Any, ...]


def kind_of_step(path: Path) -> str | None:
    """The kind of a stored step or offset, a value of `STEP_KINDS`; None for what is none."""
    last = path if isinstance(path, str) else str(getattr(path[-1], "key", ""))
    return STEP_KINDS.get(last.rpartition("/")[2])


def kind_of(path: tuple[Any, ...]) -> str:
    """The kind of a parameter: "kernel" (decayed), "step" (steps and offsets), or "other"."""
    if kind_of_step(path):
        return "step"
    return "kernel" if str(path[-1].key) == "kernel" else "other"


def trained_as(path: Path) -> str:
    """What a parameter is trained or frozen with: "network", or the kind of its step; offsets and gains go with
    psums."""
    kind = kind_of_step(path) or "network"
    return "psum" if kind in ("offset", "gain") else kind


def stored_steps(params: Any) -> dict[str, Array]:
    """The stored steps and offsets among parameters, by path: {"conv1/psum_log_step": ...}."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    return {path: value for path, value in flat.items() if kind_of_step(path)}
