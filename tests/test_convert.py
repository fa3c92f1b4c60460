"""Networks of plain Flax layers that are put into arrays as they stand."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import cimjax
from cimjax.hardware.on_chip import apply_on_chip
from cimjax.hardware.survey import layers_of
from cimjax.nn.parameters import kind_of_step
from cimjax.training.config.file import load_config

SPEC = cimjax.CIMSpec(array=cimjax.ArraySpec(rows=32, columns=32))
SIGNED = cimjax.CIMSpec(activation=cimjax.ActivationSpec(signed=True), adc=cimjax.ADCSpec(bits=4, granularity="array"))
IN_ARRAYS = {
    "conv": functools.partial(cimjax.CIMConv, spec=SPEC),
    "dense": functools.partial(cimjax.CIMDense, spec=SPEC),
}
PLAIN = {"conv": nn.Conv, "dense": nn.Dense}
KEY = jax.random.key(1)
IMAGES = jax.nn.relu(jax.random.normal(jax.random.key(0), (4, 8, 8, 3)))
LINES = IMAGES.reshape(4, 64, 3)


class Block(nn.Module):
    """A block that networks repeat."""

    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        x = nn.relu(self.conv(3, (3, 3), use_bias=False, name="conv")(x))
        return (x, None) if _ is not None else x


class InSetup(nn.Module):
    """Layers made in `setup`, one of them called twice, and a method beside `__call__`."""

    conv: Callable[..., nn.Module]
    dense: Callable[..., nn.Module]
    activation: Callable[..., Any] = nn.relu

    def setup(self) -> None:
        self.first = self.conv(3, (3, 3), strides=2, padding="VALID", name="stem")
        self.again = self.conv(3, (3, 3), kernel_init=nn.initializers.he_normal())
        self.head = self.dense(5)

    def features(self, x: Any) -> Any:
        x = self.activation(self.first(x))
        return self.activation(self.again(self.activation(self.again(x))))

    def __call__(self, x: Any, train: bool = False) -> Any:
        return self.head(self.features(x).mean((1, 2)))


class Scanned(nn.Module):
    """A block as layers of a scan, with parameters for each."""

    conv: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return stack(self.conv, name="stack")(x, jnp.zeros(2))[0]


def mapped(conv: Any, dense: Any) -> nn.Module:
    copies = nn.vmap(Block, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}, axis_size=4)
    return nn.Sequential([lambda x: x[:, None], copies(conv)])


# Networks by the layers that they are made of, and what goes in.
NETWORKS: dict[str, tuple[Callable[[Any, Any], nn.Module], jax.Array]] = {
    "one convolution": (lambda conv, dense: conv(4, (3, 3), use_bias=False), IMAGES),
    "one dense layer": (lambda conv, dense: dense(4, dtype=jnp.bfloat16), IMAGES),
    "layers without names": (lambda conv, dense: nn.Sequential([conv(4, (3, 3)), nn.relu, dense(3)]), IMAGES),
    "one axis": (lambda conv, dense: nn.Sequential([conv(4, 3, kernel_dilation=2, padding=1)]), LINES),
    "layers of setup": (lambda conv, dense: InSetup(conv, dense), IMAGES),
    "scan": (lambda conv, dense: Scanned(conv), IMAGES),
    "vmap": (mapped, IMAGES),
    "remat": (lambda conv, dense: nn.Sequential([nn.remat(Block)(conv), nn.remat(Block)(conv)]), IMAGES),
    "jit": (lambda conv, dense: nn.Sequential([nn.jit(Block)(conv), nn.jit(Block)(conv)]), IMAGES),
}  # fmt: skip


QUICK = ("one convolution", "layers of setup", "jit")
SOME = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.full) for name in NETWORKS]


@pytest.mark.parametrize("name", SOME)
def test_a_converted_network_is_the_one_written_with_array_layers(name: str) -> None:
    make, x = NETWORKS[name]
    written, plain = make(**IN_ARRAYS), make(**PLAIN)
    converted = cimjax.convert_network(plain, SPEC)
    variables = written.init(KEY, x)
    chex.assert_trees_all_equal(converted.init(KEY, x), variables)

    plain.apply(variables, x)  # what was compiled of it must not be taken for the converted one's

    def loss(params: Any, network: nn.Module) -> Any:
        return (network.apply({"params": params}, x).astype(jnp.float32) ** 2).sum()

    of_written, of_converted = (jax.value_and_grad(loss)(variables["params"], net) for net in (written, converted))
    chex.assert_trees_all_equal(of_converted, of_written)
    assert max(map(jnp.max, jax.tree.leaves(jax.tree.map(jnp.abs, of_written[1])))) > 0
    layers, by_hand = layers_of(converted, x), layers_of(written, x)
    assert [(each.name, each.kernel, each.spec, each.output) for each in layers] == [
        (each.name, each.kernel, each.spec, each.output) for each in by_hand
    ]


def test_trained_weights_drop_in_and_the_network_stays_what_it_was() -> None:
    network = InSetup(**PLAIN)
    variables = network.init(KEY, IMAGES)
    before = network.apply(variables, IMAGES)
    converted = cimjax.convert_network(network, SPEC, rules=[("head", None)])
    assert isinstance(converted, InSetup) and repr(converted) == repr(network)
    again = cimjax.convert_network(InSetup(**PLAIN), SPEC, rules=[("head", None)])
    assert again == converted and hash(again) == hash(converted)
    assert converted != network and converted != cimjax.convert_network(network, SPEC)
    in_arrays = converted.init(KEY, IMAGES)
    flat, plain = (flax.traverse_util.flatten_dict(tree["params"], sep="/") for tree in (in_arrays, variables))
    chex.assert_trees_all_equal({path: value for path, value in flat.items() if path in plain}, plain)
    assert set(flat) - set(plain) == {
        f"{layer}/{step}_log_step" for layer in ("stem", "again") for step in ("activation", "weight", "psum")
    }
    chex.assert_trees_all_equal(network.apply(variables, IMAGES), before)


@pytest.mark.parametrize("name", SOME)
def test_the_variables_of_full_precision_are_calibrated_as_they_are(name: str) -> None:
    make, x = NETWORKS[name]
    network, converted = make(**PLAIN), cimjax.convert_network(make(**PLAIN), SPEC)
    initial = converted.init(KEY, x)
    flat = flax.traverse_util.flatten_dict(initial, sep="/")
    plain = {path: value for path, value in flat.items() if not kind_of_step(path)}
    variables = flax.traverse_util.unflatten_dict(plain, sep="/")
    chex.assert_trees_all_equal_shapes(variables, network.init(KEY, x))
    in_arrays = cimjax.calibrate(converted, variables, x)
    chex.assert_trees_all_close(in_arrays, initial, rtol=1e-6)
    chex.assert_trees_all_close(cimjax.calibrate(converted, in_arrays, x), initial, rtol=1e-6)
    with pytest.raises(ValueError, match=r"are without .*activation_log_step, .* which are weight, psum"):
        cimjax.calibrate(converted, variables, x, kinds=("weight", "psum"))


def test_variables_without_a_weight_are_refused() -> None:
    network = cimjax.convert_network(InSetup(**PLAIN), SPEC)
    variables = InSetup(**PLAIN).init(KEY, IMAGES)
    del variables["params"]["again"]["kernel"]
    with pytest.raises(ValueError, match="`variables` are without a parameter that is not set from data; give all but"):
        cimjax.calibrate(network, variables, IMAGES)


def test_every_way_to_call_the_network_goes_through_arrays() -> None:
    network = InSetup(**PLAIN)
    converted = cimjax.convert_network(network, SPEC)
    variables = converted.init(KEY, IMAGES)
    features = converted.apply(variables, IMAGES, method="features")
    for method in (converted.features, InSetup.features, lambda module, x: module.features(x)):
        chex.assert_trees_all_equal(converted.apply(variables, IMAGES, method=method), features)
    chex.assert_trees_all_equal(converted.bind(variables).features(IMAGES), features)
    chex.assert_trees_all_equal(nn.apply(lambda module, x: module.features(x), converted)(variables, IMAGES), features)
    assert not jnp.array_equal(network.apply(variables, IMAGES, method="features"), features)


def test_a_converted_network_stays_so_inside_another() -> None:
    inner = cimjax.convert_network(
        nn.Sequential([nn.Conv(4, (3, 3)), nn.relu, nn.Dense(4)]), SPEC, rules=[(".*2", None)]
    )
    outer = nn.Sequential([inner, nn.relu, nn.Dense(3)])

    def built(network: nn.Module) -> list[Any]:
        return [each.spec for each in layers_of(network, IMAGES)]

    assert built(outer) == [SPEC, None, None]
    assert built(cimjax.convert_network(outer, SIGNED)) == [SPEC, None, SIGNED]


def test_the_first_rule_that_matches_a_path_decides() -> None:
    network = InSetup(**PLAIN)

    def built(spec: Any, *rules: Any) -> dict[str, Any]:
        return {each.name: each.spec for each in layers_of(cimjax.convert_network(network, spec, rules=rules), IMAGES)}

    assert built(SPEC) == {"stem": SPEC, "again": SPEC, "head": SPEC}
    assert built(SPEC, ("head", SIGNED), ("stem|head", None)) == {"stem": None, "again": SPEC, "head": SIGNED}
    assert built(None, ("a.*", SPEC)) == {"stem": None, "again": SPEC, "head": None}
    alone = cimjax.convert_network(nn.Dense(3), SPEC, rules=[("", None)])
    assert type(alone) is nn.Dense


REFUSED = {
    "groups": ({"feature_group_count": 2}, r"`layers_1` has `feature_group_count` 2.*full precision"),
    "mask": ({"mask": jnp.ones((3, 3, 3, 4))}, r'`layers_1` has `mask`.*rules=\[\("layers_1", None\)'),
    "product": ({"conv_general_dilated": jax.lax.conv_general_dilated}, r"`layers_1` has `conv_general_dilated`,"),
    "padding": ({"padding": "CIRCULAR"}, r"`layers_1` has `padding` 'CIRCULAR'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_arrays_cannot_compute_is_refused_by_name(name: str) -> None:
    fields, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        cimjax.convert_network(nn.Sequential([nn.relu, nn.Conv(4, (3, 3), **fields)]), SPEC).init(KEY, IMAGES)
    with pytest.raises(ValueError, match=r"`Conv` has"):
        cimjax.convert_network(nn.Conv(4, (3, 3), **fields), SPEC)


def test_what_is_no_network_is_refused() -> None:
    network = InSetup(**PLAIN)
    bound = network.bind(network.init(jax.random.key(0), IMAGES))
    for given, words in (
        (jnp.tanh, "of type .*flax.linen"),
        (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "of type Linear.*nnx.bridge.ToNNX"),
        (InSetup, "of type .*flax.linen"),
        (bound, "bound to variables"),
    ):
        with pytest.raises(ValueError, match=words):
            cimjax.convert_network(given, SPEC)
    with pytest.raises(ValueError, match=r"`spec` is .*`CIMSpec`"):
        cimjax.convert_network(network, {"adc": None})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`rules`"):
        cimjax.convert_network(network, SPEC, rules="head")  # type: ignore[arg-type]


class Small(nn.Module):
    """A network of somebody else's."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        for features in (8, 16):
            x = nn.Conv(features, (3, 3), strides=2, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(not train)(x))
        return nn.Dense(10)(x.mean((1, 2)))


