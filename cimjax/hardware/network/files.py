"""A network in integers in files: `network.json`, its steps in order, and `network.npz`, their arrays.

`network.vectors.npz` has the integers of every step for some images, to test hardware or its model with. What cells
hold and when ADCs give which codes is in the files of the layers (`cimjax.hardware.export`); the factors here are those
of the network, in units of what a layer's result is added to.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import numpy as np

from cimjax.hardware.export import FORMAT, index_of
from cimjax.hardware.freeze import FrozenLayer
from cimjax.hardware.network.operations import Arrays, IntegerNetwork, Operation, Pool, Step

INDEX, TABLES, VECTORS = "network.json", "network.npz", "network.vectors.npz"
# What operations are called in files, which stay readable: there pooling is a window.
_NAMES: dict[type, str] = {kind: kind.__name__.lower() for kind in get_args(Operation)} | {Pool: "window"}
_KINDS = {name: kind for kind, name in _NAMES.items()}
# Of a layer's tables what its network has otherwise.
_OF_LAYER = ("factors", "constant_factors", "bias")


def write(network: IntegerNetwork, folder: Path, entries: Sequence[np.ndarray]) -> None:
    """Write a network, and the integers of all its steps for what enters, into a folder that exists."""
    arrays: dict[str, np.ndarray] = {}
    steps = []
    for number, step in enumerate(network.steps):
        plain, tables = _parts(step)
        arrays |= {f"{number}.{name}": table for name, table in tables.items()}
        steps.append({"inputs": list(step.inputs), "exponent": step.exponent, **plain, "arrays": sorted(tables)})
    np.savez_compressed(folder / TABLES, **arrays)  # type: ignore[arg-type]
    integers = network.run(entries)
    np.savez_compressed(folder / VECTORS, **{str(number): each for number, each in enumerate(integers)})  # type: ignore[arg-type]
    described = {name: " ".join((kind.__doc__ or "").split()) for name, kind in _KINDS.items()}
    index = {"format": FORMAT, "operations": described, "steps": steps}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def read(folder: str | Path, layers: Mapping[str, FrozenLayer]) -> IntegerNetwork:
    """The network that `write` wrote; integers enter it as they are (`IntegerNetwork.run`).

    Args:
      folder: where it is.
      layers: of `cimjax.hardware.export.read` of the same folder.

    Raises:
      ValueError: for a folder that has none, of another format, or with damaged files.
    """
    folder = Path(folder)
    with index_of(folder / INDEX, "steps of a network") as index, np.load(folder / TABLES) as tables:
        steps = [_step(number, plain, tables, layers) for number, plain in enumerate(index["steps"])]
    return IntegerNetwork(tuple(steps), _nothing_enters)


def _nothing_enters(images: Any) -> NoReturn:
    raise ValueError(
        "a network that was read from files takes integers (`run`); images enter by the network it was of."
    )


def _parts(step: Step) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What of a step is plain data, and its arrays."""
    operation = step.operation
    plain: dict[str, Any] = {"operation": _NAMES[type(operation)]}
    if isinstance(operation, Arrays):
        values = {name: getattr(operation.layer, name) for name in _OF_LAYER}
        values |= {"layer": operation.layer.name, "largest": operation.largest}
    else:
        values = {field.name: getattr(operation, field.name) for field in dataclasses.fields(operation)}
    tables = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    return plain | {name: value for name, value in values.items() if name not in tables}, tables


def _step(number: int, plain: dict[str, Any], tables: Any, layers: Mapping[str, FrozenLayer]) -> Step:
    kind, exponent, inputs = _KINDS[plain.pop("operation")], plain.pop("exponent"), tuple(plain.pop("inputs"))
    found = {name: tables[f"{number}.{name}"] for name in plain.pop("arrays")}
    if kind is Arrays:
        layer = layers[plain["layer"]].with_factors(
            found["factors"], found.get("constant_factors"), found["bias"], exponent
        )
        return Step(Arrays(layer, plain["largest"]), inputs, exponent)
    return Step(kind(**{name: _tuple(value) for name, value in plain.items()}, **found), inputs, exponent)


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
