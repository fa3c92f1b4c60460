"""What must hold of the array layer whatever its numbers: exactness, equivalences, independence, no surprises."""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, ENCODINGS, GRANULARITIES, SLICES, TILINGS, Case, draw, spec
from jax import lax

from cimjax.core import adc, cells, conv, encoding, lsq
from cimjax.core import step_sizes as steps_lib
from cimjax.core import window as window_lib
from cimjax.core.array_mac import partial_sums
from cimjax.core.lsq import Codes
from cimjax.core.tiling import tile
from cimjax.spec import CIMSpec, VariationSpec

CASE_OF = {case.name: case for case in CASES}
SHARED_STEP = [name for name, weight in ENCODINGS.items() if not weight.get("step_per_plane")]


def integer_case(weight: str, tiling: str, activation: str, *, adc: bool = False) -> Case:
    wide = {"columns": 16} | TILINGS[tiling]
    return Case("", spec(weight=ENCODINGS[weight], array=wide, activation=SLICES[activation], adc=adc))


def resolve(case: Case) -> window_lib.Window:
    return window_lib.resolve(case.x_shape[1:3], case.kernel_shape[:2], **case.window)


def plain_conv(x: Any, kernel: Any, case: Case) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        case.strides,
        case.padding,
        rhs_dilation=case.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=lax.Precision.HIGHEST,
    )


def each_once(names: list[str], others: list[tuple[str, str]]) -> list[Any]:
    """All combinations; in the quick tier every name with one of the others, in turn."""
    return [
        pytest.param(name, *other, marks=() if place % len(others) == turn else pytest.mark.full)
        for place, name in enumerate(names)
        for turn, other in enumerate(others)
    ]


@pytest.mark.parametrize(
    "weight,tiling,activation",
    each_once(SHARED_STEP, [("packed", "sliced"), ("balanced-read", "signed-1"), ("im2col-read", "sliced-signed")]),
)
def test_psums_and_recombined_sums_equal_integer_convolutions(weight: str, tiling: str, activation: str) -> None:
    """Bit for bit, in integers: every column, and every tile's recombined sum."""
    case = integer_case(weight, tiling, activation)
    x, kernel, steps = draw(case)
    tiled = tile(case.kernel_shape, case.spec)
    inputs = lsq.quantize_activation(x, steps.activation, case.spec.activation)
    psums = partial_sums(inputs.codes, jnp.asarray(kernel), steps, tiled, resolve(case), case.spec)
    codes = np.asarray(cells.quantize_weight(jnp.asarray(kernel), steps.weight, tiled, case.spec))
    digits = np.asarray(encoding.encode(jnp.asarray(codes), case.spec.weight))
    slices = np.asarray(encoding.slice_codes(inputs.codes, case.spec.activation))
    pairs = [(t, r) for t in range(len(slices)) for r in range(tiled.groups)]
    recombined = np.zeros((psums.columns.shape[1], tiled.groups, tiled.features), np.int64)
    for t, r in pairs:
        channels = np.minimum(tiled.channels[r], case.x_shape[-1] - 1)
        driven = slices[t][..., channels].astype(np.int32)
        stored = tiled.stored[:, :, r, :, None]
        for k, plane in enumerate(case.spec.weight.planes):
            digits_of = np.where(stored, digits[k][:, :, r], 0).astype(np.int32)
            in_integers = plain_conv(driven, digits_of, case).reshape(-1, tiled.features)
            np.testing.assert_array_equal(psums.columns[t, ..., r, k, :], in_integers)
            factor = case.spec.activation.slices[t].significance * plane.significance
            recombined[..., r, :] += factor * np.asarray(psums.columns[t, ..., r, k, :], np.int64)
        if psums.reference is not None:
            constant = case.spec.activation.slices[t].significance * case.spec.weight.constant
            recombined[..., r, :] += constant * np.asarray(psums.reference[t, ..., r], np.int64)[..., None]
    for r in range(tiled.groups):
        channels = np.minimum(tiled.channels[r], case.x_shape[-1] - 1)
        q = np.where(tiled.stored[:, :, r, :, None], codes[:, :, r], 0).astype(np.int32)
        whole = plain_conv(np.asarray(inputs.codes)[..., channels].astype(np.int32), q, case)
        whole = whole.reshape(-1, tiled.features)
        np.testing.assert_array_equal(recombined[..., r, :], whole)


