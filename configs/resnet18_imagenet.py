"""ResNet-18 on ImageNet, or on a folder of your own images, through arrays, with the settings of the paper's Table II.

    cimjax data prepare imagenet2012        # says what must be downloaded by hand, and how much room it needs
    python train.py --config configs/resnet18_imagenet.py:weight=layer,psum=column
    python train.py --config configs/resnet18_imagenet.py --config.dataset=folder:PATH  # of train/CLASS/*.jpg and val/

Images are decoded by `--config.workers` processes: random crops of 8 % to 100 % of an image's area, 224 x 224
(`--config.image_size`), and mirror images; in evaluation the middle of the image, whose shorter side is resized to 256.
docs/scale.md says how many cores a GPU needs beside it, and the time of a step is told by
`cimjax bench --config configs/resnet18_imagenet.py --config.batch_size=4 --runs 2`, which needs no data.

3-bit activations and weights in 1-bit cells, arrays of 128 x 128, 2-bit partial sums, 90 epochs. The paper reports
68.51 % for column/column and 69.13 % in full precision; no run of this file has been made yet. Options change layers
as in every other file; `smoke` is a network of an eighth of the width.

The recipe of 90 epochs by which ResNet-18 is usually quantized starts from full precision (Esser et al., "Learned step
size quantization", 2020, section 3: a tenth of the rate, half of the weight decay for 3 bits, a quarter for 2):

    python train.py --config configs/resnet18_imagenet.py:weight=none --workdir runs/full
    python train.py --config configs/resnet18_imagenet.py:start=run --from runs/full --workdir runs/arrays

Memory follows the images that are computed at a time: a batch of 128 needs 10 GB on a CPU, and 3.2 GB in 4 parts
(`--config.optimizer.accumulate=4`); `cimjax bench --of memory --config configs/resnet18_imagenet.py` says it for your
device and batch.
Numbers are float32 throughout (weights, optimizer, batch normalisation and its statistics, losses, partial sums after
the product); only the products of codes have bfloat16 operands, on GPUs and TPUs, where these hold every code exactly.

Deviations: every ADC has an offset, and weight steps start by least squares (docs/design.md); the first half of the
epochs has ideal ADCs, then their steps are set from data (docs/ablation.md). `:scheme=column` is the paper's own.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from cimjax.training.config.defaults import IDEAL_SHARE, RECIPE, default_config, finished
from cimjax.training.config.options import Option, parse_options

START = Option("start", ("random", "run"), "random", "random weights, or a run of full precision by --from")
# By bits of a weight, what the weight decay is multiplied by where training starts from full precision.
DECAY = {2: 0.25, 3: 0.5}


def get_config(argument: str | None = None) -> ConfigDict:
    """The fields of a training run; `cimjax config show` says what each means."""
    cells = {"act_bits": 3, "weight_bits": 3, "cell_bits": 1, "rows": 128, "columns": 128}
    options = parse_options(argument, START, **cells, adc_bits=2, **RECIPE)
    config = default_config(options)
    config.dataset = "imagenet2012"
    config.model = ConfigDict({"name": "resnet18", "width": 0.125 if options.smoke else 1.0})
    config.batch_size = 256
    config.epochs = 1.0 if options.smoke else 90.0
    config.warmup_epochs = 0.1 if options.smoke else 5.0
    config.ideal_share = IDEAL_SHARE
    config.optimizer.weight_decay = 1e-4
    config.augment = ConfigDict({"shift": 0, "flip": True})
    if options.start == "run":
        config.start, config.warmup_epochs = "run", 0.0
        config.optimizer.learning_rate = 0.01
        config.optimizer.weight_decay *= DECAY.get(options.weight_bits, 1.0)
    return finished(config, options)
