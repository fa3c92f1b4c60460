"""The fields of every configuration, with what each means; a file in `configs/` changes what is its own."""

from __future__ import annotations

import types

from ml_collections import ConfigDict

from cimjax.spec import Execution
from cimjax.training.config.options import spec_from_options


def default_config(options: types.SimpleNamespace) -> ConfigDict:
    """A configuration of all fields, not locked.

    What follows from them (numbers of steps, rates) is computed when training starts, so that it follows overrides.

    Args:
      options: from `parse_options`; its seed and its specification are taken.
    """
    config = ConfigDict()
    # Of the initial weights, the order of the images and their augmentation.
    config.seed = options.seed

    # One of `cimjax data list`, and its folder; "" is the default folder of tensorflow-datasets.
    config.dataset = ""
    config.data_dir = ""
    # Only the first so many classes, and so many training images of these; 0: all.
    config.subset = ConfigDict({"classes": 0, "images": 0})
    # A network by name, and its own options.
    config.model = ConfigDict({"name": ""})
    # The specification of every layer, None for full precision; then (pattern of paths, specification or None) for
    # layers that differ.
    config.spec = spec_from_options(options)
    config.rules = ()
    # How array layers are computed (`cimjax.Execution`): changes no result, and may differ when a run goes on.
    config.execution = ConfigDict(Execution().to_dict())

    config.batch_size = 64
    config.epochs = 1.0
    # Linear warm-up of the learning rate; a cosine follows.
    config.warmup_epochs = 1.0
    config.optimizer = ConfigDict(
        {
            # "sgd" or "adamw".
            "name": "sgd",
            "learning_rate": 0.1,
            "momentum": 0.9,
            "nesterov": True,
            # Of kernels only.
            "weight_decay": 5e-4,
            # Multiplies the learning rate of quantization steps and offsets.
            "step_factor": 1.0,
            # Norm to which the gradient of all parameters together is scaled down; 0: never.
            "clip_norm": 0.0,
            # Parts that a batch is computed in, one after the other, whose gradients are averaged.
            "accumulate": 1,
            # What follows the warm-up: one of `training.optimizer.SCHEDULES`, and what that takes: the part of the rate
            # at the end, a factor, a power, parts of the steps, restarts.
            "schedule": "cosine",
            "schedule_options": ConfigDict(
                {"alpha": 0.0, "decay_rate": 0.1, "power": 1.0, "boundaries": (0.5, 0.75), "cycles": 1}
            ),
        }
    )
    # Decay of the running average of the parameters, which is evaluated beside them; 0: none.
    config.ema = 0.0
    config.label_smoothing = 0.0
    # The `alpha` of mixup; 0: none.
    config.mixup = 0.0
    # Random shifts of at most so many pixels, and mirror images.
    config.augment = ConfigDict({"shift": 0, "flip": False})

    # With `variation`: "chip", one for the run, or "step", a fresh one in every step; and how many fresh chips the
    # trained network is evaluated on.
    config.variation_draw = "chip"
    config.fresh_chips = 0

    # The part of the training images that is held out to choose the best state by; 0: the last state is the result.
    config.validation = 0.0
    config.eval_batch_size = 500
    # Training images from which all steps are set before training.
    config.calibration_images = 256
    # The part of the epochs, at the start and rounded down to whole ones, in which ADCs are ideal. Then their steps and
    # offsets are set anew.
    config.ideal_share = 0.0
    # After these epochs ADC steps and offsets are set anew, as before training, and their momentum starts from 0.
    config.recalibrate_epochs = ()
    # Optimizer steps in one program; 0: chosen by the program.
    config.steps_per_dispatch = 0
    # How steps are spread over several devices: "shard_map" or "pmap".
    config.parallel = "shard_map"
    # Epochs between checkpoints; the best state is kept as well.
    config.checkpoint_epochs = 1.0
    return config


# What `docs/ablation.md` settles on, from a part of CIFAR-100; files in `configs/` take it as their defaults.
RECIPE = {"offset": True, "weight_start": "least_squares"}
# Deviation: the paper trains in one stage, which `--config.ideal_share=0.0` does.
IDEAL_SHARE = 0.5


def train_as_cifar(config: ConfigDict, *, smoke: bool, classes: int) -> None:
    """Train as is usual for CIFAR: 200 epochs on images shifted by up to 4 pixels and mirrored.

    `smoke`: 12 epochs of a small network on 10,000 images of the first `classes` classes.
    """
    config.batch_size = 64 if smoke else 128
    config.epochs = 12.0 if smoke else 200.0
    config.warmup_epochs = 1.0 if smoke else 5.0
    config.ideal_share = IDEAL_SHARE
    config.augment = ConfigDict({"shift": 4, "flip": True})
    if smoke:
        config.model = ConfigDict({"name": "resnet8", "stem_stride": 2})
        config.subset = ConfigDict({"classes": classes, "images": 10_000})
