"""Starting values of steps: from the mean magnitude for activations and weights, by a search for partial sums.

Everything here can be traced, so that an initialisation which calibrates can be jitted. The order in which layers are
calibrated is in `cimjax.nn.calibrate`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.core import lsq
from cimjax.core.adc import psum_ranges, reference_ranges
from cimjax.core.array_mac import array_mac
from cimjax.core.calibration.ladder import Grouping, fit
from cimjax.core.calibration.quantile import PERCENTILE, quantile
from cimjax.core.calibration.report import CalibrationReport, report_input
from cimjax.core.cells import quantize_weight, store
from cimjax.core.encoding import slice_codes
from cimjax.core.lsq import Codes
from cimjax.core.readout import plane_significances, slice_significances
from cimjax.core.step_sizes import (
    StepSizes,
    expand_outputs,
    expand_weight,
    gradient_factors,
    max_over_groups,
    middle_codes,
    middle_of_reference,
    offset_units,
    real_steps,
    shapes,
    stored_adc_steps,
    sum_over_groups,
)
from cimjax.core.tiling import Tiling, tile, tile_kernel
from cimjax.core.window import Window, positions, seen_at, without_padding
from cimjax.spec import ActivationSpec, CIMSpec, Encoding, Reference, StartRule, StepKind
from cimjax.spec.codes import CodeRange

# Output positions that the search for a psum step looks at, at most; they are spread over images and pixels.
SAMPLES = 1024
# Candidates for the step of an activation or a weight, as multiples of LSQ's start.
STEP_SCALES = tuple(np.geomspace(0.2, 2.5, 96))


# The kinds of steps that can be calibrated apart; `psum` includes offsets and the reference's ADC.
KINDS = ("activation", "weight", "psum")


# Layers of equal shapes are traced once.
@functools.partial(jax.jit, static_argnames=("window", "spec", "kinds"))
def calibrate_layer(
    x: Array | Codes,
    kernel: Array,
    stored: StepSizes,
    window: Window,
    spec: CIMSpec,
    *,
    kinds: tuple[str, ...] = KINDS,
    variation_key: Array | None = None,
) -> tuple[StepSizes, CalibrationReport]:
    """Stored steps of one layer, set from its kernel and from an input: activation and weight first, then the ADC's.

    Args:
      x: (N, H, W, C) real, or `Codes`, whose step is not touched.
      kernel: (kh, kw, C, O) real.
      stored: present values (`step_sizes.real_steps` makes real ones of them), kept where `kinds` does not name them.
      window: how the kernel moves.
      kinds: which of "activation", "weight" and "psum" to set.
      variation_key: the random key of the chip; needed with `spec.variation`.

    Returns:
      Stored steps, and what the data was like.
    """
    tiling = tile(kernel.shape, spec)
    if "activation" in kinds and stored.activation is not None and not isinstance(x, Codes):
        stored = stored._replace(activation=lsq.log_from_step(activation_step(x, spec.activation)))
    if "weight" in kinds:
        stored = stored._replace(weight=lsq.log_from_step(weight_step(kernel, tiling, spec)))
    units = offset_units(tiling, spec)
    steps = real_steps(stored, gradient_factors(tiling, spec, 1, 1), units, spec)
    report = CalibrationReport() if isinstance(x, Codes) else report_input(x, steps.activation, spec.activation)
    if "weight" in kinds:
        report = report._replace(empty=empty_weight_groups(kernel, tiling, spec))
    if "psum" not in kinds or spec.adc is None:
        return stored, report
    inputs = lsq.quantize_activation(x, steps.activation, spec.activation)
    inputs, window = _sampled_inputs(inputs, tiling, window)
    arrays = store(quantize_weight(kernel, steps.weight, tiling, spec), tiling, spec, variation_key)
    psums = array_mac(slice_codes(inputs.codes, spec.activation), arrays, tiling, window, spec)
    if spec.adc.step != StepKind.FIXED:
        report = report._replace(**columns_seen(psums.columns, arrays.digits, tiling, spec))
    if not psums.columns.shape[1]:
        return stored, report
    step, offset = psum_steps(psums.columns, steps, tiling, spec)
    psum, zeta = stored_adc_steps(step, offset, units.offset, middle_codes(spec), spec)
    stored = stored._replace(psum=psum, offset=zeta)
    if spec.weight.reference == Reference.ADC:
        assert psums.reference is not None
        found, middle = reference_steps(psums.reference, spec), middle_of_reference(spec)
        psum, zeta = stored_adc_steps(*found, units.reference_offset, middle, spec)
        stored = stored._replace(reference=psum, reference_offset=zeta)
    if stored.gain is not None:
        stored = stored._replace(gain=jnp.zeros_like(stored.gain))
    return stored, report


def activation_step(x: Array, spec: ActivationSpec) -> Array:
    """The start of an activation's step by `spec.start`; 1 where `x` is all zero.

    Args:
      x: any shape, real.

    Returns:
      () float32, > 0.
    """
    values = x.astype(jnp.float32)
    step = _from_mean_magnitude(jnp.mean(jnp.abs(values)), spec.code_range)
    if spec.start == StartRule.MAGNITUDE or spec.code_range.binary:
        return step
    if spec.start == StartRule.RANGE:
        return _positive(jnp.max(_reach(values, spec.code_range)))
    values = values.reshape(-1)
    # Every so many elements are enough, and much quicker.
    values = values[:: max(1, values.size // 2**16)]
    if spec.start == StartRule.PERCENTILE:
        return _positive(jnp.quantile(_reach(values, spec.code_range), PERCENTILE))
    return _least_squares(values, step, spec.code_range, lambda step: step, jnp.sum)


def weight_step(kernel: Array, tiling: Tiling, spec: CIMSpec) -> Array:
    """The start of every weight group's step by `spec.weight.start`, over the weights that it really has.

    Planes start alike, but those of `learned_scales` at a step of its own each, twice as large as the one below.

    Args:
      kernel: (kh, kw, C, O) real.

    Returns:
      float32 > 0, of the weight step's shape; 1 for a group of zeros.
    """
    expand, total = _over_weight_groups(tiling, spec)
    weights = tile_kernel(kernel.astype(jnp.float32), tiling)
    stored = jnp.broadcast_to(jnp.asarray(tiling.stored, jnp.float32)[..., None], weights.shape)
    codes, start = spec.weight.code_range, spec.weight.start
    step = _from_mean_magnitude(total(jnp.abs(weights)) / total(stored), codes)
    if codes.binary or start == StartRule.MAGNITUDE:
        pass
    elif start == StartRule.LEAST_SQUARES:
        step = _least_squares(weights, step, codes, lambda step: expand(step)[:, None], total)
    else:
        part = 1.0 if start == StartRule.RANGE else PERCENTILE
        reach = _reach(weights, codes)
        step = _positive(quantile(reach, part, lambda step: expand(step)[:, None], total, stored))
    if not spec.weight.step_per_plane:
        return step
    per_plane = jnp.broadcast_to(step[:, None], shapes(tiling, spec).weight)
    if spec.weight.encoding == Encoding.LEARNED_SCALES:
        per_plane *= np.exp2(np.arange(per_plane.shape[1], dtype=np.float32))[:, None]
    return per_plane


def empty_weight_groups(kernel: Array, tiling: Tiling, spec: CIMSpec) -> Array:
    """How many weight steps have weights of 0 alone, () int32."""
    total = _over_weight_groups(tiling, spec)[1]
    return jnp.sum(total(jnp.abs(tile_kernel(kernel.astype(jnp.float32), tiling))) == 0, dtype=jnp.int32)


def columns_seen(psums: Array, digits: Array, tiling: Tiling, spec: CIMSpec) -> dict[str, Any]:
    """What ADC steps saw too little: `single`, `silent` and `groups` of a `CalibrationReport`, () int32.

    A column that holds nothing needs to see nothing.

    Args:
      psums: (T, M, R, K, O) float32.
      digits: (K, kh, kw, R, c, O) float32.
    """
    held = jnp.max(jnp.abs(digits), axis=(*range(1, digits.ndim - 3), -2)).swapaxes(0, 1)
    seen = jnp.max(jnp.abs(psums), axis=(0, 1), initial=0)
    held, seen = (max_over_groups(values, shapes(tiling, spec).psum, tiling) for values in (held, seen))
    alone = psums.shape[1] == 1 and held.shape == psums.shape[2:]
    return {
        "single": jnp.int32(held.size if alone else 0),
        "silent": jnp.sum((held > 0) & (seen == 0), dtype=jnp.int32),
        "groups": jnp.int32(held.size),
    }


def _over_weight_groups(tiling: Tiling, spec: CIMSpec) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Steps of groups made broadcastable to (R, O), and sums of weights (kh, kw, R, c, O) over each group."""
    shape = shapes(tiling, spec).weight
    axes = (*range(len(tiling.kernel_size)), -2)

    def expand(step: Array) -> Array:
        """(A, Ct) or the like to (R, O)."""
        return jnp.broadcast_to(expand_weight(step, tiling)[:, 0], (tiling.groups, tiling.features))

    transpose = jax.linear_transpose(expand, jax.ShapeDtypeStruct((shape[0], shape[-1]), jnp.float32))
    return expand, lambda values: transpose(jnp.sum(values, axis=axes))[0]


