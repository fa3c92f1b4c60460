"""scikit-learn's 1,797 handwritten digits as a tensorflow-datasets builder; small, real, and made without a network.

Importing this module registers `cimjax_digits` with tensorflow-datasets (`digits` alone is a name that others may
want). Use it through `cimjax.data.load("digits")`.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from cimjax.data.bridge import SilentBuilder, require

TRAIN_EXAMPLES = 1437
# scikit-learn's pixels are 0 .. 16: times 15 they use the range of 8 bits, 0 .. 240, and stay exact.
PIXEL_SCALE = 15


def split_indices(number: int, train_examples: int = TRAIN_EXAMPLES) -> tuple[list[int], list[int]]:
    """Which of scikit-learn's images train and which test: the first in the order of a hash of the index train.

    The split is the same under every version of Python and NumPy, which a random generator does not promise.

    Args:
      number: images in total.
      train_examples: how many of them train.

    Returns:
      Indices of the training images and of the test images.
    """
    order = sorted(range(number), key=lambda index: hashlib.sha256(f"digits {index}".encode()).digest())
    return order[:train_examples], order[train_examples:]


class CimjaxDigits(SilentBuilder, tfds.core.GeneratorBasedBuilder):
    """8 x 8 grey digits: 1,437 training and 360 test images, not stratified."""

    name = "cimjax_digits"
    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "The 1,797 handwritten digits that scikit-learn carries (the test part of the UCI optical recognition "
                "data set), in a fixed shuffled split. Pixels 0 .. 16 are multiplied by 15. `index` is the position "
                "in `sklearn.datasets.load_digits()`."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "index": np.int64,
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        require("sklearn.datasets")
        from sklearn.datasets import load_digits

        digits = load_digits()
        train, test = split_indices(len(digits.target))
        return {
            "train": self._generate_examples(digits.images, digits.target, train),
            "test": self._generate_examples(digits.images, digits.target, test),
        }

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray, indices: Sequence[int]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields each image as PNG bytes, which tensorflow-datasets stores without TensorFlow."""
        for index in indices:
            png = io.BytesIO()
            Image.fromarray((images[index] * PIXEL_SCALE).astype(np.uint8)).save(png, "PNG")
            yield index, {"image": png.getvalue(), "label": int(labels[index]), "index": index}