@pytest.mark.parametrize(
    "weight,tiling,activation", each_once(SHARED_STEP, [("im2col", "sliced"), ("packed-read", "signed-1.5")])
)
def test_an_ideal_adc_gives_the_quantized_convolution_and_its_gradients(
    weight: str, tiling: str, activation: str
) -> None:
    case = integer_case(weight, tiling, activation)
    case = dataclasses.replace(
        case,
        spec=CIMSpec.from_dict(case.spec.to_dict() | {"weight": case.spec.weight.to_dict() | {"granularity": "layer"}}),
    )
    x, kernel, steps = draw(case)
    weight_codes, activation_codes = case.spec.weight.code_range, case.spec.activation.code_range

    def quantized(x: Any, kernel: Any, steps: Any) -> jax.Array:
        a = lsq.fake_quantize(x, steps.activation, activation_codes)
        return plain_conv(a, lsq.fake_quantize(kernel, steps.weight[0, 0], weight_codes), case)

    def through_arrays(x: Any, kernel: Any, steps: Any) -> jax.Array:
        return conv.cim_conv(x, kernel, steps, case.spec, **case.window)

    want, pull_want = jax.vjp(quantized, x, kernel, steps)
    got, pull_got = jax.vjp(through_arrays, x, kernel, steps)
    cotangent = np.random.default_rng(3).normal(size=want.shape).astype(np.float32)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5 * float(jnp.abs(want).max()))
    for got_part, want_part, tolerance in zip(
        pull_got(cotangent), pull_want(cotangent), (1e-5, 1e-5, 1e-4), strict=True
    ):
        for g, w in zip(jax.tree.leaves(got_part), jax.tree.leaves(want_part), strict=True):
            scale = max(float(jnp.abs(w).max()), 1.0)
            chex.assert_trees_all_close(g, w, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("offset", [False, True])
def test_equal_column_steps_equal_the_layer_step(offset: bool) -> None:
    by_granularity = {}
    for granularity in GRANULARITIES:
        case = Case("", spec(weight={"granularity": granularity}, adc={"granularity": granularity, "offset": offset}))
        x, kernel, _ = draw(case)
        shapes = steps_lib.shapes(tile(case.kernel_shape, case.spec), case.spec)
        values = {"activation": 0.3, "weight": 0.4, "psum": 2.5, "offset": 1.25}
        steps = steps_lib.StepSizes(
            **{
                name: np.full(shape, values[name], np.float32)
                for name, shape in shapes._asdict().items()
                if shape is not None
            }
        )
        by_granularity[granularity] = conv.cim_conv(x, kernel, steps, case.spec)
    chex.assert_trees_all_equal(by_granularity["array"], by_granularity["layer"])
    chex.assert_trees_all_equal(by_granularity["column"], by_granularity["layer"])


@pytest.mark.parametrize(
    "name", ["pair-column-column-offset", "encoding-offset-adc", "slices-sliced-signed-twos-wide-top"]
)
def test_an_image_does_not_depend_on_its_batch(name: str) -> None:
    case = dataclasses.replace(CASE_OF[name], x_shape=(6, 5, 4, 4))
    x, kernel, steps = draw(case)
    tiled = tile(case.kernel_shape, case.spec)

    @jax.jit
    def run(x: Any) -> tuple[jax.Array, jax.Array]:
        inputs = lsq.quantize_activation(x, steps.activation, case.spec.activation)
        psums = partial_sums(inputs.codes, jnp.asarray(kernel), steps, tiled, resolve(case), case.spec)
        digitised = adc.convert(psums.columns, steps, tiled, case.spec)
        step = steps_lib.expand_outputs(jnp.asarray(steps.psum), tiled)
        zero = 0.0 if steps.offset is None else steps_lib.expand_outputs(jnp.asarray(steps.offset), tiled)
        codes = jnp.rint((digitised - zero) / step)
        return conv.cim_conv(x, kernel, steps, case.spec), codes.reshape(codes.shape[0], len(x), -1)

    together, codes = run(x)
    alone = [run(x[i : i + 1]) for i in range(6)]
    # Codes are the same whatever the batch; real outputs too, to the rounding of another program's sums.
    chex.assert_trees_all_equal(codes, jnp.concatenate([own for _, own in alone], axis=1))
    chex.assert_trees_all_close(together, jnp.concatenate([y for y, _ in alone]), rtol=0, atol=1e-5)
    # Within one program other neighbours change no bit.
    other, _ = run(np.concatenate([x[:2], 100 * x[2:]]))
    chex.assert_trees_all_equal(together[:2], other[:2])


def test_nothing_is_compiled_again_for_new_numbers_or_an_equal_specification() -> None:
    case = CASE_OF["pair-column-column-offset"]
    count = 0

    def run(x: Any, kernel: Any, steps: Any, layer_spec: CIMSpec) -> jax.Array:
        nonlocal count
        count += 1
        return conv.cim_conv(x, kernel, steps, layer_spec)

    jitted = jax.jit(run, static_argnums=3)
    for seed in range(3):
        jitted(*draw(case, seed), CIMSpec.from_dict(case.spec.to_dict()))
    assert count == 1


def test_codes_take_the_place_of_a_real_input_and_its_step() -> None:
    case = CASE_OF["slices-sliced-twos-wide-top"]
    x, kernel, steps = draw(case)
    codes = lsq.quantize_activation(x, steps.activation, case.spec.activation)
    assert isinstance(codes, Codes)
    from_codes = conv.cim_conv(codes, kernel, steps._replace(activation=None), case.spec)
    chex.assert_trees_all_equal(from_codes, conv.cim_conv(x, kernel, steps, case.spec))
    chex.assert_trees_all_close(codes.value, codes.codes * steps.activation)
    with pytest.raises(ValueError, match=r"The input was quantized with .*bits=4.* but the layer's `activation` is"):
        conv.cim_conv(codes, kernel, steps, CASE_OF["pair-column-column"].spec)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3)])
