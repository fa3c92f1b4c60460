"""The layers that a network is found to have, and what they take, however often and in whichever transform they run."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from cimjax import ADCSpec, ArraySpec, CIMConv, CIMDense, CIMSpec, layer_cost
from cimjax.hardware.survey import Layer, layers_of

SPEC = CIMSpec(adc=ADCSpec(bits=3), array=ArraySpec(rows=64, columns=64))
BATCH = 7


def found(model: nn.Module, *shape: int, batch: int = BATCH) -> list[Layer]:
    return layers_of(model, jax.ShapeDtypeStruct((batch, *shape), jnp.float32))


def require(layer: Layer, *, positions: int, copies: int = 1) -> None:
    """What a layer takes: conversions of so many positions over all copies, arrays and parameters once for each."""
    once = layer_cost(layer.kernel, (), SPEC, use_bias=layer.use_bias)
    cost = layer.cost
    assert cost is not None and layer.copies == copies
    assert cost.adc_conversions == positions * once.adc_conversions
    for name in ("arrays", "cells", "used_cells", "parameters", "dequantization_multiplications"):
        assert getattr(cost, name) == copies * getattr(once, name), name
    assert layer.parameters == cost.parameters


def dense(features: int = 16, name: str | None = None) -> CIMDense:
    return CIMDense(features, spec=SPEC, name=name)


@pytest.mark.parametrize("batch", [1, 2, BATCH])
def test_axes_between_batch_and_channels_are_positions_of_an_image(batch: int) -> None:
    for shape, positions in (((128,), 1), ((49, 128), 49), ((4, 5, 128), 20)):
        (layer,) = found(dense(), *shape, batch=batch)
        assert layer.output == shape[:-1]
        require(layer, positions=positions)
    for shape, output in (((8, 6, 3), (8, 6)), ((5, 8, 6, 3), (5, 8, 6))):
        (layer,) = found(CIMConv(8, (3, 3), spec=SPEC), *shape, batch=batch)
        assert layer.output == output
        require(layer, positions=8 * 6 * (5 if len(shape) == 4 else 1))


def test_a_single_image_without_a_batch_is_one_image() -> None:
    for model, shape, output in (
        (CIMConv(8, (3, 3), spec=SPEC), (8, 6, 3), (8, 6)),
        (CIMConv(8, (3,), spec=SPEC), (6, 3), (6,)),
        (dense(), (128,), ()),
    ):
        (layer,) = layers_of(model, jax.ShapeDtypeStruct(shape, jnp.float32))
        assert layer.output == output


class Merged(nn.Module):
    """Windows of an image in the batch axis, as attention over windows has them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return dense()(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class ForAll(nn.Module):
    """A product that does not depend on the images, such as one of embedded positions."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x + dense(x.shape[-1])(jnp.ones((1, *x.shape[1:])))


def test_windows_merged_into_the_batch_and_products_for_all_images_are_told_apart() -> None:
    (layer,) = found(Merged(), 48, 128)
    assert layer.output == (48,)
    require(layer, positions=48)
    (layer,) = found(ForAll(), 48, 128)
    require(layer, positions=48)


class Shared(nn.Module):
    """One convolution that is called three times, once on a smaller image, beside a full-precision one."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv, plain = CIMConv(3, (3, 3), spec=SPEC, name="conv"), nn.Conv(3, (1, 1), name="plain")
        x = plain(conv(plain(conv(x))))
        return conv(x[:, ::2, ::2])


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = CIMConv(3, (3, 3), spec=SPEC)
        return conv(conv(x))


def test_a_layer_that_is_called_again_is_one_set_of_arrays_that_is_read_more_often() -> None:
    conv, plain = found(Shared(), 8, 6, 3)
    assert (conv.name, conv.output, plain.name) == ("conv", (2 * 48 + 12,), "plain")
    require(conv, positions=2 * 48 + 12)
    assert plain.parameters == 3 * 3 + 3 and plain.output == (2, 8, 6)
    (conv,) = found(Twice(), 8, 6, 3)
    assert conv.output == (2, 8, 6)
    require(conv, positions=2 * 48)


class Body(nn.Module):
    @nn.compact
    def __call__(self, carry: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return nn.relu(dense(carry.shape[-1], name="dense")(carry)), None


class Scan(nn.Module):
    """A stack of three layers as one loop, with parameters of their own or the same for all."""

    stacked: bool
    axis: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        how: dict[str, Any] = {"variable_broadcast": "params"}
        if self.stacked:
            how = {"variable_axes": {"params": self.axis}}
        loop = nn.scan(Body, split_rngs={"params": self.stacked}, length=3, **how)
        return loop(name="loop")(x, None)[0]


class Mapped(nn.Module):
    """A layer for each of the five parts of an image, with parameters of their own or the same for all."""

    stacked: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = {"params": 0 if self.stacked else None}
        kind = nn.vmap(CIMDense, variable_axes=axes, split_rngs={"params": self.stacked}, in_axes=1, out_axes=1)
        return kind(16, spec=SPEC, name="parts")(x)


class ScanOfMapped(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        own = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        body = nn.vmap(Body, in_axes=(1, None), out_axes=1, **own)
        return nn.scan(body, length=3, **own)(name="loop")(x, None)[0]


class Cell(nn.RNNCellBase):
    @nn.compact
    def __call__(self, carry: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        carry = jnp.tanh(dense(name="hidden")(carry) + dense(name="inputs")(x))
        return carry, carry

    @nn.nowrap
    def initialize_carry(self, rng: jax.Array, input_shape: tuple[int, ...]) -> jax.Array:
        return jnp.zeros((*input_shape[:-1], 16))

    @property
    def num_feature_axes(self) -> int:
        return 1


class Recomputed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.remat(Body)(name="body")(x, None)[0]


@pytest.mark.parametrize(
    "model,shape,expected",
    [
        # Of every layer: its path, positions over all copies, copies.
        (Scan(stacked=True), (128,), {"loop/dense": (3, 3)}),
        (Scan(stacked=True, axis=-1), (128,), {"loop/dense": (3, 3)}),
        (Scan(stacked=True), (5, 128), {"loop/dense": (15, 3)}),
        (Scan(stacked=False), (128,), {"loop/dense": (3, 1)}),
        (Mapped(stacked=True), (5, 128), {"parts": (5, 5)}),
        (Mapped(stacked=False), (5, 128), {"parts": (5, 1)}),
        (ScanOfMapped(), (5, 128), {"loop/dense": (15, 15)}),
        (nn.RNN(Cell()), (11, 32), {"cell/hidden": (11, 1), "cell/inputs": (11, 1)}),
        (Recomputed(), (128,), {"body/dense": (1, 1)}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_layers_in_lifted_transforms_are_counted_as_often_as_they_run(
    model: nn.Module, shape: tuple[int, ...], expected: dict[str, tuple[int, int]]
) -> None:
    layers = {layer.name: layer for layer in found(model, *shape)}
    assert set(layers) == set(expected)
    for name, (positions, copies) in expected.items():
        require(layers[name], positions=positions, copies=copies)


class While(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = dense(128, name="layer")
        layer(x)
        return nn.while_loop(lambda _, y: jnp.sum(y) < 3, lambda _, y: layer(y), self, x)


def test_a_loop_of_unknown_length_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"The layer layer is in a loop of unknown length, .*; use `nn.scan`"):
        found(While(), 128)


def test_images_may_be_given_by_name() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool = False) -> Any:
            assert isinstance(train, bool)
            return CIMConv(8, (3, 3), spec=SPEC)(x)

    images = jax.ShapeDtypeStruct((7, 4, 4, 3), jnp.float32)
    assert layers_of(Net(), x=images, train=True) == layers_of(Net(), images, train=True)
