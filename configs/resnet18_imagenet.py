"""ResNet-18 on ImageNet through arrays, with the settings of the paper's Table II.

This version does not read ImageNet by itself: it trains on arrays of your own, with images of any size.

    images = cimjax.data.Dataset.from_arrays("imagenet2012", train_images, train_labels, test_images, test_labels)
    cimjax.train(load_config("configs/resnet18_imagenet.py:weight=layer,psum=column"), dataset=images)

What needs no data runs as it is: `cimjax config show configs/resnet18_imagenet.py`, and the time of a step by
`cimjax bench --config configs/resnet18_imagenet.py --config.batch_size=4 --runs 2`.

3-bit activations and weights in 1-bit cells, arrays of 128 x 128, 2-bit partial sums, 90 epochs. The paper reports
68.51 % for column/column and 69.13 % in full precision; no run of this file has been made yet. Options change layers
as in every other file; `smoke` is a network of an eighth of the width. `load_config` is of
`cimjax.training.config.file`.

Deviation: the first half of the epochs has ideal ADCs, then their steps are set from data (docs/ablation.md);
`--config.ideal_share=0.0` is the paper's single stage.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cimjax.training.config.defaults import IDEAL_SHARE, RECIPE, default_config, finished
from cimjax.training.config.options import parse_options


def get_config(argument: str | None = None) -> ConfigDict:
    """The fields of a training run; `cimjax config show` says what each means."""
    cells = {"act_bits": 3, "weight_bits": 3, "cell_bits": 1, "rows": 128, "columns": 128}
    options = parse_options(argument, **cells, adc_bits=2, **RECIPE)
    config = default_config(options)
    config.dataset = "imagenet2012"
    config.model = ConfigDict({"name": "resnet18", "width": 0.125 if options.smoke else 1.0})
    config.batch_size = 256
    config.epochs = 1.0 if options.smoke else 90.0
    config.warmup_epochs = 0.1 if options.smoke else 5.0
    config.ideal_share = IDEAL_SHARE
    config.optimizer.weight_decay = 1e-4
    config.augment = ConfigDict({"shift": 0, "flip": True})
    return finished(config, options)
