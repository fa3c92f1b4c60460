"""`load`: from the name of a data set to its arrays, without ever downloading."""

from __future__ import annotations

import os

from cimjax.data.cache import cached_splits
from cimjax.data.catalog import find
from cimjax.data.dataset import Dataset, channel_statistics
from cimjax.data.folder import absent, is_there, require_folder_of_all, resolve
from cimjax.data.preparation import prepare


def load(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """A data set by name, as arrays.

    Args:
      name: one of `names()`: "digits" (8 x 8 x 1; prepared on first use), "cifar10", "cifar100" (32 x 32 x 3;
        prepared before by `prepare`, by `cimjax data prepare`, or by tensorflow-datasets itself).
      data_dir: where data sets lie; tensorflow-datasets' default, `$TFDS_DATA_DIR` or `~/tensorflow_datasets`, when
        not given.

    Returns:
      Both splits in the order in which they are stored, the same every time; `mean` and `std` of the training images
      (for CIFAR the published ones). Decoded arrays are cached beside the records where that folder can be written.

    Raises:
      ValueError: an unknown name.
      DataError: the data is absent or may not be read, or a package is not installed; nothing is downloaded.
      DamagedDataError: the data is incomplete or broken.
    """
    source = find(name)
    root = resolve(data_dir)
    require_folder_of_all(source, root)
    if not is_there(source, root):
        if source.downloads:
            raise absent(source, root)
        prepare(name, root)
    splits = cached_splits(source, root)
    mean, std = source.statistics or channel_statistics(splits["train"].images)
    return Dataset(name, splits["train"], splits["test"], source.classes, mean, std)
