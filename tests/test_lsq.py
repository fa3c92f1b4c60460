"""Properties of the quantizer: values, edges, and its gradients, written out."""

from __future__ import annotations

import statistics
from typing import Any

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cimjax.core import lsq
from cimjax.core.broadcasts import sum_to_shape
from cimjax.core.reciprocal import nearest_quotient, reciprocal
from cimjax.spec.codes import CodeRange, code_range, weight_range

RANGES = {
    "unsigned-1": code_range(1, signed=False),
    "signed-1": code_range(1, signed=True),
    "unsigned-1.5": code_range(1.5, signed=False),
    "signed-1.5": code_range(1.5, signed=True),
    "unsigned-3": code_range(3, signed=False),
    "signed-3": code_range(3, signed=True),
    "signed-8": code_range(8, signed=True),
    "symmetric-4": weight_range(4, symmetric=True),
}
ranges = st.sampled_from(list(RANGES.values()))


def reals(largest: float) -> st.SearchStrategy[float]:
    """Without numbers so small that a step makes them subnormal, which XLA's CPU backend takes for 0."""
    return st.floats(-largest, largest, width=32).map(lambda value: value if abs(value) > 1e-30 else 0.0)


inputs = hnp.arrays(np.float32, st.integers(1, 40), elements=reals(100))
steps = st.floats(2.0**-6, 2.0**6, width=32)
powers = st.integers(-8, 8).map(lambda n: np.float32(2.0**n))
settings = hypothesis.settings(max_examples=60, deadline=None)


def all_codes(codes: CodeRange) -> np.ndarray:
    return np.array([-1.0, 1.0]) if codes.binary else np.arange(codes.q_min, codes.q_max + 1.0)


@settings
@hypothesis.given(inputs, steps, ranges, st.booleans())
def test_dequantized_values_are_fixed_points(x: np.ndarray, step: float, codes: CodeRange, half_up: bool) -> None:
    once = lsq.fake_quantize(x, step, codes, half_up=half_up)
    chex.assert_trees_all_equal(lsq.fake_quantize(once, step, codes, half_up=half_up), once)
    chex.assert_trees_all_equal(
        lsq.quantize(once, step, codes, half_up=half_up), lsq.quantize(x, step, codes, half_up=half_up)
    )


@settings
@hypothesis.given(inputs, steps, ranges, reals(10))
def test_error_is_at_most_half_a_step_inside_the_range(
    x: np.ndarray, step: float, codes: CodeRange, offset: float
) -> None:
    hypothesis.assume(not codes.binary)
    low, high = offset + step * codes.q_min, offset + step * codes.q_max
    inside = np.clip(x, low, high)
    error = np.abs(np.asarray(lsq.fake_quantize(inside, step, codes, offset, half_up=True)) - inside)
    assert error.max() <= step / 2 + 1e-5 * (1 + abs(offset) + step * codes.magnitude)


@pytest.mark.parametrize("codes", RANGES.values(), ids=RANGES)
@pytest.mark.parametrize("half_up", [False, True])
def test_a_ramp_reaches_exactly_the_codes_of_the_range(codes: CodeRange, half_up: bool) -> None:
    ramp = np.linspace(-300, 300, 20001, dtype=np.float32)
    reached = np.unique(lsq.quantize(ramp, 0.9, codes, half_up=half_up))
    np.testing.assert_array_equal(reached, all_codes(codes))
    assert len(reached) == codes.size


@settings
@hypothesis.given(inputs, steps, ranges, powers)
def test_scaling_input_and_step_together_changes_no_code(
    x: np.ndarray, step: float, codes: CodeRange, scale: np.float32
) -> None:
    scaled = lsq.quantize(x * scale, np.float32(step) * scale, codes, np.float32(0.25) * scale, half_up=True)
    chex.assert_trees_all_equal(scaled, lsq.quantize(x, step, codes, 0.25, half_up=True))


@pytest.mark.parametrize("half_up,expected", [(True, [-1, 0, 1, 2, 3]), (False, [-2, 0, 0, 2, 2])])
def test_ties(half_up: bool, expected: list[int]) -> None:
    ties = np.array([-1.5, -0.5, 0.5, 1.5, 2.5], np.float32)
    np.testing.assert_array_equal(lsq.quantize(ties, 1.0, CodeRange(-4, 3, 8), half_up=half_up), expected)


