"""Every weight lies in exactly one row of one array, and no array or read is larger than the specification."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from cimjax.core.tiling import tile, tile_inputs, tile_kernel
from cimjax.spec import ActivationSpec, ArraySpec, CIMSpec, WeightSpec


@st.composite
def layers(draw: st.DrawFn) -> tuple[tuple[int, ...], CIMSpec]:
    kernel = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    area = int(np.prod(kernel))
    rule = draw(st.sampled_from(["packed", "balanced", "im2col"]))
    read = draw(st.integers(1 if rule == "im2col" else area, 70))
    rows = draw(st.integers(read, 90))
    array = ArraySpec(
        rows=rows,
        columns=draw(st.integers(3, 20)),
        tiling=rule,
        active_rows=draw(st.sampled_from([None, read])),
    )
    if array.active_rows is None and rule != "im2col" and rows < area:
        rows = area
    return (*kernel, draw(st.integers(1, 40)), draw(st.integers(1, 12))), CIMSpec(array=array)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(layers())
def test_every_weight_is_stored_once_in_an_array_that_holds_it(layer: tuple[tuple[int, ...], CIMSpec]) -> None:
    shape, spec = layer
    tiling = tile(shape, spec)
    *kernel, channels, features = shape
    rows = np.arange(1, np.prod(kernel, dtype=int) * channels + 1).reshape(*kernel, channels)
    stored = np.asarray(tile_kernel(jnp.asarray(rows[..., None], jnp.float32), tiling))[..., 0]
    assert np.array_equal(np.sort(stored[tiling.stored]), np.sort(rows.ravel()))
    assert not stored[~tiling.stored].any()
    assert tiling.rows_of_group.max() <= spec.array.rows_per_read
    assert tiling.rows_of_array.max() <= spec.array.rows
    assert tiling.rows_of_group.min() >= 1
    assert tiling.column_tiles * tiling.outputs_per_array >= features
    assert (np.diff(tiling.array_of_group) >= 0).all()
    # Driving the groups' inputs and adding their products is the plain product.
    x = np.random.default_rng(0).integers(0, 5, channels).astype(np.float32)
    driven = np.asarray(tile_inputs(jnp.asarray(x), tiling)).reshape(tiling.groups, -1)
    assert np.allclose(np.sum(stored * driven), np.sum(rows * x))
    if spec.array.tiling != "im2col":
        whole = tiling.stored.reshape(-1, *tiling.channels.shape)
        assert (whole == whole[0]).all(), "kernels stay whole"
        fit = spec.array.rows // int(np.prod(kernel, dtype=int))
        assert tiling.arrays == -(-channels // fit)


def channels_per_tile(rule: str, channels: int, rows: int = 128, active_rows: int | None = None) -> list[int]:
    tiling = tile((3, 3, channels, 4), CIMSpec(array=ArraySpec(rows=rows, tiling=rule, active_rows=active_rows)))
    return [int(rows) // 9 for rows in tiling.rows_of_group]


def test_packed_fills_arrays_and_balanced_spreads_channels() -> None:
    assert channels_per_tile("packed", 32) == [14, 14, 4]
    assert channels_per_tile("balanced", 32) == [11, 11, 10]
    assert channels_per_tile("packed", 20, active_rows=40) == [4, 4, 4, 2, 4, 2]
    assert channels_per_tile("balanced", 20, active_rows=40) == [4, 3, 3, 4, 3, 3]


def test_im2col_cuts_kernels_at_the_last_row() -> None:
    tiling = tile((3, 3, 5, 4), CIMSpec(array=ArraySpec(rows=20, tiling="im2col")))
    assert tiling.rows_of_group.tolist() == [20, 20, 5]
    # Rows 18 and 19 are the first two of channel 2.
    assert tiling.channels.tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, 5]]


def test_a_kernel_larger_than_an_array_is_refused_but_not_by_im2col() -> None:
    for rule in ("packed", "balanced"):
        with pytest.raises(ValueError, match=r"A kernel of 49 rows does not fit in 32 rows.*tiling='im2col'"):
            tile((7, 7, 3, 4), CIMSpec(array=ArraySpec(rows=32, tiling=rule)))
        with pytest.raises(ValueError, match="9 rows does not fit in 8 rows"):
            tile((3, 3, 3, 4), CIMSpec(array=ArraySpec(rows=32, tiling=rule, active_rows=8)))
    assert tile((7, 7, 3, 4), CIMSpec(array=ArraySpec(rows=32, tiling="im2col"))).groups == 5


def test_sums_that_float32_cannot_hold_are_refused() -> None:
    wide = {
        "activation": ActivationSpec(bits=16),
        "weight": WeightSpec(bits=8, cell_bits=8),
    }
    assert tile((64, 4), CIMSpec(**wide, array=ArraySpec(rows=2))).groups == 32
    with pytest.raises(ValueError, match=r"Partial sums reach 33553920, beyond .* `active_rows`.*`slice_bits`"):
        tile((64, 4), CIMSpec(**wide, array=ArraySpec(rows=4)))
    # Behind an ideal ADC the recombined sum has to fit as well.
    narrow = {
        "activation": ActivationSpec(bits=16, slice_bits=4),
        "weight": WeightSpec(bits=8, cell_bits=1, encoding="offset"),
        "array": ArraySpec(rows=4),
    }
    assert tile((64, 4), CIMSpec(**narrow)).groups == 16
    with pytest.raises(ValueError, match="Recombined sums behind an ideal ADC reach"):
        tile((64, 4), CIMSpec(**narrow, adc=None))
