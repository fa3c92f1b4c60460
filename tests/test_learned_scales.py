"""Weights as sums of learned steps: the nearest sum, LSQ's gradient, and where steps start."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from cimjax.core import lsq
from cimjax.core.calibration.steps import weight_step
from cimjax.core.cells import quantize_weight, store
from cimjax.core.learned_scales import nearest_digits, sums_of
from cimjax.core.step_sizes import shapes
from cimjax.core.tiling import tile
from cimjax.hardware.cost import layer_cost
from cimjax.spec import ArraySpec, CIMSpec, WeightSpec
from cimjax.spec.codes import CodeRange
from cimjax.training.config.options import parse_options, spec_from_options
from cimjax.training.config.refusals import OptionError

STEPS = st.lists(st.floats(2**-10, 2**10, width=32), min_size=3, max_size=3)


def scales(bits: int = 3, **options: str) -> CIMSpec:
    weight = WeightSpec(bits=bits, cell_bits=1, encoding="learned_scales", step_per_plane=True, **options)
    return CIMSpec(weight=weight, array=ArraySpec(rows=18, columns=16))


@pytest.mark.parametrize("planes", range(1, 6))
def test_every_combination_of_digits_is_there_once_and_fewer_digits_come_first(planes: int) -> None:
    table = sums_of(planes)
    assert {*map(tuple, table.tolist())} == {*itertools.product((-1, 0, 1), repeat=planes)}
    assert len(table) == 3**planes
    assert (np.diff(np.count_nonzero(table, axis=1)) >= 0).all()


@settings(deadline=None, max_examples=100)
@given(steps=STEPS, seed=st.integers(0, 99))
def test_no_other_sum_is_nearer(steps: list[float], seed: int) -> None:
    s = np.asarray(steps, np.float32)
    x = np.random.default_rng(seed).normal(0, s.sum(), 40).astype(np.float32)
    digits = np.asarray(nearest_digits(jnp.asarray(x), jnp.asarray(s)[:, None]))
    assert {*np.unique(digits)} <= {-1, 0, 1}
    sums = np.array([np.dot(d, s.astype(np.float64)) for d in itertools.product((-1, 0, 1), repeat=len(s))])
    least = np.abs(x[:, None] - sums).min(axis=1)
    mine = np.abs(x - s.astype(np.float64) @ digits)
    assert (mine <= least + 1e-6 * s.sum()).all()


@given(step=st.floats(2**-10, 2**10, width=32), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_one_plane_is_the_ternary_quantizer_with_its_gradients(step: float, seed: int) -> None:
    x = jnp.asarray(np.random.default_rng(seed).normal(0, step, 30), jnp.float32)
    cotangent = jnp.asarray(np.random.default_rng(seed + 1).normal(size=30), jnp.float32)
    one, pull = jax.vjp(lambda x, s: nearest_digits(x, s[None, None])[0], x, jnp.float32(step))
    other, pull_other = jax.vjp(lambda x, s: lsq.quantize(x, s, CodeRange(-1, 1, 3)), x, jnp.float32(step))
    np.testing.assert_array_equal(one, other)
    for mine, theirs in zip(pull(cotangent), pull_other(cotangent), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=1e-4 / step)


def test_a_weight_passes_its_gradient_and_a_step_gets_its_part_of_the_residual() -> None:
    steps = jnp.array([[0.11], [0.26], [0.55]])
    x = jnp.array([0.3, -0.77, 0.0, 0.9, -2.0, 5.0])

    def value(x: jax.Array, steps: jax.Array) -> jax.Array:
        return jnp.sum(nearest_digits(x, steps) * steps, axis=0)

    reached, pull = jax.vjp(value, x, steps)
    inside = np.abs(x) <= float(steps.sum())
    for i in range(len(x)):
        to_x, to_steps = pull(jnp.eye(len(x))[i])
        assert to_x[i] == pytest.approx(float(inside[i]))
        part = (reached[i] - x[i]) / (3 * steps[:, 0]) if inside[i] else jnp.sign(x[i]) * jnp.ones(3)
        np.testing.assert_allclose(to_steps[:, 0], part, rtol=1e-5, atol=1e-6)


def test_what_is_no_number_stays_none() -> None:
    digits = nearest_digits(jnp.array([jnp.nan, 1.0]), jnp.array([[1.0], [2.0]]))
    assert np.isnan(digits[:, 0]).all() and np.isfinite(digits[:, 1]).all()


@pytest.mark.parametrize("start", ["magnitude", "least_squares", "range", "percentile"])
def test_each_step_starts_at_twice_the_one_below_and_weights_are_kept_well(start: str) -> None:
    spec = scales(3, start=start)
    kernel = jax.random.normal(jax.random.key(0), (3, 3, 4, 5))
    tiling = tile(kernel.shape, spec)
    steps = weight_step(kernel, tiling, spec)
    assert steps.shape == shapes(tiling, spec).weight == (2, 3, 5)
    np.testing.assert_allclose(steps[:, 1:], 2 * steps[:, :-1], rtol=1e-6)
    arrays = store(quantize_weight(kernel, steps, tiling, spec), tiling, spec)
    kept = jnp.einsum("kijrco,rko->ijrco", arrays.digits, steps)
    original = kernel.reshape(3, 3, 2, 2, 5)
    assert float(jnp.sum((kept - original) ** 2) / jnp.sum(original**2)) < 0.04


def test_cost_counts_two_columns_and_one_conversion_a_plane() -> None:
    cost = layer_cost((3, 3, 4, 5), (1, 1), scales(3))
    assert cost.planes == 3 and cost.adc_conversions == 2 * 3 * 5
    assert cost.physical_columns == 2 * 2 * 3 * 5
    assert cost.dequantization_multiplications == 2 * 3 * 5


@pytest.mark.parametrize(
    "given,message",
    [
        ({"bits": 6}, r"`bits` is 6 with `encoding` learned_scales.*give 1 to 5"),
        ({"bits": 2.5}, r"`bits` is 2.5"),
        ({"bits": 1.5}, r"`bits` is 1.5 with `encoding` learned_scales; three codes need 'differential'"),
        ({"cell_bits": 2}, r"`cell_bits` is 2 with `encoding` learned_scales.*give 1\."),
        ({"step_per_plane": False}, r"`step_per_plane` is False with `encoding` learned_scales.*give True"),
        ({"plane_shares": "lowest"}, r"`plane_shares` is lowest with `encoding` learned_scales.*give 'equal'"),
        ({"granularity": "layer"}, r"`step_per_plane` is True with `granularity` layer"),
        ({"subtract": "analog"}, r"`subtract` is 'analog' with `encoding` learned_scales"),
    ],
)
def test_what_contradicts_it_is_refused(given: dict[str, object], message: str) -> None:
    options = {"bits": 3, "cell_bits": 1, "encoding": "learned_scales", "step_per_plane": True} | given
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        WeightSpec(**options)


def test_the_option_implies_what_it_needs() -> None:
    spec = spec_from_options(parse_options("encoding=learned_scales,weight_bits=3"))
    assert spec is not None and spec["weight"]["cell_bits"] == 1 and spec["weight"]["step_per_plane"] is True
    with pytest.raises(OptionError, match=r"`cell_bits` is 2 with `encoding` learned_scales"):
        spec_from_options(parse_options("encoding=learned_scales,weight_bits=3,cell_bits=2"))
    with pytest.raises(OptionError, match=r"`step_per_plane` is False"):
        spec_from_options(parse_options("encoding=learned_scales,step_per_plane=false"))