def test_dense_is_a_convolution_of_one_pixel(leading: tuple[int, ...]) -> None:
    layer_spec = spec(weight=ENCODINGS["offset-adc"], array={"rows": 20})
    case = Case("", layer_spec, x_shape=(*leading, 50), kernel_shape=(50, 5))
    x, kernel, steps = draw(case)
    got = conv.cim_dense(x, kernel, steps, layer_spec)
    chex.assert_shape(got, (*leading, 5))
    as_image = conv.cim_conv(x.reshape(-1, 1, 1, 50), kernel.reshape(1, 1, 50, 5), steps, layer_spec)
    chex.assert_trees_all_close(got.reshape(-1, 5), as_image.reshape(-1, 5), rtol=1e-6)


def test_one_and_three_spatial_axes_work_as_two() -> None:
    layer_spec = spec(array={"rows": 20, "tiling": "im2col"})
    for axes in (1, 3):
        case = Case("", layer_spec, x_shape=(2, *(4,) * axes, 3), kernel_shape=(*(2,) * axes, 3, 5))
        x, kernel, steps = draw(case)
        y = conv.cim_conv(x, kernel, steps._replace(psum=None), dataclasses.replace(layer_spec, adc=None))
        a = lsq.quantize_activation(x, steps.activation, layer_spec.activation).value
        assert y.shape == (2, *(4,) * axes, 5)
        assert np.isfinite(y).all() and float(jnp.abs(a).max()) > 0


