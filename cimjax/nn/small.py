"""A small network for the embedded digits: quick on a laptop, with several row tiles in every array layer."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from cimjax.nn.layers import doubt_channels_first
from cimjax.nn.rules import ConvMaker, conv_for, dense_for, plain_conv
from cimjax.spec.rules import Rules


class SmallNet(nn.Module):
    """Four 3 x 3 convolutions, each with batch normalisation and ReLU, a mean over pixels and a classifier.

    The first convolution and the classifier are full precision unless a rule says otherwise. Layers: `stem`, `conv1`,
    `conv2` (stride 2, twice the width), `conv3`, `classifier`.

    classes: outputs.
    conv: builds the array layers: `functools.partial(CIMConv, spec=spec)`, or `flax.linen.Conv`.
    rules: layers that differ.
    width: channels of the first two convolutions.
    axis_name: the mapped axis over which batch statistics are averaged, if any.
    """

    classes: int
    conv: ConvMaker = plain_conv
    rules: Rules = ()
    width: int = 16
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (N, classes) of images (N, H, W, C), float32."""
        if self.is_initializing():
            doubt_channels_first(self, x.shape)
        plan = [("stem", 1, 1), ("conv1", 1, 1), ("conv2", 2, 2), ("conv3", 2, 1)]
        for name, widths, stride in plan:
            make = conv_for(self, name, plain_conv if name == "stem" else self.conv, self.rules)
            x = make(widths * self.width, (3, 3), strides=(stride, stride), padding="SAME", use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=self.axis_name)(x)
            x = nn.relu(x)
        return dense_for(self, "classifier", self.conv, self.rules)(self.classes)(jnp.mean(x, axis=(1, 2)))
