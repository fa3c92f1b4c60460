"""`load`: from the name of a data set to its images, without ever downloading."""

from __future__ import annotations

import os
import pathlib

from cimjax.data.cache import cached_splits
from cimjax.data.catalog import Source, find
from cimjax.data.dataset import Dataset, channel_statistics
from cimjax.data.decoding import View
from cimjax.data.folder import absent, is_there, require_folder_of_all, resolve
from cimjax.data.image_folder import is_folder, read_folder
from cimjax.data.npz import is_npz, read_npz
from cimjax.data.preparation import prepare
from cimjax.data.shards import class_names, stored_records
from cimjax.data.streams import StreamedDataset, StreamedSplit

_VIEW = View()


def load(name: str, data_dir: str | os.PathLike[str] | None = None, *, view: View = _VIEW) -> Dataset | StreamedDataset:
    """A data set by name: as arrays, or, of ImageNet and of folders of images, as a stream from files.

    Args:
      name: one of `names()`: "digits" (8 x 8 x 1; prepared on first use), "cifar10", "cifar100" (32 x 32 x 3),
        "imagenet2012" (prepared before by `prepare`, by `cimjax data prepare`, or by tensorflow-datasets itself as
        ArrayRecord); or "folder:PATH" or "npz:PATH", as `cimjax.data.image_folder` and `cimjax.data.npz` tell.
      data_dir: where data sets lie; tensorflow-datasets' default, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`, when
        not given. A relative path of a folder or file of images is relative to it, when it is given.
      view: what of each image of a stream is given out.

    Returns:
      Both splits in the order in which they are stored, the same every time; `mean` and `std` of the training images
      (for CIFAR the published ones; for every stream those of ImageNet). Decoded arrays are cached beside the records
      where that folder can be written.

    Raises:
      ValueError: an unknown name.
      DataError: the data is absent or may not be read, or a package is not installed; nothing is downloaded.
      DamagedDataError: the data is incomplete or broken.
    """
    if is_folder(name):
        return _folder(name, data_dir, view)
    if is_npz(name):
        return read_npz(name, data_dir)
    source = find(name)
    root = resolve(data_dir)
    require_folder_of_all(source, root)
    if not is_there(source, root):
        if source.downloads:
            raise absent(source, root)
        prepare(name, root)
    if source.streamed:
        return _stream(source, root, view)
    splits = cached_splits(source, root)
    mean, std = source.statistics or channel_statistics(splits["train"].images)
    return Dataset(name, splits["train"], splits["test"], source.classes, mean, std)


def is_streamed(name: str) -> bool:
    """Whether a data set's images stay in files while a network trains.

    Raises:
      ValueError: an unknown name.
    """
    return is_folder(name) or (not is_npz(name) and find(name).streamed)


def shape_and_classes(
    name: str, data_dir: str | os.PathLike[str] | None = None, *, view: View = _VIEW
) -> tuple[tuple[int, int, int], int]:
    """The shape (H, W, C) of a data set's images and its number of classes, without its data; arguments as of `load`.

    Raises:
      ValueError, DataError: an unknown name, or a folder that is wrong.
    """
    if is_folder(name):
        return view.shape, len(read_folder(name, data_dir).classes)
    if is_npz(name):
        arrays = read_npz(name, data_dir)
        return arrays.image_shape, arrays.classes
    source = find(name)
    return view.shape if source.streamed else source.image_shape, source.classes


def _folder(name: str, data_dir: str | os.PathLike[str] | None, view: View) -> StreamedDataset:
    found = read_folder(name, data_dir)
    return StreamedDataset(
        name=found.path.name,
        train=StreamedSplit.of(found.train, view),
        test=StreamedSplit.of(found.test, view),
        validation=StreamedSplit.of(found.validation, view) if found.validation else None,
        classes=len(found.classes),
        class_names=found.classes,
    )


def _stream(source: Source, root: pathlib.Path, view: View) -> StreamedDataset:
    train, test = (StreamedSplit.of(stored_records(source, root, split), view) for split in ("train", "validation"))
    names = class_names(source, root)
    return StreamedDataset(name=source.name, train=train, test=test, classes=source.classes, class_names=names)
