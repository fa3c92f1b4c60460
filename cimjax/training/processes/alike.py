"""What must be the same on all processes before they train: versions, configuration, images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

import cimjax
from cimjax.data import StreamedSplit
from cimjax.training.processes.group import Group

# Fields that say how a machine is set up, not what is computed.
_MAY_DIFFER = ("data_dir", "workers", "writers")
# Images of a stream whose names are compared.
_NAMED = 64


def require_same_config(config: ConfigDict, processes: Group) -> None:
    """Refuse other versions or another configuration than process 0 has.

    Raises:
      ValueError: on all processes, naming those that differ.
    """
    versions = f"cimjax {cimjax.__version__}, jax {jax.__version__}"
    processes.require_same("version of cimjax or jax", versions.encode(), f"install {versions} everywhere")
    plain = json.loads(config.to_json_best_effort())
    compared = {name: value for name, value in plain.items() if name not in _MAY_DIFFER}
    mend = "start all with the same file, options and fields"
    processes.require_same("config", json.dumps(compared, sort_keys=True).encode(), mend)


def require_same_data(dataset: Any, processes: Group) -> None:
    """Refuse other images than process 0 has: every pixel of arrays, and of streams as much as is known unread.

    Raises:
      ValueError: on all processes, naming those that differ.
    """
    if processes.count == 1:
        return
    content = hashlib.sha256(repr((dataset.classes, dataset.mean, dataset.std)).encode())
    for split in (dataset.train, dataset.test, dataset.validation):
        for part in () if split is None else _parts(split):
            content.update(np.ascontiguousarray(part).tobytes())
    mend = "copy the same files to all machines, or read them from one file system"
    processes.require_same("data set", content.digest(), mend)


def _parts(split: Any) -> Iterator[Any]:
    yield np.int64(len(split))
    if not isinstance(split, StreamedSplit):
        yield split.images
        yield split.labels
        return
    yield split.chosen
    labels = split.known_labels()
    if labels is not None:
        yield labels
    for index in range(0, len(split), max(1, len(split) // _NAMED)):
        yield np.frombuffer(split.name(index).rpartition("/")[2].encode(), np.uint8)
