"""Calibration of whole networks: lifted transforms, layers that are called several times, and what is said of data."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import chex
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.version import Version

import cimjax
from cimjax import (
    ActivationSpec,
    ADCSpec,
    ArraySpec,
    CalibrationWarning,
    CIMConv,
    CIMDense,
    CIMSpec,
    Quantize,
    WeightSpec,
)
from cimjax.nn.calibrate import calibrate_and_report, without_calibration
from cimjax.nn.calibration_warnings import messages
from cimjax.nn.ideal import ideal_adcs

SIGNED = CIMSpec(
    activation=ActivationSpec(bits=4, signed=True),
    weight=WeightSpec(bits=3, cell_bits=3),
    # The quickest start to compile: how a step follows from data is tested elsewhere.
    adc=ADCSpec(bits=3, start="magnitude"),
    array=ArraySpec(rows=16, columns=64),
)
UNSIGNED = dataclasses.replace(SIGNED, activation=ActivationSpec(bits=4))
KEY = jax.random.key(1)
CHANNELS = 24
X = jax.random.normal(jax.random.key(0), (12, CHANNELS))


full = functools.partial(pytest.param, marks=pytest.mark.full)


class Body(nn.Module):
    """A layer that can be repeated."""

    spec: CIMSpec = SIGNED

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return CIMDense(x.shape[-1], spec=self.spec, name="fc")(x), None


class ConvBody(nn.Module):
    """The same of a convolution, with a tensor that is quantized apart."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        codes = Quantize(SIGNED.activation, name="quantize")(x)
        return x + CIMConv(x.shape[-1], (3, 3), spec=SIGNED, name="conv")(codes), None


class Pair(nn.Module):
    """Two layers in a loop, for a loop around it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        return scanned(Body, 2)(name="inner")(x, None)


class Mapped(nn.Module):
    """A layer whose parameters pass functions."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        def same(params: Any) -> Any:
            return jax.tree.map(lambda value: value * 1, params)

        layer = nn.map_variables(CIMDense, "params", same, same, init=True, mutable=True)
        return layer(x.shape[-1], spec=SIGNED, name="fc")(x), None


def scanned(body: Any, length: int) -> Any:
    return nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=length)


class Stacked(nn.Module):
    """Bodies in a loop."""

    body: Any = Body
    length: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return scanned(self.body, self.length)(name="body")(x, None)[0]


class WrittenOut(nn.Module):
    """The same bodies one after the other."""

    body: Any = Body
    length: int = 2

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for index in range(self.length):
            x, _ = self.body(name=f"body{index}")(x, None)
        return x


class Net(nn.Module):
    """One layer in a network."""

    spec: CIMSpec = UNSIGNED

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return CIMDense(8, spec=self.spec, name="fc")(x)


def written_out(params: Any, length: int = 2) -> Any:
    return {"params": {f"body{i}": jax.tree.map(lambda p, i=i: p[i], params["params"]["body"]) for i in range(length)}}


def spoiled(variables: Any) -> Any:
    """Variables with other steps."""

    def spoil(path: Any, value: jax.Array) -> jax.Array:
        return value + 0.7 if str(path[-1].key).endswith(("log_step", "offset")) else value

    return jax.tree_util.tree_map_with_path(spoil, variables)


