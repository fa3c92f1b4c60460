"""Images as they are stored: one by one, still encoded, by their number. In the files of folders, or in records.

What they look like decoded is told by `cimjax.data.decoding`, in which order they are read by `cimjax.data.reading`.
Objects are passed to other processes: what they hold is small, and files are opened where they are read.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cimjax.data.folder import DamagedDataError, DataError, one_line


class Encoded(NamedTuple):
    """One image: the bytes of its file, and its class."""

    image: bytes
    label: int


class Stored(Protocol):
    """Some stored images, numbered from 0."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, index: int) -> Encoded:
        """One of them; `DataError` with its name where it cannot be read."""

    def name(self, index: int) -> str:
        """What to call an image in a message, so that it can be found."""

    @property
    def labels(self) -> npt.NDArray[np.int32] | None:
        """(N,), all classes; None where they cannot be told without reading every image."""


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Files:
    """Image files below a folder.

    paths: (N,) of NumPy's bytes, relative to `root`, as the system encodes names: a million take tens of megabytes.
    labels: (N,) int32.
    """

    root: pathlib.Path
    paths: npt.NDArray[np.bytes_]
    labels: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Encoded:
        try:
            return Encoded(self._path(index).read_bytes(), int(self.labels[index]))
        except OSError as error:
            raise DataError(f"{self.name(index)} cannot be read ({one_line(error)}); mend that.") from error

    def name(self, index: int) -> str:
        """The path."""
        return str(self._path(index))

    def _path(self, index: int) -> pathlib.Path:
        return self.root / os.fsdecode(bytes(self.paths[index]))


class Records:
    """ArrayRecord files of `tf.train.Example` with "image", "label" and "file_name", as tensorflow-datasets writes
    ImageNet; neither TensorFlow nor tensorflow-datasets' builder is needed to read them."""

    labels = None

    def __init__(self, shards: list[pathlib.Path], lengths: list[int], mend: str) -> None:
        """Nothing is read yet.

        Args:
          shards: the files, in order.
          lengths: how many records each holds.
          mend: the command that makes them anew.
        """
        self.shards, self.mend = shards, mend
        self.ends = np.cumsum(lengths)
        self._source: Any = None

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Encoded:
        fields = self._fields(index)
        try:
            return Encoded(fields["image"].bytes_list.value[0], fields["label"].int64_list.value[0])
        except IndexError as error:
            raise self._damaged(index, "it has no image and label") from error

    def name(self, index: int) -> str:
        """The name of the file that it was, if the record tells it, and the place of the record."""
        names = self._fields(index)["file_name"].bytes_list.value
        place = self._place(index)
        return f"{names[0].decode(errors='replace')} ({place})" if names else place

    def _place(self, index: int) -> str:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        return f"record {index - (self.ends[shard - 1] if shard else 0)} of {self.shards[shard]}"

    def _fields(self, index: int) -> Any:
        from tensorflow_datasets.proto import tf_example_pb2

        try:
            return tf_example_pb2.Example.FromString(self._opened()[index]).features.feature
        except Exception as error:
            # Whatever ArrayRecord or protobuf raise over a file that is missing, short or altered.
            raise self._damaged(index, error) from error

    def _damaged(self, index: int, reason: object) -> DamagedDataError:
        return DamagedDataError(f"{self._place(index)} cannot be read ({one_line(reason)}); mend it with: {self.mend}")

    def _opened(self) -> Any:
        if self._source is None:
            from array_record.python.array_record_data_source import ArrayRecordDataSource

            starts = np.diff(self.ends, prepend=0)
            # With the number of its records in the name, a file is opened only when one of them is wanted.
            named = [f"{path}[0:{length}]" for path, length in zip(self.shards, starts, strict=True)]
            self._source = ArrayRecordDataSource(named)
        return self._source

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}
