"""Plain convolutions, as the networks use them: Flax's own, with gradients of another program."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cimjax.nn.rules import plain_conv

LAYERS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "plain": ((3, 7, 6, 5), {"kernel_size": (3, 3)}),
    "strided": ((3, 8, 8, 5), {"kernel_size": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}),
    "pointwise": ((3, 7, 6, 5), {"kernel_size": (1, 1), "strides": (2, 1), "use_bias": False}),
    "dilated": ((3, 9, 8, 5), {"kernel_size": (3, 2), "kernel_dilation": (2, 3), "padding": "VALID"}),
    "enlarged": ((3, 5, 4, 5), {"kernel_size": (3, 3), "input_dilation": 2, "padding": 1}),
    "grouped": ((3, 7, 6, 4), {"kernel_size": (3, 3), "feature_group_count": 2}),
    "circular": ((3, 7, 6, 5), {"kernel_size": (3, 3), "padding": "CIRCULAR"}),
    "one axis": ((3, 11, 5), {"kernel_size": (4,), "strides": (3,)}),
    "without examples": ((0, 7, 6, 5), {"kernel_size": (3, 3)}),
}


def built(name: str, **more: Any) -> tuple[nn.Module, nn.Module, Any, jax.Array]:
    """A convolution of the networks, the same as Flax has it, their parameters and an input."""
    shape, options = LAYERS[name]
    both = [make(6, **options, **more) for make in (plain_conv, nn.Conv)]
    x = jax.random.normal(jax.random.key(0), shape)
    return *both, both[1].init(jax.random.key(1), x), x


def results(layer: nn.Module, variables: Any, x: jax.Array) -> Any:
    y, pull = jax.vjp(layer.apply, variables, x)
    return y, pull(jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape).astype(y.dtype))


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    """Within so much of each array's norm."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)


@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_are_those_of_flax(name: str) -> None:
    layer, flax, variables, x = built(name)
    np.testing.assert_array_equal(layer.apply(variables, x), flax.apply(variables, x))
    assert_close(jax.jit(results, static_argnums=0)(layer, variables, x), results(flax, variables, x), 1e-6)


@pytest.mark.parametrize("more", [{"dtype": jnp.bfloat16}, {"dtype": jnp.float16, "param_dtype": jnp.float16}])
def test_short_numbers_stay_short(more: dict[str, Any]) -> None:
    layer, flax, variables, x = built("plain", **more)
    assert_close(results(layer, variables, x), results(flax, variables, x), 0.01)


def test_mapped_over_kernels_and_inputs() -> None:
    layer, flax, variables, x = built("strided")
    many = jax.tree.map(lambda values: jnp.stack([values, 2 * values, -values]), variables)
    inputs = jnp.stack([x, x + 1, x * x])
    for axes, given in ({(0, None): (many, x), (None, 0): (variables, inputs), (0, 0): (many, inputs)}).items():
        got, want = (jax.vmap(lambda *of, one=one: results(one, *of), axes)(*given) for one in (layer, flax))
        assert_close(got, want, 1e-6)


def test_second_derivatives() -> None:
    layer, flax, variables, x = built("one axis")

    def curvature(of: nn.Module) -> Any:
        def loss(variables: Any) -> jax.Array:
            return jnp.sum(jnp.sin(of.apply(variables, x)))

        return jax.jvp(jax.grad(loss), (variables,), (jax.tree.map(jnp.cos, variables),))[1]

    assert_close(curvature(layer), curvature(flax), 1e-5)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere nothing is computed apart")
def test_what_a_weight_gradient_reads_is_written_first() -> None:
    """A branch of its own in the compiled gradient, which XLA would otherwise join to the convolution."""

    def branches(layer: nn.Module) -> int:
        def loss(variables: Any, x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(layer.apply(variables, nn.relu(x))))

        compiled = jax.jit(jax.grad(loss)).lower(variables, x).compile()
        return compiled.as_text().count(" conditional(")

    layer, flax, variables, x = built("plain")
    assert branches(layer) == 1
    assert branches(flax) == 0
