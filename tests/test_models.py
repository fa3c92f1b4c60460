"""The networks: sizes as published, the same in full precision and through arrays, and rules for single layers."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cimjax
from cimjax.hardware.survey import layers_of
from cimjax.nn.models import build_model
from cimjax.nn.rules import conv_maker
from cimjax.spec.rules import Rules

SMALL = cimjax.CIMSpec(array=cimjax.ArraySpec(rows=64, columns=64))


def network(
    name: str, spec: cimjax.CIMSpec | None = None, rules: Rules = (), classes: int = 10, **options: Any
) -> nn.Module:
    return build_model(name, classes=classes, conv=conv_maker(spec), rules=rules, **options)


def parameters(model: nn.Module, size: int, channels: int = 3) -> dict[str, tuple[int, ...]]:
    """Shapes of weights, biases and normalisation, by path; steps and offsets left out."""
    images = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), images)["params"]
    flat = {
        "/".join(part.key for part in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    return {path: shape for path, shape in flat.items() if not path.endswith(("step", "offset"))}


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.parametrize(
    "name,classes,size,options,published",
    [
        # He et al., table 6: 0.27 M; with projections 2,752 more.
        ("resnet20", 10, 32, {}, 269_722),
        ("resnet20", 100, 32, {}, 275_572),
        ("resnet20", 10, 32, {"shortcut": "projection"}, 272_474),
        # The counts of the usual implementations for 1,000 classes.
        ("resnet18", 1000, 224, {}, 11_689_512),
        ("resnet50", 1000, 224, {}, 25_557_032),
    ],
)
def test_parameter_counts_are_the_published_ones(
    name: str, classes: int, size: int, options: dict[str, Any], published: int
) -> None:
    full = parameters(network(name, classes=classes, **options), size)
    assert count(full) == published


def test_the_same_weights_go_through_arrays_so_that_pretrained_ones_drop_in() -> None:
    small = {"blocks": (2, 1), "widths": (8, 16), "shortcut": "projection", "bottleneck": True}
    assert parameters(network("resnet20", SMALL, **small), 8) == parameters(network("resnet20", **small), 8)


def test_layers_lie_where_expected() -> None:
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    layers = layers_of(network("resnet20", shortcut="projection"), images)
    assert [layer.name for layer in layers[:3]] == ["stem", "stage1_block1/conv1", "stage1_block1/conv2"]
    through = layers_of(network("resnet20", SMALL, blocks=(1,), widths=(4,)), images)
    assert [layer.name for layer in through if layer.spec is None] == ["stem", "classifier"]
    by_name = {layer.name: layer for layer in layers}
    assert by_name["stage3_block1/projection"].kernel == (1, 1, 32, 64)
    assert by_name["stage3_block3/conv2"].output == (8, 8)
    large = layers_of(network("resnet18"), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    assert (large[0].output, large[1].output, large[-2].output) == ((112, 112), (56, 56), (7, 7))


def test_a_tensor_that_two_layers_read_is_quantized_once() -> None:
    small = {"blocks": (1, 2), "widths": (4, 8), "shortcut": "projection"}
    names = set(parameters_with_steps(network("resnet20", SMALL, **small)))
    assert "stage2_block1/quantize/log_step" in names
    assert "stage2_block1/conv1/activation_log_step" not in names
    assert "stage2_block1/projection/activation_log_step" not in names
    assert "stage2_block2/conv1/activation_log_step" in names
    other = cimjax.CIMSpec(activation=cimjax.ActivationSpec(bits=8))
    rules = (("stage2_block1/projection", other),)
    names = set(parameters_with_steps(network("resnet20", SMALL, rules=rules, **small)))
    assert "stage2_block1/quantize/log_step" not in names
    assert "stage2_block1/projection/activation_log_step" in names


def parameters_with_steps(model: nn.Module) -> list[str]:
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), images)["params"]
    return ["/".join(part.key for part in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]


@pytest.mark.parametrize(
    "options",
    [{"preactivation": True}, pytest.param({"shortcut": "projection", "residual": "codes"}, marks=pytest.mark.full)],
    ids=str,
)
def test_narrow_networks_run_and_differentiate(options: dict[str, Any]) -> None:
    model = network("resnet20", SMALL, blocks=(1, 1), widths=(4, 8), **options)
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    variables = jax.jit(functools.partial(model.init, train=True))(jax.random.key(1), x)

    @jax.jit
    def gradient(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.square(logits))

        return jax.grad(loss)(params)

    for path, value in jax.tree_util.tree_leaves_with_path(gradient(variables["params"])):
        assert bool(jnp.all(jnp.isfinite(value))), path
        assert path[-1].key != "kernel" or bool(jnp.any(value != 0)), path


def test_what_a_network_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`model.name` is 'resnet21' \(did you mean 'resnet20'\?\)"):
        network("resnet21")
    with pytest.raises(ValueError, match=r"`shortcut` is 'padding'; allowed: pad, projection"):
        network("resnet20", shortcut="padding")
    with pytest.raises(ValueError, match=r"`residual` is 'narrow'; allowed: wide, codes"):
        network("resnet20", residual="narrow")
    with pytest.raises(ValueError, match=r"`width` is 0.01"):
        network("resnet20", width=0.01)