# Compiled once for each network.
calibrated = jax.jit(cimjax.calibrate, static_argnums=0)
initialised = jax.jit(lambda model, x: model.init(KEY, x), static_argnums=0)
applied = jax.jit(lambda model, variables, x: model.apply(variables, x), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def reported(model: nn.Module, x: Any) -> Any:
    with without_calibration():
        variables = model.init(KEY, x)
    return calibrate_and_report(model, variables, x)


def settings(model: nn.Module, x: Any) -> Iterator[tuple[str, Any]]:
    """The variables that each way to set steps gives, from the same weights."""
    variables = initialised(model, x)
    yield "init", variables
    yield "calibrate", calibrated(model, spoiled(variables), x)


@pytest.mark.parametrize(
    "body",
    [Body, *(full(body, id=body.__name__) for body in (ConvBody, Pair, Mapped, nn.remat(Body), nn.jit(Body)))],
)
def test_layers_in_a_loop_get_the_steps_of_the_layers_written_out(body: Any) -> None:
    x = jax.random.normal(KEY, (2, 4, 3, 6)) if body is ConvBody else X
    plain, loop = WrittenOut(body), Stacked(body)
    expected = None
    for name, variables in settings(loop, x):
        if expected is None:
            expected = calibrated(plain, spoiled(written_out(variables)), x)
            chex.assert_trees_all_close(applied(loop, variables, x), applied(plain, expected, x), rtol=1e-4, atol=1e-4)
        chex.assert_trees_all_close(written_out(variables), expected, rtol=1e-5, atol=1e-5, custom_message=name)


@pytest.mark.full
def test_steps_are_the_same_whether_compiled_or_not_and_with_reports() -> None:
    model = Stacked()
    compiled = initialised(model, X)
    chex.assert_trees_all_close(model.init(KEY, X), compiled, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(cimjax.calibrate(model, spoiled(compiled), X), compiled, rtol=1e-5, atol=1e-5)
    variables, reports = reported(model, X)
    chex.assert_trees_all_close(variables, compiled, rtol=1e-6, atol=1e-6)
    assert set(reports) == {"body/fc"} and reports["body/fc"].groups == 2 * CHANNELS


class Copies(nn.Module):
    """Copies of a layer, each on its own part of the input, with parameters of their own or shared."""

    shared: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes, split = {"params": None if self.shared else 0}, {"params": not self.shared}
        return nn.vmap(CIMDense, variable_axes=axes, split_rngs=split)(8, spec=SIGNED, name="fc")(x)


@pytest.mark.parametrize("shared", [full(False), True])
def test_mapped_layers_are_set_each_by_itself_or_all_together(shared: bool) -> None:
    x, one = X.reshape(3, 4, CHANNELS) * jnp.asarray([1.0, 3.0, 0.2])[:, None, None], CIMDense(8, spec=SIGNED)
    expected = None
    for name, variables in settings(Copies(shared), x):
        if expected is None:
            own = [
                variables["params"]["fc"] if shared else jax.tree.map(lambda p, i=i: p[i], variables["params"]["fc"])
                for i in range(3)
            ]
            each = [calibrated(one, {"params": params}, part)["params"] for params, part in zip(own, x, strict=True)]
            stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *each)
            together = jax.tree.map(lambda parts: jnp.mean(parts, axis=0), stacked)
            expected = {"params": {"fc": together if shared else stacked}}
        chex.assert_trees_all_close(dict(variables), expected, rtol=1e-5, atol=1e-5, custom_message=name)


class Repeated(nn.Module):
    """One layer, called several times."""

    calls: int
    lift: Callable[[Any], Any] = staticmethod(lambda layer: layer)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = self.lift(Body)(name="shared")
        for _ in range(self.calls):
            x, _ = layer(x)
        return x


@pytest.mark.parametrize(
    "calls,lift",
    [pytest.param(2, lambda layer: layer, id="twice"), full(3, nn.remat, id="remat"), full(3, nn.jit, id="jit")],
)
def test_a_layer_called_several_times_gets_the_mean_of_what_each_call_sets(calls: int, lift: Any) -> None:
    body, given = Body(), None
    for name, variables in settings(Repeated(calls, lift), X):
        if given is None:
            given, found, y = variables["params"]["shared"], [], X
            for _ in range(calls):
                found.append(calibrated(body, {"params": given}, y)["params"])
                mean = jax.tree.map(lambda *each: sum(each) / len(each), *found)
                y, _ = applied(body, {"params": mean}, y)
            assert not np.allclose(found[0]["fc"]["psum_log_step"], mean["fc"]["psum_log_step"], atol=1e-2)
        chex.assert_trees_all_close(variables["params"]["shared"], mean, rtol=1e-5, atol=1e-5, custom_message=name)


def test_a_tensor_quantized_in_two_places_gets_the_mean_of_both() -> None:
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            quantize = Quantize(SIGNED.activation, name="quantize")
            return quantize(x).value + quantize(4 * x).value

    one = initialised(Quantize(SIGNED.activation), X)["params"]["log_step"]
    for name, variables in settings(Twice(), X):
        np.testing.assert_allclose(
            variables["params"]["quantize"]["log_step"], one + np.log(2), rtol=1e-5, err_msg=name
        )


class Cell(nn.RNNCellBase):
    """A recurrent cell of array layers."""

    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        layer = functools.partial(CIMDense, 8, spec=SIGNED)
        carry = jnp.tanh(layer(name="input")(x) + layer(name="hidden")(carry))
        return carry, carry

    @nn.nowrap
    def initialize_carry(self, rng: Any, shape: Any) -> jax.Array:
        return jnp.zeros((*shape[:-1], 8))

    num_feature_axes = 1


class Loop(nn.Module):
    """A loop whose turns share a layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.scan(Body, variable_broadcast="params", split_rngs={"params": False}, length=2)(name="body")(x, None)[
            0
        ]


@pytest.mark.parametrize(
    "model,x,name",
    [
        pytest.param(nn.RNN(Cell()), X.reshape(3, 4, CHANNELS), "cell/input", id="RNN"),
        full(Loop(), X, "body/fc", id="scan"),
    ],
)
def test_layers_that_the_turns_of_a_loop_share_are_refused(model: nn.Module, x: jax.Array, name: str) -> None:
    refused = rf"^`{name}` is shared by the iterations of a loop .* cimjax.without_calibration\(\), then calibrate"
    with without_calibration():
        variables = initialised(model, x)
    for attempt in (
        lambda: model.init(KEY, x),
        lambda: initialised(model, x),
        lambda: cimjax.calibrate(model, variables, x),
    ):
        with pytest.raises(ValueError, match=refused):
            attempt()


@pytest.mark.full
def test_a_cell_calibrated_by_itself_serves_its_loop() -> None:
    """What the message of a refusal says: the cell by itself, on what one turn sees."""
    series = X.reshape(3, 4, CHANNELS)
    rnn, (carry, now) = nn.RNN(Cell()), (jnp.tanh(X[:3, :8]), series[:, 1])
    with without_calibration():
        variables = initialised(rnn, series)
    cell = cimjax.calibrate(Cell(), {"params": variables["params"]["cell"]}, carry, now)
    set_now = {"params": variables["params"] | {"cell": cell["params"]}}
    exact = rnn_exactly(variables["params"]["cell"], series)
    errors = [float(jnp.linalg.norm(applied(rnn, each, series) - exact)) for each in (variables, set_now)]
    assert np.isfinite(errors).all() and errors[1] < 0.5 * errors[0], errors


def rnn_exactly(params: Any, series: jax.Array) -> jax.Array:
    carry, outputs = jnp.zeros((len(series), 8)), []
    for index in range(series.shape[1]):
        carry = jnp.tanh(
            sum(
                v @ params[n]["kernel"] + params[n]["bias"] for n, v in (("input", series[:, index]), ("hidden", carry))
            )
        )
        outputs.append(carry)
    return jnp.stack(outputs, axis=1)


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What is said inside, also by programs that still run."""
    lines: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
        jax.effects_barrier()
    for warning in caught:
        assert warning.category is CalibrationWarning, warning
        # The line of whoever called.
        assert warning.filename == __file__ or "threading" in warning.filename or "jax" in warning.filename, warning
    lines.extend(str(warning.message) for warning in caught)


class Branches(nn.Module):
    """Layers of which one is chosen when the program runs, or that a loop of unknown length calls."""

    kind: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        names = ("one", "two") if self.kind != "while_loop" else ("one",)
        layers = [CIMDense(CHANNELS, spec=SIGNED, name=name) for name in names]
        if self.is_initializing():
            for layer in layers:
                layer(x)
        if self.kind == "while_loop":

            def turn(layer: Any, state: Any) -> Any:
                return state[0] + 1, layer(state[1])

            return nn.while_loop(lambda _, state: state[0] < 2, turn, layers[0], (0, x))[1]
        one = functools.partial(_call, index=0)
        two = functools.partial(_call, index=1)
        if self.kind == "cond":
            return nn.cond(x[0, 0] > 1e9, one, two, Both(layers), x)
        return nn.switch(jnp.int32(1), [one, two], Both(layers), x)


class Both(nn.Module):
    """Several layers as one module, as conditions take them."""

    layers: Any

    def __call__(self, x: jax.Array, index: int) -> jax.Array:
        return self.layers[index](x)


def _call(module: Any, x: jax.Array, index: int) -> jax.Array:
    return module(x, index)


@pytest.mark.parametrize("kind", [full("cond"), full("switch"), "while_loop"])
def test_layers_that_no_call_reached_are_named_and_stay_as_they_were(kind: str) -> None:
    model = Branches(kind)
    variables = initialised(model, X)
    alone = CIMDense(CHANNELS, spec=SIGNED)
    for params in variables["params"].values():
        chex.assert_trees_all_close(calibrated(alone, {"params": params}, X)["params"], params, atol=1e-5)
    with heard() as lines:
        found = calibrated(model, spoiled(variables), X)["params"]
    assert len(lines) == 1 and lines[0].startswith("one: no steps were set, it was not called")
    chex.assert_trees_all_equal(found["one"], spoiled(variables)["params"]["one"])
    if kind != "while_loop":
        chex.assert_trees_all_close(found["two"], variables["params"]["two"], rtol=1e-5, atol=1e-5)


DEAD = nn.relu(X).at[:, 16:].set(0)
BAD = {
    "negative": (X, r"\d\d% of the input's magnitude is negative and lost, .* signed=True, or put a ReLU before it\.$"),
    "constant": (jnp.zeros_like(X), r"steps were set from an input that is empty or the same everywhere, .*calibrate"),
    "ones": (jnp.ones_like(X), r"steps were set from an input that is empty or the same everywhere"),
    "no images": (X[:0], r"steps were set from an input that is empty or the same everywhere"),
    "missing": (nn.relu(X).at[3, 4].set(jnp.nan), r"1 of its input's values are NaN or infinite"),
    "single": (nn.relu(X[:1]), r"16 ADC steps were set from one partial sum each; give more examples"),
    "silent": (DEAD, r"8 of 16 ADC steps saw partial sums of 0 alone and stay at 1; calibrate on data"),
    "clipped": (nn.relu(X).at[0, 0].set(1e4), r"\d\d% of the input's magnitude lies beyond its codes"),
}


@pytest.mark.parametrize("x,line", BAD.values(), ids=BAD)
def test_what_data_cannot_tell_is_one_line_of_its_layer(x: jax.Array, line: str) -> None:
    ((name, message),) = messages(jax.device_get(reported(Net(), x)[1]))
    assert name == "fc" and re.match(rf"fc: {line}", message), message


@pytest.mark.parametrize("model", [Net(), full(Stacked(functools.partial(Body, UNSIGNED)))], ids=["Net", "Stacked"])
def test_a_layer_speaks_once_by_each_way_to_set_steps(model: nn.Module) -> None:
    with heard() as at_init:
        variables = model.init(KEY, X)
    with heard() as compiled:
        initialised(model, X)
    with heard() as calibrating:
        cimjax.calibrate(model, variables, X)
    for lines in (at_init, compiled, calibrating):
        assert len(lines) == 1 and re.match(rf"(body/)?fc: {BAD['negative'][1]}", lines[0]), lines


@pytest.mark.full
def test_weights_of_zero_and_fixed_steps_that_are_too_small_are_said() -> None:
    net, x = Net(), nn.relu(X)
    variables = net.init(KEY, x)
    kernel = variables["params"]["fc"]["kernel"].at[:, 2].set(0)
    with heard() as lines:
        cimjax.calibrate(net, {"params": {"fc": variables["params"]["fc"] | {"kernel": kernel}}}, x)
    assert len(lines) == 1 and lines[0].startswith("fc: 2 of its weight steps have weights of 0 alone")
    fixed = ActivationSpec(bits=4, step="fixed", full_scale=0.1)
    with heard() as lines:
        Net(dataclasses.replace(UNSIGNED, activation=fixed)).init(KEY, x)
        Quantize(fixed).init(KEY, x)
    assert len(lines) == 2 and "beyond its codes and is lost" in lines[0] and "a larger full_scale" in lines[1]
    _, reports = calibrate_and_report(Quantize(fixed), {}, x)
    assert reports[""].clipped > 0.4


@pytest.mark.parametrize(
    "activation",
    [
        {"bits": 1},
        full({"bits": 2}),
        full({"bits": 8}),
        full({"bits": 1, "signed": True}),
        full({"bits": 1.5, "signed": True}),
        full({"bits": 3, "signed": True}),
    ],
    ids=str,
)
def test_nothing_is_said_of_ordinary_data(activation: dict[str, Any]) -> None:
    spec = dataclasses.replace(UNSIGNED, activation=ActivationSpec(**activation))
    _, reports = reported(Net(spec), X if spec.activation.signed else nn.relu(X))
    assert not list(messages(jax.device_get(reports)))


@pytest.mark.full
def test_a_report_is_of_what_a_layer_reads() -> None:
    """Of codes it says nothing, of an ideal ADC nothing about its steps; only what is asked for is set."""
    x, ideal = nn.relu(X), dataclasses.replace(UNSIGNED, adc=None)
    codes = Quantize(UNSIGNED.activation).init_with_output(KEY, x)[0]
    for spec in (UNSIGNED, ideal):
        variables, reports = reported(CIMDense(8, spec=spec), codes)
        assert set(reports) == {""} and "activation_log_step" not in variables["params"]
        assert reports[""].negative == 0 == reports[""].clipped and reports[""].calls == 1
        assert (reports[""].groups > 0) == (spec.adc is not None)
        again, _ = calibrate_and_report(CIMDense(8, spec=spec), spoiled(variables), codes, kinds=("psum",))
        chex.assert_trees_all_equal(again["params"]["weight_log_step"], spoiled(variables)["params"]["weight_log_step"])
    offset = dataclasses.replace(UNSIGNED, adc=ADCSpec(step="fixed", full_scale=30.0, offset=True))
    variables = CIMDense(8, spec=offset).init(KEY, x)
    assert set(variables["params"]) >= {"psum_offset"} and "psum_log_step" not in variables["params"]
    chex.assert_trees_all_close(cimjax.calibrate(CIMDense(8, spec=offset), spoiled(variables), x), variables, atol=1e-5)
    with pytest.raises(ValueError, match=r"`kinds` names \(\); give a tuple of activation, weight, psum"):
        cimjax.calibrate(CIMDense(8, spec=offset), variables, x, kinds=())


@pytest.mark.full
def test_steps_of_activations_may_be_fixed_or_powers_of_two() -> None:
    x = nn.relu(X)
    power = ActivationSpec(bits=4, step="power_of_two")
    fixed = ActivationSpec(bits=4, step="fixed", full_scale=3.0)
    for spec, layer in (
        (power, CIMDense(8, spec=dataclasses.replace(UNSIGNED, activation=power))),
        (power, Quantize(power)),
    ):
        params = layer.init(KEY, x)["params"]
        (name,) = [name for name in params if name.endswith("log_step") and not name.startswith(("weight", "psum"))]
        # Stored is what the data gives, used the nearest power.
        codes = Quantize(spec).apply({"params": {"log_step": params[name]}}, x)
        assert np.log2(codes.step) == np.rint(np.log2(codes.step)) == np.rint(params[name] / np.log(2))
    codes, variables = Quantize(fixed).init_with_output(KEY, x)
    assert codes.step == pytest.approx(0.2) and not variables.get("params")
    layer = CIMDense(8, spec=dataclasses.replace(UNSIGNED, activation=fixed))
    variables = layer.init(KEY, x)
    assert "activation_log_step" not in variables["params"]
    chex.assert_trees_all_close(layer.apply(variables, x), layer.apply(variables, codes), rtol=1e-5)


@pytest.mark.full
def test_flaxs_other_doors_set_steps_too_or_say_why_not() -> None:
    net, x = Net(), nn.relu(X)
    variables = net.init(KEY, x)
    chex.assert_trees_all_close(net.init_with_output(KEY, x)[1], variables)
    chex.assert_trees_all_close(nn.init(lambda net, x: net(x), net)(KEY, x), variables)
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, jax.eval_shape(net.init, KEY, x))
    # Only the network that is asked to sets steps.
    _, same = net.apply(variables, 3 * x, mutable=["params"])
    chex.assert_trees_all_equal(same["params"], variables["params"])
    chex.assert_trees_all_equal(net.bind(variables)(x), net.apply(variables, x))
    described = jax.ShapeDtypeStruct(x.shape, x.dtype)
    refused, said = ValueError, "^`fc` sets its steps from data, which lazy_init has not"
    if Version(flax.__version__) >= Version("0.12.12"):  # which gives zeros instead of data
        refused, said = cimjax.CalibrationWarning, "^fc: steps were set from an input that is empty or the same"
    with pytest.raises(refused, match=said):
        net.lazy_init(KEY, described)
    with without_calibration():
        lazy = net.lazy_init(KEY, described)
    chex.assert_trees_all_close(cimjax.calibrate(net, lazy, x), variables, rtol=1e-5, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "weight_log_step" in net.tabulate(KEY, x)

    class Sharing(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layer = CIMDense(8, spec=UNSIGNED)
            nn.share_scope(self, layer)
            return layer(x)

    assert set(Sharing().init(KEY, x)["params"]) == set(variables["params"]["fc"])
    for _, found in settings(Sharing(), x):
        chex.assert_trees_all_close(found["params"]["weight_log_step"].shape, (2, 8))


@pytest.mark.full
def test_a_layer_compiled_with_its_adcs_is_not_taken_for_one_without() -> None:
    class Compiled(nn.Module):
        spec: CIMSpec

        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.jit(CIMDense)(8, spec=self.spec, name="fc")(x)

    variables = Compiled(SIGNED).init(KEY, X)
    with_adcs = Compiled(SIGNED).apply(variables, X)
    with ideal_adcs():
        without = Compiled(SIGNED).apply(variables, X)
    ideal = Compiled(dataclasses.replace(SIGNED, adc=None)).apply(variables, X)
    chex.assert_trees_all_close(without, ideal, rtol=1e-5, atol=1e-5)
    assert not np.allclose(with_adcs, without, atol=1e-3)


class LoopAndParts(nn.Module):
    """Layers that `nn.scan` stacks, and such that `nn.vmap` stacks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = scanned(Body, 2)(name="loop")(x, None)[0]
        parts = nn.vmap(CIMDense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=1, out_axes=1)
        return parts(3, spec=SIGNED, name="parts")(x.reshape(len(x), 3, -1))


def test_what_is_kept_is_found_in_stacks_too() -> None:
    x = jax.random.normal(jax.random.key(0), (6, 12))
    first = LoopAndParts().init(jax.random.key(1), x)["params"]
    flat = flax.traverse_util.flatten_dict(first, sep="/")
    layers = [path.removesuffix("/activation_log_step") for path in flat if path.endswith("activation_log_step")]
    assert len(layers) == 2
    wide = {**flat, **{f"{layer}/activation_log_step": flat[f"{layer}/activation_log_step"] + 1.0 for layer in layers}}
    variables = {"params": flax.traverse_util.unflatten_dict(wide, sep="/")}
    found = cimjax.calibrate(LoopAndParts(), variables, x, kept={(layer, "activation") for layer in layers})["params"]
    for path, value in flax.traverse_util.flatten_dict(found, sep="/").items():
        assert np.allclose(value, wide[path], atol=1e-5) == ("psum" not in path), path


@pytest.mark.parametrize("kept", [("layer_0", "weight"), ("layers_0", "weights"), "layers_0"])
def test_what_is_kept_must_be_there(kept: Any) -> None:
    model, x = nn.Sequential([cimjax.CIMDense(3)]), jax.random.uniform(jax.random.key(0), (8, 6))
    variables = model.init(jax.random.key(1), x)
    line = r"^`kept` has .*, which these variables do not have; give pairs of a layer and a kind, such as "
    with pytest.raises(ValueError, match=line):
        cimjax.calibrate(model, variables, x, kept=[kept])
