"""One step of training and one of evaluation: pure functions of a state and a batch.

Randomness and the order of the images are functions of (seed, step), so that a run can stop anywhere and go on. How
steps are spread over devices is in `cimjax.training.parallel`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from ml_collections import ConfigDict

from cimjax.nn.ideal import ideal_adcs
from cimjax.training.metrics import gradient_ratios
from cimjax.training.optimizer import is_kind


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes, and that a checkpoint holds.

    seed: () int32, of all randomness; an argument, so that programs are the same for every seed.
    step: () int32, optimizer steps done.
    failed_at: () int32, the step whose loss or gradient was not finite, -1 while there is none; from then on the state
      no longer changes, so that the failure can be looked at.
    params, batch_stats, opt_state: the network's and the optimizer's.
    first_steps: the stored steps and offsets as calibrated, by path.
    """

    seed: Array
    step: Array
    failed_at: Array
    params: Any
    batch_stats: Any
    opt_state: Any
    first_steps: dict[str, Array]


class Images(flax.struct.PyTreeNode):
    """A split on the device: uint8 `pixels` (N, H, W, C) and int32 `labels` (N,)."""

    pixels: Array
    labels: Array


def chip_key(seed: int | Array) -> Array:
    """The random key of a run's chip: with `variation`, the same cells wherever the run is trained or looked at.

    Args:
      seed: the run's, `TrainState.seed`.
    """
    return jax.random.fold_in(jax.random.key(seed), 1)


def step_rngs(state: TrainState) -> dict[str, Array]:
    """The random keys of the training step that a state is about to make: the chip's, and that of dropout."""
    return {
        "variation": chip_key(state.seed),
        "dropout": jax.random.fold_in(jax.random.key(state.seed), state.step),
    }


