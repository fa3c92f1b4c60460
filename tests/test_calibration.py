"""Starting values: LSQ's for weights and activations, least squares for ADC ladders, held against brute force."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, ENCODINGS, Case, draw, spec

from cimjax.core import adc, lsq
from cimjax.core import step_sizes as steps_lib
from cimjax.core import window as window_lib
from cimjax.core.array_mac import partial_sums
from cimjax.core.calibration import steps as calibration
from cimjax.core.calibration.quantile import PERCENTILE
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import Tiling, tile, tile_kernel
from cimjax.spec import ActivationSpec, ADCSpec, ArraySpec, CIMSpec, WeightSpec

SAMPLES = 512


def distributions() -> dict[str, np.ndarray]:
    """Integer samples as columns see them: one-sided and two-sided, sparse, skewed, few-valued."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=SAMPLES)
    return {
        "far from zero": np.rint(200 + 12 * normal),
        "one-sided": np.rint(np.abs(40 * normal)),
        "exponential": np.rint(rng.exponential(60, SAMPLES)),
        "sparse": np.rint(np.where(rng.random(SAMPLES) < 0.7, 0, rng.exponential(80, SAMPLES))),
        "binomial": rng.binomial(126, 0.3, SAMPLES),
        "small": rng.binomial(9, 0.4, SAMPLES),
        "uniform": rng.integers(0, 900, SAMPLES),
        "outlier": np.append(rng.integers(0, 20, SAMPLES - 1), 1500),
        "two values": np.where(rng.random(SAMPLES) < 0.5, 3, 90),
    }


def one_column(values: np.ndarray, layer_spec: CIMSpec) -> tuple[jax.Array, Tiling, StepSizes]:
    """Psums (1, M, 1, 1, 1) of a layer with a single column."""
    tiling = tile((4, 1), layer_spec)
    psums = jnp.asarray(values, jnp.float32).reshape(1, -1, 1, 1, 1)
    return psums, tiling, StepSizes(activation=jnp.float32(1), weight=jnp.ones((1, 1)))


def error(psums: jax.Array, step: np.ndarray, offset: np.ndarray | None, tiling: Tiling, layer_spec: CIMSpec) -> float:
    shaped = StepSizes(
        psum=jnp.asarray(step, jnp.float32).reshape(1, 1, 1),
        offset=None if offset is None else jnp.asarray(offset, jnp.float32).reshape(1, 1, 1),
    )
    return float(jnp.sum(jnp.square(adc.convert(psums, shaped, tiling, layer_spec) - psums)))


@pytest.mark.parametrize(
    "signed,offset,bits",
    [
        pytest.param(signed, offset, bits, marks=pytest.mark.full if signed == (bits in (1, 2, 5)) else ())
        for signed, offset, bits in itertools.product((False, True), (False, True), (1, 1.5, 2, 3, 5))
    ],
)
def test_ladders_come_within_a_tenth_of_the_best_error_of_brute_force(bits: float, offset: bool, signed: bool) -> None:
    encoding = {"bits": 4, "cell_bits": 4, "encoding": "differential", "subtract": "analog"}
    weight = encoding if signed else {"bits": 3, "cell_bits": 8, "encoding": "offset"}
    layer_spec = spec(weight=weight, adc={"bits": bits, "offset": offset, "range": "signed" if signed else "auto"})
    search = jax.jit(lambda psums, steps: calibration.psum_steps(psums, steps, tile((4, 1), layer_spec), layer_spec))

    def errors(step: jax.Array, zero: jax.Array | None, psums: jax.Array, counts: jax.Array) -> jax.Array:
        rounded = lsq.fake_quantize(psums, step, adc.psum_ranges(layer_spec), zero, half_up=True)
        return jnp.sum(jnp.square(rounded - psums) * counts)

    of_steps = jax.vmap(errors, (0, None, None, None))
    of_ladders = jax.jit(jax.vmap(of_steps, (None, 0, None, None)) if offset else of_steps)
    for name, values in distributions().items():
        if signed:
            values = values * np.random.default_rng(1).choice([-1, 1], SAMPLES)
        psums, tiling, steps = one_column(values, layer_spec)
        step, zero = search(psums, steps)
        got = error(psums, step, zero, tiling, layer_spec)
        low, high = values.min(), values.max()
        smallest = 1.0 if bits > 1 else 0.5
        candidates = np.geomspace(smallest, max(2.0, 1.2 * max(abs(low), high)), 400, dtype=np.float32)
        zeros = np.linspace(low - 0.3 * (high - low), high + 0.3 * (high - low), 121, dtype=np.float32)
        # Every value once, times how often it occurs.
        unique, counts = np.unique(values, return_counts=True)
        # Of few lengths, each compiled once.
        length = -len(unique) % 64
        each = jnp.pad(jnp.asarray(unique, jnp.float32), (0, length)).reshape(1, -1, 1, 1, 1)
        often = np.pad(counts, (0, length)).reshape(each.shape)
        best = float(jnp.min(of_ladders(candidates, zeros if offset else None, each, often)))
        assert got <= 1.1 * best + 1e-3, f"{name}: {got} against {best}"
        assert step >= (1 if bits > 1 else 0)


