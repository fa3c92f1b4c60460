"""Stored steps: what they stand for, and that each gets its gradient, times its factor, once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import ENCODINGS, GRANULARITIES, spec

from cimjax.core import step_sizes as steps_lib
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import tile
from cimjax.spec import CIMSpec

KERNEL = (3, 3, 7, 5)


def layer(granularity: str, kind: str, offset: bool = True) -> CIMSpec:
    """A layer that has every step that there is, but for those of planes."""
    return spec(
        activation={"step": kind},
        weight=ENCODINGS["offset-adc"] | {"granularity": granularity},
        adc={
            "granularity": granularity,
            "step": kind,
            "offset": offset,
            "digital_gain": kind != "power_of_two",
        },
    )


def random_like(shapes: StepSizes, seed: int) -> StepSizes:
    rng = np.random.default_rng(seed)
    return StepSizes(*(None if shape is None else np.asarray(rng.normal(size=shape), np.float32) for shape in shapes))


@pytest.mark.parametrize("kind", ["learned", "power_of_two", "calibrated"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_stored_step_gets_its_gradient_times_its_factor_once(granularity: str, kind: str) -> None:
    """Of a sum of all real steps, each times a number of its own."""
    layer_spec = layer(granularity, kind)
    tiling = tile(KERNEL, layer_spec)
    shapes = steps_lib.shapes(tiling, layer_spec)
    factors = steps_lib.gradient_factors(tiling, layer_spec, 140, 20)
    units = steps_lib.offset_units(tiling, layer_spec)
    stored, weights = random_like(shapes, 0), random_like(shapes, 1)

    def total(stored: StepSizes) -> Any:
        real = steps_lib.real_steps(stored, factors, units, layer_spec)
        return sum(jnp.sum(w * s) for w, s in zip(weights, real, strict=True) if s is not None), real

    gradients, real = jax.grad(total, has_aux=True)(stored)
    middle = steps_lib.middle_codes(layer_spec)
    assert middle == steps_lib.middle_of_reference(layer_spec)
    trained = kind != "calibrated"
    want = StepSizes(
        activation=trained * weights.activation * real.activation,
        weight=weights.weight * real.weight,
        # A ladder widens around its middle, which its offset moves.
        psum=trained * (weights.psum - weights.offset * middle) * real.psum,
        offset=trained * weights.offset * units.offset,
        reference=trained * (weights.reference - weights.reference_offset * middle) * real.reference,
        reference_offset=trained * weights.reference_offset * units.reference_offset,
        # What is digital learns, whatever the ADC is.
        gain=None if real.gain is None else weights.gain * real.gain,
    )
    for name, factor in factors._asdict().items():
        if name == "gain" and factor is None:
            continue
        np.testing.assert_allclose(
            getattr(gradients, name), factor * getattr(want, name), rtol=2e-5, atol=1e-7, err_msg=name
        )


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_steps_of_powers_of_two_are_such_however_they_are_stored(granularity: str) -> None:
    layer_spec = layer(granularity, "power_of_two", offset=False)
    tiling = tile(KERNEL, layer_spec)
    stored = random_like(steps_lib.shapes(tiling, layer_spec), 0)
    factors = steps_lib.gradient_factors(tiling, layer_spec, 140, 20)
    real = steps_lib.real_steps(stored, factors, steps_lib.offset_units(tiling, layer_spec), layer_spec)
    for name in ("activation", "psum", "reference"):
        exponent = getattr(stored, name) / np.log(2)
        np.testing.assert_array_equal(getattr(real, name), np.exp2(np.rint(exponent)), err_msg=name)
    np.testing.assert_allclose(real.weight, np.exp(stored.weight), rtol=1e-6)
