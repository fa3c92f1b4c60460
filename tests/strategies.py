"""Random layers for property tests: any valid specification, with shapes and a window that the oracle can compute."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from cases import Case

from cimjax.core.tiling import tile
from cimjax.spec import ActivationSpec, ADCSpec, ArraySpec, CIMSpec, WeightSpec

# Columns (slices x read groups x planes x outputs) and multiplications of one layer, for the oracle's loops.
MOST_COLUMNS = 1500
MOST_PRODUCTS = 3_000_000

GRANULARITIES = st.sampled_from(["layer", "array", "column"])


@st.composite
def activations(draw: st.DrawFn) -> ActivationSpec:
    """Any input: signed or not, 1 to 8 bits, in slices of any width."""
    signed = draw(st.booleans())
    bits = draw(st.sampled_from([1, 1.5, 2, 3, 4, 5, 8] if signed else [1, 2, 3, 4, 5, 8]))
    slice_bits = draw(st.none() | st.integers(1, int(bits) + 1)) if bits >= 2 else None
    return ActivationSpec(bits=bits, signed=signed, slice_bits=slice_bits)


@st.composite
def weights(draw: st.DrawFn) -> WeightSpec:
    """Any encoding with its own options, bits and cell bits that need not divide."""
    encoding = draw(st.sampled_from(["twos_complement", "differential", "offset", "learned_scales"]))
    if encoding == "learned_scales":
        bits = draw(st.integers(1, 3))
        return WeightSpec(bits=bits, cell_bits=1, encoding=encoding, granularity="column", step_per_plane=True)
    wide = [2, 3, 4, 5, 6, 8]
    bits = {"twos_complement": wide, "differential": [1, 1.5, *wide], "offset": [1, *wide]}[encoding]
    options: dict[str, Any] = {"granularity": draw(GRANULARITIES)}
    if encoding == "differential":
        options["subtract"] = draw(st.sampled_from(["digital", "analog"]))
    elif options["granularity"] == "column":
        options["step_per_plane"] = draw(st.booleans())
    if encoding == "offset":
        options["reference"] = draw(st.sampled_from(["digital", "adc"]))
    return WeightSpec(
        bits=draw(st.sampled_from(bits)),
        cell_bits=draw(st.integers(1, 4) | st.just(8)),
        encoding=encoding,
        signed_cells=draw(st.sampled_from(["paired", "ideal"])),
        **options,
    )


@st.composite
def adcs(draw: st.DrawFn, *, all_signed: bool) -> ADCSpec:
    """Any ADC; `all_signed` tells whether every column can be negative, which forced signed codes need."""
    offset = draw(st.booleans())
    kind = draw(st.sampled_from(["learned", "calibrated", "power_of_two", "fixed"]))
    return ADCSpec(
        bits=draw(st.sampled_from([1, 1.5, 2, 3, 4, 6, 8])),
        granularity=draw(GRANULARITIES),
        offset=offset,
        step=kind,
        full_scale=draw(st.floats(0.5, 500)) if kind == "fixed" else None,
        range=draw(st.sampled_from(["auto", "signed"] if offset or all_signed else ["auto"])),
    )


@st.composite
def arrays(draw: st.DrawFn, area: int, columns: int) -> ArraySpec:
    """Arrays that hold a kernel of `area` rows and an output of `columns` columns, read whole or in parts."""
    tiling = draw(st.sampled_from(["packed", "balanced", "im2col"]))
    read = draw(st.integers(4 if tiling == "im2col" else area, 60))
    partial = draw(st.booleans())
    return ArraySpec(
        rows=draw(st.integers(read, 90)) if partial else read,
        columns=draw(st.integers(columns, columns + 12)),
        tiling=tiling,
        active_rows=read if partial else None,
    )


@st.composite
def specs(draw: st.DrawFn, area: int) -> CIMSpec:
    """Any specification of a layer whose kernel has `area` rows per channel."""
    activation, weight = draw(activations()), draw(weights())
    array = draw(arrays(area, weight.columns_per_output + weight.dummy_columns))
    ideal = CIMSpec(activation=activation, weight=weight, adc=None, array=array)
    all_signed = all(signed for of_slice in ideal.signed_psums for signed in of_slice)
    # An ideal ADC is one of many.
    adc = None if draw(st.integers(0, 7)) == 0 else draw(adcs(all_signed=all_signed))
    return CIMSpec(activation=activation, weight=weight, adc=adc, array=array)


@st.composite
def cases(draw: st.DrawFn, most_images: int = 4, most_pixels: int = 6) -> Case:
    """Any layer: kernels of 1 x 1 to 4 x 4, strides, uneven padding, dilation, channels that divide nothing."""
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    strides = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    sides = st.integers(0, 3)
    padding = draw(st.tuples(st.tuples(sides, sides), st.tuples(sides, sides)))
    size = []
    for axis in range(2):
        # At least one output.
        least = (kernel[axis] - 1) * dilation[axis] + 1 - sum(padding[axis])
        size.append(draw(st.integers(max(1, least), max(most_pixels, least))))
    spec = draw(specs(kernel[0] * kernel[1]))
    channels = draw(st.integers(1, 11))
    groups = tile((*kernel, channels, 1), spec).groups
    columns = groups * len(spec.activation.slices) * len(spec.weight.planes)
    outputs = draw(st.integers(1, max(1, min(9, MOST_COLUMNS // columns))))
    products = size[0] * size[1] * kernel[0] * kernel[1] * channels * outputs * columns // groups
    images = draw(st.integers(1, max(1, min(most_images, MOST_PRODUCTS // products))))
    return Case(
        "random",
        spec,
        x_shape=(images, *size, channels),
        kernel_shape=(*kernel, channels, outputs),
        strides=strides,
        padding=padding,
        dilation=dilation,
    )
