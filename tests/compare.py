"""How the array convolution is held against the oracle: the same case through both, and what counts as equal."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import oracle
from cases import Case, draw

from cimjax.core import conv
from cimjax.core.step_sizes import StepSizes
from cimjax.spec import Execution

TOLERANCE = 1e-5


def assert_equals_oracle(case: Case, seed: int = 0, options: dict[str, Any] | None = None, **execution: Any) -> None:
    """The values of `cim_conv` and its gradients to the input, the kernel and every step are the oracle's."""
    forward, gradients, cotangent = expected(case, seed)
    y, (to_x, to_kernel, to_steps) = computed(case, cotangent, seed, options, **execution)
    assert_near(y, forward.y, "y")
    assert_near(to_x, gradients.x, "x")
    assert_near(to_kernel, gradients.kernel, "kernel")
    scales = terms(forward, cotangent)
    for name, got in to_steps._asdict().items():
        want = getattr(gradients, name)
        assert (got is None) == (want is None), name
        if want is not None:
            assert_near(got, want, name, getattr(scales, name))


def expected(case: Case, seed: int = 0) -> tuple[oracle.Forward, oracle.Grads, np.ndarray]:
    x, kernel, steps = draw(case, seed)
    forward = oracle.forward(
        x,
        kernel,
        oracle.StepSizes(**steps._asdict()),
        case.spec,
        strides=case.strides,
        padding=case.padding,
        dilation=case.dilation,
    )
    cotangent = np.random.default_rng(seed + 1).normal(size=forward.y.shape).astype(np.float32)
    return forward, oracle.backward(forward, cotangent), cotangent


def computed(
    case: Case, cotangent: np.ndarray, seed: int = 0, options: dict[str, Any] | None = None, **execution: Any
) -> tuple[np.ndarray, Any]:
    x, kernel, steps = draw(case, seed)

    @functools.partial(jax.jit, compiler_options=options)
    def run(x: Any, kernel: Any, steps: Any, cotangent: Any) -> Any:
        how = Execution(**execution)
        y, pull = jax.vjp(lambda *args: conv.cim_conv(*args, case.spec, **case.window, execution=how), x, kernel, steps)
        return y, pull(cotangent)

    return run(x, kernel, steps, cotangent)


def terms(forward: oracle.Forward, cotangent: np.ndarray) -> StepSizes:
    """For every step the sum of the absolute values of the terms that its gradient adds up (about), as its scale.

    Step gradients are differences of large terms (a code and the real number that it stands for).
    """
    geometry, steps = forward.geometry, forward.steps
    g = np.abs([s.significance for s in geometry.slices]).reshape(-1, 1, 1, 1, 1, 1, 1)
    f = np.abs([p.significance for p in geometry.planes]).reshape(-1, 1)
    to_read = np.abs(cotangent)[None, :, :, :, None, None, :] * float(steps.activation) * g * f
    of_weight = np.sum(to_read * np.abs(forward.psums_read), axis=(0, 1, 2, 3))
    weight_step = np.broadcast_to(np.max(steps.weight), of_weight.shape)
    reference = 0.0
    if forward.reference_psums is not None:
        constant = abs(forward.geometry.spec.weight.constant)
        per_group = np.sum(
            np.abs(cotangent)[None, :, :, :, None, :] * g[..., 0] * constant * weight_step.max(), axis=-1
        )
        reference = per_group * float(steps.activation)
        of_weight = of_weight + np.sum(reference * np.abs(forward.reference_read)) / weight_step.max()
    activation = np.sum(of_weight * weight_step) / float(steps.activation)
    psum = offset = to_reference = None
    if steps.psum is not None:
        to_read = to_read * weight_step
        codes = np.abs(forward.adc_codes) * 2 + 1
        psum, offset = (np.sum(to_read * part, axis=(0, 1, 2, 3)) for part in (codes, 2 * np.ones_like(codes)))
    if steps.reference is not None:
        to_reference = np.sum(reference * (np.abs(forward.reference_codes) * 2 + 1), axis=(0, 1, 2, 3))
    gain = None
    if steps.gain is not None:
        activation, of_weight = (np.max(steps.gain) * part for part in (activation, of_weight))
        psum, offset = (np.max(steps.gain) * part for part in (psum, offset))
        gain = 2 * of_weight * weight_step
    return StepSizes(2 * activation, 2 * of_weight, psum, offset, to_reference, to_reference, gain)


def assert_near(got: Any, want: np.ndarray, what: str, scale: Any = None) -> None:
    """Equal to `TOLERANCE` of the largest value, or of `scale`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (what, got.shape, want.shape)
    scale = np.max(np.abs(want), initial=0) if scale is None else max(np.max(scale), np.max(np.abs(want)))
    error = np.max(np.abs(got - want), initial=0)
    assert error <= TOLERANCE * scale + 1e-12, f"{what}: error {error} of {scale}"
