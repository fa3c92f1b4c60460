"""A trained network as one text file in its run folder, instead of checkpoints: small enough to be handed on.

    {"about": ..., "step": ..., "extra": ..., "arrays": {PATH: {"dtype", "shape", "data"}}, "seal": SHA-256 of the rest}

`data` are an array's bytes (little endian, C order; the first byte of all numbers, then the second of all, ...),
compressed by LZMA and written in base 85. The array of a kernel is that of its codes where its path is in `codes`. What
kernels follow from codes is told elsewhere.
"""

from __future__ import annotations

import base64
import lzma
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from cimjax.training.run.files import RunFolderError, read_json, write_json
from cimjax.training.run.seal import seal_of

NETWORK = "network.json"

_ABOUT = "a trained network of cimjax; to measure it: cimjax evaluate FOLDER"


class Network(NamedTuple):
    """What the file holds.

    step: training steps done.
    extra: what was saved beside the state, a JSON-able dictionary.
    arrays: by path ("params/stem/kernel").
    codes: paths of the kernels whose array is that of their codes.
    """

    step: int
    extra: dict[str, Any]
    arrays: Mapping[str, np.ndarray]
    codes: list[str]


def write(folder: Path, network: Network) -> Path:
    """Write the file; it is there whole, or not at all.

    Raises:
      RunFolderError: where it cannot be written.
    """
    arrays = {path: _text_of(array) for path, array in network.arrays.items()}
    content = {"about": _ABOUT, **network._asdict(), "arrays": arrays}
    file = folder / NETWORK
    write_json(file, {**content, "seal": seal_of(content)})
    return file


def read(folder: Path) -> Network | None:
    """What the file of a folder holds; None where there is none.

    Raises:
      RunFolderError: where it is not what was written.
    """
    file = folder / NETWORK
    if not file.exists():
        return None
    content = read_json(file, dict)
    seal = content.pop("seal", None)
    if seal != seal_of(content):
        raise RunFolderError(f"{file} is damaged: it is not what was written; fetch it again.")
    arrays = {path: _array_of(text) for path, text in content["arrays"].items()}
    return Network(content["step"], content["extra"], arrays, content["codes"])


def refuse(folder: Path) -> None:
    """Refuse to train in a folder that holds such a network.

    Raises:
      RunFolderError: in one line.
    """
    if (folder / NETWORK).exists():
        raise RunFolderError(
            f"{folder} holds a packed network, without what its training would go on from; start from it by "
            f"--from {folder}, in another --workdir."
        )


def _text_of(array: np.ndarray) -> dict[str, Any]:
    # First bytes first, then all second ones, ...: those of a sign and an exponent are alike.
    in_order = np.frombuffer(array.tobytes(), np.uint8).reshape(-1, array.itemsize).T.tobytes()
    data = base64.b85encode(lzma.compress(in_order, lzma.FORMAT_ALONE, preset=9)).decode()
    return {"dtype": array.dtype.name, "shape": list(array.shape), "data": data}


def _array_of(text: dict[str, Any]) -> np.ndarray:
    dtype, data = jnp.dtype(text["dtype"]), lzma.decompress(base64.b85decode(text["data"]), lzma.FORMAT_ALONE)
    in_order = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1).T.tobytes()
    return np.frombuffer(in_order, dtype).reshape(text["shape"])
