"""What one layer takes on the chip: arrays, columns, conversions and dequantization multiplications, as plain data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from cimjax.core.tiling import tile
from cimjax.spec import CIMSpec, Encoding, Granularity, Reference, StepKind


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """Geometry and overhead of one layer; counts are per image where they say so, otherwise per layer.

    row_tiles, column_tiles: `A` and `Ct`; the layer takes `arrays = A * Ct`.
    read_groups: `R`, conversions that one physical column needs one after the other over all row tiles.
    planes, slices: `K` and `T`.
    rows_driven, rows_per_read: rows that a conversion of the fullest read group reads, and that it may read at most.
    fewest_read_groups: `R` if kernels were cut anywhere, as `im2col` does.
    cells, used_cells: memory cells of the arrays, and those that hold a weight's digit or a dummy column's.
    utilization: used cells divided by cells.
    physical_columns: columns that are used, over all arrays (two for a signed plane; dummy columns included).
    adc_conversions: conversions per image.
    adc_energy: the same, each counted as often as its ADC has codes, per image; without a unit: what ADCs of few bits
      take is about proportional to it (it doubles with each bit: Murmann's survey of converters).
    adc_references: distinct steps that the layer's ADCs need; 0 with an ideal ADC.
    dequantization_multiplications: multiplications by a scale factor per output pixel: `O * (1 if both steps are layer,
      else R) * (K if there is a step per column or plane, else 1)`, plus those of an offset's reference.
    dequantization_multiplications_of_paper: the paper's count (section III-B): layer 1; array `n_array n_oc`; column
      `n_split n_array n_oc`, by the granularity of psums.
    dequantization_factors: distinct scale factors to store.
    parameters: weights and biases, steps not included.
    """

    row_tiles: int
    column_tiles: int
    read_groups: int
    planes: int
    slices: int
    rows_driven: int
    rows_per_read: int
    fewest_read_groups: int
    arrays: int
    cells: int
    used_cells: int
    physical_columns: int
    adc_conversions: int
    adc_energy: int
    adc_references: int
    dequantization_multiplications: int
    dequantization_multiplications_of_paper: int
    dequantization_factors: int
    parameters: int

    @property
    def utilization(self) -> float:
        """The part of the arrays' cells that is used, 0 to 1."""
        return self.used_cells / self.cells

    def times(self, copies: int) -> LayerCost:
        """The cost of so many layers like this one; its geometry stays that of each."""
        return dataclasses.replace(self, **{name: copies * getattr(self, name) for name in _SUMMED})

    def stored_factor_bits(self, bits_per_factor: int = 32) -> int:
        """Bits that store the dequantization factors; float32 unless told otherwise."""
        return self.dequantization_factors * bits_per_factor

    def to_dict(self) -> dict[str, Any]:
        """Every field and the utilization, as a plain dictionary."""
        return {**dataclasses.asdict(self), "utilization": self.utilization}


# What adds up over layers.
_SUMMED = (
    "arrays",
    "cells",
    "used_cells",
    "physical_columns",
    "adc_conversions",
    "adc_energy",
    "adc_references",
    "dequantization_multiplications",
    "dequantization_multiplications_of_paper",
    "dequantization_factors",
    "parameters",
)


def layer_cost(
    kernel_shape: tuple[int, ...], output_size: tuple[int, ...], spec: CIMSpec, *, use_bias: bool = False
) -> LayerCost:
    """Count what a layer takes.

    Args:
      kernel_shape: (kh, kw, C, O), or (C, O) for a dense layer.
      output_size: the output's spatial shape, `(OH, OW)`; `()` for one dense product. Any axes will do whose product is
        the number of positions of an image.
      spec: what to build.
      use_bias: whether the layer has a bias of `O` parameters.

    Raises:
      ValueError: for a kernel that does not fit the arrays.
    """
    tiling = tile(tuple(kernel_shape), spec)
    weight, planes, slices = spec.weight, len(spec.weight.planes), len(spec.activation.slices)
    groups, outputs = tiling.groups, tiling.features
    arrays = tiling.arrays * tiling.column_tiles
    dummies = weight.dummy_columns * tiling.column_tiles
    columns = outputs * weight.columns_per_output + dummies
    conversions = slices * groups * (outputs * planes + dummies)
    multiplications = _multiplications(groups, planes, outputs, spec)
    return LayerCost(
        row_tiles=tiling.arrays,
        column_tiles=tiling.column_tiles,
        read_groups=groups,
        planes=planes,
        slices=slices,
        rows_driven=int(tiling.rows_of_group.max()),
        rows_per_read=spec.array.rows_per_read,
        fewest_read_groups=_fewest_read_groups(math.prod(kernel_shape[:-1]), spec),
        arrays=arrays,
        cells=arrays * spec.array.rows * spec.array.columns,
        used_cells=int(tiling.rows_of_array.sum()) * columns,
        physical_columns=tiling.arrays * columns,
        adc_conversions=0 if spec.adc is None else conversions * math.prod(output_size),
        adc_energy=0 if spec.adc is None else groups * _codes(outputs, dummies, spec) * math.prod(output_size),
        adc_references=_references(groups, planes, outputs, tiling.column_tiles, spec),
        dequantization_multiplications=multiplications,
        dequantization_multiplications_of_paper=_paper_multiplications(tiling.arrays, planes, outputs, spec),
        # The factor of a single layer-wide step is one number, however often it is applied.
        dequantization_factors=1 + _factors_of_reference(groups, spec) if _one_factor(spec) else multiplications,
        parameters=math.prod(kernel_shape) + (outputs if use_bias else 0),
    )


def _codes(outputs: int, dummies: int, spec: CIMSpec) -> int:
    """Codes of all ADCs of a read group, over its planes and slices."""
    columns = sum(codes.size for row in spec.adc_ranges for codes in row)
    return int(outputs * columns + dummies * sum(codes.size for codes in spec.reference_ranges))


def _fewest_read_groups(rows: int, spec: CIMSpec) -> int:
    """Read groups of a stretched kernel of so many rows that is cut wherever an array or a read is full."""
    full, rest = divmod(rows, spec.array.rows)
    per_read = spec.array.rows_per_read
    return full * -(-spec.array.rows // per_read) + -(-rest // per_read)


def _shared_by(spec: CIMSpec) -> Granularity:
    """What shares one factor of partial sums: a fixed step is the same everywhere, unless a gain is learned behind it,
    and an ideal ADC has none to tell."""
    if spec.adc is None or (spec.adc.step == StepKind.FIXED and not spec.adc.digital_gain):
        return Granularity.LAYER
    return spec.adc.granularity


def _one_factor(spec: CIMSpec) -> bool:
    return spec.weight.granularity == _shared_by(spec) == Granularity.LAYER


def _factors_of_reference(groups: int, spec: CIMSpec) -> int:
    """Factors of a reference beside one for the layer: of ADCs their own steps, and in digital one without such a
    step."""
    if spec.adc is None or spec.weight.encoding != Encoding.OFFSET:
        return 0
    return groups if spec.weight.reference == Reference.ADC else 1


def _multiplications(groups: int, planes: int, outputs: int, spec: CIMSpec) -> int:
    per_plane = spec.weight.step_per_plane or _shared_by(spec) == Granularity.COLUMN
    count = outputs * (1 if _one_factor(spec) else groups) * (planes if per_plane else 1)
    if spec.weight.encoding != Encoding.OFFSET:
        return count
    # The reference is scaled by the weight step (and its own ADC step): once per output if those are layer-wide.
    layer_wide = spec.weight.granularity == Granularity.LAYER and spec.weight.reference == Reference.DIGITAL
    return count + outputs * (1 if layer_wide else groups)


def _references(groups: int, planes: int, outputs: int, column_tiles: int, spec: CIMSpec) -> int:
    if spec.adc is None:
        return 0
    if spec.adc.step == StepKind.FIXED and not spec.adc.offset:
        return 1
    own = {
        Granularity.LAYER: 1,
        Granularity.ARRAY: groups * column_tiles,
        Granularity.COLUMN: groups * planes * outputs,
    }[spec.adc.granularity]
    return own + (groups if spec.weight.reference == Reference.ADC else 0)


def _paper_multiplications(arrays: int, planes: int, outputs: int, spec: CIMSpec) -> int:
    # Output channels of all the arrays of one row tile together are the layer's: n_array n_oc = A O.
    if spec.adc is None or spec.adc.granularity == Granularity.LAYER:
        return 1
    return arrays * outputs * (planes if spec.adc.granularity == Granularity.COLUMN else 1)
