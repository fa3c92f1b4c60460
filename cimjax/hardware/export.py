"""The frozen form of a network in files: `layers.json`, which says what is where, and NumPy archives beside it.

`LAYER.npz` has the tables of one layer, `LAYER.vectors.npz` what goes in and what is seen on the way for some images,
to test hardware or its model with. A name's slashes are dots in the names of files.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cimjax
from cimjax.core.window import Window
from cimjax.hardware.freeze import FrozenLayer
from cimjax.hardware.on_chip import Call
from cimjax.hardware.thresholds import ADCTable
from cimjax.spec import CIMSpec
from cimjax.spec.codes import Plane

INDEX = "layers.json"
FORMAT = 1
# What the arrays of a file are, for readers of `layers.json`: letters as in `cimjax.core`.
_TABLES = {
    "cells": "(A, Ct, rows, columns) what each cell of each array holds",
    "inputs": "(A, rows) what drives a row: channel * (places of the kernel) + place; -1: nothing",
    "reads": "(A, rows) the read group in which a row is read; -1: none",
    "array_of_output": "(O) in which of the Ct arrays side by side an output's columns are",
    "columns": "(K, 2, O) an output's column of each plane, and the one that is subtracted before the ADC; -1: none",
    "thresholds": "(T, R, K, O, L) the least partial sums that are read as the next code",
    "lowest": "(T, K) the lowest code: code = lowest + spacing * (thresholds that the sum reaches)",
    "spacing": "(T, K) what codes differ by",
    "codes": "(T, K) how many codes there are",
    "dummy_thresholds": "(T, R, 1, 1, L) of the ADC behind the dummy column, and so on",
    "dummy_lowest": "(T, 1)",
    "dummy_spacing": "(T, 1)",
    "dummy_codes": "(T, 1)",
    "factors": "(R, K, O) what codes are multiplied by",
    "constant_factors": "(R, O) what the sums of the inputs of a read group are multiplied by",
    "bias": "(O) what is added",
}
_VECTORS = {
    "inputs": "(N, H, W, C) the codes that come in",
    "psums": "(T, M, R, K, O) partial sums, M = N OH OW",
    "codes": "(T, M, R, K, O) what the ADCs give",
    "accumulators": "(N, OH, OW, O) sum over t, r, k of significance * factor * code, plus bias; times 2^exponent and "
    "the step of the input they are the output",
}
_PLAIN = ("name", "kernel_size", "in_channels", "features", "dummy", "exponent", "activation_step")
_ARRAYS = ("cells", "inputs", "reads", "array_of_output", "columns", "factors", "constant_factors", "bias")


def write(frozen: Mapping[str, FrozenLayer], folder: Path, calls: Sequence[Call] = ()) -> None:
    """Write layers, and vectors of the first call of each, into a folder that exists."""
    for name, layer in frozen.items():
        np.savez_compressed(folder / f"{_file(name)}.npz", **_arrays(layer))
        of_layer = next((call for call in calls if call.layer == name), None)
        if of_layer is not None:
            vectors: dict[str, Any] = {"inputs": of_layer.codes, **of_layer.readings._asdict()}
            np.savez_compressed(folder / f"{_file(name)}.vectors.npz", **vectors)
    index = {
        "format": FORMAT,
        "cimjax": cimjax.__version__,
        "letters": "A arrays below each other, Ct side by side, R read groups, K planes, O outputs, T slices of inputs",
        "tables": _TABLES,
        "vectors": _VECTORS,
        "layers": [_plain(layer) for layer in frozen.values()],
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def read(folder: str | Path) -> dict[str, FrozenLayer]:
    """The layers that `write` wrote, by path.

    Raises:
      ValueError: for a folder that has none, of another format, or with damaged files.
    """
    folder = Path(folder)
    with index_of(folder / INDEX, "layers") as index:
        layers = [_from_plain(plain, folder) for plain in index["layers"]]
    return {layer.name: layer for layer in layers}


@contextlib.contextmanager
def index_of(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """What an index says, while all that it names is read: where that fails, one line says so.

    Args:
      what: it is of, "layers".
    """
    try:
        index = json.loads(path.read_text())
        if index["format"] != FORMAT:
            raise ValueError(f"{path} has format {index['format']}; this version reads {FORMAT}.")
        yield index
    except (OSError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, json.JSONDecodeError) as error:
        raise ValueError(f"{path.parent} holds no {what} of `cimjax export`, or damaged ones: {error}.") from error


def _file(name: str) -> str:
    return name.replace("/", ".") or "network"


def _plain(layer: FrozenLayer) -> dict[str, Any]:
    return {
        **{field: getattr(layer, field) for field in _PLAIN},
        "file": f"{_file(layer.name)}.npz",
        "arrays": sorted(_arrays(layer)),
        "window": layer.window._asdict(),
        "slices": [part._asdict() for part in layer.slices],
        "planes": [plane._asdict() for plane in layer.spec.weight.planes],
        "spec": layer.spec.to_dict(),
    }


def _arrays(layer: FrozenLayer) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(layer, name) for name in _ARRAYS if getattr(layer, name) is not None}
    for prefix, table in (("", layer.table), ("dummy_", layer.dummy_table)):
        if table is not None:
            found |= {f"{prefix}{name}": getattr(table, name) for name in ADCTable.__dataclass_fields__}
    return found


def _from_plain(plain: Mapping[str, Any], folder: Path) -> FrozenLayer:
    with np.load(folder / plain["file"]) as file:
        arrays = dict(file)
    if sorted(arrays) != plain["arrays"]:
        raise KeyError(f"{plain['file']} has not the arrays that it should have")
    tables = {
        prefix: ADCTable(*(arrays[f"{prefix}{name}"] for name in ADCTable.__dataclass_fields__))
        for prefix in ("", "dummy_")
        if f"{prefix}thresholds" in arrays
    }
    window = plain["window"]
    return FrozenLayer(
        **{field: plain[field] for field in _PLAIN if field != "kernel_size"},
        **{name: arrays.get(name) for name in _ARRAYS},  # type: ignore[arg-type]
        kernel_size=tuple(plain["kernel_size"]),
        window=Window(*(tuple(map(_tuple, window[name])) for name in Window._fields)),
        slices=tuple(Plane(**part) for part in plain["slices"]),
        spec=CIMSpec.from_dict(plain["spec"]),
        table=tables.get(""),
        dummy_table=tables.get("dummy_"),
    )


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
