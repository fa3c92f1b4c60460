r"""A small convolutional network through compute-in-memory arrays, on 1,797 real 8 x 8 digits that need no download.

    python train.py --config configs/digits.py
    python train.py --config configs/digits.py:weight=layer,psum=array,adc_bits=2 --config.epochs=60
    python train.py --config configs/digits.py:adc_step=fixed,full_scale=64   # one reference for all columns
    python train.py --config configs/digits.py:weight=none            # the same network in full precision
    python train.py --config configs/digits.py:smoke                  # a few seconds, to see that it works

By default 3-bit activations and weights, 1 bit per cell, arrays of 64 x 64 cells, and a 3-bit ADC with a step and an
offset of its own in every column (an offset costs no multiplication: it adds up to one constant for each output; it
goes with offset=false, and is not there where the ADC is fixed). The README says what to expect; `smoke` ends far below
that. `python train.py --help` lists all options.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cimjax.training.config.defaults import default_config, finished
from cimjax.training.config.options import parse_options


def get_config(argument: str | None = None) -> ConfigDict:
    """The fields of a training run; `cimjax config show` says what each means."""
    options = parse_options(
        argument, act_bits=3, weight_bits=3, cell_bits=1, adc_bits=3, offset=True, rows=64, columns=64
    )
    config = default_config(options)
    config.dataset = "digits"
    config.model = ConfigDict({"name": "small", "width": 8 if options.smoke else 16})
    config.epochs = 2.0 if options.smoke else 50.0
    config.warmup_epochs = 0.5 if options.smoke else 1.0
    config.optimizer.learning_rate = 0.15
    config.optimizer.weight_decay = 2e-3
    config.eval_batch_size = 360
    return finished(config, options)
