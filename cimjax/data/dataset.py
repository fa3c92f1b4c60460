"""What a data set is to the rest of the library: two splits of images and labels, and the colour statistics.

Everything that can be wrong with a user's own arrays is refused here, at construction. Where arrays come from is told
by `cimjax.data.loading`, how they become batches by `cimjax.training`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from cimjax.spec.base import is_number, shown


@dataclasses.dataclass(frozen=True, slots=True, eq=False, repr=False)
class Split:
    """Images and their labels.

    Attributes:
      images: (N, H, W, C) uint8, N > 0; grey images have C = 1.
      labels: (N,) int32, >= 0.

    Raises:
      ValueError: another shape or dtype, no images, or another number of labels than of images.

    >>> Split(np.zeros((2, 8, 8, 1), np.uint8), np.array([0, 9], np.int32))
    Split(images=uint8 (2, 8, 8, 1), labels=int32 (2,))
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int32]

    def __post_init__(self) -> None:
        _require_array("images", self.images, np.uint8, "(N, H, W, C)")
        _require_array("labels", self.labels, np.int32, "(N,)")
        if 0 in self.images.shape:
            raise ValueError(f"`images` must not be empty, got shape {self.images.shape}")
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"`images` and `labels` must have the same length, got {len(self.images)} and {len(self.labels)}"
            )
        if self.labels.min() < 0:
            raise ValueError(f"`labels` must be 0 or more, got {self.labels.min()}")

    def __len__(self) -> int:
        return len(self.images)

    def _where(self, chosen: npt.NDArray[np.bool_]) -> Split:
        return Split(self.images[chosen], self.labels[chosen])

    def __repr__(self) -> str:
        return f"Split(images=uint8 {self.images.shape}, labels=int32 {self.labels.shape})"


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """A training split, a test split, and what normalises them: `(image / 255 - mean) / std`.

    Attributes:
      name: what the data set is called in run folders and reports.
      train, test: images of one shape (H, W, C).
      classes: number of classes, >= 2; labels are 0 .. classes - 1.
      mean, std: per channel, of the training images divided by 255; C numbers each, `std` > 0.
      validation: training images that were held out, or None.

    Raises:
      ValueError: splits of different image shapes, a label beyond `classes`, or statistics that do not fit.
    """

    name: str
    train: Split
    test: Split
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: Split | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"`name` must be a word, got {self.name!r}")
        splits = {name: getattr(self, name) for name in ("train", "test", "validation")}
        if self.validation is None:
            del splits["validation"]
        for field, split in splits.items():
            if not isinstance(split, Split):
                raise ValueError(f"`{field}` must be a `cimjax.data.Split`, got {type(split).__name__}")
            if split.images.shape[1:] != self.image_shape:
                raise ValueError(
                    f"`train` and `{field}` must have images of one shape, "
                    f"got {self.image_shape} and {split.images.shape[1:]}"
                )
        if isinstance(self.classes, bool) or not isinstance(self.classes, numbers.Integral) or self.classes < 2:
            raise ValueError(f"`classes` must be an integer, 2 or more, got {self.classes!r}")
        object.__setattr__(self, "classes", int(self.classes))
        for field, split in splits.items():
            if split.labels.max() >= self.classes:
                raise ValueError(
                    f"labels of `{field}` must be 0 .. {self.classes - 1} (`classes` = {self.classes}), "
                    f"got {split.labels.max()}"
                )
        object.__setattr__(self, "mean", self._per_channel("mean", self.mean))
        object.__setattr__(self, "std", self._per_channel("std", self.std))
        if not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"`mean` must lie in 0 .. 1 (of images divided by 255), got {self.mean}")
        if not all(value > 0 for value in self.std):
            raise ValueError(f"`std` must be greater than 0, got {self.std}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    def _per_channel(self, field: str, values: Sequence[float]) -> tuple[float, ...]:
        channels = self.image_shape[-1]
        try:
            given = tuple(float(value) for value in values)
        except (TypeError, ValueError, OverflowError):
            given = ()
        if len(given) != channels or not all(math.isfinite(number) for number in given):
            raise ValueError(f"`{field}` must hold one finite number per channel ({channels}), got {shown(values)}")
        return given

    @classmethod
    def from_arrays(
        cls,
        name: str,
        train_images: npt.ArrayLike,
        train_labels: npt.ArrayLike,
        test_images: npt.ArrayLike,
        test_labels: npt.ArrayLike,
        *,
        classes: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> Self:
        """A data set of the user's own arrays.

        Args:
          name: what to call it.
          train_images, test_images: (N, H, W, C) or, grey, (N, H, W); uint8, 0 .. 255; not copied.
          train_labels, test_labels: (N,) of any integer dtype.
          classes: number of classes; the largest label + 1 when not given, at most the number of training images.
          mean, std: per channel, of images divided by 255; measured on `train_images` when not given (a channel
            that is the same everywhere gets `std` 1).

        Raises:
          ValueError: what `Split` and `Dataset` refuse, and labels that are not integers.

        >>> images, labels = np.zeros((4, 8, 8), np.uint8), [0, 1, 2, 1]
        >>> data = Dataset.from_arrays("mine", images, labels, images, labels)
        >>> data.classes, data.image_shape, data.mean, data.std
        (3, (8, 8, 1), (0.0,), (1.0,))
        """
        train = Split(_images(train_images), _labels(train_labels))
        test = Split(_images(test_images), _labels(test_labels))
        if classes is None:
            classes = max(2, 1 + int(max(train.labels.max(), test.labels.max())))
            if classes > max(2, len(train)):
                raise ValueError(
                    f"the largest label is {classes - 1}, and there are {len(train)} training images: number the "
                    "classes from 0, or give `classes`"
                )
        if mean is None or std is None:
            measured_mean, measured_std = channel_statistics(train.images)
            mean = measured_mean if mean is None else mean
            std = measured_std if std is None else std
        return cls(name, train, test, classes, mean, std)  # type: ignore[arg-type]  # which makes tuples of them

    def part(self, classes: int = 0, images: int = 0) -> Dataset:
        """A smaller data set: the first classes, and of each the first training images.

        Args:
          classes: how many classes, 2 or more; 0: all. Test images of other classes are left out as well.
          images: how many training images, spread evenly over the classes; 0: all of these classes.

        Returns:
          A data set of the same name, order and colour statistics; itself where nothing is left out.

        Raises:
          ValueError: more classes or images than there are, or images that cannot be spread evenly.
        """
        classes = classes or self.classes
        if not 2 <= classes <= self.classes:
            raise ValueError(f"`subset.classes` is {classes}; give 2 to {self.classes}, or 0 for all.")
        per_class = np.bincount(self.train.labels, minlength=classes)[:classes]
        each = images // classes
        if images and (images % classes or not 1 <= each <= per_class.min()):
            raise ValueError(
                f"`subset.images` is {images}; give a multiple of {classes}, the number of classes, up to "
                f"{per_class.min() * classes}, or 0 for all."
            )
        if classes == self.classes and not images:
            return self
        rank = np.empty(len(self.train), np.int64)
        for label in range(self.classes):
            of_label = self.train.labels == label
            rank[of_label] = np.arange(of_label.sum())
        chosen = (self.train.labels < classes) & ((rank < each) | (images == 0))
        kept = {name: getattr(self, name) for name in ("test", "validation")}
        for name, split in kept.items():
            if split is not None and (of_these := split.labels < classes).any():
                kept[name] = split._where(of_these)
            elif split is not None:
                raise ValueError(f"`subset.classes` is {classes}; no {name} image is of these classes, give more.")
        return dataclasses.replace(self, train=self.train._where(chosen), classes=classes, **kept)

    def holding_out(self, part: float, seed: int = 0) -> Dataset:
        """A data set with some of the training images as `validation`, to choose by without looking at `test`.

        Of each class `round(part * n)` of its n training images are held out, those that come first in the order of a
        hash of seed and index: the same under every version of Python and NumPy. Both splits keep their order; `mean`
        and `std` stay those of all training images.

        Args:
          part: of the training images, 0 to below 1; 0: none, and the data set is returned as it is.
          seed: another number holds out others.

        Raises:
          ValueError: another `part`, one that leaves either split empty, or images that were held out before.

        >>> images, labels = np.zeros((8, 4, 4), np.uint8), [0, 0, 0, 0, 1, 1, 1, 1]
        >>> Dataset.from_arrays("mine", images, labels, images, labels).holding_out(0.25).validation.labels
        array([0, 1], dtype=int32)
        """
        require_part(part)
        if part == 0:
            return self
        if self.validation is not None:
            raise ValueError(f"{len(self.validation)} images are held out already; hold out all of them at once.")
        held = held_out(self.train.labels, part, seed)
        return dataclasses.replace(self, train=self.train._where(~held), validation=self.train._where(held))


def require_part(part: float) -> None:
    """Refuse what is no part of images to hold out.

    Raises:
      ValueError: in one line.
    """
    if not is_number(part) or not 0 <= part < 1:
        raise ValueError(f"`part` is {shown(part)}; give the part of the training images to hold out, 0 to below 1.")


def held_out(labels: npt.NDArray[np.integer], part: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which images are held out: of each class `round(part * n)` of its n, those that come first by `hashed_order`.

    Args:
      labels: (N,), of the images; all the same where classes are not known.

    Returns:
      (N,) bool.

    Raises:
      ValueError: for a part that leaves either side empty.
    """
    rank = np.empty(len(labels), np.int64)
    rank[hashed_order(len(labels), str(seed))] = np.arange(len(labels))
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        of_label = np.flatnonzero(labels == label)
        held[of_label[np.argsort(rank[of_label])][: round(part * len(of_label))]] = True
    if held.all() or not held.any():
        raise ValueError(f"`part` is {part} of {len(labels)} images, which leaves a split empty; give another.")
    return held


def hashed_order(count: int, seed: str) -> list[int]:
    """The numbers below `count` in the order of a hash: the same under every version of Python and NumPy."""
    hashes = [hashlib.sha256(f"{seed} {index}".encode()).digest() for index in range(count)]
    return sorted(range(count), key=hashes.__getitem__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Description:
    """A data set without its images: what a trained network must know of it; fields as of `Dataset`.

    images: how many of them a run trains on.
    class_names: in the order of the labels, as of `StreamedDataset`; empty where they are not known.
    """

    name: str
    classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    class_names: tuple[str, ...] = ()

    @classmethod
    def of(cls, dataset: Any) -> Description:
        """Of a data set whose part it is already, and of whose images some may be held out."""
        return cls(
            name=dataset.name,
            classes=dataset.classes,
            image_shape=dataset.image_shape,
            mean=dataset.mean,
            std=dataset.std,
            images=len(dataset.train),
            class_names=getattr(dataset, "class_names", ()),
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Description:
        """From JSON, in which tuples are lists."""
        given: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in fields.items()}
        return cls(**given)

    def differs_from(self, other: Description) -> str:
        """In what other images differ for a network, a few words; empty for none. They may have another name."""
        named = {"classes": "classes", "image_shape": "an image's shape", "images": "training images"}
        for field, words in named.items():
            mine, others = getattr(self, field), getattr(other, field)
            if mine != others:
                return f"{words}: {mine}, not {others}"
        same = np.allclose([self.mean, self.std], [other.mean, other.std], rtol=1e-4, atol=1e-6)
        return "" if same else "the mean or deviation of their colours"

    @property
    def train(self) -> range:
        """Something of the training images' number."""
        return range(self.images)


def channel_statistics(images: npt.NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of `images / 255`, exact to rounding: from counts of the 256 values.

    `mean_c = sum_v n_cv v / sum_v n_cv`, `std_c^2 = sum_v n_cv (v - mean_c)^2 / sum_v n_cv`, v = 0/255 .. 255/255;
    a `std` of 0 becomes 1.

    Args:
      images: (N, H, W, C) uint8, N > 0.

    Returns:
      C means and C standard deviations.
    """
    values = np.arange(256) / 255
    means, deviations = [], []
    for channel in range(images.shape[-1]):
        counts = np.bincount(images[..., channel].ravel(), minlength=256)
        mean = np.average(values, weights=counts)
        means.append(float(mean))
        deviations.append(float(np.sqrt(np.average((values - mean) ** 2, weights=counts))) or 1.0)
    return tuple(means), tuple(deviations)


def _require_array(field: str, array: object, dtype: type[np.generic], shape: str) -> None:
    """Refuses what is not an array of the dtype with as many dimensions as `shape` has letters."""
    dimensions = len(shape.strip("(),").split(","))
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != dimensions:
        got = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(
            f"`{field}` must be a NumPy array of {np.dtype(dtype)} and shape {shape}, got {got}; "
            "`Dataset.from_arrays` converts labels and grey images"
        )


def _images(images: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    array = np.asarray(images)
    if array.dtype != np.uint8:
        raise ValueError(
            f"images must be uint8, 0 .. 255, got {array.dtype}; "
            "values in 0 .. 1 become so by (255 * images).round().astype(numpy.uint8)"
        )
    return array[..., np.newaxis] if array.ndim == 3 else array


def _labels(labels: npt.ArrayLike) -> npt.NDArray[np.int32]:
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"labels must be integers of shape (N,), got {array.dtype} {array.shape}")
    if array.size and (array.min() < 0 or array.max() > np.iinfo(np.int32).max):
        raise ValueError(f"labels must be 0 or more and fit int32, got {array.min()} .. {array.max()}")
    return array.astype(np.int32)
