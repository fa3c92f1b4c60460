"""Networks in integers throughout, held against the networks that they were made of, and against what files hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

import cimjax
from cimjax.hardware import export
from cimjax.hardware.factors import INT32
from cimjax.hardware.network import files as network_files
from cimjax.hardware.network.operations import (
    Arrays,
    Codes,
    Entry,
    Limit,
    Product,
    Rearrange,
    Rescale,
    shifted,
    shifted_bound,
)
from cimjax.hardware.on_chip import Call, apply_on_chip
from cimjax.nn.models import build_model
from cimjax.nn.rules import conv_maker

SMALL = cimjax.CIMSpec(adc=cimjax.ADCSpec(bits=3, offset=True), array=cimjax.ArraySpec(rows=64, columns=32))
IDEAL = dataclasses.replace(SMALL, adc=None)
SIGNED = dataclasses.replace(IDEAL, activation=cimjax.ActivationSpec(bits=4, signed=True))
IMAGES = jax.nn.relu(jax.random.normal(jax.random.key(0), (3, 8, 8, 3)))


def initialised(network: nn.Module, seed: int = 1) -> Any:
    """Variables with statistics and factors of normalization as after training, some factors negative."""
    variables = network.init(jax.random.key(seed), IMAGES, train=False)
    rng = np.random.default_rng(seed)

    def trained(path: Any, value: Array) -> Array:
        name = jax.tree_util.keystr(path)
        if "BatchNorm" not in name:
            return value
        spread = {"mean": rng.normal(0, 0.3, value.shape), "var": rng.uniform(0, 1, value.shape)}
        change = spread.get(path[-1].key, rng.normal(0, 0.7, value.shape))
        return value + jnp.asarray(change, jnp.float32)

    return jax.tree_util.tree_map_with_path(trained, variables)


RULES = [["stem", SIGNED], ["classifier", SMALL]]
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("small", {}),
    "all in arrays": ("small", {"rules": RULES}),
    "plain": ("resnet8", {}),
    "projection": ("resnet8", {"shortcut": "projection"}),
    "preactivation": ("resnet8", {"preactivation": True}),
    "codes": ("resnet8", {"shortcut": "projection", "residual": "codes", "preactivation": True}),
    "bottleneck": ("resnet8", {"bottleneck": True}),
}
SOME = ("all in arrays", "codes")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in SOME else pytest.mark.full) for n in NETWORKS])
def test_every_code_is_the_networks_but_for_those_on_an_edge(name: str) -> None:
    kind, options = NETWORKS[name]
    options = {"width": 4 if kind == "small" else 0.5, "rules": (), **options}
    network = build_model(kind, classes=4, conv=conv_maker(SMALL), **options)
    variables = initialised(network)
    integers = cimjax.integer_network(network, variables, IMAGES, train=False)
    calls: list[Call] = []
    layers = cimjax.freeze(network, variables, IMAGES, train=False)
    logits = apply_on_chip(network, variables, layers, IMAGES, watch=calls.append, feeds_on=False, train=False)
    found = integers.run(integers.enter(IMAGES))
    codes = {
        step.operation.layer.name: found[step.inputs[0]]
        for step in integers.steps
        if isinstance(step.operation, Arrays)
    }
    assert set(codes) == {call.layer for call in calls}
    np.testing.assert_array_equal(codes[calls[0].layer].reshape(calls[0].codes.shape), calls[0].codes)
    other = [np.mean(codes[call.layer].reshape(call.codes.shape) != call.codes) for call in calls]
    assert max(other) < 0.01
    np.testing.assert_allclose(integers(IMAGES), logits, atol=0.02 * float(np.abs(logits).max()))


class Between(nn.Module):
    """Something between two array layers, or behind one."""

    between: Callable[[Any], Any]
    last: bool = False
    spec: cimjax.CIMSpec = SIGNED

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Any:
        x = self.between(cimjax.CIMConv(6, (3, 3), spec=self.spec)(x))
        return x if self.last else cimjax.CIMDense(4, spec=self.spec)(x)


FACTORS = np.array([0.5, -1.5, 2.0, 0.0, 1.0, 3.0], np.float32)
BETWEEN: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda x: x,
    "ReLU": nn.relu,
    "ReLU6": nn.relu6,
    "a limit": lambda x: jnp.clip(x, -0.5, 0.25),
    "a limit of channels": lambda x: jnp.minimum(x, jnp.abs(FACTORS)),
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
    "factors": lambda x: x * FACTORS + FACTORS,
    "the negative": lambda x: 1 - x,
    "a quotient": lambda x: x / 3,
    "a chain": lambda x: nn.relu(0.3 - 2 * nn.relu(x * FACTORS)),
    "a sum": lambda x: nn.relu(x) + 0.3 * x,
    "a difference": lambda x: nn.relu(x) - x,
    "a difference to the mean": lambda x: x.mean((1, 2), keepdims=True) - x,
    "largest of windows": lambda x: nn.max_pool(nn.relu(x), (2, 3), (2, 1), "SAME"),
    "largest of negatives": lambda x: nn.max_pool(-nn.relu(x), (3, 3), (2, 2), ((1, 1), (1, 1))),
    "mean of windows": lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
    "largest": lambda x: x.max((1, 2)),
    "mean": lambda x: x.mean((1, 2)),
    "mean that keeps axes": lambda x: x.mean((1, 2), keepdims=True),
    "the channels after one another": lambda x: x.reshape(len(x), -1),
    "some pixels": lambda x: x[:, ::3, 2:],
    "one pixel": lambda x: x[:, 1, 2],
    "rows for columns": lambda x: x.transpose(0, 2, 1, 3),
    "more channels": lambda x: jnp.pad(x, ((0, 0), (0, 0), (1, 0), (1, 2))),
    "side by side": lambda x: jnp.concatenate([x, nn.relu(x), 4 * x], -1),
    "two layers": lambda x: nn.Dense(5)(nn.relu(nn.Dense(7)(x.mean((1, 2))))),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_may_stand_between_array_layers(name: str) -> None:
    for last in (False, True):
        if (last, name) in ((True, "tanh"), (True, "sigmoid"), (False, "largest of negatives")):
            continue
        network = Between(BETWEEN[name], last)
        variables = network.init(jax.random.key(2), IMAGES)
        integers = cimjax.integer_network(network, variables, IMAGES)
        y = network.apply(variables, IMAGES)
        assert integers(IMAGES).shape == y.shape
        np.testing.assert_allclose(integers(IMAGES), y, atol=2e-3 * float(np.abs(y).max()))
        bounded(integers)


def bounded(integers: cimjax.IntegerNetwork) -> None:
    """No integer leaves what its step says, and no step an int32, whatever enters; nor does any sum on the way."""
    rng = np.random.default_rng(3)
    shapes = [each.shape for each in integers.enter(IMAGES)]
    most = [step.operation.largest for step in integers.steps if isinstance(step.operation, Entry)]
    extremes = [
        [np.full(shape, size) for shape, size in zip(shapes, most, strict=True)],
        [size * rng.choice([-1, 1], shape) for shape, size in zip(shapes, most, strict=True)],
        [np.clip(rng.normal(0, 2.0**30, shape), -INT32, INT32).astype(int) for shape in shapes],
    ]
    for entries in extremes:
        wide: list[np.ndarray] = []
        bounds: list[int] = []
        for step, value in zip(integers.steps, integers.run(entries), strict=True):
            operation = step.operation
            if isinstance(operation, Entry):
                wide.append(np.clip(entries[operation.number], -operation.largest, operation.largest))
            else:  # as `run`, but with room for every sum
                wide.append(operation(*(wide[number] for number in step.inputs)).astype(np.int64))
            bounds.append(operation.bound(*(bounds[number] for number in step.inputs)))
            np.testing.assert_array_equal(value, wide[-1])
            assert np.abs(wide[-1]).max() <= bounds[-1] <= INT32


def test_shifts_round_to_the_nearest_and_halves_up() -> None:
    values = np.array([5, 6, 7, 2, 0, -2, -5, -6, -7])
    assert shifted(values, 2).tolist() == [1, 2, 2, 1, 0, 0, -1, -1, -2]
    assert shifted(values, 0).tolist() == values.tolist()
    assert all(
        abs(shifted(np.array([value]), shift)[0]) <= shifted_bound(9, shift) for value in (-9, 9) for shift in range(5)
    )


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a convolution": (lambda x: nn.Conv(3, (3, 3))(x), "`conv_general_dilated` stands behind array layers"),
    "softmax": (nn.softmax, "`.*` stands behind array layers, where there may be sums"),
    "a product of results": (lambda x: x * x[..., ::-1], "`rev` stands behind|is a factor or a divisor of another"),
    "a square": (lambda x: x * x, "a result of array layers is a factor or a divisor of another"),
    "a quotient of results": (lambda x: 1 / x, "is a factor or a divisor of another"),
    "the larger of two": (lambda x: jnp.maximum(x, -x), "the larger of two results"),
    "images mixed": (lambda x: x - x.mean(0), "images are mixed"),
    "images joined": (lambda x: jnp.concatenate([x, x]), "images are mixed"),
    "images merged": (lambda x: x.reshape(-1, 6), r"a tensor of \(3, 8, 8, 6\) becomes \(192, 6\)"),
    "numbers of places": (lambda x: x + np.arange(8.0)[:, None], "differ from place to place"),
    "more places": (lambda x: x.mean((1, 2), keepdims=True) + np.ones((8, 8, 1)), "spread a tensor of"),
    "padding by ones": (
        lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=1),
        "other numbers than 0",
    ),
    "tanh that is added": (lambda x: x + jnp.tanh(x), "tanh or a sigmoid stands elsewhere than before codes"),
    "several results": (lambda x: (x, x), "the network has 2 results"),
    "a constant": (lambda x: jnp.ones(3), "does not come out of its array layers"),
    "rounding": (lambda x: x.astype(int), "are made whole numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_integers_cannot_do_is_refused_by_name(name: str) -> None:
    between, words = REFUSED[name]
    network = Between(between, last=True)
    variables = network.init(jax.random.key(2), IMAGES)
    with pytest.raises(ValueError, match=words):
        cimjax.integer_network(network, variables, IMAGES)


def test_fine_codes_and_bits_are_refused() -> None:
    fine = dataclasses.replace(SIGNED, activation=cimjax.ActivationSpec(bits=12, signed=True))
    network = Between(nn.relu, spec=fine)
    variables = network.init(jax.random.key(2), IMAGES)
    with pytest.raises(ValueError, match="thresholds of 4096 codes are more than the table of 10 bits"):
        cimjax.integer_network(network, variables, IMAGES)
    with pytest.raises(ValueError, match="`factor_bits` is 30; give 2 to 24"):
        cimjax.integer_network(network, variables, IMAGES, factor_bits=30)


def test_an_image_has_the_same_integers_in_any_batch() -> None:
    network = build_model("small", classes=4, conv=conv_maker(SMALL), rules=(), width=4)
    variables = initialised(network)
    integers = cimjax.integer_network(network, variables, IMAGES[:1], train=False)
    together = integers(IMAGES)
    for index in range(len(IMAGES)):
        np.testing.assert_array_equal(integers(IMAGES[index : index + 1])[0], together[index])


def test_fewer_bits_of_factors_are_further_off() -> None:
    network = Between(lambda x: x.mean((1, 2)), last=True, spec=SMALL)
    variables = network.init(jax.random.key(2), IMAGES)
    y = network.apply(variables, IMAGES)
    off = [
        np.abs(cimjax.integer_network(network, variables, IMAGES, factor_bits=bits)(IMAGES) - y).max()
        for bits in (4, 8, 16)
    ]
    assert off[0] > 4 * off[1] > 16 * off[2]


def test_codes_at_every_edge_are_those_of_the_quantizer() -> None:
    network = Between(lambda x: nn.relu(x * FACTORS + 0.1), spec=SIGNED)
    variables = network.init(jax.random.key(2), IMAGES)
    integers = cimjax.integer_network(network, variables, IMAGES)
    (codes,) = [step for step in integers.steps if isinstance(step.operation, Codes)]
    assert isinstance(codes.operation, Codes)
    exponent, thresholds = integers.steps[codes.inputs[0]].exponent, codes.operation.thresholds.T.astype(np.int64)
    assert exponent is not None and codes.operation.sign.tolist() == np.where(FACTORS < 0, -1, 1).tolist()
    step = cimjax.freeze(network, variables, IMAGES)["CIMDense_0"].activation_step
    # At a threshold is the code that it is of, and just below it the one before, where there are such values.
    for below in (0, 1):
        values = (thresholds - below) * codes.operation.sign
        real = np.maximum(np.ldexp(values.astype(np.float64), exponent) * FACTORS + 0.1, 0)
        expected = codes.operation.lowest + 1 - below + np.arange(len(thresholds))[:, None]
        has_edge = (np.abs(thresholds) < 2**30) & (real > 0)
        assert has_edge.sum() > 20
        np.testing.assert_array_equal(np.clip(np.rint(real / step), -8, 7)[has_edge], (expected + 0 * values)[has_edge])


def test_files_hold_the_network_whole(tmp_path: Path) -> None:
    network = Between(lambda x: nn.Dense(3)(nn.max_pool(0.3 * nn.relu(x) + x, (2, 2)).reshape(len(x), -1)), last=True)
    variables = network.init(jax.random.key(2), IMAGES)
    integers = cimjax.integer_network(network, variables, IMAGES)
    kinds = {type(step.operation) for step in integers.steps}
    assert {Entry, Arrays, Limit, Rescale, Product, Rearrange} <= kinds
    entries = integers.enter(IMAGES)
    export.write(cimjax.freeze(network, variables, IMAGES), tmp_path)
    network_files.write(integers, tmp_path, entries)
    read = network_files.read(tmp_path, export.read(tmp_path))
    with np.load(tmp_path / network_files.VECTORS) as vectors:
        for number, (mine, theirs) in enumerate(zip(integers.run(entries), read.run(entries), strict=True)):
            np.testing.assert_array_equal(mine, theirs)
            np.testing.assert_array_equal(mine, vectors[str(number)])
    with pytest.raises(ValueError, match="takes integers"):
        read(IMAGES)
    (tmp_path / "network.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="holds no steps of a network of `cimjax export`, or damaged ones"):
        network_files.read(tmp_path, export.read(tmp_path))


def dense(*features: int) -> nn.Module:
    """Dense layers in arrays with ReLU between them; the first reads images of positive numbers."""
    layers: list[Any] = [cimjax.CIMDense(count, spec=IDEAL) for count in features]
    return nn.Sequential([layer for each in layers for layer in (each, nn.relu)][:-1])


def test_codes_that_enter_may_be_larger_than_those_it_was_made_with() -> None:
    network, images = dense(8, 4), jax.nn.relu(jax.random.normal(jax.random.key(0), (4, 6)))
    variables = network.init(jax.random.key(1), images)
    integers = cimjax.integer_network(network, variables, images / 8)
    operation = integers.steps[0].operation
    assert isinstance(operation, Entry) and operation.largest == 15
    np.testing.assert_allclose(integers(images * 3), network.apply(variables, images * 3), atol=1e-4)


class Pyramid(nn.Module):
    """A layer that is called on images of an even size and of an odd one, of which "SAME" pads one otherwise."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        layer = cimjax.CIMConv(2, (3, 3), strides=2, spec=IDEAL)
        return layer(x).sum((1, 2)) + layer(x[:, :-1, :-1]).sum((1, 2))


