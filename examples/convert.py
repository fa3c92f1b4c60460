"""Somebody's network of plain Flax layers: trained in full precision, put into arrays, trained on. Run me."""

from pathlib import Path

import flax.linen as nn

import cimjax
from cimjax.training.config.file import load_config


class Theirs(nn.Module):
    """A small network that knows nothing of arrays."""

    @nn.compact
    def __call__(self, x, train=False):
        for features in (16, 32, 32):
            x = nn.Conv(features, (3, 3), strides=2 if features > 16 else 1, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(not train)(x))
        return nn.Dense(10)(x.mean(axis=(1, 2)))


spec = cimjax.CIMSpec(
    activation=cimjax.ActivationSpec(bits=4),
    weight=cimjax.WeightSpec(bits=4, cell_bits=2),
    adc=cimjax.ADCSpec(bits=2, offset=True),
    array=cimjax.ArraySpec(rows=64, columns=64),
)
# The first and the last layer stay in full precision.
chip = cimjax.convert_network(Theirs(), spec, rules=[("Conv_0|Dense_0", None)])

if __name__ == "__main__":
    config = load_config(str(Path(__file__).parents[1] / "configs" / "digits.py"))
    cimjax.train(config, model=Theirs(), workdir="runs/theirs")
    trained = cimjax.load("runs/theirs", model=Theirs())
    accuracy = {}
    # Batch normalisation has the statistics of what comes out of the arrays, also where nothing is trained.
    config.batch_norm_images = 1400
    for epochs in (0.0, 10.0):
        config.epochs = epochs
        result = cimjax.train(config, model=chip, variables=trained, workdir=f"runs/theirs-in-arrays-{epochs:.0f}")
        accuracy[epochs] = result.accuracy
    print(f"in arrays: {accuracy[0.0]:.2%} without training, {accuracy[10.0]:.2%} after 10 epochs")
