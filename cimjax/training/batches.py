"""Where batches come from: images that lie on the device, or on the host, or in files; the loop does not know which.

A program of some steps is given a *feed*, made on the host before it starts, and takes the batch of each step from it.
Which images are in a batch, and how they are augmented and mixed, is a function of (seed, step) in both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from cimjax.data import Split
from cimjax.data.streams import StreamedSplit
from cimjax.training.parallel import AXIS, Devices
from cimjax.training.random_streams import Stream, stream_key
from cimjax.training.state import Batch, TrainState

# Bytes of a feed of decoded images, about: two of them lie on the devices at a time.
_FEED_BYTES = 2**28
# How many truncated images are named.
_NAMED = 20


class Batches:
    """Batches of a training split.

    spread: how a feed lies on several devices.
    most: how many steps a feed is made for, at most.
    """

    spread: PartitionSpec
    most = 2**31

    def feed(self, step: int, count: int) -> Any:
        """What a program of `count` steps from `step` on is given; all of one epoch."""
        raise NotImplementedError

    def batch(self, feed: Any, state: TrainState, index: int | Array, axis_name: str | None) -> Batch:
        """Within a program: this device's share of the batch of its `index`-th step."""
        raise NotImplementedError

    def expect(self, step: int, count: int) -> None:
        """Say which feed is wanted next, so that it is made while devices compute."""

    def remarks(self) -> list[str]:
        """What a person should know of the images since this was last asked, a line each."""
        return []

    def close(self) -> None:
        """End what reads images."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How pixels and labels become a batch.

    mean, std: per channel, of pixels in 0..1.
    """

    config: ConfigDict
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int

    def normalise(self, pixels: Array) -> Array:
        """Real images of uint8 pixels: zero mean and unit variance per channel."""
        mean, std = (np.asarray(value, np.float32) for value in (self.mean, self.std))
        return (pixels.astype(jnp.float32) / 255 - mean) / std

    def plain(self, pixels: Array, labels: Array) -> Batch:
        """Images as they are, as for evaluation."""
        return Batch(self.normalise(pixels), labels, jax.nn.one_hot(labels, self.classes, dtype=jnp.float32))

    def for_training(self, pixels: Array, labels: Array, key: Array, keys: Array) -> Batch:
        """Augmented, with smoothed labels and, if so configured, each pair of neighbours mixed.

        Args:
          key: of mixup, the same on every device.
          keys: (N,), of the images.
        """
        config = self.config
        batch = self.plain(augment(pixels, keys, config.augment.shift, config.augment.flip), labels)
        batch = batch.replace(targets=optax.smooth_labels(batch.targets, config.label_smoothing))
        return mix(batch, key, config.mixup) if config.mixup else batch


