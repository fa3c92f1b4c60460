"""The steps of a layer: which there are, their shapes, what shares them, and LSQ's gradient factors.

A step is one positive number that a whole group shares; a group is a layer, an array or a column. Quantizing with
steps is in `cimjax.core.lsq`; their starting values are in `cimjax.core.calibration`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from cimjax.core import lsq
from cimjax.core.tiling import Tiling
from cimjax.spec import ActivationSpec, CIMSpec, Granularity, Reference, StepKind


class StepSizes(NamedTuple):
    """The steps of one layer, or something of the same structure (shapes, gradient factors).

    `A` row tiles, `R` read groups, `K` planes, `Ct` column tiles, `O` outputs; a field is None where the layer has no
    such step. Steps are real, float32 and > 0; offsets are in units of one partial sum.

    activation: ().
    weight: `layer` (1, 1), `array` (A, Ct), `column` (A, O), with a step per plane (A, K, O).
    psum: `layer` (1, 1, 1), `array` (R, 1, Ct), `column` (R, K, O).
    offset: the psum of ADC code 0, the shape of `psum`; stored as the middle of the ladder (`real_steps`).
    reference, reference_offset: (R,), of the ADC behind the dummy column of `reference="adc"`.
    gain: what is multiplied to what each ADC gives, the shape of `psum`; with `ADCSpec.digital_gain`.
    """

    activation: Any = None
    weight: Any = None
    psum: Any = None
    offset: Any = None
    reference: Any = None
    reference_offset: Any = None
    gain: Any = None


def shapes(tiling: Tiling, spec: CIMSpec) -> StepSizes:
    """The shape of every step that a layer has; None for those that it has not."""
    planes = len(spec.weight.planes)
    weight: tuple[int, ...] = {
        Granularity.LAYER: (1, 1),
        Granularity.ARRAY: (tiling.arrays, tiling.column_tiles),
        Granularity.COLUMN: (tiling.arrays, tiling.features),
    }[spec.weight.granularity]
    if spec.weight.step_per_plane:
        weight = (tiling.arrays, planes, tiling.features)
    if spec.adc is None:
        return StepSizes(activation=(), weight=weight)
    psum: tuple[int, ...] = {
        Granularity.LAYER: (1, 1, 1),
        Granularity.ARRAY: (tiling.groups, 1, tiling.column_tiles),
        Granularity.COLUMN: (tiling.groups, planes, tiling.features),
    }[spec.adc.granularity]
    reference = (tiling.groups,) if spec.weight.reference == Reference.ADC else None
    return StepSizes(
        activation=(),
        weight=weight,
        psum=psum,
        offset=psum if spec.adc.offset else None,
        reference=reference,
        reference_offset=reference if spec.adc.offset else None,
        gain=psum if spec.adc.digital_gain else None,
    )


def expand_outputs(step: Float[Array, "*axes _"], tiling: Tiling) -> Float[Array, "*axes _"]:
    """Repeat a step whose last axis is 1, `Ct` or `O` so that it is broadcastable over the `O` outputs."""
    # A last axis of 1 is a layer's or a single column tile's; both are broadcast.
    if step.shape[-1] in (1, tiling.features):
        return step
    return jnp.take(step, tiling.column_tile_of_output, axis=-1)


def expand_weight(step: Float[Array, ...], tiling: Tiling) -> Float[Array, "_ _ _"]:
    """The weight step of every read group, plane and output: broadcastable to (R, K, O).

    Args:
      step: (1, 1), (A, Ct), (A, O) or (A, K, O).
    """
    per_plane = step if step.ndim == 3 else step[:, None, :]
    # One for all, or as many arrays as read groups: nothing to repeat.
    fits = per_plane.shape[0] in (1, tiling.groups)
    per_group = per_plane if fits else jnp.take(per_plane, tiling.array_of_group, axis=0)
    return expand_outputs(per_group, tiling)


def sum_over_groups(values: Float[Array, "R K O"], shape: tuple[int, ...], tiling: Tiling) -> Float[Array, "_ _ _"]:
    """Sum values of (R, K, O) over everything that shares a psum step of `shape`; the transpose of its expansion."""

    def expand(step: Array) -> Array:
        return jnp.broadcast_to(expand_outputs(step, tiling), values.shape)

    return jax.linear_transpose(expand, jax.ShapeDtypeStruct(shape, values.dtype))(values)[0]


def max_over_groups(values: Float[Array, "R K O"], shape: tuple[int, ...], tiling: Tiling) -> Float[Array, "_ _ _"]:
    """The maximum of values of (R, K, O) over everything that shares a psum step of `shape`."""
    if shape == values.shape:
        return values
    if shape == (1, 1, 1):
        return jnp.max(values, keepdims=True)
    of_outputs = jnp.moveaxis(jnp.max(values, axis=1, keepdims=True), -1, 0)
    return jnp.moveaxis(jax.ops.segment_max(of_outputs, tiling.column_tile_of_output, shape[-1]), 0, -1)


def require_shapes(steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> None:
    """Check that a layer has the steps that it needs, each of its shape, or of as many axes, all of size 1.

    Raises:
      ValueError: naming the step, the shape got and the shape needed.
    """
    for name, shape in shapes(tiling, spec)._asdict().items():
        step = getattr(steps, name)
        if shape is None or (name == "activation" and step is None):
            continue
        got = None if step is None else np.shape(step)
        if got not in (shape, (1,) * len(shape)):
            raise ValueError(f"`steps.{name}` has shape {got}; the layer needs {shape} (see `core.step_sizes.shapes`).")


def gradient_factors(tiling: Tiling, spec: CIMSpec, input_size: int, output_size: int) -> StepSizes:
    """LSQ's factor of every step's gradient: `c / sqrt(n q)` (Esser et al. 2020, section 2.2).

    `n`: true elements that share the step, per example for activations and partial sums; `q`: the largest `max|code|`
    of the group; `c`: the kind's `gradient_factor`. It is applied once to the stored parameter, before it fans out.

    Args:
      input_size: elements of the layer's input per example (activations).
      output_size: output positions per example, `OH * OW`.

    Returns:
      `StepSizes` of float32 NumPy arrays, broadcastable to the steps.
    """
    shape = shapes(tiling, spec)
    weight_count = _weights_sharing(tiling, spec)
    if spec.weight.step_per_plane:
        weight_count = weight_count[:, None, :]
    activation = activation_factor(input_size, spec.activation)
    weight = _factor(weight_count, spec.weight.code_range.magnitude, spec.weight.gradient_factor)
    if spec.adc is None:
        return StepSizes(activation=activation, weight=weight)
    slices = len(spec.activation.slices)
    ranges = np.array([[codes.magnitude for codes in row] for row in spec.adc_ranges])
    magnitude = ranges.max(axis=0)[None, :, None] if spec.adc.granularity == Granularity.COLUMN else ranges.max()
    psum = _factor(_columns_sharing(tiling, spec) * slices * output_size, magnitude, spec.adc.gradient_factor)
    reference = None
    if shape.reference is not None:
        largest = max(codes.magnitude for codes in spec.reference_ranges)
        reference = _factor(np.full(1, slices * output_size), largest, spec.adc.gradient_factor)
    return StepSizes(
        activation=activation,
        weight=weight,
        psum=psum,
        offset=psum if spec.adc.offset else None,
        reference=reference,
        reference_offset=reference if spec.adc.offset else None,
        gain=psum if spec.adc.digital_gain else None,
    )


def activation_factor(input_size: int, spec: ActivationSpec) -> np.ndarray:
    """The gradient factor of an activation step, for `input_size` elements per example; see `gradient_factors`."""
    return _factor(input_size, spec.code_range.magnitude, spec.gradient_factor)


def _factor(count: Any, magnitude: Any, constant: float) -> np.ndarray:
    # A layer without outputs (an image smaller than the kernel) has no gradient, but neither a NaN.
    return np.asarray(constant / np.sqrt(np.maximum(count, 1.0) * magnitude), np.float32)


def _outputs_of_tile(tiling: Tiling) -> np.ndarray:
    """(Ct,) int, how many outputs each column tile really has."""
    return np.bincount(tiling.column_tile_of_output, minlength=tiling.column_tiles)


def _weights_sharing(tiling: Tiling, spec: CIMSpec) -> np.ndarray:
    rows = tiling.rows_of_array[:, None]
    if spec.weight.granularity == Granularity.LAYER:
        return np.full((1, 1), rows.sum() * tiling.features)
    return rows * (_outputs_of_tile(tiling) if spec.weight.granularity == Granularity.ARRAY else 1)


def _columns_sharing(tiling: Tiling, spec: CIMSpec) -> np.ndarray:
    assert spec.adc is not None
    planes = len(spec.weight.planes)
    if spec.adc.granularity == Granularity.COLUMN:
        return np.ones((1, 1, 1))
    if spec.adc.granularity == Granularity.ARRAY:
        return planes * _outputs_of_tile(tiling)[None, None, :]
    return np.full((1, 1, 1), tiling.groups * planes * tiling.features)


def offset_units(tiling: Tiling, spec: CIMSpec) -> StepSizes:
    """What one unit of a stored offset is, in psum units: `sqrt(rows) max|a| max|d| / (2 size)`.

    That is about a step of a ladder of `size` codes over random partial sums. It must not follow the learned step: an
    offset of many steps would then carry the ladder away from its partial sums whenever the step moves.

    Returns:
      `StepSizes` whose `offset` and `reference_offset` are float32 NumPy arrays broadcastable to the stored ones; None
      where there are none.
    """
    if spec.adc is None or not spec.adc.offset:
        return StepSizes()
    inputs = max(s.magnitude for s in spec.activation.slices)
    digits = np.array([plane.magnitude for plane in spec.weight.planes])
    sizes = np.array([codes.size for codes in spec.adc_ranges[0]])
    rows = np.sqrt(tiling.rows_of_group)
    unit = rows[:, None, None] * digits[:, None] * inputs / (2 * sizes[:, None])
    if spec.adc.granularity == Granularity.ARRAY:
        unit = unit.max(axis=1, keepdims=True)
    elif spec.adc.granularity == Granularity.LAYER:
        unit = unit.max(keepdims=True)
    reference = None
    if spec.weight.reference == Reference.ADC:
        reference = (rows * inputs / (2 * spec.reference_ranges[0].size)).astype(np.float32)
    return StepSizes(offset=unit.astype(np.float32), reference_offset=reference)


def real_steps(stored: StepSizes, factors: StepSizes, units: StepSizes, spec: CIMSpec) -> StepSizes:
    """Real steps and offsets of stored parameters, with their gradient factors and kinds applied.

    Stored are logarithms of steps and gains, `s = exp(clip(log_step, -25, 25))`, and for an offset the middle of its
    ladder in fixed units, `z = zeta unit - s (q_min + q_max) / 2`, so that a step that moves widens the ladder around
    its middle. `fixed` steps are computed from `full_scale` and need no stored value; neither they nor `calibrated`
    ones receive a gradient.

    Args:
      stored: logarithms of steps, and middles of ladders in units.
      factors: from `gradient_factors`.
      units: from `offset_units`.

    Returns:
      Real steps, > 0, and offsets in psum units; float32, whatever the parameters are kept in.
    """
    stored = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), stored)

    weight = lsq.step_from_log(lsq.scale_gradient(stored.weight, factors.weight))
    steps = StepSizes(real_activation_step(stored.activation, factors.activation, spec.activation), weight)
    if spec.adc is None:
        return steps
    psum, offset = _adc_steps(stored.psum, stored.offset, factors.psum, units.offset, middle_codes(spec), spec)
    steps = steps._replace(psum=psum, offset=offset)
    if spec.weight.reference == Reference.ADC:
        stored_pair, middle = (stored.reference, stored.reference_offset), middle_of_reference(spec)
        psum, offset = _adc_steps(*stored_pair, factors.reference, units.reference_offset, middle, spec)
        steps = steps._replace(reference=psum, reference_offset=offset)
    if spec.adc.digital_gain:
        steps = steps._replace(gain=lsq.step_from_log(lsq.scale_gradient(stored.gain, factors.gain)))
    return steps


def real_activation_step(log_step: Array | None, factor: Any, spec: ActivationSpec) -> Any:
    """The real step of an activation, of the kind that `spec.step` names; None where its codes come from elsewhere.

    Args:
      log_step: (), None where none is stored.
      factor: of its gradient, from `activation_factor`.
    """
    if spec.step == StepKind.FIXED:
        return jnp.float32(spec.fixed_step)
    return None if log_step is None else _real_step(log_step, factor, spec.step)


def _real_step(log_step: Array, factor: Any, kind: StepKind) -> Array:
    step = lsq.step_from_log(lsq.scale_gradient(jnp.asarray(log_step, jnp.float32), factor))
    if kind == StepKind.POWER_OF_TWO:
        step = lsq.nearest_power_of_two(step)
    return jax.lax.stop_gradient(step) if kind == StepKind.CALIBRATED else step


def _adc_steps(
    log_step: Array | None, zeta: Array | None, factor: Any, unit: Any, middle: Any, spec: CIMSpec
) -> tuple[Array, Array | None]:
    """The real step and offset of one ADC kind."""
    adc = spec.adc
    assert adc is not None
    if adc.step == StepKind.FIXED:
        step = jnp.full((1,) * np.ndim(factor), fixed_step(spec), jnp.float32)
    else:
        assert log_step is not None
        step = _real_step(log_step, factor, adc.step)
    offset = None
    if zeta is not None:
        offset = lsq.offset_in_limits(lsq.scale_gradient(zeta, factor)) * unit - step * middle
    return (step, offset) if adc.trainable else jax.lax.stop_gradient((step, offset))


def stored_adc_steps(
    step: Array, offset: Array | None, unit: Any, middle: Any, spec: CIMSpec
) -> tuple[Array | None, Array | None]:
    """What is stored for a real step and offset of an ADC: the inverse of `real_steps`; nothing for a `fixed` step.

    Args:
      middle: `middle_codes(spec)`, or `middle_of_reference(spec)`.
    """
    assert spec.adc is not None
    log_step = None if spec.adc.step == StepKind.FIXED else lsq.log_from_step(step)
    return log_step, None if offset is None else (offset + step * middle) / unit


def middle_codes(spec: CIMSpec) -> np.ndarray:
    """The middle of the codes of each plane's ADCs with an offset, the same in all slices; not always a code itself.

    Returns:
      (1,) float32, or (K, 1) where the bits of planes differ.
    """
    middles = np.array([(codes.q_min + codes.q_max) / 2 for codes in spec.adc_ranges[0]], np.float32)
    assert spec.adc is not None  # or it would have no ranges
    return middles[:1] if spec.adc.plane_bits is None else middles[:, None]


def middle_of_reference(spec: CIMSpec) -> np.ndarray:
    """The same of a dummy column's ADC, (1,) float32."""
    codes = spec.reference_ranges[0]
    return np.array([(codes.q_min + codes.q_max) / 2], np.float32)


def fixed_step(spec: CIMSpec) -> float:
    """The step of a `fixed` ADC: `full_scale / (codes - 1)`, in psum units."""
    assert spec.adc is not None and spec.adc.full_scale is not None
    return spec.adc.full_scale / (spec.adc_ranges[0][0].size - 1)
