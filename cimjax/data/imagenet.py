"""ImageNet (ILSVRC 2012): the prepared records as a data set, and their preparation from the published archives.

The archives have to be downloaded by hand, by whoever has agreed to their terms. Records are those of
tensorflow-datasets' `imagenet2012` (name, version, features), so that what either prepares the other reads. Replaced is
what calls TensorFlow. Importing this module imports tensorflow-datasets; reading records does not.
"""

from __future__ import annotations

import io
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.datasets.imagenet2012 import imagenet2012_dataset_builder as original

from cimjax.data.bridge import SilentBuilder
from cimjax.data.catalog import find

Examples = Iterator[tuple[str, dict[str, Any]]]


class Imagenet2012(SilentBuilder, original.Builder, skip_registration=True):  # type: ignore[call-arg]
    """ImageNet's 1,281,167 training and 50,000 validation images of 1,000 classes."""

    name = "imagenet2012"
    pkg_dir_path = original.Builder.pkg_dir_path
    # Fixed, also under a later tensorflow-datasets, because the folder is looked up without importing that.
    VERSION = tfds.core.Version(find("imagenet2012").version)

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        from cimjax.data.imagenet_archives import TRAIN, VALIDATION

        manual = pathlib.Path(dl_manager.manual_dir)
        return {"train": _training(manual / TRAIN), "validation": _validation(manual / VALIDATION)}


def _training(archive: pathlib.Path) -> Examples:
    """An archive of archives, one for each class and called by it."""
    with tarfile.open(archive) as classes:
        for of_class in classes:
            with tarfile.open(fileobj=classes.extractfile(of_class)) as images:
                for member in images:
                    yield member.name, _example(images, member, pathlib.PurePath(of_class.name).stem)


def _validation(archive: pathlib.Path) -> Examples:
    """One archive of images, whose classes tensorflow-datasets lists in the order of their names."""
    labels = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt").read_text().split()
    with tarfile.open(archive) as images:
        label_of = dict(zip(sorted(images.getnames()), labels, strict=False))
        for member in images:
            yield member.name, _example(images, member, label_of[member.name])


def _example(archive: tarfile.TarFile, member: tarfile.TarInfo, label: str) -> dict[str, Any]:
    file = archive.extractfile(member)
    assert file is not None
    return {"file_name": member.name, "image": _as_rgb_jpeg(member.name, file.read()), "label": label}


def _as_rgb_jpeg(name: str, encoded: bytes) -> bytes:
    """The bytes as they are, but for the 22 images in CMYK and the one in PNG, as in tensorflow-datasets."""
    if name not in original.CMYK_IMAGES and name not in original.PNG_IMAGES:
        return encoded
    jpeg = io.BytesIO()
    with Image.open(io.BytesIO(encoded)) as image:
        image.convert("RGB").save(jpeg, "JPEG", quality=100)
    return jpeg.getvalue()
