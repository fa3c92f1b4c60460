"""Decoded arrays kept beside the records they came from: a second run reads them in a fraction of a second.

The cache is one uncompressed `.npz` file. It carries the names, sizes and modification times of the files it was made
from, and is ignored, then replaced, when these differ. A folder that cannot be written has no cache. Without one,
60,000 CIFAR images take some seconds to decode.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import uuid
import zipfile
import zlib
from typing import Any

import numpy as np

from cimjax.data.catalog import Source
from cimjax.data.dataset import Split
from cimjax.data.folder import folder_of
from cimjax.data.records import SPLITS, read_splits

FILE = "decoded_by_cimjax.npz"


def cached_splits(source: Source, root: pathlib.Path) -> dict[str, Split]:
    """The splits of a prepared data set from its cache, else from its records, which are then cached.

    Raises:
      DataError: what `read_splits` raises.
    """
    folder = folder_of(source, root)
    try:
        files = _fingerprint(folder)  # before reading: what changes meanwhile makes the cache old
    except OSError:
        return read_splits(source, root)  # which says what is wrong with the folder
    splits = _read(folder, files)
    if splits is None:
        splits = read_splits(source, root)
        _write(folder, files, splits)
    return splits


def _read(folder: pathlib.Path, files: str) -> dict[str, Split] | None:
    """The cached splits, or None where there is no cache, or one of other files, or a broken one."""
    try:
        with (folder / FILE).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if arrays["made_from"].item() != files:
                return None
            return {split: Split(arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in SPLITS}
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


def _write(folder: pathlib.Path, files: str, splits: dict[str, Split]) -> None:
    """Caches the splits, completely or not at all; a folder that cannot be written stays as it is."""
    arrays: dict[str, Any] = {"made_from": np.array(files)}
    for name, split in splits.items():
        arrays |= {f"{name}_images": split.images, f"{name}_labels": split.labels}
    unfinished = folder / f"{FILE}.{uuid.uuid4().hex}.tmp"
    try:
        with unfinished.open("xb") as file:
            np.savez(file, **arrays)
        unfinished.replace(folder / FILE)
    except OSError:
        pass
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def _fingerprint(folder: pathlib.Path) -> str:
    """Name, size and modification time (ns) of every file of the prepared data."""
    files = [path for path in folder.iterdir() if not path.name.startswith((FILE, "."))]
    return json.dumps(sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files))
