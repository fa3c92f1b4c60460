"""What a chip computes from a layer's frozen form: integers alone, in NumPy, from the tables of `cimjax.freeze`.

Written to be read beside a description of the hardware, and to be held against it: rows are driven, columns add up,
thresholds are compared, codes are multiplied by integer factors and added. It knows nothing of how tables are made.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

from cimjax.hardware.freeze import FrozenLayer
from cimjax.hardware.thresholds import ADCTable
from cimjax.spec.codes import Plane


class Readings(NamedTuple):
    """What is seen on the way through one layer, at `M` output positions of all images.

    psums: (T, M, R, K, O) int32, the partial sums that come to the ADCs.
    codes: (T, M, R, K, O) int32, what these give; of an ideal ADC the sums themselves.
    accumulators: (N, OH, OW, O) int32; times `2^exponent` and the input's step they are the layer's output, but for a
      bias that is not of the arrays.
    """

    psums: np.ndarray
    codes: np.ndarray
    accumulators: np.ndarray


def run(layer: FrozenLayer, codes: np.ndarray) -> Readings:
    """Compute a layer.

    Args:
      codes: (N, H, W, C) integers, the activation's codes.

    Raises:
      ValueError: for codes of another number of channels or axes.
    """
    codes = np.asarray(codes).astype(np.int64)
    axes = len(layer.kernel_size) + 2
    if codes.ndim != axes or codes.shape[-1] != layer.in_channels:
        wanted = f"{axes} axes, the last of {layer.in_channels} channels"
        raise ValueError(f"{layer.name or 'the layer'} got codes of shape {codes.shape}; it takes {wanted}.")
    driven, size = _stretched(layer, codes)
    slices = [driven] if len(layer.slices) == 1 else [_slice(driven, part) for part in layer.slices]
    sums = [_columns(layer, each) for each in slices]
    psums = np.stack([of_columns for of_columns, _ in sums])
    read = psums if layer.table is None else _read(layer.table, psums)
    significances = np.array([part.significance for part in layer.slices])
    total = layer.bias + np.einsum("t,tmrko,rko->mo", significances, read, layer.factors.astype(np.int64))
    if layer.constant_factors is not None:
        inputs = np.stack([of_inputs for _, of_inputs in sums])
        if layer.dummy_table is not None:
            inputs = _read(layer.dummy_table, inputs[..., None, None])[..., 0, 0]
        total += np.einsum("t,tmr,ro->mo", significances, inputs, layer.constant_factors.astype(np.int64))
    accumulators = total.astype(np.int32).reshape(len(codes), *size, layer.features)
    return Readings(psums.astype(np.int32), read.astype(np.int32), accumulators)


def _stretched(layer: FrozenLayer, codes: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """What every output position sees, (M, C kh kw), channel slowest; and the output's spatial shape."""
    window, sizes = layer.window, codes.shape[1:-1]
    gaps = [(size - 1) * gap + 1 for size, gap in zip(sizes, window.input_dilation, strict=True)]
    spread = np.zeros((len(codes), *gaps, codes.shape[-1]), np.int64)
    spread[(slice(None), *(slice(None, None, gap) for gap in window.input_dilation))] = codes
    # Negative padding cuts off.
    ends = zip(gaps, window.padding, strict=True)
    cut = [slice(max(0, -low), size - max(0, -high)) for size, (low, high) in ends]
    pairs = [(max(0, low), max(0, high)) for low, high in window.padding]
    padded = np.pad(spread[(slice(None), *cut)], [(0, 0), *pairs, (0, 0)])
    spans = [(kernel - 1) * gap + 1 for kernel, gap in zip(layer.kernel_size, window.kernel_dilation, strict=True)]
    steps = zip(padded.shape[1:-1], spans, window.strides, strict=True)
    size = tuple(max(0, (have - span) // stride + 1) for have, span, stride in steps)
    places = []
    for place in itertools.product(*map(range, layer.kernel_size)):
        starts = [index * gap for index, gap in zip(place, window.kernel_dilation, strict=True)]
        taken = zip(starts, window.strides, size, strict=True)
        places.append(
            padded[(slice(None), *(slice(start, start + stride * count, stride) for start, stride, count in taken))]
        )
    seen = np.stack(places, axis=-1)  # (N, OH, OW, C, kh kw)
    return seen.reshape(-1, seen.shape[-2] * seen.shape[-1]), size


def _slice(codes: np.ndarray, part: Plane) -> np.ndarray:
    """The part of codes that a DAC of few bits drives in one cycle."""
    shifted = codes // abs(part.significance)
    return shifted if part.signed else shifted % (part.d_max + 1)


def _columns(layer: FrozenLayer, driven: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sums of all columns, (M, R, K, O), and of the inputs of every read group, (M, R)."""
    groups, planes, outputs = layer.factors.shape
    psums = np.zeros((len(driven), groups, planes, outputs), np.int64)
    inputs = np.zeros((len(driven), groups), np.int64)
    for group in range(groups):
        arrays, rows = np.nonzero(layer.reads == group)
        (array,) = set(arrays.tolist())
        on_rows = driven[:, layer.inputs[array, rows]]
        currents = _product(on_rows, layer.cells[array][:, rows])
        for plane, (plus, minus) in enumerate(layer.columns):
            psums[:, group, plane] = currents[:, layer.array_of_output, plus]
            if minus[0] >= 0:
                psums[:, group, plane] -= currents[:, layer.array_of_output, minus]
        inputs[:, group] = on_rows.sum(axis=1) if layer.dummy < 0 else currents[:, 0, layer.dummy]
    return psums, inputs


def _product(inputs: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """(M, rows) times (Ct, rows, columns): (M, Ct, columns), in float64, which holds these integers and is quick."""
    product = np.einsum("mi,cij->mcj", inputs.astype(np.float64), cells.astype(np.float64), optimize=True)
    return product.astype(np.int64)


def _read(table: ADCTable, sums: np.ndarray) -> np.ndarray:
    """The codes of sums (T, M, R, K, O): how many thresholds each one reaches."""
    reached = np.zeros(sums.shape, np.int64)
    for threshold in np.moveaxis(table.thresholds, -1, 0):  # (T, R, K, O)
        reached += sums >= threshold[:, None]
    lowest, spacing = (each[:, None, None, :, None] for each in (table.lowest, table.spacing))
    return lowest + spacing * reached