def test_with_an_offset_every_code_is_used_on_one_sided_psums() -> None:
    layer_spec = spec(adc={"bits": 3, "offset": True}, weight={"bits": 3, "cell_bits": 8, "encoding": "offset"})
    for name in ("far from zero", "one-sided", "binomial", "uniform"):
        psums, tiling, steps = one_column(distributions()[name], layer_spec)
        step, zero = calibration.psum_steps(psums, steps, tiling, layer_spec)
        codes = np.unique(
            np.rint((adc.convert(psums, StepSizes(psum=step, offset=zero), tiling, layer_spec) - zero) / step)
        )
        assert codes.tolist() == list(range(8)), name


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.full if place % 3 else (), id=case.name)
        for place, case in enumerate(case for case in CASES if case.name.startswith("window"))
    ],
)
def test_the_positions_looked_at_have_the_partial_sums_that_all_have(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are computed alone, from what the kernel meets there."""
    monkeypatch.setattr(calibration, "SAMPLES", 7)
    x, kernel, steps = draw(case)
    tiling = tile(case.kernel_shape, case.spec)
    window = window_lib.resolve(case.x_shape[1:3], case.kernel_shape[:2], **case.window)
    inputs = lsq.quantize_activation(x, steps.activation, case.spec.activation)
    every = partial_sums(inputs.codes, jnp.asarray(kernel), steps, tiling, window, case.spec)
    sampled, window = calibration._sampled_inputs(inputs, tiling, window)
    assert sampled.codes.shape[0] == 7 < every.columns.shape[1]
    some = partial_sums(sampled.codes, jnp.asarray(kernel), steps, tiling, window, case.spec)
    np.testing.assert_array_equal(some.columns, calibration._sampled(every.columns))
    if every.reference is not None:
        np.testing.assert_array_equal(some.reference, calibration._sampled(every.reference))


@pytest.mark.parametrize(
    "granularity,offset",
    [
        pytest.param(granularity, offset, marks=pytest.mark.full if offset == (granularity == "array") else ())
        for granularity, offset in itertools.product(("layer", "array", "column"), (False, True))
    ],
)
def test_every_group_is_fitted_on_its_own_psums_by_weight(granularity: str, offset: bool) -> None:
    """Each group's ladder is the best for what it shares: no other common step does better."""
    layer_spec = spec(weight=ENCODINGS["twos-wide-top"], adc={"granularity": granularity, "offset": offset})
    case = Case("", layer_spec, x_shape=(4, 6, 5, 7), kernel_shape=(3, 3, 7, 5))
    x, kernel, steps = draw(case)
    tiling = tile(case.kernel_shape, layer_spec)
    window = window_lib.resolve((6, 5), (3, 3), padding="SAME")
    inputs = lsq.quantize_activation(x, steps.activation, layer_spec.activation)
    psums = partial_sums(inputs.codes, jnp.asarray(kernel), steps, tiling, window, layer_spec).columns
    step, zero = calibration.psum_steps(psums, steps, tiling, layer_spec)
    chex.assert_shape(step, steps_lib.shapes(tiling, layer_spec).psum)
    significance = np.array([p.significance for p in layer_spec.weight.planes], np.float32)[:, None]
    weight = jnp.square(significance * steps_lib.expand_weight(jnp.asarray(steps.weight), tiling))

    def errors(step: jax.Array, zero: jax.Array | None) -> jax.Array:
        rounded = adc.convert(psums, StepSizes(psum=step, offset=zero), tiling, layer_spec)
        each = jnp.sum(weight * jnp.square(rounded - psums), axis=(0, 1))
        return steps_lib.sum_over_groups(each, step.shape, tiling)

    best = errors(step, zero)
    for scale in (0.7, 0.85, 1.15, 1.4):
        assert (errors(jnp.maximum(1.0, step * scale), zero) >= 0.95 * best - 1e-3).all()
    if zero is not None:
        for shift in (-0.5, 0.5):
            assert (errors(step, zero + shift * step) >= 0.95 * best - 1e-3).all()


def test_a_silent_group_gets_one_and_zero() -> None:
    for adc_options in ({"offset": True}, {"bits": 1, "offset": True}, {}, {"bits": 1}):
        layer_spec = spec(adc=adc_options, weight={"bits": 3, "cell_bits": 8, "encoding": "offset"})
        psums, tiling, steps = one_column(np.zeros(64), layer_spec)
        step, zero = calibration.psum_steps(psums, steps, tiling, layer_spec)
        assert step.item() == 1
        assert zero is None or zero.item() == 0
    assert calibration.activation_step(jnp.zeros((2, 3)), layer_spec.activation) == 1
    zero_kernel = calibration.weight_step(jnp.zeros((4, 1)), tiling, layer_spec)
    np.testing.assert_array_equal(zero_kernel, 1)


@pytest.mark.parametrize("bits", [1, 1.5, 3])
@pytest.mark.parametrize("code_range", ["auto", "signed"])
@pytest.mark.parametrize("value", [1.0, 100.0, 2.0**20])
def test_a_group_of_one_value_gets_a_ladder_that_can_be_stored(bits: float, code_range: str, value: float) -> None:
    """As every column is when a dense layer is initialised on one example."""
    adc_options = {"bits": bits, "offset": True, "range": code_range}
    layer_spec = spec(adc=adc_options, weight={"bits": 3, "cell_bits": 8, "encoding": "offset"})
    psums, tiling, steps = one_column(np.full(1, value), layer_spec)
    step, zero = calibration.psum_steps(psums, steps, tiling, layer_spec)
    units = steps_lib.offset_units(tiling, layer_spec)
    log_step, zeta = steps_lib.stored_adc_steps(
        step, zero, units.offset, steps_lib.middle_codes(layer_spec), layer_spec
    )
    stored = StepSizes(activation=jnp.zeros(()), weight=jnp.zeros((1, 1)), psum=log_step, offset=zeta)
    real = steps_lib.real_steps(stored, steps_lib.gradient_factors(tiling, layer_spec, 4, 1), units, layer_spec)
    assert error(psums, real.psum, real.offset, tiling, layer_spec) <= 1e-9 * value**2


def test_power_of_two_and_fixed_steps_are_kept_to_while_searching() -> None:
    values = distributions()["far from zero"]
    for options, allowed in (
        ({"step": "power_of_two", "offset": True}, lambda s: np.log2(s) == np.rint(np.log2(s))),
        ({"step": "fixed", "full_scale": 700.0, "offset": True}, lambda s: s == 100),
    ):
        layer_spec = spec(adc=options, weight={"bits": 3, "cell_bits": 8, "encoding": "offset"})
        psums, tiling, steps = one_column(values, layer_spec)
        step, zero = calibration.psum_steps(psums, steps, tiling, layer_spec)
        assert allowed(step.item())
        assert error(psums, step, zero, tiling, layer_spec) <= error(psums, step, zero + 7, tiling, layer_spec)


def test_weight_steps_are_the_mean_magnitude_of_the_weights_that_a_group_has() -> None:
    for case in CASES:
        if not case.name.startswith(("tiling", "pair")):
            continue
        kernel = np.asarray(draw(case)[1])
        tiling = tile(case.kernel_shape, case.spec)
        got = calibration.weight_step(jnp.asarray(kernel), tiling, case.spec)
        q = case.spec.weight.code_range.magnitude
        # The flattened kernel, channel slowest, cut where the read groups' arrays end.
        rows = kernel.transpose(2, 0, 1, 3).reshape(-1, kernel.shape[-1])
        bounds = np.concatenate([[0], np.cumsum(tiling.rows_of_array)])
        for index in np.ndindex(got.shape):
            a, column = index
            part = rows if got.shape[0] == 1 else rows[bounds[a] : bounds[a + 1]]
            if case.spec.weight.granularity == "array":
                part = part[:, tiling.column_tile_of_output == column]
            elif case.spec.weight.granularity == "column":
                part = part[:, column : column + 1]
            np.testing.assert_allclose(got[index], 2 * np.abs(part).mean() / np.sqrt(q), rtol=1e-5)
    binary = spec(weight={"bits": 1, "encoding": "offset", "granularity": "layer"})
    step = calibration.weight_step(jnp.asarray(kernel), tile(kernel.shape, binary), binary)
    np.testing.assert_allclose(step, np.abs(kernel).mean(), rtol=1e-5)


def test_gradient_factors_count_what_shares_a_step() -> None:
    layer_spec = spec(
        weight=ENCODINGS["offset-adc"] | {"granularity": "array", "gradient_factor": 1.0},
        adc={"granularity": "array", "bits": 4, "offset": True, "gradient_factor": 3.0},
        activation={"bits": 4, "slice_bits": 2, "gradient_factor": 2.0},
        array={"columns": 10},
    )
    tiling = tile((3, 3, 7, 5), layer_spec)
    # Three channels, then three, then one; three outputs an array (one column is the dummy), then two; 3 planes.
    assert tiling.rows_of_array.tolist() == [27, 27, 9] and tiling.outputs_per_array == 3
    factors = steps_lib.gradient_factors(tiling, layer_spec, input_size=140, output_size=20)
    np.testing.assert_allclose(factors.activation, 2 / np.sqrt(140 * 15), rtol=1e-6)
    weights = np.array([[81, 54], [81, 54], [27, 18]])
    np.testing.assert_allclose(factors.weight, 1 / np.sqrt(weights * 4), rtol=1e-6)
    columns = np.array([[[9, 6]]]) * 2 * 20
    np.testing.assert_allclose(factors.psum, 3 / np.sqrt(columns * 15), rtol=1e-6)
    np.testing.assert_allclose(factors.reference, 3 / np.sqrt(2 * 20 * 15), rtol=1e-6)
    np.testing.assert_allclose(factors.offset, factors.psum)


def test_a_ladder_widens_around_its_middle_and_moves_in_fixed_units() -> None:
    """What is stored gives the real step and offset back, and a step that moves leaves the middle where it is."""
    for weight, options, code in (
        ("twos", {}, 3.5),
        ("offset-adc", {"granularity": "array"}, 3.5),
        ("twos-wide-top", {"granularity": "layer"}, 3.5),
        ("offset-adc", {"plane_bits": (2, 1, 4)}, np.array([[1.5], [0.5], [7.5]])),
    ):
        layer_spec = spec(weight=ENCODINGS[weight], adc=options | {"offset": True})
        case = Case("", layer_spec)
        tiling, (_, _, steps) = tile(case.kernel_shape, layer_spec), draw(case)
        units = steps_lib.offset_units(tiling, layer_spec)
        factors = steps_lib.gradient_factors(tiling, layer_spec, 140, 20)
        middle = steps_lib.middle_codes(layer_spec)
        psum, zeta = steps_lib.stored_adc_steps(
            jnp.asarray(steps.psum), jnp.asarray(steps.offset), units.offset, middle, layer_spec
        )
        stored = StepSizes(activation=jnp.zeros(()), weight=jnp.log(steps.weight), psum=psum, offset=zeta)
        if steps.reference is not None:
            pair = (jnp.asarray(steps.reference), jnp.asarray(steps.reference_offset))
            reference, offset = steps_lib.stored_adc_steps(
                *pair, units.reference_offset, steps_lib.middle_of_reference(layer_spec), layer_spec
            )
            stored = stored._replace(reference=reference, reference_offset=offset)
        real = steps_lib.real_steps(stored, factors, units, layer_spec)
        for name in ("psum", "offset", "reference", "reference_offset"):
            if getattr(steps, name) is not None:
                chex.assert_trees_all_close(getattr(real, name), getattr(steps, name), rtol=1e-5, atol=1e-5)
        wider = steps_lib.real_steps(stored._replace(psum=psum + 0.7), factors, units, layer_spec)
        middle = [r.offset + code * r.psum for r in (real, wider)]
        chex.assert_trees_all_close(*middle, rtol=1e-5, atol=1e-4)
        chex.assert_trees_all_close(wider.psum, real.psum * np.exp(0.7), rtol=1e-5)


def test_gradients_of_a_ladder_beyond_its_ends_are_the_derivatives_of_its_values() -> None:
    """Far beyond both ends of a ladder the gradients of stored step and offset are those of `s p + z`."""
    layer_spec = spec(adc={"bits": 2, "offset": True, "gradient_factor": 1.0})
    tiling = tile((3, 3, 7, 5), layer_spec)
    factors, units = steps_lib.gradient_factors(tiling, layer_spec, 1, 1), steps_lib.offset_units(tiling, layer_spec)
    shape = steps_lib.shapes(tiling, layer_spec).psum
    # On code 3, above it, and below code 0; psums on codes do not move when the ladder moves a little.
    for distance, code in ((10.0, 3), (-10.0, 0)):

        def converted(log_step: jax.Array, zeta: jax.Array, distance: float = distance) -> jax.Array:
            stored = StepSizes(activation=jnp.zeros(()), weight=jnp.zeros((3, 5)), psum=log_step, offset=zeta)
            real = steps_lib.real_steps(stored, factors, units, layer_spec)
            psums = jax.lax.stop_gradient(real.offset + distance * real.psum)[None, None]
            return jnp.sum(adc.convert(psums, real, tiling, layer_spec))

        log_step, zeta = jnp.full(shape, 0.4), jnp.full(shape, -0.3)
        to_step, to_zeta = jax.grad(converted, argnums=(0, 1))(log_step, zeta)
        factor = np.broadcast_to(factors.psum, shape)
        np.testing.assert_allclose(to_step, np.exp(0.4) * (code - 1.5) * factor, rtol=1e-5)
        np.testing.assert_allclose(to_zeta, np.broadcast_to(units.offset, shape) * factor, rtol=1e-5)


@pytest.mark.parametrize("granularity", ["layer", "array", "column"])
def test_least_squares_steps_are_near_the_best_and_better_than_lsqs(
    granularity: str,
) -> None:
    case = Case("", spec(weight=ENCODINGS["twos-wide-top"] | {"granularity": granularity, "start": "least_squares"}))
    x, kernel, _ = draw(case)
    tiling = tile(case.kernel_shape, case.spec)
    codes = case.spec.weight.code_range
    rows = jnp.asarray(kernel)

    def error(step: jax.Array) -> jax.Array:
        tiled = tile_kernel(rows, tiling)
        per_group = steps_lib.expand_weight(step, tiling)[:, 0][:, None]
        return steps_of_group(jnp.square(lsq.fake_quantize(tiled, per_group, codes) - tiled))

    def steps_of_group(values: jax.Array) -> jax.Array:
        """Errors by group: rows of an array and outputs that share the step."""
        by_row = jnp.sum(values, axis=(0, 1, 3))
        if granularity == "column":
            return by_row
        by_tile = jax.ops.segment_sum(by_row.T, tiling.column_tile_of_output, tiling.column_tiles).T
        return by_tile if granularity == "array" else jnp.sum(by_tile, keepdims=True)

    step = calibration.weight_step(rows, tiling, case.spec)
    best = jnp.min(jnp.stack([error(step * scale) for scale in np.geomspace(0.3, 3, 200)]), axis=0)
    assert (error(step) <= 1.1 * best + 1e-6).all()
    plain = spec(weight=ENCODINGS["twos-wide-top"] | {"granularity": granularity})
    assert (error(step) <= error(calibration.weight_step(rows, tiling, plain)) + 1e-6).all()
    activation = case.spec.activation
    wrong = [
        float(jnp.sum(jnp.square(lsq.fake_quantize(x, s, activation.code_range) - x)))
        for s in (
            calibration.activation_step(jnp.asarray(x), activation),
            calibration.activation_step(jnp.asarray(x), dataclasses.replace(activation, start="least_squares")),
        )
    ]
    assert wrong[1] <= wrong[0]
    zero = calibration.weight_step(jnp.zeros_like(rows), tiling, case.spec)
    np.testing.assert_array_equal(zero, 1)


@pytest.mark.parametrize("signed", [False, True])
def test_the_magnitude_start_of_one_bit_is_the_mean_magnitude(signed: bool) -> None:
    """Levels of {-1, +1} lie at the codes, those of {0, 1} at 0 and one step."""
    values = distributions()["exponential"]
    layer_spec = spec(
        adc={"bits": 1, "start": "magnitude", "range": "signed" if signed else "auto"},
        weight={"bits": 4, "cell_bits": 4, "encoding": "differential", "subtract": "analog"}
        if signed
        else {"bits": 3, "cell_bits": 8, "encoding": "offset"},
    )
    psums, tiling, steps = one_column(values, layer_spec)
    step, _ = calibration.psum_steps(psums, steps, tiling, layer_spec)
    want = np.abs(values).mean() * (1 if signed else 2)
    np.testing.assert_allclose(np.asarray(step).ravel()[0], want, rtol=1e-5)


@pytest.mark.parametrize("offset", [False, True])
def test_simpler_starts_of_ladders_are_what_they_say(offset: bool) -> None:
    values = distributions()["exponential"]
    for start_rule in ("magnitude", "range"):
        layer_spec = spec(
            adc={"bits": 3, "offset": offset, "start": start_rule},
            weight={"bits": 3, "cell_bits": 8, "encoding": "offset"},
        )
        psums, tiling, steps = one_column(values, layer_spec)
        step, zero = calibration.psum_steps(psums, steps, tiling, layer_spec)
        assert (zero is None) == (not offset)
        if start_rule == "magnitude":
            np.testing.assert_allclose(step.item(), 2 * np.abs(values).mean() / np.sqrt(7), rtol=1e-5)
            assert zero is None or zero.item() == 0
        else:
            low = values.min() if offset else 0
            np.testing.assert_allclose(step.item(), (values.max() - low) / 7, rtol=1e-5)
            assert zero is None or zero.item() == pytest.approx(low)


@pytest.mark.parametrize("granularity", ["layer", "array", "column"])
def test_ranges_and_percentiles_of_weights_are_those_of_each_group(granularity: str) -> None:
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 9, 5))
    for start, part in (("range", 1.0), ("percentile", PERCENTILE)):
        spec = CIMSpec(weight=WeightSpec(granularity=granularity, start=start), array=ArraySpec(rows=36, columns=6))
        tiling = tile(kernel.shape, spec)
        got = np.asarray(calibration.weight_step(kernel, tiling, spec))
        reach = np.maximum(kernel / spec.weight.code_range.q_max, kernel / spec.weight.code_range.q_min)
        # Groups as a mask each: what a change of the weight moves of the step of its group.
        for index in np.ndindex(*got.shape):
            inside = np.asarray(members(tiling, spec, index, kernel.shape))
            values = np.sort(reach[inside])
            assert got[index] == pytest.approx(values[int(np.ceil(part * len(values))) - 1], rel=1e-5)