def test_a_run_of_full_precision_goes_on_in_arrays(tmp_path: Any) -> None:
    config = load_config("configs/digits.py:smoke")
    cimjax.train(config, model=Small(), workdir=tmp_path / "full")
    trained = cimjax.load(tmp_path / "full", model=Small())
    chip = cimjax.convert_network(Small(), SPEC, rules=[("Conv_0", None), ("Dense_0", SIGNED)])
    result = cimjax.train(config, model=chip, variables=trained.variables, workdir=tmp_path / "chip")
    loaded = cimjax.load(tmp_path / "chip", model=chip)
    assert loaded.spec == {"Conv_1": SPEC, "Dense_0": SIGNED}
    assert cimjax.evaluate(tmp_path / "chip", model=chip)["accuracy"] == result.accuracy


@pytest.mark.parametrize(
    "use",
    [
        lambda chip, trained: chip.apply(trained, IMAGES),
        lambda chip, trained: cimjax.freeze(chip, trained, IMAGES),
        lambda chip, trained: cimjax.integer_network(chip, trained, IMAGES),
    ],
    ids=["apply", "freeze", "integer_network"],
)
def test_variables_without_steps_are_refused_in_one_line(use: Any) -> None:
    chip = cimjax.convert_network(InSetup(**PLAIN), SPEC)
    trained = InSetup(**PLAIN).init(KEY, IMAGES)
    line = r"^`stem` has no `\w+_log_step` in these variables: its steps were never set; call cimjax\.calibrate\("
    with pytest.raises(ValueError, match=line):
        use(chip, trained)


