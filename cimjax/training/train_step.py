"""One step of training and one of evaluation: pure functions of a state and a batch. What a researcher edits.

Everything random in a step is a function of (seed, step), so that a run can stop anywhere and go on. Where batches come
from is in `cimjax.training.batches`, how a step is spread over devices in `cimjax.training.parallel`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from cimjax.nn.ideal import ideal_adcs
from cimjax.training.metrics import gradient_ratios
from cimjax.training.random_streams import Stream, chip_key, stream_key
from cimjax.training.state import Batch, TrainState

# `loss_fn(logits, batch)`: () or (N,) float32; a step takes the mean.
LossFunction = Callable[[Array, Batch], Array]


def cross_entropy(logits: Array, batch: Batch) -> Array:
    """Of each image, (N,)."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), batch.targets)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is fixed while a run trains.

    accumulate: parts that a batch is computed in, one after the other, with the mean of their gradients.
    ema: the decay of the average of the parameters, at first at most (1 + step) / (10 + step); 0 without one.
    fresh_chips: whether every step draws a chip of its own (`variation`), instead of one for the run.
    axis_name: the mapped axis over which a batch is spread; None on one device.
    ideal_adcs: whether the network is computed without its ADCs: the first stage of training in two.
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    loss_fn: LossFunction = cross_entropy
    accumulate: int = 1
    ema: float = 0.0
    fresh_chips: bool = False
    axis_name: str | None = None
    ideal_adcs: bool = False

    def mode(self, *, train: bool) -> dict[str, Any]:
        """The argument `train`, for networks that have it."""
        return {"train": train} if "train" in inspect.signature(type(self.model).__call__).parameters else {}

    def adcs(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the network is computed with its ADCs or without."""
        return ideal_adcs() if self.ideal_adcs else contextlib.nullcontext()

    def apply(self, variables: Any, images: Array, *, train: bool, **options: Any) -> Any:
        """What the network makes of normalised images, with its ADCs or without."""
        with self.adcs():
            return self.model.apply(variables, images, **self.mode(train=train), **options)


def step_rngs(setup: Setup, state: TrainState, part: int | Array = 0) -> dict[str, Array]:
    """The random keys of the training step that a state is about to make: the chip's, that of dropout, and one for
    streams of other names."""
    seed, step = state.seed, state.step
    chip = stream_key(seed, Stream.CHIP_OF_STEP, step) if setup.fresh_chips else chip_key(seed)
    counted = (step, part) if setup.axis_name is None else (step, part, lax.axis_index(setup.axis_name))
    dropout, others = (stream_key(seed, stream, *counted) for stream in (Stream.DROPOUT, Stream.NETWORK))
    return {"variation": chip, "dropout": dropout, "params": others}


def loss(params: Any, setup: Setup, state: TrainState, batch: Batch, part: int | Array = 0) -> tuple[Array, Any]:
    """The mean loss of a batch in training mode; also the changed collections and the logits."""
    variables = {"params": params, **state.collections}
    rngs, mutable = step_rngs(setup, state, part), list(state.collections)
    logits, changed = setup.apply(variables, batch.images, train=True, mutable=mutable, rngs=rngs)
    return jnp.mean(setup.loss_fn(logits, batch)), (dict(changed), logits)


def gradients(setup: Setup, state: TrainState, batch: Batch) -> tuple[Any, Any, dict[str, Array]]:
    """The gradient of the mean loss, the collections as the network leaves them, and `loss` and `accuracy`; on every
    device those of the whole batch."""

    def one(collections: Any, part: tuple[Array, Batch]) -> tuple[Any, Any]:
        now, share = state.replace(collections=collections), part[1]
        (value, (changed, logits)), gradient = jax.value_and_grad(loss, has_aux=True)(
            state.params, setup, now, share, part[0]
        )
        accuracy = jnp.mean(jnp.argmax(logits, -1) == share.labels, dtype=jnp.float32)
        return changed, (gradient, {"loss": value, "accuracy": accuracy})

    if setup.accumulate == 1:
        collections, (gradient, metrics) = one(state.collections, (jnp.int32(0), batch))
    else:
        parts = jax.tree.map(lambda x: x.reshape(setup.accumulate, -1, *x.shape[1:]), batch)
        numbers = jnp.arange(setup.accumulate)
        collections, each = lax.scan(one, state.collections, (numbers, parts))
        gradient, metrics = jax.tree.map(lambda x: jnp.mean(x, 0), each)
    if setup.axis_name is not None:
        gradient, metrics = lax.pmean((gradient, metrics), setup.axis_name)
        collections = jax.tree.map(lambda x: _mean_over_devices(x, setup.axis_name), collections)
    return gradient, collections, metrics


def _decay(setup: Setup, state: TrainState) -> Array:
    """What the average keeps of itself in a step: less at first, or it would hold the random weights for long."""
    return jnp.minimum(setup.ema, (1 + state.step) / (10 + state.step))


def _mean_over_devices(x: Array, axis_name: str | None) -> Array:
    return lax.pmean(x, axis_name) if jnp.issubdtype(x.dtype, jnp.floating) else lax.pmax(x, axis_name)


def train_step(setup: Setup, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step.

    Returns:
      The next state, and `loss`, `accuracy`, `failed_at` and the ratios of `metrics.gradient_ratios`.
    """
    gradient, collections, metrics = gradients(setup, state, batch)
    metrics |= gradient_ratios(state.params, gradient)
    leaves = jax.tree.leaves((metrics["loss"], gradient))
    wrong = sum(jnp.sum(~jnp.isfinite(value), dtype=jnp.float32) for value in leaves)
    # The root keeps XLA from computing the whole sum again in the update of every parameter, which made programs
    # ten times as long: it repeats cheap operations only.
    going_on = (jnp.sqrt(wrong) == 0) & (state.failed_at < 0)
    updates, opt_state = setup.optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = optax.incremental_update(params, state.average, 1 - _decay(setup, state)) if setup.ema else None
    moved = state.replace(
        step=state.step + 1, params=params, collections=collections, opt_state=opt_state, average=average
    )
    state = jax.tree.map(lambda new, old: jnp.where(going_on, new, old), moved, state).replace(
        failed_at=jnp.where(going_on | (state.failed_at >= 0), state.failed_at, state.step)
    )
    return state, {**metrics, "failed_at": state.failed_at}


def eval_step(setup: Setup, state: TrainState, batch: Batch, real: Array, chip: Array) -> dict[str, Array]:
    """Sums over a batch that may be padded: `correct` and `loss` (cross entropy) of the `real` images.

    Args:
      real: (N,) bool, False at padding.
      chip: the random key of the chip that evaluates, `chip_key(state.seed)` for the run's own.
    """
    rngs = {"variation": chip, "params": chip}
    logits = setup.apply(state.variables, batch.images, train=False, rngs=rngs).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    right = jnp.argmax(logits, -1) == batch.labels
    return {"correct": jnp.sum(right & real), "loss": jnp.sum(jnp.where(real, losses, 0.0))}