def test_the_sign_quantizer_gives_plus_one_at_zero_and_minus_one_just_below() -> None:
    tiny = np.float32(2e-38)
    codes = lsq.quantize(np.array([0.0, -0.0, tiny, -tiny, -1.0]), 1e10, code_range(1, signed=True))
    np.testing.assert_array_equal(codes, [1, 1, 1, -1, -1])


@pytest.mark.parametrize("name", RANGES)
def test_what_is_no_number_has_no_code(name: str) -> None:
    """So that a run that has gone wrong says so, instead of training on."""
    assert jnp.isnan(lsq.quantize(jnp.array([jnp.nan]), 1.0, RANGES[name])).all()
    assert jnp.isnan(lsq.quantize(jnp.array([1.0]), 1.0, RANGES[name], jnp.nan)).all()


def test_ties_are_decided_alike_by_every_compiler() -> None:
    """A compiler that fuses the product with the sum that rounds would decide some near-ties differently."""
    rng = np.random.default_rng(0)
    psums = rng.integers(1, 3000, 500_000).astype(np.float32)
    ties = rng.integers(0, 7, psums.size) + 0.5
    step = (psums / ties * (1 + 1e-7 * rng.normal(size=psums.size))).astype(np.float32)
    u = psums * (np.float32(1) / step)
    expected = np.clip(np.floor(u + np.float32(0.5)), 0, 7)
    fused = np.clip(np.floor(psums.astype(np.float64) * (np.float32(1) / step) + 0.5), 0, 7)
    assert (expected != fused).sum() > 1000, "the inputs do not tell the two apart"
    quantize = jax.jit(lambda x, s: lsq.quantize(x, s, CodeRange(0, 7, 8), half_up=True))
    np.testing.assert_array_equal(quantize(psums, step), expected)


def gradients(x: float, step: float, offset: float, codes: CodeRange, half_up: bool = True) -> tuple[float, ...]:
    """d code / d (x, step, offset)."""

    def code(x: jax.Array, step: jax.Array, offset: jax.Array) -> jax.Array:
        return lsq.quantize(x, step, codes, offset, half_up=half_up)

    return tuple(float(g) for g in jax.grad(code, argnums=(0, 1, 2))(x, step, offset))


@settings
@hypothesis.given(reals(20), steps, reals(5), ranges)
def test_gradients_are_those_of_the_definition(x: float, step: float, offset: float, codes: CodeRange) -> None:
    u = float((np.float32(x) - np.float32(offset)) * (np.float32(1) / np.float32(step)))
    inside = codes.q_min <= u <= codes.q_max
    expected = (1 / step, 0 if codes.binary else -u / step, -1 / step) if inside else (0, 0, 0)
    np.testing.assert_allclose(gradients(x, step, offset, codes), expected, rtol=1e-5)


@pytest.mark.parametrize("codes", RANGES.values(), ids=RANGES)
def test_both_ends_of_the_range_are_inside(codes: CodeRange) -> None:
    for end in (codes.q_min, codes.q_max):
        to_x, to_step, to_offset = gradients(end * 0.5, 0.5, 0.0, codes)
        assert (to_x, to_offset) == (2.0, -2.0)
        assert to_step == (0 if codes.binary else -2.0 * end)
        beyond = end + (1e-3 if end == codes.q_max else -1e-3)
        assert gradients(beyond * 0.5, 0.5, 0.0, codes) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("codes", RANGES.values(), ids=RANGES)
def test_a_margin_reaches_beyond_codes_but_not_of_a_sign(codes: CodeRange) -> None:
    def code(x: jax.Array) -> jax.Array:
        return lsq.quantize(x, 0.5, codes, half_up=True, margin=0.5)

    beyond = (codes.q_max + 0.4, codes.q_max + 0.6, codes.q_min - 0.4, codes.q_min - 0.6)
    slopes = [float(jax.grad(code)(0.5 * u)) for u in beyond]
    assert slopes == ([0, 0, 0, 0] if codes.binary else [2, 0, 2, 0])