def test_a_layer_is_moved_over_every_input_as_the_network_moves_it() -> None:
    network = Pyramid()
    variables = network.init(jax.random.key(1), IMAGES)
    frozen, y = cimjax.freeze(network, variables, IMAGES), network.apply(variables, IMAGES)
    np.testing.assert_allclose(apply_on_chip(network, variables, frozen, IMAGES), y, atol=1e-4)
    np.testing.assert_allclose(cimjax.integer_network(network, variables, IMAGES)(IMAGES), y, atol=1e-3)


class Lifted(nn.Module):
    """An array layer with the same parameters in every turn of a loop, or at every place of an axis."""

    loop: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        kept: dict[str, Any] = {"split_rngs": {"params": False}}
        if not self.loop:
            mapped = nn.vmap(cimjax.CIMDense, in_axes=1, out_axes=1, variable_axes={"params": None}, **kept)
            return mapped(4, spec=IDEAL)(x)

        def turn(layer: nn.Module, x: Any, _: Any) -> tuple[Any, None]:
            return layer(x), None

        scanned = nn.scan(turn, variable_broadcast="params", length=2, **kept)
        return scanned(cimjax.CIMDense(4, spec=IDEAL), x, None)[0]


@pytest.mark.parametrize("loop", [False, True], ids=["vmap", "scan"])
def test_layers_in_loops_are_refused_in_one_line(loop: bool) -> None:
    network, x = Lifted(loop), jnp.ones((2, 3, 4))
    with cimjax.without_calibration():
        variables = network.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"^array layers are called in [^\n]*cannot do that; use another"):
        cimjax.integer_network(network, variables, x)
