"""The record files of a prepared data set, from its `dataset_info.json`; a missing one is named at once."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from cimjax.data.catalog import Source
from cimjax.data.folder import DataError, absent, damaged, folder_of, is_there, prepare_command
from cimjax.data.stored import Records

_FORMAT = "array_record"


def stored_records(source: Source, root: pathlib.Path, split: str) -> Records:
    """The records of a split.

    Raises:
      DataError: the data is absent, or in another format than ArrayRecord.
      DamagedDataError: a file is missing or empty, or the split is.
    """
    if not is_there(source, root):
        raise absent(source, root)
    folder, info = folder_of(source, root), _info(source, root)
    if info.get("fileFormat", "tfrecord") != _FORMAT:
        raise DataError(
            f"{folder} is stored as {info.get('fileFormat', 'tfrecord')}, of which no image can be read by itself; "
            f"move it away, and prepare it anew with: {prepare_command(source, root)}"
        )
    found = next((one for one in info.get("splits", ()) if one.get("name") == split), None)
    if found is None or not found.get("shardLengths"):
        raise damaged(source, root, f"its dataset_info.json has no split {split!r}")
    lengths = [int(length) for length in found["shardLengths"]]
    common = f"{info['name']}-{split}.{_FORMAT}"
    shards = [folder / f"{common}-{number:05d}-of-{len(lengths):05d}" for number in range(len(lengths))]
    for shard in shards:
        try:
            empty = shard.stat().st_size == 0
        except FileNotFoundError:
            raise damaged(source, root, f"{shard.name} is missing") from None
        if empty:
            raise damaged(source, root, f"{shard.name} is empty")
    return Records(shards, lengths, prepare_command(source, root))


def class_names(source: Source, root: pathlib.Path) -> tuple[str, ...]:
    """The names that the prepared folder holds, in the order of the labels; none where it holds no such list."""
    try:
        names = tuple((folder_of(source, root) / "label.labels.txt").read_text().split())
    except OSError:
        return ()
    return names if len(names) == source.classes else ()


def _info(source: Source, root: pathlib.Path) -> dict[str, Any]:
    try:
        info = json.loads((folder_of(source, root) / "dataset_info.json").read_text())
    except FileNotFoundError:
        raise damaged(source, root, "dataset_info.json is missing") from None
    except (OSError, ValueError) as error:
        raise damaged(source, root, f"dataset_info.json cannot be read: {error}") from error
    if not isinstance(info, dict) or "name" not in info:
        raise damaged(source, root, "dataset_info.json is no description of a data set")
    return info
