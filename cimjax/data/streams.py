"""Data sets whose images stay in their files, encoded: ImageNet's records, folders of images. Never all in memory.

To the rest of the library they are what `Dataset` is: two splits, the number of classes, and the colour statistics.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cimjax.data.dataset import hashed_order, held_out, require_part
from cimjax.data.decoding import UndecodableError, View, centre_crop
from cimjax.data.folder import DataError
from cimjax.data.stored import Encoded, Stored

# Mean and standard deviation per channel of ImageNet's training images divided by 255, as everybody uses them.
IMAGENET_STATISTICS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_THREADS = 8


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class StreamedSplit:
    """Some of the images of a store, in a fixed order.

    Attributes:
      stored: all of them.
      chosen: (N,) int64, the numbers of those that belong to this split.
      view: what of each image is given out.
    """

    stored: Stored
    chosen: npt.NDArray[np.int64]
    view: View

    @classmethod
    def of(cls, stored: Stored, view: View) -> StreamedSplit:
        """All images of a store."""
        return cls(stored, np.arange(len(stored)), view)

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Encoded:
        return self.stored[int(self.chosen[index])]

    def name(self, index: int) -> str:
        """What to call an image in a message, so that it can be found."""
        return self.stored.name(int(self.chosen[index]))

    @property
    def images(self) -> _Images:
        """As evaluation sees them, decoded where they are asked for: `images[[3, 1]]`, (2, H, W, C) uint8."""
        return _Images(self)

    @property
    def labels(self) -> _Labels:
        """Its labels, read where they are asked for: `labels[[3, 1]]`, (2,) int32."""
        return _Labels(self)

    def where(self, chosen: npt.NDArray[np.bool_]) -> StreamedSplit:
        """A part of the split."""
        return dataclasses.replace(self, chosen=self.chosen[chosen])

    def known_labels(self) -> npt.NDArray[np.int32] | None:
        """(N,) labels of all images; None where only reading every image would tell."""
        return None if self.stored.labels is None else self.stored.labels[self.chosen]

    def __repr__(self) -> str:
        return f"StreamedSplit({len(self):,} images of {type(self.stored).__name__}, {self.view})"


@dataclasses.dataclass(frozen=True, slots=True)
class _Images:
    split: StreamedSplit

    def __getitem__(self, indices: Sequence[int]) -> npt.NDArray[np.uint8]:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            return np.stack(list(threads.map(self._one, indices)))

    def _one(self, index: int) -> npt.NDArray[np.uint8]:
        try:
            return centre_crop(self.split[index].image, self.split.view).pixels
        except UndecodableError as error:
            raise undecodable(self.split, index, error) from error


@dataclasses.dataclass(frozen=True, slots=True)
class _Labels:
    split: StreamedSplit

    def __getitem__(self, indices: Sequence[int]) -> npt.NDArray[np.int32]:
        known = self.split.known_labels()
        return np.array([self.split[i].label for i in indices], np.int32) if known is None else known[indices]


@dataclasses.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StreamedDataset:
    """A training split, a test split, and what normalises them; fields as of `Dataset`.

    class_names: of the classes, in the order of their labels; empty where they are not known.
    """

    name: str
    train: StreamedSplit
    test: StreamedSplit
    classes: int
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = IMAGENET_STATISTICS[0]
    std: tuple[float, ...] = IMAGENET_STATISTICS[1]
    validation: StreamedSplit | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        return self.train.view.shape

    def part(self, classes: int = 0, images: int = 0) -> StreamedDataset:
        """A smaller data set: the first classes, and some of the training images.

        Args:
          classes: how many classes, 2 or more; 0: all. Test images of other classes are left out as well.
          images: how many training images, 0: all; those that come first in the order of a hash of their numbers, so
            about as many of every class.

        Raises:
          ValueError: more classes or images than there are, or classes of records, which only reading all would tell.
        """
        classes = classes or self.classes
        if not 2 <= classes <= self.classes:
            raise ValueError(f"`subset.classes` is {classes}; give 2 to {self.classes}, or 0 for all.")
        changed: dict[str, Any] = {"classes": classes, "class_names": self.class_names[:classes]}
        if classes < self.classes:
            for field in ("train", "test", "validation"):
                split = getattr(self, field)
                labels = self.train.known_labels() if split is None else split.known_labels()
                if labels is None:
                    raise ValueError(
                        f"`subset.classes` is {classes}, but the records of {self.name} tell no classes before they "
                        "are read: give 0, and fewer `subset.images` if you like."
                    )
                changed[field] = None if split is None else split.where(labels < classes)
                if changed[field] is not None and not len(changed[field]):
                    raise ValueError(f"`subset.classes` is {classes}, of which {field} has no images; give more, or 0.")
        train = changed.get("train", self.train)
        if not 0 <= images <= len(train):
            raise ValueError(f"`subset.images` is {images}; give up to {len(train)}, or 0 for all.")
        if images:
            chosen = np.zeros(len(train), bool)
            chosen[hashed_order(len(train), "subset")[:images]] = True
            train = train.where(chosen)
        return dataclasses.replace(self, **{**changed, "train": train})

    def holding_out(self, part: float, seed: int = 0) -> StreamedDataset:
        """A data set with some of the training images as `validation`; `round(part * n)` of each class, or of all
        where classes cannot be told, those that come first in the order of a hash of seed and number.

        Args:
          part: of the training images, 0 to below 1; 0: none, and the data set is returned as it is.
          seed: another number holds out others.

        Raises:
          ValueError: a part that leaves either split empty, or images that were held out before.
        """
        require_part(part)
        if part == 0:
            return self
        if self.validation is not None:
            raise ValueError(f"{len(self.validation)} images are held out already, as `val`; leave `validation` at 0.")
        labels = self.train.known_labels()
        groups = np.zeros(len(self.train), np.int32) if labels is None else labels
        held = held_out(groups, part, seed)
        return dataclasses.replace(self, train=self.train.where(~held), validation=self.train.where(held))


def undecodable(split: StreamedSplit, index: int, reason: object) -> DataError:
    """An image of which nothing can be decoded."""
    return DataError(f"{split.name(index)} cannot be decoded ({reason}); put a whole image in its place.")
