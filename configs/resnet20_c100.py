"""ResNet-20 on CIFAR-100 through arrays, with the settings of the paper's Table II.

    cimjax data prepare cifar100
    python train.py --config configs/resnet20_c100.py
    python train.py --config configs/resnet20_c100.py:weight=layer,psum=column --config.data_dir=DIR
    python train.py --config configs/resnet20_c100.py:smoke           # two minutes: ResNet-8, 20 classes

4-bit activations and weights in 2-bit cells, arrays of 128 x 128, 3-bit partial sums, 200 epochs. The paper reports
72.09 % for column/column (72.22 % without partial-sum quantization) with its own pre-activation network of about four
times the parameters; no full-length run of this file has been made yet. Shortcuts are He et al.'s option A.

Deviations: every ADC has an offset, and weight steps start by least squares (docs/design.md); the first half of the
epochs has ideal ADCs, then their steps are set from data (docs/ablation.md). `:scheme=column` is the paper's own.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cimjax.training.config.defaults import RECIPE, default_config, finished, train_as_cifar
from cimjax.training.config.options import parse_options


def get_config(argument: str | None = None) -> ConfigDict:
    """The fields of a training run; `cimjax config show` says what each means."""
    cells = {"act_bits": 4, "weight_bits": 4, "cell_bits": 2, "rows": 128, "columns": 128}
    options = parse_options(argument, **cells, adc_bits=3, **RECIPE)
    config = default_config(options)
    config.dataset = "cifar100"
    config.model = ConfigDict({"name": "resnet20", "width": 1.0})
    train_as_cifar(config, smoke=options.smoke, classes=20)
    return finished(config, options)
