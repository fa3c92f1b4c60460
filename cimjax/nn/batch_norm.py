"""Statistics of batch normalisation, taken anew: those of given batches instead of the running ones.

What stands before a layer of batch normalisation may change after the network was trained: weights are put into arrays,
ADCs get fewer bits, weights are averaged. Its running statistics are then those of another network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from cimjax.core.programs.cpu import compiler_options

# The collection in which `flax.linen.BatchNorm` keeps running statistics.
STATISTICS = "batch_stats"


def update_batch_norm(
    model: nn.Module, variables: Mapping[str, Any], batches: Iterable[Any], **kwargs: Any
) -> dict[str, Any]:
    """A network's variables with the mean of the statistics of some batches in every layer of batch normalisation,
    weighted by their images, whatever the momentum of its running ones. Nothing else changes.

    Without it, a network that `calibrate` has given ADCs of few bits loses more than it must (docs/accuracy.md
    has figures). A few thousand images are enough, augmented as in training: a network is used to those.

    Args:
      model: any Flax module with `flax.linen.BatchNorm`, or what else keeps running means in `batch_stats`.
      variables: of the network; not changed.
      batches: of images, each (N, ...) with N of at least 2, as the network takes them.
      **kwargs: what else `model.apply` takes, with the switch by which batch normalisation reads the batch, such as
        `train=True`, and `rngs`, the same for every batch.

    Returns:
      Variables with new `batch_stats`.

    Raises:
      ValueError: without batches, for variables without `batch_stats`, or where no statistic follows the batch.

    Source: Sun et al., "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural Networks", NeurIPS
    2019, whose networks are quantized without training so; Nagel et al., "Overcoming oscillations in quantization-aware
    training", ICML 2022, section 4.

    >>> from flax import linen as nn
    >>> class Net(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train=False):
    ...         return nn.BatchNorm(use_running_average=not train)(x)
    >>> images = 3.0 + jax.random.normal(jax.random.key(0), (512, 4))
    >>> variables = Net().init(jax.random.key(1), images)
    >>> float(Net().apply(variables, images).mean().round(1))
    3.0
    >>> variables = update_batch_norm(Net(), variables, [images[:256], images[256:]], train=True)
    >>> bool(jnp.abs(Net().apply(variables, images).mean()) < 0.01)
    True
    """
    if STATISTICS not in variables:
        raise ValueError(f"`variables` have no `{STATISTICS}` of batch normalisation: there is nothing to update.")
    if hasattr(batches, "shape"):
        raise ValueError(f"`batches` is one array, of shape {batches.shape}; give a list of batches, as in [images].")

    @jax.jit(compiler_options=compiler_options())
    def of_batch(variables: Any, batch: Any) -> tuple[Any, Array]:
        return batch_statistics(model.apply, variables, batch, **kwargs)

    images, total, moved = 0, None, False
    for batch in batches:
        found, follows = of_batch(dict(variables), batch)
        count = len(jax.tree.leaves(batch)[0])
        weighted = jax.tree.map(lambda value, count=count: value * count, found)
        total = weighted if total is None else jax.tree.map(jnp.add, total, weighted)
        images, moved = images + count, moved or bool(follows)
    if total is None:
        raise ValueError("`batches` has no batch; give an iterable of images as the network takes them, (N, ...).")
    if not moved:
        raise ValueError(
            "no statistic follows the batch; give the switch that the network has for training, such as `train=True`."
        )
    return {**variables, STATISTICS: jax.tree.map(lambda value: value / images, total)}


def batch_statistics(
    apply: Callable[..., Any], variables: Mapping[str, Any], images: Any, **kwargs: Any
) -> tuple[Any, Array]:
    """The statistics of one batch, of the structure of the running ones, which stay where a layer does not read the
    batch; and whether any layer does, () bool.

    What a batch does to running statistics is linear, `m old + (1 - m) its own`, so that two updates tell both `m` and
    its own, whatever layers have for `m`. They start far enough apart that large statistics do not hide `m`.

    Args:
      apply: `model.apply`, or what takes the same arguments.
      images: (N, ...), as the network takes them.
      **kwargs: what else `apply` takes in training.
    """
    running, mutable = variables[STATISTICS], [name for name in variables if name != "params"]

    def updated(start: Any) -> Any:
        return apply({**variables, STATISTICS: start}, images, mutable=mutable, **kwargs)[1][STATISTICS]

    from_zero = updated(jax.tree.map(jnp.zeros_like, running))
    start = jax.tree.map(lambda zero: 1 + jnp.abs(zero), from_zero)
    parts = jax.tree.map(lambda first, zero, then: 1 - (then - zero) / first, start, from_zero, updated(start))

    def own(zero: Array, part: Array, old: Array) -> Array:
        return jnp.where(part > 0, zero / jnp.where(part > 0, part, 1), old)

    follows = jnp.any(jnp.stack([jnp.any(part > 0) for part in jax.tree.leaves(parts)]))
    return jax.tree.map(own, from_zero, parts, running), follows
