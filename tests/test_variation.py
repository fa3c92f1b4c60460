"""Variation: its statistics, what shares a factor, and what stays untouched."""

from __future__ import annotations

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ENCODINGS, TILINGS, Case, draw, spec

import cimjax
from cimjax.core import cells, conv, variation
from cimjax.core.tiling import tile
from cimjax.spec import VariationSpec

KEY = jax.random.key(7)


def stored(case: Case, on: str, sigma: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Digits without and with variation."""
    _, kernel, steps = draw(case)
    tiling = tile(case.kernel_shape, case.spec)
    codes = cells.quantize_weight(jnp.asarray(kernel), steps.weight, tiling, case.spec)
    varied_spec = dataclasses.replace(case.spec, variation=VariationSpec(sigma=sigma, on=on))
    ideal, varied = cells.store(codes, tiling, case.spec), cells.store(codes, tiling, varied_spec, KEY)
    return np.asarray(ideal.digits), np.asarray(varied.digits)


BIG = Case("", spec(array={"rows": 64, "columns": 64}), kernel_shape=(3, 3, 40, 60))


@pytest.mark.parametrize("on", ["weights", "cells"])
def test_factors_are_log_normal_with_median_one(on: str) -> None:
    ideal, varied = stored(BIG, on)
    theta = np.log(varied[ideal != 0] / ideal[ideal != 0])
    n = theta.size
    assert n > 20_000
    assert abs(np.median(theta)) < 4 * 1.2533 * 0.3 / np.sqrt(n)
    assert abs(theta.std() / 0.3 - 1) < 4 / np.sqrt(2 * n)


@pytest.mark.parametrize("weight", ["twos", "diff-digital", "diff-analog", "offset"])
@pytest.mark.parametrize("on", ["weights", "cells"])
def test_zero_digits_stay_zero_and_weights_share_their_factor(weight: str, on: str) -> None:
    ideal, varied = stored(Case("", spec(weight=ENCODINGS[weight], array={"columns": 16})), on)
    assert ((varied == 0) == (ideal == 0)).all()
    stores = ideal != 0
    ratio = varied / np.where(stores, ideal, 1)
    spread = np.where(stores, ratio, -np.inf).max(axis=0) - np.where(stores, ratio, np.inf).min(axis=0)
    several = stores.sum(axis=0) > 1
    # A differential weight of two cells uses one sign's planes only, so some encodings have few such weights.
    assert several.sum() > 10
    assert (spread[several] < 1e-5).all() == (on == "weights")


def test_a_weights_factor_does_not_depend_on_the_tiling() -> None:
    """With an ideal ADC, the same chip gives the same output however its kernels are cut."""
    outputs = []
    for array in TILINGS.values():
        layer_spec = dataclasses.replace(spec(array=array, adc=False), variation=VariationSpec(sigma=0.2))
        case = Case(
            "", dataclasses.replace(layer_spec, weight=dataclasses.replace(layer_spec.weight, granularity="layer"))
        )
        x, kernel, steps = draw(case)
        outputs.append(conv.cim_conv(x, kernel, steps, case.spec, variation_key=KEY))
    for other in outputs[1:]:
        chex.assert_trees_all_close(other, outputs[0], rtol=1e-4, atol=1e-4)


def test_no_variation_is_the_integer_path_and_keys_give_chips() -> None:
    case = Case("", spec(weight=ENCODINGS["offset-adc"]))
    x, kernel, steps = draw(case)

    def run(sigma: float, seed: int, on: str = "cells") -> jax.Array:
        varied = dataclasses.replace(case.spec, variation=VariationSpec(sigma=sigma, on=on))
        return conv.cim_conv(x, kernel, steps, varied, variation_key=jax.random.key(seed))

    chex.assert_trees_all_close(run(0.0, 0), conv.cim_conv(x, kernel, steps, case.spec), rtol=1e-6)
    chex.assert_trees_all_equal(run(0.2, 1), run(0.2, 1))
    assert float(jnp.abs(run(0.2, 1) - run(0.2, 2)).max()) > 0
    assert float(jnp.abs(run(0.2, 1, "weights") - run(0.2, 1)).max()) > 0


def test_dummy_columns_vary_as_cells_only() -> None:
    digits = jnp.ones((3, 3, 4, 2))
    weights, cells = (VariationSpec(sigma=0.2, on=on) for on in ("weights", "cells"))
    chex.assert_trees_all_equal(variation.vary_reference(digits, KEY, weights), digits)
    assert float(jnp.std(jnp.log(variation.vary_reference(digits, KEY, cells)))) == pytest.approx(0.2, rel=0.4)


def test_a_layer_that_is_called_twice_is_one_chip() -> None:
    class Twice(nn.Module):
        def setup(self) -> None:
            varied = cimjax.CIMSpec(variation=cimjax.VariationSpec(sigma=0.5))
            self.one, self.other = (cimjax.CIMDense(4, spec=varied) for _ in range(2))

        def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
            return self.one(x), self.other(x), self.one(x)

    x = jax.random.uniform(jax.random.key(0), (3, 6))
    variables = Twice().init({"params": jax.random.key(1), "variation": jax.random.key(2)}, x)
    params = {"params": {name: variables["params"]["one"] for name in ("one", "other")}}
    first, other, again = Twice().apply(params, x, rngs={"variation": jax.random.key(3)})
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)  # two layers have cells of their own
