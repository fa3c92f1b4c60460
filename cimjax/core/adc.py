"""The ADC: partial sums to codes and back, one function for every bit width, range and granularity."""

from __future__ import annotations

import numpy as np
from jax import Array

from cimjax.core import lsq
from cimjax.core.lsq import CodeRanges
from cimjax.core.step_sizes import StepSizes, expand_outputs
from cimjax.core.tiling import Tiling
from cimjax.spec import CIMSpec
from cimjax.spec.codes import CodeRange


def convert(psums: Array, steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> Array:
    """What the ADCs make of partial sums: `P^ = s p + z`, `p = clip(floor((P - z) / s + 0.5), q_min, q_max)`.

    Exactly `2^bits` codes (3 for 1.5 bits); a signed 1-bit ADC gives the sign of `P - z`. The result depends on nothing
    but the partial sum and its step: not on other images of a batch. With an ideal ADC (`spec.adc` None) `P^ = P`.

    Args:
      psums: (T, M, R, K, O) float32.
      steps: `psum` > 0 and `offset`, in psum units, at psum granularity.

    Returns:
      Digitised partial sums in psum units, the shape of `psums`, float32. Gradients as for `lsq.fake_quantize`.
    """
    if spec.adc is None:
        return psums
    step = expand_outputs(steps.psum, tiling)
    offset = None if steps.offset is None else expand_outputs(steps.offset, tiling)
    return lsq.fake_quantize(psums, step, ranges_of_psums(spec), offset, half_up=True, margin=spec.adc.gradient_margin)


def ranges_of_psums(spec: CIMSpec) -> CodeRanges:
    """Code ranges, broadcastable to psums (T, M, R, K, O): they differ by slice and plane."""
    return _as_arrays(spec.adc_ranges, (-1, 1, 1, len(spec.weight.planes), 1))


def ranges_of_reference(spec: CIMSpec) -> CodeRanges:
    """Code ranges, broadcastable to reference sums (T, M, R): they differ by slice."""
    return _as_arrays([[codes] for codes in spec.reference_ranges], (-1, 1, 1))


def _as_arrays(ranges: tuple[tuple[CodeRange, ...], ...] | list[list[CodeRange]], shape: tuple[int, ...]) -> CodeRanges:
    table = np.asarray(ranges, np.float32)
    q_min, q_max, size = (table[..., index].reshape(shape) for index in range(3))
    return q_min, q_max, size
