"""Geometry and overhead of a layer, against counts done by hand and by enumeration."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from cimjax import ADCSpec, ArraySpec, CIMSpec, WeightSpec, layer_cost
from cimjax.spec import ActivationSpec

KERNEL, OUTPUT = (3, 3, 32, 64), (16, 16)


def cost(weight: str = "column", psum: str | None = "column", **options: object) -> object:
    spec = CIMSpec(
        activation=ActivationSpec(bits=4, slice_bits=options.pop("slice_bits", None)),
        array=ArraySpec(active_rows=options.pop("active_rows", None)),
        weight=WeightSpec(granularity=weight, **options),
        adc=None if psum is None else ADCSpec(granularity=psum),
    )
    return layer_cost(KERNEL, OUTPUT, spec, use_bias=True)


def test_a_layer_counted_by_hand() -> None:
    """32 channels of 3 x 3 in 128 rows: 14, 14 and 4 channels; 4-bit weights in two planes, the upper one signed."""
    got = cost()
    assert (got.row_tiles, got.column_tiles, got.read_groups, got.planes, got.slices) == (3, 2, 3, 2, 1)
    assert got.arrays == 6
    assert got.cells == 6 * 128 * 128
    assert got.used_cells == 288 * 64 * 3
    assert got.utilization == got.used_cells / got.cells
    assert got.physical_columns == 3 * 64 * 3
    assert got.adc_conversions == 3 * 64 * 2 * 256
    assert got.adc_references == 3 * 2 * 64
    assert got.dequantization_multiplications == got.dequantization_multiplications_of_paper == 3 * 2 * 64
    assert got.stored_factor_bits(16) == 3 * 2 * 64 * 16
    assert got.parameters == 9 * 32 * 64 + 64
    json.dumps(got.to_dict())


def test_multiplications_for_every_pair_of_granularities() -> None:
    rows, planes, outputs = 3, 2, 64
    for weight, psum in itertools.product(("layer", "array", "column"), ("layer", "array", "column", None)):
        got = cost(weight, psum)
        per_output = (1 if weight == "layer" and psum in ("layer", None) else rows) * (
            planes if psum == "column" else 1
        )
        assert got.dequantization_multiplications == outputs * per_output, (weight, psum)
        paper = {"layer": 1, None: 1, "array": rows * outputs, "column": rows * planes * outputs}[psum]
        assert got.dequantization_multiplications_of_paper == paper
        # Aligning weights with column-wise partial sums costs no multiplication more: the paper's point.
        if psum == "column":
            assert got.dequantization_multiplications == cost("layer", psum).dequantization_multiplications
    assert cost("layer", "layer").dequantization_factors == 1
    assert cost("column", "layer", step_per_plane=True).dequantization_multiplications == outputs * rows * planes


def test_reads_slices_references_and_signed_cells() -> None:
    assert cost(active_rows=36).read_groups == 4 + 4 + 1
    assert cost(active_rows=36).row_tiles == 3
    assert cost(slice_bits=1).adc_conversions == 4 * cost().adc_conversions
    assert cost(signed_cells="ideal").physical_columns == 3 * 64 * 2
    digital, dummy = cost(encoding="offset"), cost(encoding="offset", reference="adc")
    assert digital.dequantization_multiplications == 3 * 2 * 64 + 3 * 64
    assert cost("layer", "column", encoding="offset").dequantization_multiplications == 3 * 2 * 64 + 64
    assert dummy.adc_conversions - digital.adc_conversions == 3 * dummy.column_tiles * 256
    assert dummy.physical_columns - digital.physical_columns == 3 * dummy.column_tiles
    assert dummy.adc_references - digital.adc_references == 3
    assert cost(psum=None).adc_conversions == cost(psum=None).adc_references == 0


def test_codes_are_counted_for_each_plane_and_dummy_column() -> None:
    shape, array = (3, 3, 4, 5), ArraySpec(rows=18, columns=16)
    weight = WeightSpec(bits=3, cell_bits=1, encoding="offset", reference="adc")
    adc = ADCSpec(bits=2, plane_bits=(1, 1.5, 4))
    found = layer_cost(shape, (2, 2), CIMSpec(weight=weight, adc=adc, array=array, activation={"slice_bits": 2}))
    tiles, groups, slices, positions = -(-5 // 5), 2, 2, 4
    assert found.column_tiles == tiles and found.read_groups == groups
    assert found.adc_energy == positions * groups * slices * (5 * (2 + 3 + 16) + tiles * 4)
    alike = layer_cost(shape, (2, 2), CIMSpec(weight=weight, adc=ADCSpec(bits=3), array=array))
    assert alike.adc_energy == 8 * alike.adc_conversions
    assert layer_cost(shape, (2, 2), CIMSpec(weight=weight, adc=None, array=array)).adc_energy == 0


def test_every_granularity_counts_its_references() -> None:
    assert [cost(psum=p).adc_references for p in ("layer", "array", "column")] == [1, 6, 384]
    fixed = CIMSpec(adc=ADCSpec(step="fixed", full_scale=100))
    assert layer_cost(KERNEL, OUTPUT, fixed).adc_references == 1
    # One reference is one factor, however large a group the granularity would give a step of its own.
    for granularity in ("layer", "array", "column"):
        one = CIMSpec(
            weight=WeightSpec(granularity="layer"), adc=ADCSpec(step="fixed", full_scale=100, granularity=granularity)
        )
        assert layer_cost(KERNEL, OUTPUT, one).dequantization_multiplications == 64
        assert layer_cost(KERNEL, OUTPUT, one).dequantization_factors == 1


def test_rows_driven_are_told_beside_those_that_may_be() -> None:
    """A 3 x 3 kernel kept whole takes 9 of 16 active rows; cut anywhere it takes all of them, in fewer reads."""
    packed = CIMSpec(array=ArraySpec(active_rows=16))
    got = layer_cost(KERNEL, OUTPUT, packed)
    assert (got.rows_driven, got.rows_per_read, got.read_groups) == (9, 16, 32)
    cut = layer_cost(KERNEL, OUTPUT, CIMSpec(array=ArraySpec(active_rows=16, tiling="im2col")))
    assert (cut.rows_driven, cut.rows_per_read, cut.read_groups) == (16, 16, 18)
    assert got.fewest_read_groups == cut.fewest_read_groups == 18
    assert (cost().rows_driven, cost().rows_per_read) == (126, 128)
    for rows, active, channels in itertools.product((64, 100), (16, 33), (1, 7, 30)):
        array = ArraySpec(rows=rows, active_rows=active, tiling="im2col")
        got = layer_cost((3, 3, channels, 4), OUTPUT, CIMSpec(array=array))
        assert got.read_groups == got.fewest_read_groups


def test_several_layers_cost_what_each_does() -> None:
    one, three = cost(), cost().times(3)
    assert (three.row_tiles, three.read_groups, three.slices) == (one.row_tiles, one.read_groups, one.slices)
    for name in ("arrays", "used_cells", "adc_conversions", "dequantization_multiplications", "parameters"):
        assert getattr(three, name) == 3 * getattr(one, name)
    assert three.utilization == one.utilization


def test_a_dense_layer_has_one_output_position() -> None:
    got = layer_cost((300, 10), (), CIMSpec())
    assert (got.row_tiles, got.adc_conversions) == (3, 3 * 2 * 10)


def test_a_kernel_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit in 64 rows"):
        layer_cost((9, 9, 3, 4), OUTPUT, CIMSpec(array=ArraySpec(rows=64)))


def test_factors_of_gains_and_references_are_counted() -> None:
    fixed = ADCSpec(bits=3, step="fixed", full_scale=64.0, digital_gain=True)
    narrow, weight = ArraySpec(rows=64, columns=64), WeightSpec(bits=4, cell_bits=1, granularity="layer")
    gains = layer_cost((3, 3, 16, 8), (4, 4), CIMSpec(weight=weight, adc=fixed, array=narrow))
    # A gain for every column: 3 read groups of 4 planes of 8 outputs.
    assert gains.dequantization_factors == gains.dequantization_multiplications == 3 * 4 * 8
    one = ADCSpec(bits=3, granularity="layer")
    for reference, factors in (("adc", 1 + 3), ("digital", 1 + 1)):
        offset = dataclasses.replace(weight, encoding="offset", reference=reference)
        cost = layer_cost((3, 3, 16, 8), (4, 4), CIMSpec(weight=offset, adc=one, array=narrow))
        assert cost.read_groups == 3 and cost.dequantization_factors == factors
        ideal = layer_cost((3, 3, 16, 8), (4, 4), CIMSpec(weight=offset, adc=None, array=narrow))
        assert ideal.dequantization_factors == 1
