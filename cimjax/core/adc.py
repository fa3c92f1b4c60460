"""The ADC (3.6 of the design): partial sums to codes and back, and how well its ladders fit."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from cimjax.core import lsq
from cimjax.core.reciprocal import reciprocal
from cimjax.core.step_sizes import StepSizes, expand_outputs
from cimjax.core.tiling import Tiling
from cimjax.spec import CIMSpec, CodeRange, Reference


def convert(
    psums: Float[Array, "T M R K O"], steps: StepSizes, tiling: Tiling, spec: CIMSpec
) -> Float[Array, "T M R K O"]:
    """What the ADCs make of partial sums: `P^ = s p + z`, `p = floor(clip((P - z) / s, q_min, q_max) + 0.5)`.

    Exactly `2^bits` codes (3 for 1.5 bits); a signed 1-bit ADC gives the sign of `P - z`. The result depends on nothing
    but the partial sum and its step: not on other images of a batch. With an ideal ADC (`spec.adc` None) `P^ = P`.
    Source: the paper's eq. 2.

    Args:
      psums: (T, M, R, K, O) float32.
      steps: `psum` > 0 and `offset`, in psum units, at psum granularity.

    Returns:
      Digitised partial sums in psum units, the shape of `psums`, float32. Gradients as for `lsq.fake_quantize`.
    """
    if spec.adc is None:
        return psums
    step, offset = _of_columns(steps, tiling)
    return lsq.dequantize(adc_codes(psums, steps, tiling, spec), step, offset)


def adc_codes(
    psums: Float[Array, "T M R K O"], steps: StepSizes, tiling: Tiling, spec: CIMSpec
) -> Float[Array, "T M R K O"]:
    """The codes `p` that the ADCs give; arguments as for `convert`, with `spec.adc`.

    Returns:
      Codes, float32, the shape of `psums`.
    """
    assert spec.adc is not None
    step, offset = _of_columns(steps, tiling)
    return lsq.quantize(psums, step, psum_ranges(spec), offset, half_up=True, **_gradient(spec))


def convert_reference(sums: Float[Array, "T M R"], steps: StepSizes, spec: CIMSpec) -> Float[Array, "T M R"]:
    """The dummy columns' sums after their own ADCs, one step for each read group; exact with a digital reference.

    Args:
      sums: (T, M, R) float32.
      steps: `reference` > 0 and `reference_offset`, (R,).
    """
    if spec.adc is None or spec.weight.reference != Reference.ADC:
        return sums
    return lsq.dequantize(reference_codes(sums, steps, spec), steps.reference, steps.reference_offset)


def reference_codes(sums: Float[Array, "T M R"], steps: StepSizes, spec: CIMSpec) -> Float[Array, "T M R"]:
    """The codes that the ADCs behind dummy columns give; arguments as for `convert_reference`, of `reference="adc"`."""
    code_range, offset = reference_ranges(spec), steps.reference_offset
    return lsq.quantize(sums, steps.reference, code_range, offset, half_up=True, **_gradient(spec))


def _gradient(spec: CIMSpec) -> dict[str, float]:
    """Where an ADC passes gradients, as `lsq.quantize` takes it."""
    assert spec.adc is not None
    return {"margin": spec.adc.gradient_margin, "bumps": spec.adc.gradient_bumps}


def psum_ranges(spec: CIMSpec) -> CodeRange:
    """The ADCs' codes, broadcastable to psums (T, M, R, K, O): they differ by slice and plane."""
    return _stacked(spec.adc_ranges, (-1, 1, 1, len(spec.weight.planes), 1))


def reference_ranges(spec: CIMSpec) -> CodeRange:
    """The codes of the dummy columns' ADCs, broadcastable to their sums (T, M, R): they differ by slice."""
    return _stacked([[codes] for codes in spec.reference_ranges], (-1, 1, 1))


def _stacked(ranges: Any, shape: tuple[int, ...]) -> CodeRange:
    """A table of ranges as one range of float32 arrays of `shape`, to broadcast."""
    return CodeRange(*np.moveaxis(np.asarray(ranges, np.float32), -1, 0).reshape(3, *shape))


def _of_columns(steps: StepSizes, tiling: Tiling) -> tuple[Any, Any]:
    """Steps and offsets, broadcastable to (R, K, O)."""
    return expand_outputs(steps.psum, tiling), None if steps.offset is None else expand_outputs(steps.offset, tiling)


class ADCStatistics(NamedTuple):
    """How well the ladders of one layer's ADCs fit its partial sums on some inputs.

    saturated: () the part of the conversions whose psum lies more than half a step beyond the ladder, 0 to 1.
    codes_used: () how many different codes a column gives, mean over columns.
    """

    saturated: Array
    codes_used: Array


def adc_statistics(psums: Float[Array, "T M R K O"], steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> ADCStatistics:
    """Look at the conversions of one layer.

    Args:
      psums: (T, M, R, K, O) float32.
      steps: `psum` and `offset` are used.
      spec: with an `adc`.
    """
    beyond, given = beyond_ladder(psums, steps, tiling, spec), codes_given(psums, steps, tiling, spec)
    return ADCStatistics(jnp.mean(beyond, dtype=jnp.float32), jnp.mean(jnp.sum(given, axis=0, dtype=jnp.float32)))


def beyond_ladder(
    psums: Float[Array, "T M R K O"], steps: StepSizes, tiling: Tiling, spec: CIMSpec
) -> Bool[Array, "T M R K O"]:
    """Which partial sums lie more than half a step beyond the ladder; arguments as for `adc_statistics`."""
    code_range = psum_ranges(spec)
    step, offset = _of_columns(steps, tiling)
    u = lsq.in_steps(psums, reciprocal(step), offset)
    # A signed 1-bit ADC has two levels, one step from its middle, and reaches one step further.
    margin = np.where(code_range.binary, np.float32(1.0), np.float32(0.5))
    return (u < code_range.q_min - margin) | (u > code_range.q_max + margin)


def codes_given(
    psums: Float[Array, "T M R K O"], steps: StepSizes, tiling: Tiling, spec: CIMSpec
) -> Bool[Array, "codes R K O"]:
    """Which codes each column gives at least once, in any slice; arguments as for `adc_statistics`.

    Returns:
      One row for each integer from the lowest code of the layer's ADCs to the highest.
    """
    code_range = psum_ranges(spec)
    codes = adc_codes(psums, steps, tiling, spec)
    values = np.arange(np.min(code_range.q_min), np.max(code_range.q_max) + 1, dtype=np.float32)
    return jax.lax.map(lambda value: jnp.any(codes == value, axis=(0, 1)), jnp.asarray(values))
