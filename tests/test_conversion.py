"""The ADC's gradients where they are small differences of large terms, and layers at the edges of their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ENCODINGS, Case, draw, spec

from cimjax.core import conv, conversion
from cimjax.core import lowering as lowering_lib
from cimjax.core.conversion import Conversion, Scales
from cimjax.core.lowering import LOWERINGS
from cimjax.spec import Lowering
from cimjax.spec.codes import code_range


@pytest.mark.parametrize("bits", [3, 8, 12])
def test_the_gradient_to_a_step_is_small_and_right_where_nothing_is_clipped(bits: int) -> None:
    """To a tolerance of itself, not of the codes that it is a difference of; that to an offset is exactly 0."""
    rng, features = np.random.default_rng(0), 4
    codes = code_range(bits, signed=False)
    step, offset = rng.uniform(1.5, 2.5, features).astype(np.float32), np.full(features, 3.25, np.float32)
    psums = np.rint(offset + step * rng.uniform(0.5, codes.q_max - 0.5, (32, 8, 8, features))).astype(np.float32)
    gradient = (1 + rng.normal(size=psums.shape)).astype(np.float32)
    weight = rng.uniform(0.1, 1, features).astype(np.float32)
    adc = Conversion((codes,), features, 0.0)
    scales = Scales(*(jnp.asarray(values) for values in (step, offset, weight)))
    small = conversion.as_small_integers(jnp.asarray(psums))
    to_psums, to = jax.jit(lambda *args: conversion.gradients(adc, *args))(small, scales, gradient, scales.weight)

    u = (psums - offset) * (np.float32(1) / step)
    rounded = np.floor(u + np.float32(0.5)).astype(np.float64)
    difference = rounded - u.astype(np.float64)
    want = np.sum(weight * gradient.astype(np.float64) * difference, axis=(0, 1, 2))
    np.testing.assert_allclose(to.step, want, atol=1e-5 * np.max(np.abs(want)) * 2**bits / 8)
    np.testing.assert_array_equal(to.offset, 0)
    np.testing.assert_array_equal(to_psums, weight * gradient)
    read = step.astype(np.float64) * rounded + offset
    np.testing.assert_allclose(to.weight, np.sum(gradient * read, axis=(0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("lowering", [*LOWERINGS], ids=str)
@pytest.mark.parametrize(
    "x_shape,padding", [((0, 6, 5, 7), "SAME"), ((2, 2, 2, 7), "VALID")], ids=["batch", "positions"]
)
def test_layers_without_images_or_outputs_have_gradients_of_zero(
    lowering: Lowering, x_shape: tuple[int, ...], padding: str
) -> None:
    layer = spec(activation={"bits": 4, "slice_bits": 2}, weight=ENCODINGS["offset"])
    layer = dataclasses.replace(layer, lowering=lowering)
    kernel, steps = draw(Case("", layer, x_shape=(2, 6, 5, 7)))[1:]

    def loss(kernel: Any, steps: Any) -> Any:
        return jnp.sum(conv.cim_conv(jnp.ones(x_shape), kernel, steps, layer, padding=padding))

    for gradient in jax.tree.leaves(jax.grad(loss, (0, 1))(kernel, steps)):
        assert not np.any(gradient)


def test_a_matrix_product_of_no_rows_keeps_its_outputs() -> None:
    layer = spec()
    kernel, steps = draw(Case("", layer, x_shape=(2, 1, 1, 7), kernel_shape=(1, 1, 7, 5)))[1:]
    assert conv.cim_dense(jnp.ones((3, 0, 7)), kernel[0, 0], steps, layer).shape == (3, 0, 5)


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All layers of several tiles take turns."""
    conv._through_arrays.clear_cache()
    monkeypatch.setattr(lowering_lib, "MANY_TILES", 2)
    monkeypatch.setattr(lowering_lib, "LARGE", 0)
    yield
    conv._through_arrays.clear_cache()


@pytest.mark.usefixtures("in_turn")
def test_a_broken_image_does_not_reach_its_neighbours_through_turns() -> None:
    layer = dataclasses.replace(spec(array={"rows": 18, "columns": 64}), lowering=Lowering.CONV_PER_TILE)
    case = Case("", layer, x_shape=(2, 6, 5, 7))
    x, kernel, steps = draw(case)
    broken = np.asarray(x).copy()
    broken[0, 0, 0, 0] = np.nan
    y = np.asarray(conv.cim_conv(broken, kernel, steps, case.spec, **case.window))
    assert np.isnan(y[0]).any() and not np.isnan(y[1]).any()
    np.testing.assert_array_equal(y[1], np.asarray(conv.cim_conv(x, kernel, steps, case.spec, **case.window))[1])