def test_a_tensor_that_is_quantized_once_needs_its_step() -> None:
    with pytest.raises(ValueError, match=r"^`Quantize` has no `log_step` in these variables"):
        cimjax.Quantize().apply({}, IMAGES)


def test_a_rule_that_names_no_layer_is_told_of() -> None:
    trained = InSetup(**PLAIN).init(KEY, IMAGES)
    chip = cimjax.convert_network(InSetup(**PLAIN), SPEC, rules=[("stm", None), ("head", None), ("head|again", None)])
    line = (
        r"^`rules` has the pattern 'stm', which names no layer that is left to it; the layers are stem, again, head\.$"
    )
    with pytest.warns(cimjax.CalibrationWarning, match=line):
        variables = cimjax.calibrate(chip, trained, IMAGES)
    assert sorted(variables["params"]["head"]) == ["bias", "kernel"]


class Helped(nn.Module):
    """A network with a function of its class, whose layer is called by the name of its argument."""

    @staticmethod
    def doubled(x: Any, by: float = 2.0) -> Any:
        return x * by

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.Dense(3)(inputs=self.doubled(x))


def test_static_functions_and_named_arguments_stay_what_they_are() -> None:
    chip, x = cimjax.convert_network(Helped(), SPEC), jax.random.uniform(KEY, (4, 6))
    variables = chip.init(KEY, x)
    layer = {"params": variables["params"]["Dense_0"]}
    chex.assert_trees_all_equal(chip.apply(variables, x), cimjax.CIMDense(3, spec=SPEC).apply(layer, inputs=2 * x))


