"""Where the files in `configs/` start from, and what several of them share."""

from __future__ import annotations

import types

from ml_collections import ConfigDict

from cimjax.training.config.fields import completed
from cimjax.training.config.options import spec_from_options


def default_config(options: types.SimpleNamespace) -> ConfigDict:
    """A configuration of all fields, not locked; `cimjax.training.config.fields` says what each means.

    What follows from them (numbers of steps, rates) is computed when training starts, so that it follows overrides.

    Args:
      options: from `parse_options`; its seed and its specification are taken.
    """
    return completed({"seed": options.seed, "dataset": "", "model": {"name": ""}, "spec": spec_from_options(options)})


# What `docs/ablation.md` settles on, from a part of CIFAR-100; files in `configs/` take it as their defaults.
RECIPE = {"offset": True, "weight_start": "least_squares"}
# Deviation: the paper trains in one stage, which `--config.ideal_share=0.0` does.
IDEAL_SHARE = 0.5


# What a published scheme in two stages leaves open: the part of the training before ADCs are there.
_FIRST_STAGE = 0.5
# Epochs in which the ADCs of a trained network learn their steps, as a part of those of a whole training.
_POST_TRAINING = 0.1
# Images of which batch normalisation has its statistics where nothing is trained.
_NORMALISED = 5000


def finished(config: ConfigDict, options: types.SimpleNamespace) -> ConfigDict:
    """The config, locked, in the stages that the options `training` and `weight_step` ask for: what ends `get_config`.

    `post_training` starts from a trained run (`--from`), and only ADCs learn; where these learn nothing, nothing is
    trained at all, and batch normalisation has the statistics of what they give.
    """
    if options.weight_step == "calibrated":
        config.frozen = ("weight",)
    if options.training is not None:
        config.ideal_share = _FIRST_STAGE if options.training == "two_stage" else 0.0
    if options.training == "post_training":
        learns = options.psum is not None and (options.adc_step in ("learned", "power_of_two"))
        config.start, config.frozen = "run", ("network", "activation", "weight")
        config.epochs = max(1.0, round(_POST_TRAINING * config.epochs)) if learns else 0.0
        config.warmup_epochs = 0.0
        # Training moves statistics of batch normalisation to what ADCs give; without it they are taken anew.
        config.batch_norm_images = 0 if learns else _NORMALISED
    return config.lock()


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
