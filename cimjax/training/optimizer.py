"""The optimizer: which parameter gets which rate and decay, by its name, and the schedule of the rate."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from cimjax.spec.base import LARGEST_COUNT

# The last part of a parameter's path tells its kind.
STEP_SUFFIXES = ("log_step", "psum_offset", "reference_offset")
# Those of the ADCs among them.
ADC_SUFFIXES = ("psum_log_step", "psum_offset", "reference_log_step", "reference_offset")


def kind_of(path: tuple[Any, ...]) -> str:
    """The kind of the parameter at a tree path: "kernel" (decayed), "step" (steps and offsets), or "other"."""
    name = str(path[-1].key)
    if name.endswith(STEP_SUFFIXES):
        return "step"
    return "kernel" if name == "kernel" else "other"


def is_of_adc(path: tuple[Any, ...]) -> bool:
    """Whether a tree path, of parameters or of what an optimizer keeps of them, ends at an ADC's step or offset."""
    return str(getattr(path[-1], "key", "")).endswith(ADC_SUFFIXES)


def is_kind(params: Any, kind: str) -> Any:
    """A tree of booleans, True at the parameters of a kind."""
    return jax.tree_util.tree_map_with_path(lambda path, _: kind_of(path) == kind, params)


def total_steps(config: ConfigDict, images: int) -> int:
    """Optimizer steps of a whole run: `epochs` epochs of whole batches.

    Raises:
      ValueError: for a batch larger than the data, or a run without steps or without end.
    """
    steps = config.epochs * steps_per_epoch(config, images)
    if not steps > 0:
        raise ValueError(f"`config.epochs` is {config.epochs}: that is no step; give more epochs.")
    if steps > LARGEST_COUNT:
        raise ValueError(f"`config.epochs` is {config.epochs}: more than {LARGEST_COUNT} steps; give fewer epochs.")
    return math.ceil(steps)


def steps_per_epoch(config: ConfigDict, images: int) -> int:
    """Whole batches in the training set."""
    if not 1 <= config.batch_size <= images:
        raise ValueError(f"`config.batch_size` is {config.batch_size}; give 1 to {images}, the number of images.")
    return images // config.batch_size


def learning_rate(config: ConfigDict, images: int) -> optax.Schedule:
    """Linear warm-up over `warmup_epochs`, then a cosine down to 0 at the last step."""
    total = total_steps(config, images)
    warmup = round(min(total - 1, config.warmup_epochs * steps_per_epoch(config, images)))
    peak = config.optimizer.learning_rate
    return optax.warmup_cosine_decay_schedule(0.0 if warmup else peak, peak, warmup, total)


def make_optimizer(config: ConfigDict, images: int) -> optax.GradientTransformation:
    """SGD with momentum or AdamW; decay on kernels only; steps and offsets at `step_factor` times the rate.

    Raises:
      ValueError: for another `optimizer.name`.
    """
    options, rate = config.optimizer, learning_rate(config, images)
    decay = optax.masked(optax.add_decayed_weights(options.weight_decay), lambda params: is_kind(params, "kernel"))
    steps = optax.masked(optax.scale(options.step_factor), lambda params: is_kind(params, "step"))
    if options.name == "sgd":
        moments = optax.trace(options.momentum, nesterov=options.nesterov)
        return optax.chain(decay, moments, steps, optax.scale_by_learning_rate(rate))
    if options.name == "adamw":
        return optax.chain(optax.scale_by_adam(), decay, steps, optax.scale_by_learning_rate(rate))
    raise ValueError(f"`config.optimizer.name` is {options.name!r}; allowed: sgd, adamw.")
