"""A macro and a network of your own: 256 rows of which 32 are read at once, trained on digits. Run me."""

import functools
from pathlib import Path

import flax.linen as nn

import cimjax
from cimjax.training.config.file import load_config

# The macro: 4-bit weights in plus and minus cells of 2 bits, bit-serial inputs, 32 rows to a 4-bit ADC conversion.
macro = cimjax.CIMSpec(
    activation=cimjax.ActivationSpec(bits=3, slice_bits=1),
    weight=cimjax.WeightSpec(bits=4, cell_bits=2, encoding="differential"),
    adc=cimjax.ADCSpec(bits=4, granularity="array"),
    array=cimjax.ArraySpec(rows=256, columns=64, active_rows=32, tiling="im2col"),
)
conv = functools.partial(cimjax.CIMConv, spec=macro, use_bias=False)


class MyNet(nn.Module):
    """Digits through two array layers; the classifier sits in arrays of its own kind, with an ideal ADC."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(16, (3, 3), name="stem")(x))
        x = nn.relu(nn.BatchNorm(not train)(conv(24, (3, 3), strides=(2, 2), name="conv1")(x)))
        x = nn.relu(nn.BatchNorm(not train)(conv(32, (3, 3), name="conv2")(x)))
        eight_bits = cimjax.CIMSpec(weight=cimjax.WeightSpec(bits=8), adc=None)
        return cimjax.CIMDense(10, spec=eight_bits, name="classifier")(x.mean(axis=(1, 2)))


if __name__ == "__main__":
    config = load_config(str(Path(__file__).parents[1] / "configs" / "digits.py"))
    with config.unlocked():
        config.epochs, config.batch_size = 10.0, 32
    print(cimjax.train(config, model=MyNet(), workdir="runs/my_macro"))