def test_low_precision_inputs_give_the_codes_of_their_float32_values() -> None:
    case = CASE_OF["pair-column-column"]
    x, kernel, steps = draw(case)
    low = jnp.asarray(x, jnp.bfloat16)
    got = conv.cim_conv(low, kernel, steps, case.spec)
    assert got.dtype == jnp.float32
    chex.assert_trees_all_equal(got, conv.cim_conv(low.astype(jnp.float32), kernel, steps, case.spec))


@pytest.mark.parametrize(
    "name",
    [pytest.param("pair-column-column-offset", marks=pytest.mark.full), "encoding-offset-adc-planes-layer"],
)
def test_a_step_of_size_one_serves_a_whole_layer_and_gets_the_sum_of_its_gradients(name: str) -> None:
    case = CASE_OF[name]
    x, kernel, _ = draw(case)
    shapes = steps_lib.shapes(tile(case.kernel_shape, case.spec), case.spec)
    values = steps_lib.StepSizes(0.3, 0.4, 2.5, 1.25, 2.0, 0.5)

    def filled(shape_of: Any) -> steps_lib.StepSizes:
        pairs = zip(values, shapes, strict=True)
        return steps_lib.StepSizes(
            *(None if shape is None else np.full(shape_of(shape), value, np.float32) for value, shape in pairs)
        )

    def loss(steps: Any) -> jax.Array:
        return jnp.sum(jnp.sin(conv.cim_conv(x, kernel, steps, case.spec)))

    one, each = (jax.grad(loss)(filled(shape)) for shape in (lambda shape: (1,) * len(shape), tuple))
    for got, want in zip(jax.tree.leaves(one), jax.tree.leaves(each), strict=True):
        scale = float(jnp.sum(jnp.abs(want)))
        chex.assert_trees_all_close(jnp.sum(got), jnp.sum(want), rtol=0, atol=1e-5 * scale)
    for shape in ((), (1,)):
        with pytest.raises(ValueError, match=r"`steps.weight` has shape \("):
            conv.cim_conv(x, kernel, filled(tuple)._replace(weight=np.ones(shape)), case.spec)


def test_a_layer_without_outputs_has_finite_gradients() -> None:
    case = CASE_OF["pair-column-column-offset"]
    factors = steps_lib.gradient_factors(tile(case.kernel_shape, case.spec), case.spec, 80, 0)
    chex.assert_tree_all_finite(factors)


def test_places_that_store_nothing_have_neither_code_nor_digit() -> None:
    """Also where kernels are cut, and in encodings whose code 0 is not digit 0, or which have no code 0."""
    for name in ("twos", "diff-digital-1", "offset", "offset-1", "offset-planes"):
        case = Case("", spec(weight=ENCODINGS[name], array={"tiling": "im2col"}))
        _, kernel, steps = draw(case)
        tiled = tile(case.kernel_shape, case.spec)
        assert not tiled.stored.all()
        codes = cells.quantize_weight(jnp.asarray(kernel), steps.weight, tiled, case.spec)
        arrays = cells.store(codes, tiled, case.spec)
        for values in (codes, arrays.digits):
            assert not np.where(tiled.stored[..., None], 0, values).any(), name
        if arrays.reference is not None:
            np.testing.assert_array_equal(arrays.reference, tiled.stored)


def test_undriven_rows_add_nothing_even_where_zero_is_no_code() -> None:
    case = Case(
        "", spec(activation=SLICES["signed-1"], weight=ENCODINGS["offset-adc"], adc=False), padding=((2, 2), (2, 2))
    )
    x, kernel, steps = draw(case)
    y = conv.cim_conv(x, kernel, steps, case.spec, padding=((20, 20), (20, 20)))
    assert float(jnp.abs(y[:, 0, 0]).max()) == 0.0