def test_a_converted_network_is_frozen() -> None:
    chip = cimjax.convert_network(InSetup(**PLAIN), SPEC)
    variables = chip.init(KEY, IMAGES)
    layers, calls = cimjax.freeze(chip, variables, IMAGES), []
    y = apply_on_chip(chip, variables, layers, IMAGES, watch=lambda call: calls.append(call.layer))
    assert calls == ["stem", "again", "again", "head"] and list(layers) == ["stem", "again", "head"]
    chex.assert_trees_all_close(y, chip.apply(variables, IMAGES), atol=1e-3)
    integers = cimjax.integer_network(chip, variables, IMAGES)
    chex.assert_trees_all_close(integers(IMAGES), np.asarray(y, np.float64), atol=1e-3)


@pytest.mark.parametrize("name", ["jit", pytest.param("remat", marks=pytest.mark.full)])
def test_transformed_blocks_are_computed_in_integers(name: str) -> None:
    make, images = NETWORKS[name]
    chip = make(functools.partial(cimjax.CIMConv, spec=SPEC), functools.partial(cimjax.CIMDense, spec=SPEC))
    variables = chip.init(KEY, images)
    y = np.asarray(chip.apply(variables, images), np.float64)
    chex.assert_trees_all_close(cimjax.integer_network(chip, variables, images)(images), y, atol=1e-3)


def test_layers_stand_in_networks_of_nnx() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.stem = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.conv = nnx.bridge.ToNNX(cimjax.CIMConv(8, (3, 3), spec=SPEC), rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.conv(nnx.relu(self.stem(x)))

    net = Net(nnx.Rngs(0))
    nnx.bridge.lazy_init(net, IMAGES)
    inside = nnx.relu(net.stem(IMAGES))
    params = nnx.to_pure_dict(nnx.state(net.conv, nnx.Param))
    layer = cimjax.CIMConv(8, (3, 3), spec=SPEC)
    chex.assert_trees_all_equal(net(IMAGES), layer.apply({"params": params}, inside))
    set_from_data = cimjax.calibrate(layer, {"params": params}, inside)
    chex.assert_trees_all_close(set_from_data["params"], params, rtol=1e-6)
    gradients = nnx.grad(lambda net: (net(IMAGES) ** 2).sum())(net)
    assert all(jnp.any(value != 0) for value in jax.tree.leaves(gradients))