def _from_mean_magnitude(mean: Array, codes: CodeRange) -> Array:
    """LSQ's start, `2 mean|x| / sqrt(q)`; `mean|x|` for signed 1 bit (Esser et al. 2020, section 2.1)."""
    step = mean if codes.binary else 2.0 * mean / math.sqrt(codes.magnitude)
    return _positive(step)


def _reach(values: Array, codes: CodeRange) -> Array:
    """The step at which each value just reaches the end of the codes on its side; 0 on a side without codes."""
    below = values / codes.q_min if codes.q_min < 0 else 0.0
    return jnp.maximum(values / codes.q_max, below)


def _positive(step: Array) -> Array:
    """Steps, 1 where there was nothing to follow."""
    return jnp.where(step > 0, step, 1.0)


def _least_squares(
    values: Array, step: Array, codes: CodeRange, expand: Callable[[Array], Array], total: Callable[[Array], Array]
) -> Array:
    """The best of a grid of multiples of `step`, for every group: least `sum (s code - x)^2`."""

    def error(step: Array) -> Array:
        return total(jnp.square(lsq.fake_quantize(values, expand(step), codes) - values))

    def visit(best: tuple[Array, Array], scale: Array) -> tuple[tuple[Array, Array], None]:
        better = (found := error(step * scale)) < best[0]
        return (jnp.where(better, found, best[0]), jnp.where(better, step * scale, best[1])), None

    return jax.lax.scan(visit, (error(step), step), jnp.asarray(STEP_SCALES, jnp.float32))[0][1]


