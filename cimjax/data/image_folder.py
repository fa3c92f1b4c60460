"""`folder:PATH`: class folders of images, as users have them; every mistake in them is one line with its path.

    PATH/train/CLASS/*.jpg, PATH/val/CLASS/*.jpg     splits; PATH/test in place of val, or beside it
    PATH/CLASS/*.jpg                                 one split, of which a tenth is held out as test images

Names of classes are names of folders, numbered in the order of their characters. Images may lie in folders of a class
folder. No image is opened here.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cimjax.data.folder import DataError, one_line, own_path
from cimjax.data.stored import Files

PREFIX = "folder:"
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
# Of a folder without other splits, the part of the images that tests.
TEST_PART = 0.1
# What systems leave in folders by themselves; hidden files too.
_LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini")


class ImageFolder(NamedTuple):
    """The splits of a folder, and its classes.

    validation: None where `val` is missing, or is what tests because `test` is missing.
    """

    path: pathlib.Path
    classes: tuple[str, ...]
    train: Files
    test: Files
    validation: Files | None


def is_folder(name: object) -> bool:
    """Whether a data set's name is `folder:PATH`."""
    return isinstance(name, str) and name.startswith(PREFIX)


def path_of(name: str, data_dir: str | os.PathLike[str] | None = None) -> pathlib.Path:
    """The folder that `folder:PATH` means; a relative one lies in `data_dir`, if that is given.

    Raises:
      DataError: where there is no such folder.
    """
    if name == PREFIX:
        raise DataError(f"{name!r} names no folder; give the path of a folder of class folders, as in folder:images")
    path = own_path(name, PREFIX, data_dir)
    if not path.is_dir():
        raise DataError(f"{path} is no folder; `folder:PATH` wants one that holds train/ and val/ of class folders")
    return path


def read_folder(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageFolder:
    """The images of `folder:PATH` by split, from the names of its files.

    Raises:
      DataError: no such folder, no or one class, a class folder without images, a file that is no image by its name,
        or splits of different classes.
    """
    path = path_of(name, data_dir)
    splits = {split: path / split for split in ("train", "val", "test") if (path / split).is_dir()}
    if "train" not in splits:
        if splits:
            raise DataError(f"{path} has {min(splits)}/ but no train/; add that, or give a folder of class folders")
        splits = {"train": path}
    classes = _classes(splits["train"])
    found = {split: _files(folder, classes) for split, folder in splits.items()}
    if len(found) == 1:
        train, test = _in_two(found["train"])
        return ImageFolder(path, classes, train, test, None)
    if "test" not in found:
        return ImageFolder(path, classes, found["train"], found["val"], None)
    return ImageFolder(path, classes, found["train"], found["test"], found.get("val"))


def _classes(folder: pathlib.Path) -> tuple[str, ...]:
    classes = tuple(sorted(entry.name for entry in _entries(folder) if _is_folder(entry)))
    if len(classes) < 2:
        held = f"holds the class {classes[0]!r} alone" if classes else "holds no class folders"
        raise DataError(f"{folder} {held}; every class is a folder of images in it, and there are two at least")
    return classes


def _files(folder: pathlib.Path, classes: tuple[str, ...]) -> Files:
    """The images of one split, class by class, by name."""
    if stray := next((entry.path for entry in _entries(folder) if not _is_folder(entry)), None):
        raise DataError(f"{stray} lies beside the class folders; move it into one of them, or away")
    own = {entry.name for entry in _entries(folder)}
    for name in sorted(own.symmetric_difference(classes)):
        words = "has no counterpart in train" if name in own else "is missing, a class of train"
        raise DataError(f"{folder / name} {words}: all splits must have the same class folders")
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        of_class = sorted(_images(folder / name))
        if not of_class:
            raise DataError(f"{folder / name} holds no image; add some ({', '.join(SUFFIXES)}), or remove the folder")
        paths += [os.fsencode(path.relative_to(folder)) for path in of_class]
        labels += [label] * len(of_class)
    return Files(folder, np.array(paths), np.array(labels, np.int32))


def _images(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    for entry in _entries(folder):
        path = pathlib.Path(entry.path)
        if _is_folder(entry):
            yield from _images(path)
        elif path.suffix.lower() in SUFFIXES:
            yield path
        else:
            raise DataError(f"{path} is no image by its name ({', '.join(SUFFIXES)}); move it away")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link that leads to itself
        raise DataError(f"{entry.path} cannot be read ({one_line(error)}); mend or remove it") from error


def _entries(folder: pathlib.Path) -> list[os.DirEntry[str]]:
    """What lies in a folder, but for hidden files and what systems leave there."""
    try:
        with os.scandir(folder) as entries:
            return [e for e in entries if not e.name.startswith(".") and e.name.lower() not in _LEFT_BY_SYSTEMS]
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({one_line(error)}); mend that or give another folder") from error


def _in_two(files: Files) -> tuple[Files, Files]:
    """Training and test images: which, a hash of the name says, so that it stays so when files are added or taken."""
    limit = int(TEST_PART * 2**32)
    held = np.array([int.from_bytes(hashlib.sha256(bytes(path)).digest()[:4], "big") < limit for path in files.paths])
    if not held.any() or len(np.unique(files.labels[~held])) < len(np.unique(files.labels)):
        raise DataError(
            f"{files.root} has too few images to hold out a tenth of them; give test images of your own, as train/ and "
            "test/ of class folders"
        )
    parts = [Files(files.root, files.paths[chosen], files.labels[chosen]) for chosen in (~held, held)]
    return parts[0], parts[1]