class Resident(Batches):
    """A split that lies whole on every device, as uint8."""

    spread = PartitionSpec()

    def __init__(self, split: Split, preparation: Preparation, seed: int, put: Callable[[Any], Any]) -> None:
        self.preparation, self.size, self.put = preparation, preparation.config.batch_size, put
        self.seed = seed
        self.data = put((jnp.asarray(split.images), jnp.asarray(split.labels, jnp.int32)))
        self._epoch: tuple[int, Any] | None = None

    def feed(self, step: int, count: int) -> Any:
        del count
        images = self.data[1].shape[0]
        epoch = step // (images // self.size)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, self.put(order_of_epoch(self.seed, epoch, images))
        return *self.data, self._epoch[1]

    def batch(self, feed: Any, state: TrainState, index: int | Array, axis_name: str | None) -> Batch:
        del index
        pixels, labels, order = feed
        position = state.step % (labels.shape[0] // self.size)
        chosen = lax.dynamic_slice(order, (position * self.size,), (self.size,))
        chosen, keys = (_share(values, axis_name) for values in (chosen, augmentation_keys(state, self.size)))
        return self.preparation.for_training(pixels[chosen], labels[chosen], mixup_key(state), keys)


class Streamed(Batches):
    """Batches that hosts send, each its share, split over the devices, and never all in their memory."""

    spread = PartitionSpec(None, AXIS)

    def __init__(self, preparation: Preparation, devices: Devices) -> None:
        self.preparation, self.size = preparation, preparation.config.batch_size
        self.devices = devices

    def read(self, step: int, count: int) -> tuple[Any, Any]:
        """This process's share of the batches of `count` steps of one epoch: (count, share, H, W, C) uint8 pixels and
        (count, share) labels."""
        raise NotImplementedError

    def feed(self, step: int, count: int) -> Any:
        return self.devices.split(self.read(step, count), self.spread)

    def batch(self, feed: Any, state: TrainState, index: int | Array, axis_name: str | None) -> Batch:
        pixels, labels = (lax.dynamic_index_in_dim(each, index, keepdims=False) for each in feed)
        keys = _share(augmentation_keys(state, self.size), axis_name)
        return self.preparation.for_training(pixels, labels, mixup_key(state), keys)


class FromMemory(Streamed):
    """Batches of a split that stays on the host."""

    def __init__(self, split: Split, preparation: Preparation, devices: Devices) -> None:
        super().__init__(preparation, devices)
        self.split, self.seed = split, preparation.config.seed
        self._epoch: tuple[int, Any] | None = None

    def read(self, step: int, count: int) -> tuple[Any, Any]:
        images = len(self.split)
        epoch, position = divmod(step, images // self.size)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, np.asarray(order_of_epoch(self.seed, epoch, images))
        chosen = self._epoch[1][position * self.size : (position + count) * self.size].reshape(count, self.size)
        chosen = chosen[:, self.devices.share.range_of(self.size)]
        return self.split.images[chosen], self.split.labels[chosen]


class FromFiles(Streamed):
    """Batches decoded from files by other processes; a feed is read and sent to the devices during the one before."""

    def __init__(self, split: StreamedSplit, preparation: Preparation, devices: Devices) -> None:
        from cimjax.data.reading import TrainingStream

        super().__init__(preparation, devices)
        config, workers = preparation.config, workers_of(preparation.config)
        self.stream = TrainingStream(
            split, seed=config.seed, batch_size=self.size, workers=workers, share=devices.share
        )
        self.most = max(1, _FEED_BYTES // (self.size * math.prod(split.view.shape)))
        # One thread: steps are read in their order.
        self._thread = ThreadPoolExecutor(1)
        self._expected: tuple[tuple[int, int], Future[Any]] | None = None
        self._told = 0

    def read(self, step: int, count: int) -> tuple[Any, Any]:
        return self.stream.read(step, count)

    def feed(self, step: int, count: int) -> Any:
        self.expect(step, count)
        assert self._expected is not None
        return self._expected[1].result()

    def expect(self, step: int, count: int) -> None:
        if self._expected is None or self._expected[0] != (step, count):
            self._expected = (step, count), self._thread.submit(super().feed, step, count)

    def remarks(self) -> list[str]:
        new = self.stream.truncated[self._told : _NAMED]
        lines = [f"{name} is truncated: what is there is decoded, and the rest of the image is grey" for name in new]
        self._told += len(new)
        if new and self._told == _NAMED:
            lines.append(f"no more truncated images are named after these {_NAMED}")
        return lines

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self.stream.close()


def workers_of(config: ConfigDict) -> int:
    """How many processes decode images."""
    from cimjax.data.reading import usual_workers

    return usual_workers() if config.workers < 0 else config.workers


def batches_of(split: Split | StreamedSplit, preparation: Preparation, devices: Devices) -> Batches:
    """The batches of a split, which lies in files, or where `config.images_on` says; the same ones wherever that is."""
    config = preparation.config
    if isinstance(split, StreamedSplit):
        return FromFiles(split, preparation, devices)
    if config.images_on == "host":
        return FromMemory(split, preparation, devices)
    return Resident(split, preparation, config.seed, devices.put)


def _share(values: Array, axis_name: str | None) -> Array:
    """This device's part of what is whole on every device."""
    if axis_name is None:
        return values
    size = values.shape[0] // lax.axis_size(axis_name)
    return lax.dynamic_slice_in_dim(values, lax.axis_index(axis_name) * size, size)


def augmentation_keys(state: TrainState, size: int) -> Array:
    """A key for each image of the batch that a state is about to learn from, (N,)."""
    return jax.random.split(stream_key(state.seed, Stream.AUGMENTATION, state.step), size)


def mixup_key(state: TrainState) -> Array:
    """The key by which the batch that a state is about to learn from is mixed."""
    return stream_key(state.seed, Stream.MIXUP, state.step)


def augment(pixels: Array, keys: Array, shift: int, flip: bool) -> Array:
    """Random shifts by up to `shift` pixels (edges filled with 0) and mirror images, each from its own key.

    Types are written out: with JAX_ENABLE_X64 others would be drawn, and other numbers of them.

    Args:
      pixels: (N, H, W, C) uint8.
      keys: (N,) random keys.
    """

    def one(image: Array, key: Array) -> Array:
        for_shift, for_flip = jax.random.split(key)
        if shift:
            padded = jnp.pad(image, ((shift, shift), (shift, shift), (0, 0)))
            corner = jax.random.randint(for_shift, (2,), 0, 2 * shift + 1, jnp.int32)
            image = lax.dynamic_slice(padded, (corner[0], corner[1], jnp.int32(0)), image.shape)
        return jnp.where(jax.random.bernoulli(for_flip, jnp.float32(0.5)), image[:, ::-1], image) if flip else image

    return jax.vmap(one)(pixels, keys) if shift or flip else pixels


def mix(batch: Batch, key: Array, alpha: float) -> Batch:
    """Mixup (Zhang et al., ICLR 2018, eq. 1) of each pair of neighbours, with one `lambda ~ Beta(alpha, alpha)`.

    Neighbours, so that several devices mix as one does; an odd last image stays as it is.
    """
    part = jax.random.beta(key, alpha, alpha, dtype=jnp.float32)
    count = batch.labels.shape[0]
    partner = np.minimum(np.arange(count) ^ 1, count - 1)

    def mixed(values: Array) -> Array:
        return part * values + (1 - part) * values[partner]

    return batch.replace(images=mixed(batch.images), targets=mixed(batch.targets))


def order_of_epoch(seed: int, epoch: int | Array, images: int) -> Array:
    """The order of the training images in an epoch: a permutation drawn from (seed, epoch), (N,) int32."""
    return jax.random.permutation(stream_key(seed, Stream.ORDER, epoch), images).astype(jnp.int32)
