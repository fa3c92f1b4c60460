"""ResNet-20 on CIFAR-10 through arrays, with the settings of the paper's Table II.

    cimjax data prepare cifar10
    python train.py --config configs/resnet20_c10.py
    python train.py --config configs/resnet20_c10.py:weight=layer,psum=column --config.data_dir=DIR

3-bit activations and weights in 1-bit cells, arrays of 128 x 128, 3-bit partial sums, 200 epochs. The paper reports
90.21 % for column/column and 90.70 % in full precision; no full-length run of this file has been made yet. Shortcuts
are He et al.'s option A.

Deviations: every ADC has an offset, and weight steps start by least squares (docs/design.md); the first half of the
epochs has ideal ADCs, then their steps are set from data (docs/ablation.md). `:scheme=column` is the paper's own.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cimjax.training.config.defaults import RECIPE, default_config, finished, train_as_cifar
from cimjax.training.config.options import parse_options


def get_config(argument: str | None = None) -> ConfigDict:
    """The fields of a training run; `cimjax config show` says what each means."""
    cells = {"act_bits": 3, "weight_bits": 3, "cell_bits": 1, "rows": 128, "columns": 128}
    options = parse_options(argument, **cells, adc_bits=3, **RECIPE)
    config = default_config(options)
    config.dataset = "cifar10"
    config.model = ConfigDict({"name": "resnet20", "width": 1.0})
    train_as_cifar(config, smoke=options.smoke, classes=10)
    return finished(config, options)
