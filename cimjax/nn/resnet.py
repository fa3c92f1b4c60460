"""Residual networks for small and large images, in full precision or through arrays.

Source: He et al., "Deep residual learning for image recognition", CVPR 2016 (section 4.2 for the CIFAR form), and
"Identity mappings in deep residual networks", ECCV 2016, for pre-activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from cimjax.core.lsq import Codes
from cimjax.nn.layers import doubt_channels_first
from cimjax.nn.rules import ConvMaker, conv_for, dense_for, plain_conv, shared_input
from cimjax.spec.rules import Rules


class ResNet(nn.Module):
    """A residual network.

    The first convolution and the classifier are full precision unless a rule says otherwise. Layers: `stem`,
    `stage{i}_block{j}/conv1`, `conv2` (and `conv3`), `projection`, `classifier`. A tensor that a block's first
    convolution and its projection both read is quantized once, in `quantize`.

    classes: outputs.
    blocks: blocks of each stage; every stage after the first halves the image.
    widths: channels of each stage, before `width`.
    small_images: the CIFAR form, a 3 x 3 first convolution; else 7 x 7 with stride 2 and a maximum.
    stem_stride: of the first convolution for small images; 2 makes everything after it four times cheaper.
    bottleneck: blocks of 1 x 1, 3 x 3 and 1 x 1 convolutions with four times the channels, instead of two 3 x 3.
    shortcut: where shapes change, "pad" takes every other pixel and fills channels with 0 (He et al.'s option A, no
      parameters), "projection" is a 1 x 1 convolution (option B).
    preactivation: batch normalisation and ReLU before each convolution instead of after.
    residual: what a shortcut carries, the "wide" tensor or its "codes" (their value).
    width: factor of all widths.
    norm_momentum: of batch normalisation's running statistics.
    conv, rules, axis_name: as for `SmallNet`.
    """

    classes: int
    conv: ConvMaker = plain_conv
    rules: Rules = ()
    blocks: Sequence[int] = (3, 3, 3)
    widths: Sequence[int] = (16, 32, 64)
    small_images: bool = True
    stem_stride: int = 1
    bottleneck: bool = False
    shortcut: str = "pad"
    preactivation: bool = False
    residual: str = "wide"
    width: float = 1.0
    norm_momentum: float = 0.9
    axis_name: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("shortcut", ("pad", "projection")), ("residual", ("wide", "codes"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed: {', '.join(allowed)}.")
        if len(self.blocks) != len(self.widths):
            raise ValueError(f"`blocks` is {self.blocks} and `widths` {self.widths}; give one of each for every stage.")
        if round(self.width * min(self.widths)) < 1:
            raise ValueError(f"`width` is {self.width}: that leaves a stage without channels; give a larger one.")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits (N, classes) of images (N, H, W, C), float32."""
        if self.is_initializing():
            doubt_channels_first(self, x.shape)
        widths = [round(self.width * width) for width in self.widths]
        stem = conv_for(self, "stem", plain_conv, self.rules)
        if self.small_images:
            x = stem(widths[0], (3, 3), strides=(self.stem_stride,) * 2, padding=((1, 1), (1, 1)), use_bias=False)(x)
        else:
            x = stem(widths[0], (7, 7), strides=(2, 2), padding=((3, 3), (3, 3)), use_bias=False)(x)
        if not self.preactivation:
            x = nn.relu(normalise(train, self)(x))
        if not self.small_images:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, (count, width) in enumerate(zip(self.blocks, widths, strict=True)):
            for index in range(count):
                x = Block(
                    width=width,
                    stride=2 if stage and not index else 1,
                    net=self.clone(parent=None, name=None),
                    name=f"stage{stage + 1}_block{index + 1}",
                )(x, train)
        if self.preactivation:
            x = nn.relu(normalise(train, self)(x))
        return dense_for(self, "classifier", self.conv, self.rules)(self.classes)(jnp.mean(x, axis=(1, 2)))


class Block(nn.Module):
    """One residual block.

    width: its channels (a bottleneck's output has four times as many).
    stride: 2 where it halves the image.
    net: the network's options.
    """

    width: int
    stride: int
    net: ResNet

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        """(N, H, W, C) to (N, H / stride, W / stride, width)."""
        net = self.net
        outputs = 4 * self.width if net.bottleneck else self.width
        strides = (self.stride, self.stride)
        changes = self.stride != 1 or x.shape[-1] != outputs
        # 3 x 3 convolutions pad both sides alike, so that strided ones are centred as in the original.
        three = {"kernel_size": (3, 3), "padding": ((1, 1), (1, 1))}
        one = {"kernel_size": (1, 1), "padding": ((0, 0), (0, 0))}
        narrow, wide = {"features": self.width}, {"features": outputs}
        plan: list[dict[str, Any]] = [narrow | three | {"strides": strides}, wide | three]
        if net.bottleneck:
            plan = [narrow | one, narrow | three | {"strides": strides}, wide | one]
        entry: Any = nn.relu(normalise(train, net)(x)) if net.preactivation else x
        projects = changes and net.shortcut == "projection"
        readers = ["conv1", "projection"] if projects or net.residual == "codes" else ["conv1"]
        entry = shared_input(self, readers, net.conv, net.rules, entry)
        shortcut = (entry.value if isinstance(entry, Codes) else entry) if net.residual == "codes" else x
        if projects:
            project = conv_for(self, "projection", net.conv, net.rules)
            shortcut = project(outputs, (1, 1), strides=strides, padding=((0, 0), (0, 0)), use_bias=False)(entry)
            if not net.preactivation:
                shortcut = normalise(train, net)(shortcut)
        elif changes:
            shortcut = pad_channels(shortcut[:, :: self.stride, :: self.stride], outputs)
        y: Any = entry
        for index, layer in enumerate(plan):
            if index:
                y = nn.relu(normalise(train, net)(y) if net.preactivation else y)
            y = conv_for(self, f"conv{index + 1}", net.conv, net.rules)(use_bias=False, **layer)(y)
            if not net.preactivation:
                y = normalise(train, net)(y)
        return y + shortcut if net.preactivation else nn.relu(y + shortcut)


def normalise(train: bool, net: ResNet) -> nn.BatchNorm:
    """Batch normalisation as all layers of a network use it."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=net.norm_momentum, epsilon=1e-5, axis_name=net.axis_name
    )


def pad_channels(x: Array, channels: int) -> Array:
    """Channels of zeros on both sides, as many as are missing: He et al.'s option A."""
    missing = channels - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (missing // 2, missing - missing // 2)))
