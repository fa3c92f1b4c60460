"""Prepared records to arrays: the only reader of tensorflow-datasets' files, and the judge of whether they are whole.

Both of tensorflow-datasets' usual formats are read without TensorFlow: ArrayRecord, which cimjax prepares, and
TFRecord, which tensorflow-datasets prepares unless told otherwise.
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from cimjax.data.bridge import builder_of, quiet
from cimjax.data.catalog import Source
from cimjax.data.dataset import Split
from cimjax.data.folder import DataError, damaged, folder_of, unreadable

SPLITS = ("train", "test")
_CHUNK = 1000


def read_splits(source: Source, root: pathlib.Path) -> dict[str, Split]:
    """Decodes every image of a prepared data set.

    Args:
      source: which one.
      root: the folder of all data sets.

    Returns:
      "train" and "test", in the order of the records.

    Raises:
      DamagedDataError: a file is missing, truncated or altered, an image cannot be decoded or has another shape, a
        label is out of range, or the number of examples is not what the folder's `dataset_info.json` says.
      DataError: the files may not be read, or are whole but in a format that needs TensorFlow.
    """
    with quiet():
        try:
            if not (folder_of(source, root) / "dataset_info.json").is_file():
                raise damaged(source, root, "dataset_info.json is missing")
            builder = builder_of(source, root)
            return {split: _read_split(source, builder, split) for split in SPLITS}
        except (DataError, MemoryError, ImportError, AttributeError, TypeError):
            # The last three come from code that does not fit together, not from data.
            raise
        except Exception as error:
            # Whatever tensorflow-datasets, protobuf, Riegeli or pillow raise over broken files.
            reason = unreadable if "Permission denied" in str(error) else damaged
            raise reason(source, root, error) from error


def _read_split(source: Source, builder: Any, split: str) -> Split:
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    if split not in builder.info.splits:
        raise ValueError(f"there is no split {split!r}")
    number = builder.info.splits[split].num_examples
    images = np.empty((number, *source.image_shape), np.uint8)
    labels = np.empty(number, np.int32)
    count = 0
    for record in _records(source, builder, split):
        if count < number:
            # Not through tensorflow-datasets' features, which decode every field and take twice as long.
            fields = tf_example_pb2.Example.FromString(record).features.feature
            with Image.open(io.BytesIO(fields["image"].bytes_list.value[0]), formats=("PNG",)) as image:
                pixels = np.asarray(image)
            if pixels.dtype != np.uint8 or pixels.reshape(*pixels.shape[:2], -1).shape != source.image_shape:
                raise ValueError(f"{split} image {count} is {pixels.dtype} {pixels.shape}, not {source.image_shape}")
            images[count] = pixels.reshape(source.image_shape)
            labels[count] = fields["label"].int64_list.value[0]
        count += 1
    if count != number:
        raise ValueError(f"{split} has {count} examples, its dataset_info.json says {number}")
    if labels.size and labels.max() >= source.classes:
        raise ValueError(f"{split} has label {labels.max()}, the largest can be {source.classes - 1}")
    return Split(images, labels)


def _records(source: Source, builder: Any, split: str) -> Iterator[bytes]:
    """The serialized examples of a split, in order: every one that is in its files."""
    from tensorflow_datasets.core import file_adapters

    readers = {
        file_adapters.FileFormat.ARRAY_RECORD: _array_records,
        file_adapters.FileFormat.TFRECORD: _tfrecords,
    }
    stored = builder.info.file_format
    if stored not in readers:
        raise DataError(
            f"{source.name} in {builder.data_dir} is stored as {stored.value}, which needs TensorFlow; "
            "prepare it in another folder with `--data_dir`"
        )
    for path in builder.info.splits[split].filepaths:
        yield from readers[stored](pathlib.Path(path))


def _array_records(path: pathlib.Path) -> Iterator[bytes]:
    """The records of one ArrayRecord file, which verifies its checksums."""
    from array_record.python.array_record_module import ArrayRecordReader

    reader = ArrayRecordReader(str(path))
    try:
        number = reader.num_records()
        for start in range(0, number, _CHUNK):
            yield from reader.read(start, min(start + _CHUNK, number))
    finally:
        reader.close()


def _tfrecords(path: pathlib.Path) -> Iterator[bytes]:
    """The records of one TFRecord file: length (8 bytes), its checksum (4), the record, its checksum (4).

    The checksums are not verified: CRC-32C is not in Python's library, and PNG images carry checksums of their own.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        while file.tell() < size:
            length = int.from_bytes(file.read(8), "little")
            file.read(4)
            if file.tell() + length + 4 > size:
                raise ValueError(f"{path.name} is truncated")
            yield file.read(length)
            file.read(4)