@dataclasses.dataclass(frozen=True)
class Stepper:
    """The functions of one run: what is fixed while it trains.

    mean, std: per channel, of pixels in 0..1.
    axis_name: the mapped axis over which a batch is spread; None on one device.
    ideal_adcs: whether the network is computed without its ADCs: the first stage of training in two.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    config: ConfigDict
    mean: tuple[float, ...]
    std: tuple[float, ...]
    axis_name: str | None = None
    ideal_adcs: bool = False

    def normalise(self, pixels: Array) -> Array:
        """Real images of uint8 pixels: zero mean and unit variance per channel."""
        mean, std = (np.asarray(value, np.float32) for value in (self.mean, self.std))
        return (pixels.astype(jnp.float32) / 255 - mean) / std

    def apply(self, variables: Any, images: Array, **options: Any) -> Any:
        """What the network makes of normalised images, with its ADCs or without."""
        with ideal_adcs() if self.ideal_adcs else contextlib.nullcontext():
            return self.model.apply(variables, images, **options)

    def train(self, state: TrainState, data: Images, order: Array) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step on the images that are due.

        Args:
          state: donated by the caller.
          data: the training split.
          order: (N,) int32, this epoch's order of the images.

        Returns:
          The next state, and `loss`, `accuracy`, `failed_at` and the ratios of `metrics.gradient_ratios`.
        """
        size = self.config.batch_size
        position = state.step % (data.labels.shape[0] // size)
        chosen = lax.dynamic_slice(order, (position * size,), (size,))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(state.seed), state.step), size)
        if self.axis_name is not None:
            share = size // lax.axis_size(self.axis_name)
            start = lax.axis_index(self.axis_name) * share
            chosen, keys = lax.dynamic_slice(chosen, (start,), (share,)), lax.dynamic_slice(keys, (start,), (share,))
        pixels = augment(data.pixels[chosen], keys, self.config.augment.shift, self.config.augment.flip)
        return self._update(state, pixels, data.labels[chosen])

    def train_many(
        self, state: TrainState, data: Images, order: Array, count: int
    ) -> tuple[TrainState, dict[str, Array]]:
        """`count` steps of `train` in one program; metrics have a leading axis of `count`."""
        if count == 1:
            state, metrics = self.train(state, data, order)
            return state, jax.tree.map(lambda value: value[None], metrics)
        return lax.scan(lambda state, _: self.train(state, data, order), state, length=count)

    def loss(self, params: Any, state: TrainState, pixels: Array, labels: Array) -> tuple[Array, tuple[Any, Array]]:
        """Mean cross entropy of a batch in training mode; also the new batch statistics and the logits."""
        logits, updated = self.apply(
            {"params": params, "batch_stats": state.batch_stats},
            self.normalise(pixels),
            train=True,
            mutable=["batch_stats"],
            rngs=step_rngs(state),
        )
        smooth = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), self.config.label_smoothing)
        mean = jnp.mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), smooth))
        return mean, (updated.get("batch_stats", {}), logits)

    def _update(self, state: TrainState, pixels: Array, labels: Array) -> tuple[TrainState, dict[str, Array]]:
        value_and_grad = jax.value_and_grad(self.loss, has_aux=True)
        (loss, (batch_stats, logits)), gradient = value_and_grad(state.params, state, pixels, labels)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == labels, dtype=jnp.float32)
        if self.axis_name is not None:
            loss, accuracy, gradient = lax.pmean((loss, accuracy, gradient), self.axis_name)
        wrong = sum(jnp.sum(~jnp.isfinite(value), dtype=jnp.float32) for value in jax.tree.leaves((loss, gradient)))
        # The root keeps XLA from computing the whole sum again in the update of every parameter, which made programs
        # ten times as long: it repeats cheap operations only.
        going_on = (jnp.sqrt(wrong) == 0) & (state.failed_at < 0)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        moved = (state.step + 1, optax.apply_updates(state.params, updates), batch_stats, opt_state)
        kept = (state.step, state.params, state.batch_stats, state.opt_state)
        step, params, batch_stats, opt_state = jax.tree.map(lambda new, old: jnp.where(going_on, new, old), moved, kept)
        failed_at = jnp.where(going_on | (state.failed_at >= 0), state.failed_at, state.step)
        metrics = {"loss": loss, "accuracy": accuracy, "failed_at": failed_at}
        metrics |= gradient_ratios(state.params, gradient)
        state = state.replace(
            step=step, failed_at=failed_at, params=params, batch_stats=batch_stats, opt_state=opt_state
        )
        return state, metrics

    def evaluate(self, state: TrainState, data: Images, real: Array) -> dict[str, Array]:
        """Sums over a batch of a split that is padded to whole batches: `correct` and `loss` of the `real` images.

        Args:
          real: (N,) bool, False at padding.
        """
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        rngs = {"variation": chip_key(state.seed)}
        logits = jnp.asarray(self.apply(variables, self.normalise(data.pixels), rngs=rngs), jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
        right = jnp.argmax(logits, -1) == data.labels
        return {"correct": jnp.sum(right & real), "loss": jnp.sum(jnp.where(real, loss, 0.0))}


def augment(pixels: Array, keys: Array, shift: int, flip: bool) -> Array:
    """Random shifts by up to `shift` pixels (edges filled with 0) and mirror images, each from its own key.

    Types are written out: with JAX_ENABLE_X64 others would be drawn, and other numbers of them.

    Args:
      pixels: (N, H, W, C) uint8.
      keys: (N,) random keys.
    """

    def one(image: Array, key: Array) -> Array:
        for_shift, for_flip = jax.random.split(key)
        if shift:
            padded = jnp.pad(image, ((shift, shift), (shift, shift), (0, 0)))
            corner = jax.random.randint(for_shift, (2,), 0, 2 * shift + 1, jnp.int32)
            image = lax.dynamic_slice(padded, (corner[0], corner[1], jnp.int32(0)), image.shape)
        return jnp.where(jax.random.bernoulli(for_flip, jnp.float32(0.5)), image[:, ::-1], image) if flip else image

    return jax.vmap(one)(pixels, keys) if shift or flip else pixels


def order_of_epoch(key: Array, epoch: int | Array, images: int) -> Array:
    """The order of the training images in an epoch: a permutation drawn from (seed, epoch), (N,) int32."""
    return jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, 3), epoch), images).astype(jnp.int32)


def stored_steps(params: Any) -> dict[str, Array]:
    """The stored steps and offsets of a network, by path."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    chosen = jax.tree.leaves(is_kind(params, "step"))
    return {
        "/".join(str(part.key) for part in path): value
        for (path, value), is_step in zip(flat, chosen, strict=True)
        if is_step
    }
