"""The optimizer: which parameter gets which rate and decay, by its name, and the schedule of the rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from cimjax.nn.parameters import kind_of, trained_as
from cimjax.spec.base import LARGEST_COUNT

# A schedule after the warm-up: `schedule(peak, steps, options)`, in the words and by the functions of optax.
SCHEDULES: dict[str, Callable[[float, int, Any], optax.Schedule]] = {
    "cosine": lambda peak, steps, options: optax.cosine_decay_schedule(peak, steps, options.alpha),
    "constant": lambda peak, steps, options: optax.constant_schedule(peak),
    "linear": lambda peak, steps, options: optax.linear_schedule(peak, peak * options.alpha, steps),
    "polynomial": lambda peak, steps, options: optax.polynomial_schedule(
        peak, peak * options.alpha, options.power, steps
    ),
    "exponential": lambda peak, steps, options: optax.exponential_decay(peak, steps, options.decay_rate),
    "piecewise_constant": lambda peak, steps, options: optax.piecewise_constant_schedule(
        peak, {round(part * steps): options.decay_rate for part in options.boundaries}
    ),
    "cosine_onecycle": lambda peak, steps, options: optax.cosine_onecycle_schedule(steps, peak),
    "linear_onecycle": lambda peak, steps, options: optax.linear_onecycle_schedule(steps, peak),
    "sgdr": lambda peak, steps, options: optax.join_schedules(
        [optax.cosine_decay_schedule(peak, -(-steps // options.cycles), options.alpha)] * options.cycles,
        [-(-steps // options.cycles) * (number + 1) for number in range(options.cycles - 1)],
    ),
}


def total_steps(config: ConfigDict, images: int) -> int:
    """Optimizer steps of a whole run: `epochs` epochs of whole batches.

    Raises:
      ValueError: for a batch larger than the data, or a run without end.
    """
    steps = config.epochs * steps_per_epoch(config, images)
    if steps > LARGEST_COUNT:
        raise ValueError(f"`config.epochs` is {config.epochs}: more than {LARGEST_COUNT} steps; give fewer epochs.")
    return math.ceil(round(steps, 6))  # 1.1 times 100 is a little more than 110


def steps_per_epoch(config: ConfigDict, images: int) -> int:
    """Whole batches in the training set."""
    if not 1 <= config.batch_size <= images:
        raise ValueError(f"`config.batch_size` is {config.batch_size}; give 1 to {images}, the number of images.")
    return images // config.batch_size


def learning_rate(config: ConfigDict, images: int) -> optax.Schedule:
    """Linear warm-up over `warmup_epochs`, then `optimizer.schedule` over the rest, by default a cosine down to 0."""
    total, options = max(1, total_steps(config, images)), config.optimizer
    warmup = round(min(total - 1, config.warmup_epochs * steps_per_epoch(config, images)))
    after = SCHEDULES[options.schedule](options.learning_rate, total - warmup, options.schedule_options)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, options.learning_rate, warmup), after], [warmup])


def make_optimizer(config: ConfigDict, images: int) -> optax.GradientTransformation:
    """SGD with momentum or AdamW; decay on kernels only; steps and offsets at `step_factor` times the rate; what
    `config.frozen` names is left as it is.

    With `clip_norm` the gradient of all parameters together is scaled down to that norm first.
    """
    options, rate = config.optimizer, learning_rate(config, images)
    decay = _at(optax.add_decayed_weights(options.weight_decay), lambda path: kind_of(path) == "kernel")
    steps = _at(optax.scale(options.step_factor), lambda path: kind_of(path) == "step")
    frozen = _at(optax.set_to_zero(), lambda path: trained_as(path) in config.frozen)
    last = [optax.scale_by_learning_rate(rate), *([frozen] if config.frozen else [])]
    clip = [optax.clip_by_global_norm(options.clip_norm)] if options.clip_norm else []
    if options.name == "sgd":
        moments = optax.trace(options.momentum, nesterov=options.nesterov)
        return optax.chain(*clip, decay, moments, steps, *last)
    return optax.chain(*clip, optax.scale_by_adam(), decay, steps, *last)


def _at(change: optax.GradientTransformation, chosen: Callable[[tuple[Any, ...]], bool]) -> Any:
    """A change of the parameters at some tree paths alone."""
    return optax.masked(change, lambda params: jax.tree_util.tree_map_with_path(lambda path, _: chosen(path), params))
