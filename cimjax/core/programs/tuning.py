"""Tables of what was measured on a device: by which execution each layer is fastest there. `auto` reads them.

`cimjax tune` (`cimjax/analysis/tune/`) measures and writes; here is what a table is, where it lies, and the one read of
it in a process. A table changes no result but for the order of sums, so whatever is wrong with one is a warning, and
layers are computed as without it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax

from cimjax.core.tiling import Tiling
from cimjax.core.window import Window
from cimjax.spec import CIMSpec, Encoding, Execution, Reference, Subtract
from cimjax.spec.base import Notice, shown
from cimjax.user_folders import user_tables

# The environment variable that names another table, or "off".
SETTING = "CIMJAX_TUNING"
# The version of keys and files.
FORMAT = 1
# Tables that come with the package.
SHIPPED = Path(__file__).parent / "tables"


class TuningWarning(Notice):
    """A table that is not used."""


class Table(NamedTuple):
    """What was measured on a device.

    file: where it was read.
    date: of the last measurement, "2026-01-31".
    layers: the fastest execution by the `key` of a layer.
    """

    file: Path
    date: str
    layers: Mapping[str, Execution]


def key(tiling: Tiling, window: Window, spec: CIMSpec, input_shape: tuple[int, ...]) -> str:
    """What the time of a layer depends on, in one line: layers of equal keys share an entry.

    These are the sizes of its arrays: images to the nearest power of two, input and kernel, the window, read groups and
    their channels, slices and planes with the largest magnitude of each (it decides which operands are exact, and
    whether 16 bits keep a partial sum), and what adds passes over partial sums: the ADC, its offset, variation,
    planes with steps of their own. Not here are granularities (steps are broadcast to all columns first), the bits of
    the ADC, and how steps start and learn.

    Args:
      input_shape: of the codes, (N, H, W, C).
    """
    images, *size, _ = input_shape
    weight = spec.weight
    parts = [
        f"{2 ** round(math.log2(max(images, 1)))} images {_by(size)}",
        f"kernel {_by(tiling.kernel_size)} {tiling.in_channels}-{tiling.features}",
        f"window {' '.join(_by(numbers) for numbers in (window.strides, *window.padding, *window[2:]))}",
        f"reads {_by(tiling.channels.shape)}",
    ]
    if spec.skips_decomposition:
        parts.append(f"codes to {spec.activation.code_range.magnitude} {weight.code_range.magnitude}")
        return ", ".join(parts)
    stored = [str(weight.encoding)]
    stored += ["analog"] if weight.subtract == Subtract.ANALOG else []
    stored += ["reference"] if weight.encoding == Encoding.OFFSET and weight.reference == Reference.ADC else []
    stored += ["own steps"] if weight.step_per_plane else []
    adc = "ideal" if spec.adc is None else "offset" if spec.adc.offset else "plain"
    parts += [
        f"slices {len(spec.activation.slices)} to {max(part.magnitude for part in spec.activation.slices)}",
        f"planes {len(weight.planes)} to {max(part.magnitude for part in weight.planes)} {' '.join(stored)}",
        f"adc {adc}{'' if spec.variation is None else ', variation'}",
    ]
    return ", ".join(parts)


def _by(numbers: Iterable[int]) -> str:
    return "x".join(map(str, numbers)) or "-"


def table(device_kind: str) -> Table | None:
    """The table in force for a device: the file of `CIMJAX_TUNING`, the user's own, or the one of the package.

    None where there is none, or `CIMJAX_TUNING` is "off".

    Read once in a process.

    Warns:
      TuningWarning: in one line, where the table cannot be used.
    """
    setting = os.environ.get(SETTING, "")
    if setting == "off":
        return None
    if setting:
        return _usable(Path(os.path.expanduser(setting)), device_kind)
    name = file_name(device_kind)
    for folder in (user_tables(), SHIPPED):
        if folder is not None and (folder / name).exists():
            return _usable(folder / name, device_kind)
    return None


@functools.lru_cache
def _usable(file: Path, device_kind: str) -> Table | None:
    try:
        return read(file, device_kind)
    except ValueError as error:
        mend = f"measure anew by `cimjax tune`, or set {SETTING}=off"
        warnings.warn(f"the tuning table {file} is not used: {error}; {mend}.", TuningWarning, stacklevel=2)
        return None


def forget() -> None:
    """Read tables again that were read before: one was written."""
    _usable.cache_clear()


def read(file: Path, device_kind: str) -> Table:
    """The table in a file.

    Raises:
      ValueError: with the reason, where it is no table, or one of another device, another format or another jax.
    """
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ValueError("it is no JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("layers"), dict):
        raise ValueError("it holds no layers")
    measured = str(content.get("jax", "")).split(".")[:2], jax.__version__.split(".")[:2]
    if content.get("format") != FORMAT:
        raise ValueError(f"its format is {shown(content.get('format'))}, and {FORMAT} is read here")
    if content.get("device") != device_kind:
        raise ValueError(f"it was measured on {shown(content.get('device'))}, and this is {device_kind!r}")
    if measured[0] != measured[1]:
        raise ValueError(f"it was measured with jax {shown(content.get('jax'))}, and this is {jax.__version__}")
    layers = {name: Execution.from_dict(entry) for name, entry in content["layers"].items()}
    return Table(file, str(content.get("date", "")), layers)


def file_name(device_kind: str) -> str:
    """How the table of a device is called: "NVIDIA_H100_80GB_HBM3.json"."""
    return re.sub(r"[^\w.+-]+", "_", device_kind) + ".json"
