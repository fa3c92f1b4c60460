"""The frozen form of a network's array layers: what is written into the chip, as tables of integers.

Cells, the thresholds of the ADCs, and the factors that put their codes together again. `cimjax.hardware.engine`
computes from these tables alone, in NumPy; `cimjax.hardware.export` writes them to files. What is digital and not of an
array layer (normalization, activation functions, layers in full precision) stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from cimjax.core import cells, step_sizes
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import Tiling, tile
from cimjax.core.window import Window
from cimjax.hardware.factors import Factors, Reach, integer_factors, reach_of, real_factors
from cimjax.hardware.survey import Layer, layers_of
from cimjax.hardware.thresholds import ADCTable, table_of_columns, table_of_dummies
from cimjax.nn.parameters import steps_of_layer
from cimjax.spec import CIMSpec
from cimjax.spec.codes import Plane

# More bits make a table of thresholds that no chip has.
MOST_ADC_BITS = 10


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenLayer:
    """One array layer in integers, `A` row tiles by `Ct` column tiles of arrays.

    The product of activation codes with weight codes is `2^exponent sum_{t,r,k} g_t factors[r,k,o] code + bias[o]`, and
    the layer's output that times the step of its input.

    name: its path in the network.
    spec, kernel_size, window: what it is built as, and how the kernel moves over its input.
    in_channels, features: `C` and `O`.
    slices: how an activation code is cut, lowest first.
    cells: (A, Ct, rows, columns) uint16, what every cell of every array holds.
    inputs: (A, rows) int32, what drives a row: `channel * (kh kw) + place in the kernel`; -1 drives nothing.
    reads: (A, rows) int32, the read group `r` in which a row is read; -1 in none.
    array_of_output: (O,) int32, the column tile that an output's columns are in.
    columns: (K, 2, O) int32, the column of that array which holds a plane's digits, and the one that is subtracted from
      it before the ADC; -1 where there is none.
    dummy: the column of every array with a 1 in each row that is used, whose sum the constant of the encoding
      multiplies (`reference="adc"`); -1 where there is none.
    table: of the ADCs of the columns; None where they are ideal.
    dummy_table: of the ADC behind dummy columns; None where there is none.
    factors: (R, K, O) int32.
    constant_factors: (R, O) int32, of the sums of a read group's inputs (`encoding="offset"`); None without.
    bias: (O,) int32.
    exponent: of the power of two that one unit of the factors is.
    activation_step: of the layer's input; None where it comes with the input's codes.
    """

    name: str
    spec: CIMSpec
    kernel_size: tuple[int, ...]
    window: Window
    in_channels: int
    features: int
    slices: tuple[Plane, ...]
    cells: np.ndarray
    inputs: np.ndarray
    reads: np.ndarray
    array_of_output: np.ndarray
    columns: np.ndarray
    dummy: int
    table: ADCTable | None
    dummy_table: ADCTable | None
    factors: np.ndarray
    constant_factors: np.ndarray | None
    bias: np.ndarray
    exponent: int
    activation_step: float | None

    def moved_over(self, window: Window) -> FrozenLayer:
        """The same layer on an input of another size, which its kernel moves over otherwise."""
        return self if window == self.window else dataclasses.replace(self, window=window)

    def with_factors(
        self, factors: np.ndarray, constant_factors: np.ndarray | None, bias: np.ndarray, exponent: int
    ) -> FrozenLayer:
        """The same layer in a network in integers, whose factors have the step of its input in them."""
        return dataclasses.replace(
            self,
            factors=factors,
            constant_factors=constant_factors,
            bias=bias,
            exponent=exponent,
            activation_step=None,
        )


def freeze(
    model: nn.Module, variables: Mapping[str, Any], images: Any, *, factor_bits: int | None = None, **kwargs: Any
) -> dict[str, FrozenLayer]:
    """The array layers of a network as integers, by path.

    Cells and thresholds are exact: on the same codes the conversions of the frozen form are those of the network. The
    real factors behind the ADCs are rounded to integers of `factor_bits`, with one power of two for the layer. By that
    a code of the next layer that lies on an edge may become another, as it may by another order of float32 sums.

    Args:
      model, variables: a trained network.
      images: (N, H, W, C) of the size that it is used on; only their shape counts.
      factor_bits: of factors, with their sign, 2 to 24; None for 24, or as many as the accumulators of a layer hold.
      **kwargs: what `model.init` takes besides, such as `train=False`.

    Raises:
      ValueError: for a network without array layers, or a layer that is no table of integers: with `variation`, pairs
        of cells that are counted as one (`signed_cells="ideal"`), ADCs of more than 10 bits, stacked by a lifted
        transform, or whose sums an int32 does not hold.
    """
    layers = [layer for layer in layers_of(model, images, **kwargs) if layer.spec is not None]
    if not layers:
        raise ValueError("the network has no layer in arrays, so there is nothing to freeze.")
    if "params" not in variables:
        raise ValueError("`variables` has no 'params'; give all that `model.init` or `cimjax.calibrate` returned.")
    params = flax.traverse_util.flatten_dict(dict(variables["params"]), sep="/")
    return {layer.name: _of_network(layer, params, factor_bits) for layer in layers}


def _of_network(layer: Layer, params: Mapping[str, Any], factor_bits: int | None) -> FrozenLayer:
    """A layer of a network, with the `params` of all by path, "conv1/kernel"."""
    spec, window = layer.spec, layer.window
    assert spec is not None and window is not None
    if layer.copies > 1:
        raise ValueError(
            f"{layer.name or 'the layer'} is {layer.copies} layers that `nn.scan` or `nn.vmap` stack; freeze them "
            "unstacked."
        )
    steps = steps_of_layer(params, layer.name, layer.kernel, spec)
    return freeze_layer(
        params[f"{layer.name}/kernel".lstrip("/")], steps, window, spec, name=layer.name, factor_bits=factor_bits
    )


def freeze_layer(
    kernel: ArrayLike,
    steps: StepSizes,
    window: Window,
    spec: CIMSpec,
    *,
    name: str = "",
    factor_bits: int | None = None,
) -> FrozenLayer:
    """One layer in integers, without Flax.

    Args:
      kernel: (kh, kw, C, O) real, or (C, O).
      steps: real steps > 0, as for `cim_conv`.
      window: as `core.window.resolve` gives it.
      spec: what to build.
      name: what messages call it.
      factor_bits: see `freeze`, as for what is refused.
    """
    _require_integers(name, spec)
    kernel, steps = jnp.asarray(kernel), jax.tree.map(lambda step: jnp.asarray(step, jnp.float32), steps)
    tiling = tile(kernel.shape, spec)
    step_sizes.require_shapes(steps, tiling, spec)
    stored = cells.store(cells.quantize_weight(kernel, steps.weight, tiling, spec), tiling, spec)
    inputs, reads = _rows(tiling, spec)
    columns, dummy = _columns(tiling, spec)
    table = None if spec.adc is None else table_of_columns(steps, tiling, spec)
    dummy_table = None if dummy < 0 or spec.adc is None else table_of_dummies(steps, tiling, spec)
    reach = reach_of((table, dummy_table), tiling, spec)
    factors = integer_factors(real_factors(steps, tiling, spec), reach, name, factor_bits)
    return FrozenLayer(
        name=name,
        spec=spec,
        kernel_size=tiling.kernel_size,
        window=window,
        in_channels=tiling.in_channels,
        features=tiling.features,
        slices=spec.activation.slices,
        cells=_cells(np.asarray(stored.digits).astype(int), (inputs, reads), (columns, dummy), tiling, spec),
        inputs=inputs,
        reads=reads,
        array_of_output=tiling.column_tile_of_output.astype(np.int32),
        columns=columns,
        dummy=dummy,
        table=table,
        dummy_table=dummy_table,
        factors=factors.of_codes,
        constant_factors=factors.of_sums,
        bias=factors.added,
        exponent=factors.exponent,
        activation_step=None if steps.activation is None else float(steps.activation),
    )


def factors_of(layer: FrozenLayer, params: Mapping[str, Any]) -> tuple[Factors, Reach]:
    """The factors of a layer of a network before they were rounded, and what they are multiplied with.

    Args:
      params: of all layers by path, "conv1/kernel".
    """
    kernel = (*layer.kernel_size, layer.in_channels, layer.features)
    steps, tiling = steps_of_layer(params, layer.name, kernel, layer.spec), tile(kernel, layer.spec)
    reach = reach_of((layer.table, layer.dummy_table), tiling, layer.spec)
    return real_factors(steps, tiling, layer.spec), reach


def _require_integers(name: str, spec: CIMSpec) -> None:
    name = name or "the layer"
    if spec.variation is not None:
        raise ValueError(f"{name} has `variation`: its cells hold real numbers; freeze the network without it.")
    spec.require_exportable()
    bits = 0 if spec.adc is None else math.log2(spec.adc_codes)
    if bits > MOST_ADC_BITS:
        raise ValueError(
            f"{name} has ADCs of {bits:.0f} bits, and tables of thresholds at most {MOST_ADC_BITS}; give `adc.bits` of "
            f"{MOST_ADC_BITS} at most."
        )


def _rows(tiling: Tiling, spec: CIMSpec) -> tuple[np.ndarray, np.ndarray]:
    """What drives every row of every row tile, and in which read group; consecutive rows of the stretched kernel."""
    inputs, reads = (np.full((tiling.arrays, spec.array.rows), -1, np.int32) for _ in range(2))
    filled = np.zeros(tiling.arrays, int)
    for group, array in enumerate(tiling.array_of_group):
        rows = _stretched(tiling, group)
        place = slice(filled[array], filled[array] + len(rows))
        inputs[array, place], reads[array, place] = rows, group
        filled[array] += len(rows)
    return inputs, reads


def _stretched(tiling: Tiling, group: int) -> np.ndarray:
    """The rows of the stretched kernel that a read group stores: `channel * (kh kw) + place`."""
    area = math.prod(tiling.kernel_size)
    place, channel = np.nonzero(tiling.stored.reshape(area, tiling.groups, -1)[:, group])
    return np.sort(tiling.channels[group, channel] * area + place)


def _columns(tiling: Tiling, spec: CIMSpec) -> tuple[np.ndarray, int]:
    """Where an output's columns are: those of one output side by side, then its neighbour's; and the dummy column."""
    weight, offset = spec.weight, 0
    columns = np.full((len(weight.planes), 2, tiling.features), -1, np.int32)
    first = np.arange(tiling.features) % tiling.outputs_per_array * weight.columns_per_output
    for k, plane in enumerate(weight.planes):
        for sign in range(2 if plane.signed else 1):
            columns[k, sign] = first + offset
            offset += 1
    return columns, tiling.outputs_per_array * weight.columns_per_output if weight.dummy_columns else -1


def _cells(
    digits: np.ndarray,
    of_rows: tuple[np.ndarray, np.ndarray],
    of_columns: tuple[np.ndarray, int],
    tiling: Tiling,
    spec: CIMSpec,
) -> np.ndarray:
    """What every cell holds: digits (K, kh, kw, R, c, O) in the places that `_rows` and `_columns` give them."""
    (inputs, reads), (columns, dummy) = of_rows, of_columns
    area, planes = math.prod(tiling.kernel_size), len(columns)
    held = np.zeros((tiling.arrays, tiling.column_tiles, spec.array.rows, spec.array.columns), np.uint16)
    by_place = digits.reshape(planes, area, tiling.groups, -1, tiling.features)
    for array, row in np.argwhere(inputs >= 0):
        channel, place = divmod(int(inputs[array, row]), area)
        group = reads[array, row]
        of_row = by_place[:, place, group, np.searchsorted(_channels(tiling, group), channel)]  # (K, O)
        for plus, minus, digit in zip(columns[:, 0], columns[:, 1], of_row, strict=True):
            held[array, tiling.column_tile_of_output, row, plus] = np.maximum(digit, 0)
            if minus[0] >= 0:
                held[array, tiling.column_tile_of_output, row, minus] = np.maximum(-digit, 0)
        if dummy >= 0:
            held[array, :, row, dummy] = 1
    return held


def _channels(tiling: Tiling, group: int) -> np.ndarray:
    return tiling.channels[group][tiling.channels[group] < tiling.in_channels]