def psum_steps(psums: Array, steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> tuple[Array, Array | None]:
    """Psum steps (and offsets) by `spec.adc.start`, for every group that shares a step; by default of least squared
    error of `g_t f_k s_w P^`.

    Not below 1 for more than one bit, since partial sums are integers; 1 (and offset 0) for a group of zeros. A `fixed`
    step is kept and only its offset is found.

    Args:
      psums: (T, M, R, K, O) float32.
      steps: `weight` is used.

    Returns:
      Step and offset (None without one), float32, of the psum step's shape, in psum units.
    """
    shape = shapes(tiling, spec).psum
    values = _sampled(psums)
    slices = slice_significances(spec)[:, None, None, None, None]
    planes = plane_significances(spec)[:, None]
    step = expand_weight(steps.weight, tiling)
    weight = jnp.square(slices * planes * (step / jnp.max(step)))

    grouping = Grouping(
        expand=lambda step: expand_outputs(step, tiling),
        total=lambda column: sum_over_groups(column, shape, tiling),
        largest=lambda column: max_over_groups(column, shape, tiling),
    )
    weight = jnp.broadcast_to(weight, (values.shape[0], 1, *values.shape[2:]))
    return fit(values, weight, psum_ranges(spec), grouping, spec)


def reference_steps(sums: Array, spec: CIMSpec) -> tuple[Array, Array | None]:
    """As `psum_steps`, for the dummy columns of `reference="adc"`: one step per read group.

    Args:
      sums: (T, M, R) float32.

    Returns:
      Step and offset (None without one), (R,) float32.
    """
    values = _sampled(sums)
    slices = slice_significances(spec)[:, None, None]
    same = Grouping(expand=lambda step: step, total=lambda column: column, largest=lambda column: column)
    weight = jnp.broadcast_to(jnp.square(slices), (values.shape[0], 1, *values.shape[2:]))
    return fit(values, weight, reference_ranges(spec), same, spec)


def _sampled_inputs(inputs: Codes, tiling: Tiling, window: Window) -> tuple[Codes, Window]:
    """What drives the rows at the positions that `_sampled` would choose, and how the kernel meets it."""
    codes = inputs.codes
    count = codes.shape[0] * positions(codes.shape[1:-1], tiling.kernel_size, window)
    if count <= SAMPLES:
        return inputs, window
    seen = seen_at(codes, _chosen(count), tiling.kernel_size, window)
    return Codes(seen, inputs.step, inputs.spec), without_padding(len(tiling.kernel_size))


def _sampled(values: Array) -> Array:
    """At most `SAMPLES` positions, spread over images and pixels: (T, M, *columns) -> (T, S, *columns)."""
    return values if values.shape[1] <= SAMPLES else jnp.take(values, _chosen(values.shape[1]), axis=1)


def _chosen(count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(0).permutation(count)[:SAMPLES])
