"""`npz:PATH`: arrays of the user's own in one file of NumPy's, for what takes names alone: commands, sweeps, studies.

    x_train, x_test     images (N, H, W, C) or, grey, (N, H, W); uint8, 0 .. 255
    y_train, y_test     labels (N,) or (N, 1) of any integer dtype, numbered from 0

These are the names in the files that Keras hands out. Every mistake is one line with the path.
"""

from __future__ import annotations

import os
import pathlib
import zipfile
import zlib

import numpy as np

from cimjax.data.dataset import Dataset
from cimjax.data.folder import DamagedDataError, DataError, one_line, own_path

PREFIX = "npz:"
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def is_npz(name: object) -> bool:
    """Whether a data set's name is `npz:PATH`."""
    return isinstance(name, str) and name.startswith(PREFIX)


def file_of(name: str, data_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The file that `npz:PATH` means; a relative one lies in `data_dir`, if that is given.

    Raises:
      DataError: where there is no such file.
    """
    path = own_path(name, PREFIX, data_dir)
    if not path.is_file():
        raise DataError(f"{path} is no file; `npz:PATH` wants one of numpy.savez with {', '.join(ARRAYS)}")
    return path


def read_npz(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """The arrays of `npz:PATH`, both splits in their order; colour statistics of the training images.

    Raises:
      DataError: no such file, or arrays that are missing, of other shapes or types, or of labels without images.
      DamagedDataError: what is no file of NumPy's, or is cut off.
    """
    path = file_of(name, data_dir)
    try:
        with np.load(path, allow_pickle=False) as file:
            there = list(file)
            arrays = {name: file[name] for name in ARRAYS if name in there}
    except (OSError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedDataError(f"{path} cannot be read as a file of numpy.savez ({one_line(error)})") from error
    if missing := [name for name in ARRAYS if name not in arrays]:
        raise DataError(f"{path} has no {', '.join(missing)} (it has {', '.join(there) or 'nothing'}); name them so")
    images, labels = ([arrays[f"{kind}_{split}"] for split in ("train", "test")] for kind in "xy")
    labels = [part[:, 0] if part.ndim == 2 and part.shape[1] == 1 else part for part in labels]
    try:
        return Dataset.from_arrays(path.stem, images[0], labels[0], images[1], labels[1])
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