@pytest.mark.parametrize(
    "log_step", [-1e9, 1e9, *(pytest.param(value, marks=pytest.mark.full) for value in (-30.0, 0.0, 30.0))]
)
def test_gradients_are_finite_at_any_stored_step(log_step: float) -> None:
    case = CASE_OF["pair-column-column-offset"]
    x, kernel, _ = draw(case)
    tiled = tile(case.kernel_shape, case.spec)
    shapes = steps_lib.shapes(tiled, case.spec)
    factors = steps_lib.gradient_factors(tiled, case.spec, 80, 20)
    units = steps_lib.offset_units(tiled, case.spec)
    for changed in ("activation", "weight", "psum"):
        stored = steps_lib.StepSizes(
            *(
                None if shape is None else jnp.full(shape, log_step if name == changed else 0.0)
                for name, shape in shapes._asdict().items()
            )
        )

        def loss(stored: Any, x: Any, kernel: Any) -> jax.Array:
            real = steps_lib.real_steps(stored, factors, units, case.spec)
            y = conv.cim_conv(x, kernel, real, case.spec)
            return jnp.mean(y / (1 + lax.stop_gradient(jnp.abs(y))))

        value, gradient = jax.value_and_grad(loss, argnums=(0, 1, 2))(stored, x, kernel)
        chex.assert_tree_all_finite((value, gradient))


def test_wrong_arguments_are_refused_by_name() -> None:
    case = CASE_OF["pair-column-column"]
    x, kernel, steps = draw(case)
    with pytest.raises(ValueError, match=r"`steps.psum` has shape \(2, 2, 2\); the layer needs \(2, 3, 5\)"):
        conv.cim_conv(x, kernel, steps._replace(psum=jnp.ones((2, 2, 2))), case.spec)
    with pytest.raises(ValueError, match=r"`steps.weight` has shape None"):
        conv.cim_conv(x, kernel, steps._replace(weight=None), case.spec)
    with pytest.raises(ValueError, match=r"`steps.activation` is None"):
        conv.cim_conv(x, kernel, steps._replace(activation=None), case.spec)
    with pytest.raises(ValueError, match=r"`x` has 3 channels but the kernel .* takes 4"):
        conv.cim_conv(x[..., :3], kernel, steps, case.spec)
    for padding in ("CIRCULAR", ((1, 1),), ((1, 1, 1), (1, 1))):
        with pytest.raises(ValueError, match="`padding` is"):
            conv.cim_conv(x, kernel, steps, case.spec, padding=padding)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`strides` is \(1, 2, 3\); give a positive integer for each of the 2"):
        conv.cim_conv(x, kernel, steps, case.spec, strides=(1, 2, 3))
    with pytest.raises(ValueError, match="`kernel_dilation` is 0"):
        conv.cim_conv(x, kernel, steps, case.spec, kernel_dilation=0)
    varied = dataclasses.replace(case.spec, variation=VariationSpec(sigma=0.1))
    with pytest.raises(ValueError, match="`variation_key` is None"):
        conv.cim_conv(x, kernel, steps, varied)


@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, ((1, 0), (0, 2)), (1, (0, 1))])
@pytest.mark.parametrize(
    "strides,input_dilation,kernel_dilation", [(1, None, 1), (2, 1, 1), ((1, 2), 2, 1), (1, 1, (2, 1))]
)
def test_windows_are_those_of_flax(padding: Any, strides: Any, input_dilation: Any, kernel_dilation: Any) -> None:
    if isinstance(padding, str) and input_dilation == 2:
        with pytest.raises(ValueError, match=r"`padding` is .* with an input dilation of \(2, 2\); give \(low, high\)"):
            window_lib.resolve((7, 8), (3, 2), padding=padding, input_dilation=2)
        return
    x = np.zeros((1, 7, 8, 2), np.float32)
    layer = nn.Conv(3, (3, 2), strides, padding, input_dilation or 1, kernel_dilation)
    want = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)[0].shape
    window = window_lib.resolve(
        (7, 8), (3, 2), strides=strides, padding=padding, input_dilation=input_dilation, kernel_dilation=kernel_dilation
    )
    assert window_lib.output_size((7, 8), (3, 2), window) == want[1:3]
    case = Case("", spec(adc=False), x_shape=x.shape, kernel_shape=(3, 2, 2, 3))
    _, kernel, steps = draw(case)
    assert conv.cim_conv(x, kernel, steps, case.spec, **window._asdict()).shape == want