@settings
@hypothesis.given(reals(20), steps, reals(5), ranges, st.floats(0.05, 2.0))
def test_bumps_pass_gradients_around_thresholds(
    x: float, step: float, offset: float, codes: CodeRange, bumps: float
) -> None:
    def value(x: jax.Array, step: jax.Array, offset: jax.Array) -> jax.Array:
        return lsq.fake_quantize(x, step, codes, offset, half_up=True, bumps=bumps)

    to_x, to_step, to_offset = jax.grad(value, argnums=(0, 1, 2))(x, step, offset)
    u = float((np.float32(x) - np.float32(offset)) * (np.float32(1) / np.float32(step)))
    code = float(lsq.quantize(x, step, codes, offset, half_up=True))
    stairs = [(0.0, 2)] if codes.binary else [(low + 0.5, 1) for low in range(int(codes.q_min), int(codes.q_max))]
    threshold, height = min(stairs, key=lambda stair: abs(u - stair[0]))
    passed = height * statistics.NormalDist(threshold, bumps).pdf(u)
    expected = (passed, code - (0 if codes.binary else u * passed), 1 - passed)
    np.testing.assert_allclose((to_x, to_step, to_offset), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bumps", [0.05, 0.3, 1.0])
@pytest.mark.parametrize(("codes", "height"), [(CodeRange(0, 1, 2), 1), (CodeRange(-1, 1, 2), 2)])
def test_bumps_pass_as_much_as_the_stair_is_high(codes: CodeRange, height: int, bumps: float) -> None:
    """Of one threshold: the gradient's integral is the stair."""
    x = jnp.linspace(-12.0, 12.0, 24_001)
    slopes = jax.vmap(jax.grad(lambda x: lsq.quantize(x, 2.0, codes, half_up=True, bumps=bumps)))(x)
    np.testing.assert_allclose(np.sum(slopes) * 1e-3, height, rtol=1e-4)


@settings
@hypothesis.given(reals(20), steps, reals(5), ranges)
def test_fake_quantize_has_the_gradients_of_lsq(x: float, step: float, offset: float, codes: CodeRange) -> None:
    def value(x: jax.Array, step: jax.Array, offset: jax.Array) -> jax.Array:
        return lsq.fake_quantize(x, step, codes, offset, half_up=True)

    to_x, to_step, to_offset = jax.grad(value, argnums=(0, 1, 2))(x, step, offset)
    u = float((np.float32(x) - np.float32(offset)) * (np.float32(1) / np.float32(step)))
    code = float(lsq.quantize(x, step, codes, offset, half_up=True))
    if codes.binary:
        inside = abs(u) <= 1
        expected = (inside, code, not inside)
    else:
        inside = codes.q_min <= u <= codes.q_max
        expected = (1, code - u, 0) if inside else (0, code, 1)
    np.testing.assert_allclose((to_x, to_step, to_offset), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step_shape", [(), (1,), (4,), (3, 1), (1, 4), (2, 3, 4), (2, 1, 1), (1, 3, 1), (2, 1, 4)])
@pytest.mark.parametrize("offset_shape", [(), (3, 1), (2, 1, 4)])
def test_gradients_have_the_shape_of_any_broadcastable_step(
    step_shape: tuple[int, ...], offset_shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    step = rng.uniform(0.2, 1, step_shape).astype(np.float32)
    offset = rng.normal(size=offset_shape).astype(np.float32)
    codes = code_range(3, signed=True)

    def total(step: jax.Array, offset: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(lsq.fake_quantize(x, step, codes, offset)))

    to_step, to_offset = jax.grad(total, argnums=(0, 1))(step, offset)
    full_step, full_offset = (np.broadcast_to(a, x.shape) for a in (step, offset))
    each_step, each_offset = jax.grad(total, argnums=(0, 1))(full_step, full_offset)
    chex.assert_shape(to_step, step.shape)
    chex.assert_shape(to_offset, offset.shape)
    chex.assert_trees_all_close(to_step, sum_to_shape(each_step, step.shape), rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(to_offset, sum_to_shape(each_offset, offset.shape), rtol=1e-4, atol=1e-4)


def test_ranges_may_differ_within_a_tensor() -> None:
    parts = [RANGES["unsigned-3"], RANGES["signed-3"], RANGES["signed-1"]]
    x = np.linspace(-5, 5, 41, dtype=np.float32)[:, None].repeat(3, axis=1)
    table = np.asarray(parts, np.float32)
    together = lsq.quantize(x, 0.7, (table[:, 0], table[:, 1], table[:, 2]), half_up=True)
    apart = [lsq.quantize(x[:, i], 0.7, codes, half_up=True) for i, codes in enumerate(parts)]
    chex.assert_trees_all_equal(together, jnp.stack(apart, axis=1))


def test_gradients_are_finite_at_absurd_values() -> None:
    for x in (0.0, 1e30, -1e30):
        for log_step in (-1e30, -25.0, 0.0, 25.0, 1e30):

            def value(x: jax.Array, log_step: jax.Array) -> jax.Array:
                return lsq.fake_quantize(x, lsq.step_from_log(log_step), code_range(3, signed=False), half_up=True)

            chex.assert_tree_all_finite(jax.grad(value, argnums=(0, 1))(x, log_step))


def test_a_stored_step_is_positive_and_its_gradient_passes_the_clip() -> None:
    for log_step in (-1e6, -40.0, 0.0, 40.0, 1e6):
        step, slope = jax.value_and_grad(lsq.step_from_log)(jnp.float32(log_step))
        assert 0 < step < jnp.inf
        assert slope == step
    chex.assert_trees_all_close(lsq.step_from_log(lsq.log_from_step(0.37)), 0.37, rtol=1e-6)


def test_scale_gradient_scales_only_the_gradient() -> None:
    x = jnp.arange(3.0)
    factor = np.array([1.0, 2.0, 0.5], np.float32)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(lsq.scale_gradient(x, factor) ** 2))(x)
    assert value == 5.0
    np.testing.assert_array_equal(gradient, 2 * np.arange(3.0) * factor)


def test_powers_of_two_pass_the_gradient_of_the_logarithm() -> None:
    step = jnp.array([0.7, 1.0, 1.4, 1.5, 300.0])
    np.testing.assert_array_equal(lsq.nearest_power_of_two(step), [0.5, 1.0, 1.0, 2.0, 256.0])
    logarithm = jnp.log(step)
    slope = jax.grad(lambda v: jnp.sum(lsq.nearest_power_of_two(lsq.step_from_log(v))))(logarithm)
    chex.assert_trees_all_close(slope, lsq.nearest_power_of_two(step), rtol=1e-6)


def test_powers_of_two_are_exact_over_the_whole_range_of_steps() -> None:
    """XLA's `exp2` is not: it gives 2^13 and 2^-13 to the last bit but one."""
    powers = 2.0 ** np.arange(-43, 44)
    for near in (0.75, 1.0, 1.4):
        np.testing.assert_array_equal(
            jax.jit(lsq.nearest_power_of_two)(jnp.asarray(powers * near, jnp.float32)), powers
        )
    assert jnp.isnan(lsq.nearest_power_of_two(jnp.float32(jnp.nan)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gradient_factors_do_not_change_the_type_of_a_gradient(dtype: Any) -> None:
    for shape in ((), (1, 3)):
        x, factor = jnp.ones(shape, dtype), np.full(shape, 0.25, np.float32)
        gradient = jax.grad(lambda x, factor=factor: jnp.sum(lsq.scale_gradient(x, factor)))(x)
        assert gradient.dtype == dtype
        np.testing.assert_array_equal(gradient.astype(jnp.float32), factor)


def test_low_precision_inputs_are_quantized_in_float32() -> None:
    x = jnp.asarray([0.3, 1.7, 100.0], jnp.bfloat16)
    codes = lsq.quantize(x, 0.1, code_range(8, signed=False))
    assert codes.dtype == jnp.float32
    np.testing.assert_array_equal(codes, lsq.quantize(x.astype(jnp.float32), 0.1, code_range(8, signed=False)))


@pytest.mark.parametrize("units", [-2, -1, 0, 1, 2])
def test_reciprocals_are_the_nearest_whatever_the_division_gives(units: int) -> None:
    """As on GPUs, whose quotients are some units in the last place off."""
    rng = np.random.default_rng(0)
    anywhere = np.exp(rng.uniform(-25, 25, 200_000)).astype(np.float32)
    # Their reciprocals lie as close to the middle of two numbers as any.
    hard = np.float32(2) - np.float32(2**-23) * np.arange(1, 5000, dtype=np.float32)
    step = np.concatenate([anywhere, hard])
    want = np.float32(1) / step
    near = (want.view(np.int32) + np.int32(units)).view(np.float32)
    np.testing.assert_array_equal(jax.jit(nearest_quotient)(step, near), want)
    np.testing.assert_array_equal(jax.jit(reciprocal)(step), want)


def test_reciprocals_of_extreme_steps_are_those_of_the_division() -> None:
    step = np.asarray([2e-38, 1e-35, 1e35, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(reciprocal(jnp.asarray(step)), np.float32(1) / step)
