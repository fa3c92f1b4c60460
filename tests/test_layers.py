"""The Flax layers: in place of Flax's own, calibrated by `init`, trainable, and nothing hidden."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import ENCODINGS

import cimjax
from cimjax import ActivationSpec, ADCSpec, ArraySpec, CIMConv, CIMDense, CIMSpec, Quantize, VariationSpec, WeightSpec
from cimjax.core.lsq import Codes
from cimjax.nn.calibrate import without_calibration
from cimjax.nn.layers import ADC_STATISTICS, PARTIAL_SUMS
from cimjax.nn.small import SmallNet

SMALL = CIMSpec(
    activation=ActivationSpec(bits=4),
    weight=WeightSpec(bits=4, cell_bits=2),
    adc=ADCSpec(bits=4, offset=True),
    array=ArraySpec(rows=32, columns=16),
)
IDEAL = dataclasses.replace(SMALL, adc=None)


def images(n: int = 4, channels: int = 6) -> jax.Array:
    return nn.relu(jax.random.normal(jax.random.key(0), (n, 6, 5, channels)))


def relative_error(got: jax.Array, want: jax.Array) -> float:
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


def test_pretrained_weights_of_flax_drop_in() -> None:
    x = images()
    plain = nn.Conv(8, (3, 3), strides=(2, 1), padding=((1, 1), (0, 1)), kernel_dilation=(1, 2))
    trained = plain.init(jax.random.key(1), x)["params"]
    trained["bias"] = jnp.arange(8.0)
    eight = CIMSpec(
        activation=ActivationSpec(bits=8), weight=WeightSpec(bits=8), adc=None, array=ArraySpec(rows=32, columns=64)
    )
    layer = CIMConv(8, (3, 3), (2, 1), ((1, 1), (0, 1)), kernel_dilation=(1, 2), spec=eight)
    variables = layer.init(jax.random.key(2), x)
    assert {"kernel", "bias"} <= set(variables["params"])
    chex.assert_trees_all_equal_shapes(trained, {name: variables["params"][name] for name in trained})
    variables = cimjax.calibrate(layer, {"params": variables["params"] | trained}, x)
    assert relative_error(layer.apply(variables, x), plain.apply({"params": trained}, x)) < 0.05

    flat = x.reshape(4, 3, -1)
    dense = nn.Dense(7)
    trained = dense.init(jax.random.key(1), flat)["params"]
    layer = CIMDense(7, spec=eight)
    variables = cimjax.calibrate(layer, {"params": layer.init(jax.random.key(2), flat)["params"] | trained}, flat)
    assert relative_error(layer.apply(variables, flat), dense.apply({"params": trained}, flat)) < 0.05


def test_parameters_are_named_and_shaped_as_documented() -> None:
    layer_spec = dataclasses.replace(SMALL, weight=WeightSpec(**ENCODINGS["offset-adc"]))
    variables = CIMConv(8, (3, 3), spec=layer_spec).init(jax.random.key(0), images())
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {
        "kernel": (3, 3, 6, 8),
        "bias": (8,),
        "activation_log_step": (),
        "weight_log_step": (2, 8),
        "psum_log_step": (2, 2, 8),
        "psum_offset": (2, 2, 8),
        "reference_log_step": (2,),
        "reference_offset": (2,),
    }
    fixed = dataclasses.replace(SMALL, adc=ADCSpec(step="fixed", full_scale=64))
    names = set(CIMConv(8, (3, 3), use_bias=False, spec=fixed).init(jax.random.key(0), images())["params"])
    assert names == {"kernel", "activation_log_step", "weight_log_step"}


@pytest.mark.parametrize("kind", [CIMConv, pytest.param(CIMDense, marks=pytest.mark.full)])
def test_init_calibrates_and_can_be_jitted(kind: Any) -> None:
    x = images()
    layer = CIMConv(8, (3, 3), spec=SMALL) if kind is CIMConv else CIMDense(8, spec=SMALL)
    variables = layer.init(jax.random.key(0), x)
    chex.assert_trees_all_close(jax.jit(layer.init)(jax.random.key(0), x), variables, rtol=1e-5, atol=1e-5)
    ideal = dataclasses.replace(layer, spec=IDEAL).apply(variables, x)
    assert relative_error(layer.apply(variables, x), ideal) < 0.25
    again = cimjax.calibrate(layer, variables, x)
    chex.assert_trees_all_close(again, dict(variables), rtol=1e-5, atol=1e-5)


def test_calibration_sets_only_the_kinds_asked_for_and_only_when_asked() -> None:
    layer = CIMConv(8, (3, 3), spec=SMALL)
    x = images()
    variables = layer.init(jax.random.key(0), x)
    for kind, names in {
        "activation": {"activation_log_step"},
        "weight": {"weight_log_step"},
        "psum": {"psum_log_step", "psum_offset"},
    }.items():
        moved = jax.tree.map(lambda p: p + 0.5, variables)
        updated = cimjax.calibrate(layer, moved, x, kinds=(kind,))["params"]
        changed = {name for name, value in updated.items() if not jnp.array_equal(value, moved["params"][name])}
        assert changed == names
    with pytest.raises(ValueError, match="`kinds` names 'psums'; give a tuple of activation, weight, psum"):
        cimjax.calibrate(layer, variables, x, kinds=("psums",))
    with pytest.raises(ValueError, match="`kinds` names 'psum'; give a tuple of"):
        cimjax.calibrate(layer, variables, x, kinds="psum")
    # Neither a training step nor `mutable=True` sets steps.
    _, updated = layer.apply(variables, 3 * x, mutable=True)
    chex.assert_trees_all_equal(updated["params"], variables["params"])
    # Nor does it leave all partial sums, which takes much memory and must be asked for by name.
    assert PARTIAL_SUMS not in updated and ADC_STATISTICS in updated
    assert PARTIAL_SUMS in layer.apply(variables, x, mutable=[PARTIAL_SUMS])[1]


class Net(nn.Module):
    """A network with batch normalisation and a tensor that two layers read."""

    spec: CIMSpec

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = CIMConv(8, (3, 3), use_bias=False, spec=self.spec)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        codes = Quantize(self.spec.activation)(x)
        x = CIMConv(8, (3, 3), spec=self.spec)(codes) + CIMConv(8, (1, 1), spec=self.spec)(codes)
        return CIMDense(3, spec=self.spec)(nn.relu(x).mean(axis=(1, 2)))


def test_a_network_is_calibrated_layer_by_layer_on_what_calibrated_layers_give() -> None:
    net, x = Net(SMALL), images(8)
    variables = jax.jit(functools.partial(net.init, train=True))(jax.random.key(0), x)
    spoil = jax.tree_util.tree_map_with_path
    spoiled = spoil(lambda path, p: p + 1.0 if "step" in str(path) or "offset" in str(path) else p, variables)

    calibrate = jax.jit(lambda variables: cimjax.calibrate(net, variables, x, train=True))
    calibrated = calibrate(spoiled)
    chex.assert_trees_all_equal(calibrated["batch_stats"], variables["batch_stats"])
    chex.assert_trees_all_close(calibrated, dict(variables), rtol=1e-4, atol=1e-4)
    # Running it once more from its own result changes nothing: each layer saw its final input.
    chex.assert_trees_all_close(calibrate(calibrated), calibrated, rtol=1e-5, atol=1e-5)
    assert "activation_log_step" not in calibrated["params"]["CIMConv_1"]
    assert calibrated["params"]["Quantize_0"]["log_step"].shape == ()


def test_a_trained_layer_gives_an_image_the_same_result_in_any_batch() -> None:
    net, x = Net(SMALL), images(8)
    variables = net.init(jax.random.key(0), x)
    apply = jax.jit(net.apply)
    chex.assert_trees_all_equal(apply(variables, x)[:2], apply(variables, jnp.concatenate([x[:2], 50 * x[2:]]))[:2])


def test_dtypes_follow_flax() -> None:
    x = images().astype(jnp.bfloat16)
    for dtype in (None, jnp.bfloat16, jnp.float32):
        plain, layer = nn.Conv(8, (3, 3), dtype=dtype), CIMConv(8, (3, 3), dtype=dtype, spec=SMALL)
        variables = layer.init(jax.random.key(0), x)
        assert layer.apply(variables, x).dtype == plain.init_with_output(jax.random.key(0), x)[0].dtype
        assert variables["params"]["kernel"].dtype == jnp.float32


def test_missing_and_extra_batch_axes_are_those_of_flax() -> None:
    x = images().reshape(2, 2, 6, 5, 6)
    layer = CIMConv(8, (3, 3), spec=SMALL)
    variables = layer.init(jax.random.key(0), x)
    y = layer.apply(variables, x)
    assert y.shape == (2, 2, 6, 5, 8)
    chex.assert_trees_all_close(layer.apply(variables, x[1, 0]), y[1, 0], rtol=1e-5, atol=1e-5)
    codes = Quantize(SMALL.activation).init_with_output(jax.random.key(0), x)[0]
    assert isinstance(codes, Codes) and codes.codes.shape == x.shape
    assert CIMConv(8, (3,), spec=SMALL).init_with_output(jax.random.key(0), x[0, 0])[0].shape == (6, 5, 8)


def test_what_is_not_supported_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="`feature_group_count` is 2; grouped convolutions through arrays are not"):
        CIMConv(8, (3, 3), feature_group_count=2, spec=SMALL).init(jax.random.key(0), images())
    varied = CIMConv(8, (3, 3), spec=dataclasses.replace(SMALL, variation=VariationSpec(sigma=0.1)))
    variables = varied.init(jax.random.key(0), images())
    with pytest.raises(ValueError, match=r"`variation`: give its key, `apply\(..., rngs="):
        varied.apply(variables, images())
    one, two = (varied.apply(variables, images(), rngs={"variation": jax.random.key(i)}) for i in range(2))
    assert relative_error(one, two) > 0


SHAPES = {
    (8, 784): r"shape \(8, 784\); it takes \(..., H, W, C\); x\[..., None\] gives images their only channel",
    (28, 28): r"shape \(28, 28\); it takes \(..., H, W, C\); x\[",
    (5,): r"shape \(5,\); it takes \(..., H, W, C\)\.(\n|$)",
    (): r"shape \(\); it takes",
    (2, 4, 4, 0): r"shape \(2, 4, 4, 0\), without channels",
}


@pytest.mark.parametrize("shape,message", SHAPES.items(), ids=str)
def test_inputs_of_other_shapes_are_refused_by_name(shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^`CIMConv` got an input of {message}"):
        CIMConv(4, (3, 3), spec=IDEAL).init(jax.random.key(0), jnp.ones(shape))


@pytest.mark.parametrize(
    "x,message",
    [
        (None, "of type NoneType; give an array of real numbers"),
        ("image", "of type str; give an array"),
        (np.array([None, 1]), "of type ndarray; give an array"),
        (jnp.ones((2, 4, 4, 3)) * 1j, "of complex64; give real numbers"),
    ],
    ids=["None", "text", "objects", "complex"],
)
def test_what_is_no_array_of_real_numbers_is_refused_by_name(x: Any, message: str) -> None:
    for layer in (CIMConv(4, (3, 3), spec=IDEAL), CIMDense(4, spec=IDEAL), Quantize()):
        with pytest.raises(ValueError, match=f"^`{type(layer).__name__}` got an input {message}"):
            layer.init(jax.random.key(0), x)


def test_whole_numbers_lists_and_empty_batches_are_taken_as_flax_takes_them() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    layer = CIMConv(4, (3, 3), spec=IDEAL)
    variables = layer.init(jax.random.key(0), jnp.asarray(pixels, jnp.float32))
    want = layer.apply(variables, jnp.asarray(pixels, jnp.float32))
    for same in (pixels, pixels.astype(np.int32), pixels.tolist()):
        chex.assert_trees_all_equal(layer.init(jax.random.key(0), same), variables)
        chex.assert_trees_all_equal(layer.apply(variables, same), want)
    assert layer.apply(variables, pixels > 100).shape == want.shape
    assert layer.apply(variables, pixels[:0]).shape == (0, 4, 4, 4)
    assert CIMDense(4, spec=IDEAL).apply(
        CIMDense(4, spec=IDEAL).init(jax.random.key(0), pixels[0]), pixels[0, :0]
    ).shape == (0, 4, 4)


def test_images_with_channels_first_are_doubted_and_later_refused() -> None:
    first = jax.random.uniform(jax.random.key(0), (2, 3, 16, 16))
    layer = CIMConv(4, (3, 3), spec=IDEAL)
    with pytest.warns(UserWarning, match=r"^CIMConv: its input of shape \(2, 3, 16, 16\) is read as images of 3 x 16 "):
        layer.init(jax.random.key(0), first)
    with pytest.warns(UserWarning, match=r"^SmallNet: .*if the channels come first, move them last: jnp.moveaxis"):
        jax.eval_shape(SmallNet(10).init, jax.random.key(0), first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variables = layer.init(jax.random.key(0), jnp.moveaxis(first, 1, -1))
        for shape in ((2, 4, 4, 512), (2, 3, 3, 16), (2, 1, 16, 8), (2, 16, 16, 16)):
            jax.eval_shape(layer.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    with pytest.raises(
        ValueError, match=r"^the input of `CIMConv` has 16 channels but .* takes 3; move the channels last"
    ):
        layer.apply(variables, first)
    with pytest.raises(ValueError, match=r"^the input of `CIMConv` has 5 channels but the kernel .* takes 3\.(\n|$)"):
        layer.apply(variables, jnp.ones((2, 4, 4, 5)))


def test_frozen_kinds_of_steps_get_no_gradient_and_power_of_two_steps_are_powers() -> None:
    x = images()
    for step, moves in {"learned": True, "power_of_two": True, "calibrated": False}.items():
        layer = CIMConv(8, (3, 3), spec=dataclasses.replace(SMALL, adc=ADCSpec(offset=True, step=step)))
        with without_calibration():
            params = layer.init(jax.random.key(0), x)["params"]
        params["weight_log_step"] = params["weight_log_step"] - 2
        gradient = jax.jit(jax.grad(lambda p, layer=layer: jnp.sum(jnp.square(layer.apply({"params": p}, x)))))(params)
        for name in ("psum_log_step", "psum_offset"):
            assert bool(jnp.any(gradient[name] != 0)) == moves, (step, name)


def test_a_dense_layer_of_several_positions_learns_as_a_convolution_of_one_pixel() -> None:
    """With the same factors of its steps' gradients: an image's positions are its own."""
    x = nn.relu(jax.random.normal(jax.random.key(0), (2, 15, 6)))
    dense, conv = CIMDense(8, spec=SMALL), CIMConv(8, (1, 1), spec=SMALL)
    with without_calibration():
        params = dense.init(jax.random.key(1), x)["params"]
    params["weight_log_step"] = params["weight_log_step"] - 2

    def gradient(layer: nn.Module, params: Any, x: jax.Array) -> Any:
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.square(layer.apply({"params": params}, x)))))(params)

    got = gradient(dense, params, x)
    want = gradient(conv, params | {"kernel": params["kernel"][None, None]}, x[:, :, None])
    chex.assert_trees_all_close(got | {"kernel": got["kernel"][None, None]}, want, rtol=1e-4)


@pytest.mark.parametrize("rate", [1e3, pytest.param(1e12, marks=pytest.mark.full), 1e30])
def test_steps_move_and_stay_positive_and_finite_at_absurd_learning_rates(rate: float) -> None:
    layer, x = CIMConv(8, (3, 3), spec=SMALL), images()
    params = layer.init(jax.random.key(0), x)["params"]
    target = jax.random.normal(jax.random.key(3), layer.apply({"params": params}, x).shape)
    steps = {name for name in params if "step" in name or "offset" in name}
    before = params

    @jax.jit
    def update(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.mean(jnp.tanh(layer.apply({"params": params}, x) - target))

        gradient = jax.grad(loss)(params)
        return {name: p - (rate if name in steps else 0) * gradient[name] for name, p in params.items()}

    for _ in range(5):
        params = update(params)
        chex.assert_tree_all_finite(layer.apply({"params": params}, x))
    for name in steps:
        assert not jnp.array_equal(params[name], before[name]), name


@pytest.mark.full
def test_all_steps_move_toward_their_least_squares_optimum() -> None:
    """A one-layer regression: the layer's own full-precision output is the target, every kind starts off by 3 x."""
    x = jax.random.normal(jax.random.key(0), (64, 6, 6, 8))
    x = nn.relu(x)
    layer_spec = CIMSpec(
        activation=ActivationSpec(bits=3),
        weight=WeightSpec(bits=3, cell_bits=1),
        adc=ADCSpec(bits=3),
        array=ArraySpec(rows=36),
    )
    layer = CIMConv(8, (3, 3), use_bias=False, spec=layer_spec)
    start = layer.init(jax.random.key(1), x)["params"]
    target = nn.Conv(8, (3, 3), use_bias=False).apply({"params": {"kernel": start["kernel"]}}, x)

    @jax.jit
    def loss(params: Any) -> jax.Array:
        return jnp.mean(jnp.square(layer.apply({"params": params}, x) - target)) / jnp.var(target)

    for kind in ("activation_log_step", "weight_log_step", "psum_log_step"):
        scan = jnp.linspace(-1.2, 1.2, 49)
        best = float(scan[np.argmin([loss(start | {kind: start[kind] + shift}) for shift in scan])])
        for off in (-np.log(3), np.log(3)):
            # Only this kind is trained, from three times too large or too small.
            params = start | {kind: start[kind] + best + off}
            optimizer = optax.adam(0.02)
            state = optimizer.init(params[kind])

            @jax.jit
            def update(value: Any, state: Any, params: Any = params, kind: str = kind, opt: Any = optimizer) -> Any:
                gradient = jax.grad(lambda v: loss(params | {kind: v}))(value)
                change, state = opt.update(gradient, state)
                return optax.apply_updates(value, change), state

            value, first = params[kind], float(loss(params))
            for _ in range(120):
                value, state = update(value, state)
            distance = float(jnp.median(jnp.abs(value - start[kind] - best)))
            assert distance < 0.6 * np.log(3), (kind, off, distance)
            assert float(loss(params | {kind: value})) < 0.7 * first, (kind, off)


