"""Starting values of steps: from the mean magnitude for activations and weights, by least squares for partial sums.

Everything here can be traced, so that an initialisation which calibrates can be jitted. The order in which layers are
calibrated is in `cimjax.nn.calibrate`.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.core import conv, lsq
from cimjax.core.adc import ranges_of_psums, ranges_of_reference
from cimjax.core.least_squares import Grouping, fit
from cimjax.core.lsq import Codes
from cimjax.core.steps import (
    Steps,
    expand_outputs,
    expand_weight,
    gradient_factors,
    max_over_groups,
    real_steps,
    shapes,
    sum_over_groups,
)
from cimjax.core.tiling import Tiling, tile, tile_kernel
from cimjax.core.window import Window
from cimjax.planes import CodeRange
from cimjax.spec import ActivationSpec, CIMSpec, Reference, StepKind

# Output positions that the search for a psum step looks at, at most; they are spread over images and pixels.
SAMPLES = 1024


# The kinds of steps that can be calibrated apart; `psum` includes offsets and the reference's ADC.
KINDS = ("activation", "weight", "psum")


def calibrated(
    x: Array | Codes,
    kernel: Array,
    stored: Steps,
    window: Window,
    spec: CIMSpec,
    *,
    kinds: Collection[str] = KINDS,
    variation_key: Array | None = None,
) -> Steps:
    """Stored steps of one layer, set from its kernel and from an input: activation and weight first, then the ADC's.

    Args:
      x: (N, H, W, C) real, or `Codes`, whose step is not touched.
      kernel: (kh, kw, C, O) real.
      stored: present values (logarithms of steps, offsets in steps), kept where `kinds` does not name them.
      window: how the kernel moves.
      kinds: which of "activation", "weight" and "psum" to set.

    Returns:
      Stored steps.
    """
    tiling = tile(kernel.shape, spec)
    if "activation" in kinds and not isinstance(x, Codes):
        stored = stored._replace(activation=lsq.log_from_step(activation_step(x, spec.activation)))
    if "weight" in kinds:
        stored = stored._replace(weight=lsq.log_from_step(weight_step(kernel, tiling, spec)))
    if "psum" not in kinds or spec.adc is None:
        return stored
    steps = real_steps(stored, gradient_factors(tiling, spec, 1, 1), spec)
    inputs = conv.quantize_activation(x, steps.activation, spec.activation)
    psums = conv.partial_sums(inputs, kernel, steps, tiling, window, spec, variation_key)
    step, offset = psum_steps(psums.columns, steps, tiling, spec)
    psum, zeta = _stored(step, offset, spec)
    stored = stored._replace(psum=psum, offset=zeta)
    if spec.weight.reference == Reference.ADC:
        assert psums.reference is not None
        psum, zeta = _stored(*reference_steps(psums.reference, spec), spec)
        stored = stored._replace(reference=psum, reference_offset=zeta)
    return stored


def _stored(step: Array, offset: Array | None, spec: CIMSpec) -> tuple[Array | None, Array | None]:
    """What is stored for a step and an offset: nothing for a `fixed` step, and the offset in steps."""
    assert spec.adc is not None
    log_step = None if spec.adc.step == StepKind.FIXED else lsq.log_from_step(step)
    return log_step, None if offset is None else offset / step


def activation_step(x: Array, spec: ActivationSpec) -> Array:
    """LSQ's start, `2 mean|x| / sqrt(q_max)`; `mean|x|` for signed 1 bit; 1 where `x` is all zero.

    Source: Esser et al. 2020, section 2.1.

    Args:
      x: any shape, real.

    Returns:
      () float32, > 0.
    """
    return _from_mean_magnitude(jnp.mean(jnp.abs(x.astype(jnp.float32))), spec.code_range)


def weight_step(kernel: Array, tiling: Tiling, spec: CIMSpec) -> Array:
    """LSQ's start for every weight group, over the weights that it really has; planes start alike.

    Args:
      kernel: (kh, kw, C, O) real.

    Returns:
      float32 > 0, of the weight step's shape.
    """
    shape = shapes(tiling, spec).weight
    shared = (shape[0], shape[-1])
    magnitude = jnp.abs(tile_kernel(kernel.astype(jnp.float32), tiling))
    axes = (*range(len(tiling.kernel_size)), -2)
    per_group = jnp.sum(magnitude, axis=axes)[:, None]
    count = jnp.broadcast_to(jnp.asarray(tiling.rows_of_group, jnp.float32)[:, None, None], per_group.shape)

    def expand(step: Array) -> Array:
        return jnp.broadcast_to(expand_weight(step, tiling), per_group.shape)

    transpose = jax.linear_transpose(expand, jax.ShapeDtypeStruct(shared, jnp.float32))
    step = _from_mean_magnitude(transpose(per_group)[0] / transpose(count)[0], spec.weight.code_range)
    return jnp.broadcast_to(step[:, None], shape) if spec.weight.step_per_plane else step


def _from_mean_magnitude(mean: Array, codes: CodeRange) -> Array:
    step = mean if codes.binary else 2.0 * mean / math.sqrt(codes.magnitude)
    return jnp.where(step > 0, step, 1.0)


def psum_steps(psums: Array, steps: Steps, tiling: Tiling, spec: CIMSpec) -> tuple[Array, Array | None]:
    """Psum steps (and offsets) of least squared error of `g_t f_k s_w P^`, for every group that shares a step.

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
    slices = np.asarray([s.significance for s in spec.activation.slices], np.float32)[:, None, None, None, None]
    planes = np.asarray([p.significance for p in spec.weight.planes], np.float32)[:, None]
    weight_of = expand_weight(steps.weight, tiling)
    weight = jnp.square(slices * planes * (weight_of / jnp.max(weight_of)))

    grouping = Grouping(
        expand=lambda step: expand_outputs(step, tiling),
        total=lambda column: sum_over_groups(column, shape, tiling),
        largest=lambda column: max_over_groups(column, shape, tiling),
    )
    weight = jnp.broadcast_to(weight, (values.shape[0], 1, *values.shape[2:]))
    return fit(values, weight, ranges_of_psums(spec), grouping, spec)


def reference_steps(sums: Array, spec: CIMSpec) -> tuple[Array, Array | None]:
    """As `psum_steps`, for the dummy columns of `reference="adc"`: one step per read group.

    Args:
      sums: (T, M, R) float32.

    Returns:
      Step and offset (None without one), (R,) float32.
    """
    values = _sampled(sums)
    slices = np.asarray([s.significance for s in spec.activation.slices], np.float32)[:, None, None]
    same = Grouping(expand=lambda step: step, total=lambda column: column, largest=lambda column: column)
    weight = jnp.broadcast_to(jnp.square(slices), (values.shape[0], 1, *values.shape[2:]))
    return fit(values, weight, ranges_of_reference(spec), same, spec)


def _sampled(values: Array) -> Array:
    """At most `SAMPLES` positions, spread over images and pixels: (T, M, *columns) -> (T, S, *columns)."""
    if values.shape[1] <= SAMPLES:
        return values
    chosen = np.sort(np.random.default_rng(0).permutation(values.shape[1])[:SAMPLES])
    return jnp.take(values, chosen, axis=1)
