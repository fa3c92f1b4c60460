r"""A small convolutional network through compute-in-memory arrays, on 1,797 real 8 x 8 digits that need no download.

    python train.py --config configs/digits.py
    python train.py --config configs/digits.py:weight=layer,psum=array,adc_bits=2 --config.epochs=60
    python train.py --config configs/digits.py:weight=none            # the same network in full precision
    python train.py --config configs/digits.py:smoke                  # a few seconds, to see that it works

By default 3-bit activations and weights, 1 bit per cell, arrays of 64 x 64 cells, and a 3-bit ADC with a step and an
offset of its own in every column (an offset costs no multiplication: it adds up to one constant for each output). The
README says what to expect; `smoke` ends far below that. `python train.py --help` lists all options.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cimjax.training.options import parse_options, spec_from_options


def get_config(argument: str | None = None) -> ConfigDict:
    """The fields of a training run; what follows from them (numbers of steps, rates) is computed when it starts."""
    options = parse_options(
        argument, act_bits=3, weight_bits=3, cell_bits=1, adc_bits=3, offset=True, rows=64, columns=64
    )
    config = ConfigDict()

    # Of the initial weights, the order of the images and their augmentation.
    config.seed = options.seed

    # "" is the default folder of tensorflow-datasets.
    config.dataset = "digits"
    config.data_dir = ""

    config.model = ConfigDict({"name": "small", "width": 8 if options.smoke else 16})
    # The specification of every layer, None for full precision; then (pattern of paths, specification or None) for
    # layers that differ.
    config.spec = spec_from_options(options)
    config.rules = ()

    config.batch_size = 64
    config.epochs = 2.0 if options.smoke else 30.0
    config.warmup_epochs = 0.5 if options.smoke else 1.0
    config.optimizer = ConfigDict(
        {
            "name": "sgd",
            "learning_rate": 0.15,
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 2e-3,
            # Multiplies the learning rate of quantization steps and offsets.
            "step_factor": 1.0,
        }
    )
    config.label_smoothing = 0.0
    # Random shifts of at most so many pixels; mirror images of digits are no digits.
    config.augment = ConfigDict({"shift": 0, "flip": False})

    config.eval_batch_size = 360
    # Training images from which all steps are set before training.
    config.calibration_images = 256
    # 0: chosen by the program.
    config.steps_per_dispatch = 0
    config.checkpoint_epochs = 1.0

    return config.lock()