def members(tiling: Any, spec: CIMSpec, index: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Which weights share the step at an index, by the gradient of their codes to it."""
    ones = jnp.ones(shape)

    def total(kernel: Any) -> Any:
        step = jnp.zeros(steps_lib.shapes(tiling, spec).weight).at[index].set(1.0)
        expanded = jnp.moveaxis(steps_lib.expand_weight(step, tiling), 1, 0)[0]
        return jnp.sum(tile_kernel(kernel, tiling) * expanded[:, None])

    return np.asarray(jax.grad(total)(ones)) != 0


def test_the_percentile_of_a_ladder_leaves_out_the_outermost_psums() -> None:
    spec = CIMSpec(
        activation=ActivationSpec(bits=3),
        weight=WeightSpec(bits=2, cell_bits=1),
        adc=ADCSpec(bits=4, offset=True, start="percentile"),
        array=ArraySpec(rows=64),
    )
    tiling = tile((1, 1, 8, 2), spec)
    psums = jax.random.randint(jax.random.key(1), (1, 1000, 1, 2, 2), 0, 200).astype(jnp.float32)
    psums = psums.at[0, 0].set(10_000.0)
    steps = StepSizes(*(s if s is None else jnp.ones(s) for s in steps_lib.shapes(tiling, spec)))
    step, offset = calibration.psum_steps(psums, steps, tiling, spec)
    values = np.sort(np.moveaxis(np.asarray(psums[0, :, 0]), 0, -1), axis=-1)
    place = int(np.ceil(PERCENTILE * 1000)) - 1
    high, low = values[..., place], -np.sort(-values)[..., place]
    assert values.max() == 10_000 and high.max() < 200
    np.testing.assert_allclose(np.asarray(step)[0], (high - low) / 15, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(offset)[0], low, atol=1e-2)
    wide = dataclasses.replace(spec, adc=dataclasses.replace(spec.adc, start="range"))
    assert float(calibration.psum_steps(psums, steps, tiling, wide)[0].min()) > 600


def test_ranges_and_percentiles_of_activations() -> None:
    x = jnp.concatenate([jnp.linspace(-1, 2, 30_001), jnp.asarray([50.0])])
    for bits, signed, q_max in ((4, False, 15), (4, True, 7)):
        for start, reach in (("range", 50.0), ("percentile", None)):
            step = float(calibration.activation_step(x, ActivationSpec(bits=bits, signed=signed, start=start)))
            assert step == pytest.approx((reach or 2.0) / q_max, rel=5e-3)