def test_every_axis_before_the_image_but_the_first_is_of_the_example() -> None:
    """LSQ's factors count an example whole: frames of a video as a dense layer counts its positions."""
    frames = jax.random.uniform(jax.random.key(0), (2, 5, 1, 1, 6))
    conv, dense = CIMConv(4, (1, 1)), CIMDense(4)
    variables = conv.init(jax.random.key(1), frames)
    as_dense = jax.tree_util.tree_map_with_path(
        lambda path, value: value[0, 0] if path[-1].key == "kernel" else value, variables
    )
    of_conv = jax.grad(lambda v: jnp.sum(conv.apply(v, frames) ** 2))(variables)["params"]
    of_dense = jax.grad(lambda v: jnp.sum(dense.apply(v, frames) ** 2))(as_dense)["params"]
    for name in ("activation_log_step", "weight_log_step", "psum_log_step"):
        chex.assert_trees_all_close(of_conv[name].ravel(), of_dense[name].ravel(), rtol=1e-5)


def test_images_without_pixels_are_taken_as_flax_takes_them() -> None:
    none = jnp.zeros((2, 0, 2, 3))
    with cimjax.without_calibration():
        found = CIMConv(4, (3, 3)).init_with_output(jax.random.key(0), none)[0]
    assert found.shape == nn.Conv(4, (3, 3)).init_with_output(jax.random.key(0), none)[0].shape == (2, 0, 2, 4)


@pytest.mark.parametrize("program", ["reference", "joined"])
def test_second_derivatives_are_refused_in_one_line(program: str) -> None:
    layer, x = CIMDense(4, execution=cimjax.Execution(program=program)), jnp.ones((2, 6))
    variables = layer.init(jax.random.key(0), jax.random.uniform(jax.random.key(1), (8, 6)))
    first = jax.grad(lambda x: jnp.sum(layer.apply(variables, x)))
    with pytest.raises(NotImplementedError, match=r"^array layers have first derivatives only, by jax.grad or jax.vjp"):
        jax.grad(lambda x: jnp.sum(first(x) ** 2))(x)
