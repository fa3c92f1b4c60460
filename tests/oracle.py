"""A slow, obviously correct NumPy model of one compute-in-memory convolution, forward and backward.

Written from the definition of the computation; it shares no code with the library, only the specification's fields,
and every fast path is held against it, values and gradients. Decisions about codes are made in float32, as every
backend makes them; everything after a code is float64. One function per step, in the order of the computation:
ranges (3.0), activation (3.1), weight (3.2), encoding (3.3), tiling (3.4), array product (3.5), ADC (3.6),
dequantization and sum (3.7); then the gradients, backwards. Variation (3.9) is not modelled.

Letters: N, H, W, C input; OH, OW, O output; kh, kw kernel; T slices; A arrays (row tiles); R read groups; K planes; Ct
column tiles. Indices are the small letters t, a, r, k, o, c.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import numpy as np

from cimjax.spec import ActivationSpec, ADCSpec, ArraySpec, CIMSpec, WeightSpec

Row = tuple[int, int, int]
Index = tuple[np.ndarray, np.ndarray, np.ndarray]
Pair = tuple[int, int]


@dataclasses.dataclass
class StepSizes:
    """The real, positive float32 steps (and offsets) that all implementations receive; see `step_shapes`."""

    activation: np.ndarray
    weight: np.ndarray
    psum: np.ndarray | None = None
    offset: np.ndarray | None = None
    reference: np.ndarray | None = None
    reference_offset: np.ndarray | None = None
    gain: np.ndarray | None = None


class Codes(NamedTuple):
    """The codes of a quantizer: `low .. high`, or only {-1, +1} when `sign`."""

    low: int
    high: int
    sign: bool = False


class Part(NamedTuple):
    """One plane of a weight code or one slice of an activation code: what a unit counts for, its sign, its digits."""

    significance: int
    signed: bool
    digits: np.ndarray


class Window(NamedTuple):
    """Where a convolution reads."""

    strides: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair


@dataclasses.dataclass
class Geometry:
    """How a layer lies in arrays.

    array_of_group: (R,) the array that a read group belongs to.
    rows: for every read group, the kernel positions (i, j, channel) of its rows.
    planes, slices: significances and signs of the K planes and T slices (their digits mean nothing).
    """

    R: int
    A: int
    K: int
    T: int
    Ct: int
    O: int  # noqa: E741
    array_of_group: np.ndarray
    outputs_per_array: int
    rows: list[list[Row]]
    planes: list[Part]
    slices: list[Part]
    spec: CIMSpec


@dataclasses.dataclass
class Forward:
    """The result of `forward` with every intermediate number; codes and digits are integers held in float64.

    y: (N, OH, OW, O).
    psums: (T, N, OH, OW, R, K, O); adc_codes, adc_u (None with an ideal ADC) and psums_read (`P^`) likewise.
    reference_psums: (T, N, OH, OW, R), the sum of the slice over the rows of a group, with `offset` encoding only;
      reference_read likewise; reference_codes, reference_u with `reference="adc"` and an ADC only.
    activation_codes, activation_u: (N, H, W, C).
    weight_codes: (kh, kw, C, O), or (K, kh, kw, C, O) with a step per plane.
    digits, weight_u: (K, kh, kw, C, O).
    patches: (T, N, OH, OW, kh, kw, C), the slices that drive the rows.
    """

    y: np.ndarray
    psums: np.ndarray
    reference_psums: np.ndarray | None
    adc_codes: np.ndarray | None
    reference_codes: np.ndarray | None
    activation_codes: np.ndarray
    weight_codes: np.ndarray
    digits: np.ndarray
    activation_u: np.ndarray
    weight_u: np.ndarray
    adc_u: np.ndarray | None
    reference_u: np.ndarray | None
    patches: np.ndarray
    psums_read: np.ndarray
    reference_read: np.ndarray | None
    steps: StepSizes
    geometry: Geometry
    window: Window


@dataclasses.dataclass
class Grads:
    """dL/d(thing), each of the thing's shape: steps and offsets are the real numbers, without any gradient factor."""

    x: np.ndarray
    kernel: np.ndarray
    activation: np.ndarray
    weight: np.ndarray
    psum: np.ndarray | None = None
    offset: np.ndarray | None = None
    reference: np.ndarray | None = None
    reference_offset: np.ndarray | None = None
    gain: np.ndarray | None = None


# 3.0 Code ranges.


def plain_range(bits: float, signed: bool) -> Codes:
    """Codes of an activation or of a partial sum."""
    if bits == 1:
        return Codes(-1, 1, sign=True) if signed else Codes(0, 1)
    if bits == 1.5:
        return Codes(-1, 1) if signed else Codes(0, 2)
    return Codes(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else Codes(0, 2**bits - 1)


def weight_range(weight: WeightSpec) -> Codes:
    """Codes of a weight: signed; a magnitude cannot hold -2^(b-1)."""
    if weight.encoding == "learned_scales":
        return Codes(-(2**weight.bits - 1), 2**weight.bits - 1)
    if weight.encoding == "differential" and weight.bits >= 2:
        return Codes(-(2 ** (weight.bits - 1) - 1), 2 ** (weight.bits - 1) - 1)
    return plain_range(weight.bits, signed=True)


def adc_range(adc: ADCSpec, signed_psum: bool, plane: int | None = None) -> Codes:
    """Codes of one ADC: signed where its column can be negative and no offset shifts it, or where forced."""
    bits = adc.bits if plane is None or adc.plane_bits is None else adc.plane_bits[plane]
    return plain_range(bits, signed=adc.range == "signed" or (signed_psum and not adc.offset))


# The quantizers: the one place where float32 matters.


def scaled(x: np.ndarray, step: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """`u = (x - zero) * (1 / step)`, every operation rounded to float32."""
    reciprocal = np.float32(1) / np.asarray(step, np.float32)
    return (np.asarray(x, np.float32) - np.asarray(zero, np.float32)) * reciprocal


def sign_code(x: np.ndarray, zero: np.ndarray) -> np.ndarray:
    """+1 where `x - zero >= 0`, else -1."""
    return np.where(np.asarray(x, np.float32) - np.asarray(zero, np.float32) >= 0, 1.0, -1.0)


def round_even(x: np.ndarray, step: np.ndarray, codes: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Codes of activations and weights (halves to even), and their u."""
    u = scaled(x, step, np.float32(0))
    if codes.sign:
        return sign_code(x, np.float32(0)), u
    return np.clip(np.rint(u), codes.low, codes.high).astype(np.float64), u


def round_up(x: np.ndarray, step: np.ndarray, zero: np.ndarray, codes: Codes) -> tuple[np.ndarray, np.ndarray]:
    """Codes of an ADC (halves up), and their u."""
    u = scaled(x, step, zero)
    if codes.sign:
        return sign_code(x, zero), u
    return np.floor(np.clip(u, np.float32(codes.low), np.float32(codes.high)) + np.float32(0.5)).astype(np.float64), u


def quantizer_gradient(
    to_code: np.ndarray, u: np.ndarray, step: np.ndarray, codes: Codes, margin: float = 0.0, bumps: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """From dL/dcode: dL/dx (dL/dzero is its negative) and dL/dstep, both elementwise; the ends count as inside.

    An ADC passes gradients for `margin` steps beyond its outer codes; signs do not. Or it passes them in `bumps` of a
    normal density of that deviation around the nearest of its thresholds, as high as its stair is there.
    """
    if bumps:
        u = u.astype(np.float64)
        stairs = [(0.0, 2.0)] if codes.sign else [(code + 0.5, 1.0) for code in range(codes.low, codes.high)]
        nearest = np.argmin([np.abs(u - threshold) for threshold, _ in stairs], axis=0)
        thresholds, heights = np.transpose(stairs)
        density = np.exp(-((u - thresholds[nearest]) ** 2) / (2 * bumps**2)) / np.sqrt(2 * np.pi * bumps**2)
        to_x = to_code * heights[nearest] * density / np.float64(step)
        return to_x, np.zeros_like(to_x) if codes.sign else -to_x * u
    reach = 0.0 if codes.sign else margin
    inside = (codes.low - reach <= u) & (u <= codes.high + reach)
    to_x = np.where(inside, to_code, 0.0) / np.float64(step)
    to_step = -to_x * np.where(inside, u, 0.0).astype(np.float64)
    return to_x, np.zeros_like(to_step) if codes.sign else to_step


# 3.1 Activation (slices) and 3.3 Encoding (planes), lowest first.


def binary(value: np.ndarray, bits: int, width: int, sign: int = 1) -> list[Part]:
    """A non-negative integer of `bits` bits in digits of `width` bits; the top digit takes what bits are left."""
    return [
        Part(sign * 2**shift, False, value // 2**shift % 2 ** min(width, bits - shift))
        for shift in range(0, bits, width)
    ]


def twos_complement(code: np.ndarray, bits: int, width: int) -> list[Part]:
    """A signed integer: the top digit subtracts if it is one bit wide, else it is signed."""
    *lower, top = binary(np.where(code < 0, code + 2**bits, code), bits, width)
    sign_bit = 2 ** (bits - 1) // top.significance
    if sign_bit == 1:
        return [*lower, Part(-top.significance, False, top.digits)]
    digits = np.where(top.digits >= sign_bit, top.digits - 2 * sign_bit, top.digits)
    return [*lower, Part(top.significance, True, digits)]


def slice_activation(code: np.ndarray, activation: ActivationSpec) -> list[Part]:
    """`a = sum_t g_t a_t`."""
    if activation.slice_bits is None:
        return [Part(1, activation.signed, code)]
    return (twos_complement if activation.signed else binary)(code, activation.bits, activation.slice_bits)


def constant(weight: WeightSpec) -> int:
    """What the digits of a code lack: the lowest code, in the `offset` encoding."""
    return weight_range(weight).low if weight.encoding == "offset" else 0


def encode(code: np.ndarray, weight: WeightSpec) -> list[Part]:
    """`q = sum_k f_k d_k + constant`."""
    if weight.encoding == "twos_complement":
        return twos_complement(code, weight.bits, weight.cell_bits)
    if weight.encoding == "offset":
        if weight.bits == 1:
            return [Part(2, False, (code + 1) / 2)]
        return binary(code - constant(weight), weight.bits, weight.cell_bits)
    if weight.encoding == "learned_scales":
        return [Part(1, True, np.zeros(np.shape(code)))] * int(weight.bits)  # digits come from `nearest_sum`
    bits = 1 if weight.bits < 2 else weight.bits - 1
    plus = binary(np.maximum(code, 0), bits, weight.cell_bits)
    minus = binary(np.maximum(-code, 0), bits, weight.cell_bits, sign=-1)
    if weight.subtract == "digital":
        return plus + minus
    return [Part(p.significance, True, p.digits - m.digits) for p, m in zip(plus, minus, strict=True)]


# 3.4 Tiling.


def cut(count: int, most: int) -> list[int]:
    """Sizes of parts of at most `most`; only the last one is smaller."""
    return [min(most, count - start) for start in range(0, count, most)]


def spread(count: int, most: int) -> list[int]:
    """Sizes of as few parts as `cut` makes, as equal as can be, the larger ones first."""
    parts = math.ceil(count / most)
    return [count // parts + (1 if part < count % parts else 0) for part in range(parts)]


def divide(rows: list[Row], kernel_area: int, most: int, array: ArraySpec) -> list[list[Row]]:
    """Cut rows into parts of at most `most`: anywhere (`im2col`), or only between channels."""
    if array.tiling == "im2col":
        sizes = cut(len(rows), most)
    else:
        if kernel_area > most:
            raise ValueError(f"a kernel of {kernel_area} rows does not fit into {most}; use im2col")
        rule = spread if array.tiling == "balanced" else cut
        sizes = [channels * kernel_area for channels in rule(len(rows) // kernel_area, most // kernel_area)]
    ends = itertools.accumulate(sizes)
    return [rows[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def geometry(kernel_shape: tuple[int, int, int, int], spec: CIMSpec) -> Geometry:
    """Lay a kernel (kh, kw, C, O) out in arrays, and the rows of every array in read groups.

    Raises:
      ValueError: if a whole kernel must fit into an array or a read group, and does not.
    """
    kh, kw, channels, outputs = kernel_shape
    stretched = [(i, j, c) for c in range(channels) for i in range(kh) for j in range(kw)]
    arrays = divide(stretched, kh * kw, spec.array.rows, spec.array)
    active = spec.array.rows if spec.array.active_rows is None else spec.array.active_rows
    groups = [(a, group) for a, rows in enumerate(arrays) for group in divide(rows, kh * kw, active, spec.array)]
    planes, slices = encode(np.ones(1), spec.weight), slice_activation(np.ones(1), spec.activation)
    columns = sum(2 if plane.signed and spec.weight.signed_cells == "paired" else 1 for plane in planes)
    dummy = 1 if spec.weight.encoding == "offset" and spec.weight.reference == "adc" else 0
    outputs_per_array = (spec.array.columns - dummy) // columns
    return Geometry(
        R=len(groups),
        A=len(arrays),
        K=len(planes),
        T=len(slices),
        Ct=math.ceil(outputs / outputs_per_array),
        O=outputs,
        array_of_group=np.array([a for a, _ in groups]),
        outputs_per_array=outputs_per_array,
        rows=[rows for _, rows in groups],
        planes=planes,
        slices=slices,
        spec=spec,
    )


def group_index(geo: Geometry, r: int) -> Index:
    """The rows of a read group, as an index of axes (kh, kw, C)."""
    i, j, c = np.transpose(geo.rows[r])
    return i, j, c


def array_index(geo: Geometry, a: int) -> Index:
    """The rows of an array, as an index of axes (kh, kw, C)."""
    i, j, c = np.transpose([row for r in range(geo.R) if geo.array_of_group[r] == a for row in geo.rows[r]])
    return i, j, c


# Which step belongs to what.


def step_shapes(geo: Geometry) -> dict[str, tuple[int, ...] | None]:
    """The shape of every member of `StepSizes`; None for one that the specification does not have."""
    weight, adc = geo.spec.weight, geo.spec.adc
    shared = {"layer": (1, 1), "array": (geo.A, geo.Ct), "column": (geo.A, geo.O)}[weight.granularity]
    psum = {"layer": (1, 1, 1), "array": (geo.R, 1, geo.Ct), "column": (geo.R, geo.K, geo.O)}
    has_reference = adc is not None and weight.encoding == "offset" and weight.reference == "adc"
    return {
        "activation": (),
        "weight": (geo.A, geo.K, geo.O) if weight.step_per_plane else shared,
        "psum": None if adc is None else psum[adc.granularity],
        "offset": psum[adc.granularity] if adc is not None and adc.offset else None,
        "reference": (geo.R,) if has_reference else None,
        "reference_offset": (geo.R,) if has_reference and adc.offset else None,
        "gain": psum[adc.granularity] if adc is not None and adc.digital_gain else None,
    }


def check_steps(steps: StepSizes, geo: Geometry) -> None:
    """Raise ValueError for a step that is missing, not wanted, or of the wrong shape."""
    for name, shape in step_shapes(geo).items():
        value = getattr(steps, name)
        got = None if value is None else np.shape(value)
        if got != shape:
            raise ValueError(f"`{name}` has shape {got}, expected {shape}")


def weight_place(geo: Geometry, a: int, k: int, o: int) -> tuple[int, ...]:
    """Where the step of a weight is among the weight steps."""
    if geo.spec.weight.step_per_plane:
        return a, k, o
    return {"layer": (0, 0), "array": (a, o // geo.outputs_per_array), "column": (a, o)}[geo.spec.weight.granularity]


def psum_place(geo: Geometry, adc: ADCSpec, r: int, k: int, o: int) -> tuple[int, ...]:
    """Where the step (and offset) of a column is among the ADC steps."""
    return {"layer": (0, 0, 0), "array": (r, 0, o // geo.outputs_per_array), "column": (r, k, o)}[adc.granularity]


# 3.2 Weight.


def nearest_sum(weights: np.ndarray, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits -1, 0, 1 of every weight, (K, n), whose sum `sum_k s_k d_k` is nearest to it; of equally near ones those
    of fewest non-zero digits, then with 0 before 1 before -1 from the first digit on. And u, (K, n): the digit and the
    plane's part `1/K` of what is left, in its step; infinite beyond the largest sum."""
    every = sorted(itertools.product((0, 1, -1), repeat=len(steps)), key=lambda digits: sum(map(abs, digits)))
    digits = np.zeros((len(steps), len(weights)))
    u = np.full(digits.shape, np.inf)
    for i, w in enumerate(weights):
        sums = [functools.reduce(lambda x, y: np.float32(x + y), np.float32(d) * steps) for d in every]
        best = min(range(len(every)), key=lambda n: np.abs(np.float32(w - sums[n])))
        digits[:, i] = every[best]
        if abs(w) <= np.float32(np.sum(steps, dtype=np.float32)):
            u[:, i] = digits[:, i] + (w - np.float64(sums[best])) / (len(steps) * np.float64(steps))
    return digits, u


def quantize_weights(kernel: np.ndarray, steps: StepSizes, geo: Geometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, u and digits, all (K, kh, kw, C, O); without steps per plane all planes have the same codes."""
    codes, digits = np.zeros((geo.K, *kernel.shape)), np.zeros((geo.K, *kernel.shape))
    u = np.zeros((geo.K, *kernel.shape), np.float32)
    if geo.spec.weight.encoding == "learned_scales":
        for a, o in np.ndindex(geo.A, geo.O):
            at = (*array_index(geo, a), o)
            for k, (digit, u_k) in enumerate(zip(*nearest_sum(kernel[at], steps.weight[a, :, o]), strict=True)):
                codes[k][at], digits[k][at], u[k][at] = digit, digit, u_k
        return codes, u, digits
    for a, k, o in np.ndindex(geo.A, geo.K, geo.O):
        at = (*array_index(geo, a), o)
        step = steps.weight[weight_place(geo, a, k, o)]
        codes[k][at], u[k][at] = round_even(kernel[at], step, weight_range(geo.spec.weight))
        digits[k][at] = encode(codes[k][at], geo.spec.weight)[k].digits
    return codes, u, digits


# 3.5 Array product.


def window_slices(i: int, j: int, out: Pair, window: Window) -> tuple[slice, slice]:
    """The padded positions that kernel element (i, j) reads for all outputs."""
    h, w = i * window.dilation[0], j * window.dilation[1]
    return (
        slice(h, h + (out[0] - 1) * window.strides[0] + 1, window.strides[0]),
        slice(w, w + (out[1] - 1) * window.strides[1] + 1, window.strides[1]),
    )


def extract_patches(slices: np.ndarray, kernel: Pair, window: Window) -> np.ndarray:
    """What drives the rows: (T, N, H, W, C) -> (T, N, OH, OW, kh, kw, C). A padded position drives nothing."""
    padded = np.pad(slices, ((0, 0), (0, 0), *window.padding, (0, 0)))
    spans = [window.dilation[d] * (kernel[d] - 1) + 1 for d in range(2)]
    height, width = ((padded.shape[2 + d] - spans[d]) // window.strides[d] + 1 for d in range(2))
    patches = np.zeros((*slices.shape[:2], height, width, *kernel, slices.shape[-1]))
    for i, j in np.ndindex(*kernel):
        patches[..., i, j, :] = padded[:, :, *window_slices(i, j, (height, width), window), :]
    return patches


def scatter_patches(to_patches: np.ndarray, size: Pair, window: Window) -> np.ndarray:
    """The transpose of `extract_patches`: every position adds up what it gets; the padding is dropped."""
    (top, bottom), (left, right) = window.padding
    steps, batch, height, width, kh, kw, channels = to_patches.shape
    padded = np.zeros((steps, batch, top + size[0] + bottom, left + size[1] + right, channels))
    for i, j in np.ndindex(kh, kw):
        padded[:, :, *window_slices(i, j, (height, width), window), :] += to_patches[..., i, j, :]
    return padded[:, :, top : top + size[0], left : left + size[1], :]


def array_product(patches: np.ndarray, digits: np.ndarray, geo: Geometry) -> np.ndarray:
    """`P[t, n, oh, ow, r, k, o]`: the sum over the rows of a read group of slice times digit."""
    psums = np.zeros((*patches.shape[:4], geo.R, geo.K, geo.O))
    for t, r in np.ndindex(geo.T, geo.R):
        rows = group_index(geo, r)
        driven = patches[t][(..., *rows)]
        for k, o in np.ndindex(geo.K, geo.O):
            psums[t, ..., r, k, o] = driven @ digits[(k, *rows, o)]
    return psums


def reference_product(patches: np.ndarray, geo: Geometry) -> np.ndarray:
    """`S[t, n, oh, ow, r]`: the same for a column of ones, which the constant of `offset` multiplies."""
    sums = np.zeros((*patches.shape[:4], geo.R))
    for t, r in np.ndindex(geo.T, geo.R):
        sums[t, ..., r] = patches[t][(..., *group_index(geo, r))].sum(-1)
    return sums


# 3.6 ADC.


class Conversion(NamedTuple):
    """One use of one ADC: where its sums are, where its step (and offset) is, and its codes."""

    at: tuple[Any, ...]
    place: tuple[int, ...]
    codes: Codes


def column_conversions(geo: Geometry, adc: ADCSpec) -> list[Conversion]:
    """Of every column in every cycle: (T, N, OH, OW, R, K, O) sums."""
    return [
        Conversion(
            at=(t, ..., r, k, o),
            place=psum_place(geo, adc, r, k, o),
            codes=adc_range(adc, geo.slices[t].signed or geo.planes[k].signed, k),
        )
        for t, r, k, o in np.ndindex(geo.T, geo.R, geo.K, geo.O)
    ]


def reference_conversions(geo: Geometry, adc: ADCSpec) -> list[Conversion]:
    """Of the dummy column of every read group in every cycle: (T, N, OH, OW, R) sums."""
    return [
        Conversion(at=(t, ..., r), place=(r,), codes=adc_range(adc, geo.slices[t].signed))
        for t, r in np.ndindex(geo.T, geo.R)
    ]


def convert(
    sums: np.ndarray, steps: np.ndarray, zeros: np.ndarray | None, conversions: list[Conversion]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, u, and what they stand for: `P^ = s_p p + z`."""
    codes, u, read = np.zeros(sums.shape), np.zeros(sums.shape, np.float32), np.zeros(sums.shape)
    for at, place, code_range in conversions:
        zero = np.float32(0) if zeros is None else zeros[place]
        codes[at], u[at] = round_up(sums[at], steps[place], zero, code_range)
        read[at] = np.float64(steps[place]) * codes[at] + np.float64(zero)
    return codes, u, read


# 3.7 Dequantize and add.


def add_columns(read: np.ndarray, references: np.ndarray | None, steps: StepSizes, geo: Geometry) -> np.ndarray:
    """`sum_{t,r,k} g_t f_k s_w P^`, and the constant of `offset` times the top plane's step: y before `s_a`."""
    total = np.zeros((*read.shape[1:4], geo.O))
    for t, r, o in np.ndindex(geo.T, geo.R, geo.O):
        a, g = geo.array_of_group[r], geo.slices[t].significance
        for k in range(geo.K):
            factor = g * geo.planes[k].significance * np.float64(steps.weight[weight_place(geo, a, k, o)])
            total[..., o] += factor * gain_of(steps, geo, r, k, o) * read[t, ..., r, k, o]
        if references is not None:
            factor = g * constant(geo.spec.weight) * np.float64(steps.weight[weight_place(geo, a, geo.K - 1, o)])
            total[..., o] += factor * references[t, ..., r]
    return total


def gain_of(steps: StepSizes, geo: Geometry, r: int, k: int, o: int) -> float:
    """What is multiplied to what a column's ADC gives."""
    return 1.0 if steps.gain is None else np.float64(steps.gain[psum_place(geo, geo.spec.adc, r, k, o)])


def forward(
    x: np.ndarray,
    kernel: np.ndarray,
    steps: StepSizes,
    spec: CIMSpec,
    *,
    strides: Pair = (1, 1),
    padding: tuple[Pair, Pair] = ((1, 1), (1, 1)),
    dilation: Pair = (1, 1),
) -> Forward:
    """The layer on x (N, H, W, C) float32 with a kernel (kh, kw, C, O) float32; no bias, no feature groups.

    Raises:
      ValueError: for steps of wrong shapes, a kernel that does not fit, or a specification with variation.
    """
    if spec.variation is not None:
        raise ValueError("the oracle does not model variation")
    geo, window = geometry(kernel.shape, spec), Window(strides, padding, dilation)
    check_steps(steps, geo)
    steps = StepSizes(**{name: None if value is None else np.float32(value) for name, value in vars(steps).items()})

    a, a_u = round_even(x, steps.activation, plain_range(spec.activation.bits, spec.activation.signed))
    slices = np.stack([part.digits for part in slice_activation(a, spec.activation)])
    q, q_u, digits = quantize_weights(kernel, steps, geo)
    patches = extract_patches(slices, kernel.shape[:2], window)
    psums = array_product(patches, digits, geo)
    sums = reference_product(patches, geo) if spec.weight.encoding == "offset" else None

    p, p_u, psums_read = None, None, psums
    s, s_u, sums_read = None, None, sums
    if spec.adc is not None:
        p, p_u, psums_read = convert(psums, steps.psum, steps.offset, column_conversions(geo, spec.adc))
        if steps.reference is not None:
            conversions = reference_conversions(geo, spec.adc)
            s, s_u, sums_read = convert(sums, steps.reference, steps.reference_offset, conversions)

    return Forward(
        y=np.float64(steps.activation) * add_columns(psums_read, sums_read, steps, geo),
        psums=psums,
        reference_psums=sums,
        adc_codes=p,
        reference_codes=s,
        activation_codes=a,
        weight_codes=q if spec.weight.step_per_plane else q[0],
        digits=digits,
        activation_u=a_u,
        weight_u=q_u,
        adc_u=p_u,
        reference_u=s_u,
        patches=patches,
        psums_read=psums_read,
        reference_read=sums_read,
        steps=steps,
        geometry=geo,
        window=window,
    )


# Gradients, from the output back to x and the kernel.


def add_backward(f: Forward, to_total: np.ndarray, grads: Grads) -> tuple[np.ndarray, np.ndarray | None]:
    """Through 3.7: from dL/d(y before `s_a`) to dL/dP^ of columns and references; adds to dL/ds_w."""
    geo, steps = f.geometry, f.steps
    to_read = np.zeros(f.psums.shape)
    to_references = None if f.reference_psums is None else np.zeros(f.reference_psums.shape)
    for t, r, o in np.ndindex(geo.T, geo.R, geo.O):
        a, g = geo.array_of_group[r], geo.slices[t].significance
        for k in range(geo.K):
            place, to_product = weight_place(geo, a, k, o), g * geo.planes[k].significance * to_total[..., o]
            gain = gain_of(steps, geo, r, k, o)
            to_read[t, ..., r, k, o] = to_product * np.float64(steps.weight[place]) * gain
            grads.weight[place] += np.sum(to_product * gain * f.psums_read[t, ..., r, k, o])
            if grads.gain is not None:
                to_gain = to_product * np.float64(steps.weight[place]) * f.psums_read[t, ..., r, k, o]
                grads.gain[psum_place(geo, geo.spec.adc, r, k, o)] += np.sum(to_gain)
        if to_references is not None:
            place, to_product = weight_place(geo, a, geo.K - 1, o), g * constant(geo.spec.weight) * to_total[..., o]
            to_references[t, ..., r] += to_product * np.float64(steps.weight[place])
            grads.weight[place] += np.sum(to_product * f.reference_read[t, ..., r])
    return to_read, to_references


def convert_backward(
    to_read: np.ndarray,
    codes: np.ndarray,
    u: np.ndarray,
    steps: np.ndarray,
    conversions: list[Conversion],
    adc: ADCSpec,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Through 3.6: from dL/dP^ to dL/dP, dL/ds_p and dL/dz (for a z as shared as the step)."""
    to_sums, to_steps, to_zeros = np.zeros(to_read.shape), np.zeros(steps.shape), np.zeros(steps.shape)
    for at, place, code_range in conversions:
        to_code = to_read[at] * np.float64(steps[place])
        to_sums[at], to_step = quantizer_gradient(
            to_code, u[at], steps[place], code_range, adc.gradient_margin, adc.gradient_bumps
        )
        to_steps[place] += np.sum(to_read[at] * codes[at] + to_step)
        to_zeros[place] += np.sum(to_read[at] - to_sums[at])
    return to_sums, to_steps, to_zeros


def product_backward(f: Forward, to_psums: np.ndarray, to_sums: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Through 3.5: dL/da_t (T, N, H, W, C) and dL/dd_k (K, kh, kw, C, O)."""
    geo = f.geometry
    to_patches, to_digits = np.zeros(f.patches.shape), np.zeros(f.digits.shape)
    for t, r in np.ndindex(geo.T, geo.R):
        rows = group_index(geo, r)
        driven = f.patches[t][(..., *rows)]
        to_driven = np.zeros(driven.shape)
        for k, o in np.ndindex(geo.K, geo.O):
            to_psum = to_psums[t, ..., r, k, o]
            to_driven += to_psum[..., None] * f.digits[(k, *rows, o)]
            to_digits[(k, *rows, o)] += np.tensordot(to_psum, driven, axes=3)
        if to_sums is not None:
            to_driven += to_sums[t, ..., r, None]
        to_patches[t][(..., *rows)] = to_driven
    return scatter_patches(to_patches, f.activation_codes.shape[1:3], f.window), to_digits


def activation_backward(f: Forward, to_slices: np.ndarray, grads: Grads) -> None:
    """Through 3.1: every slice answers for an equal share, `1/T`, of a change of the code."""
    activation, slices = f.geometry.spec.activation, f.geometry.slices
    to_code = sum(to_slice / part.significance / len(slices) for to_slice, part in zip(to_slices, slices, strict=True))
    codes = plain_range(activation.bits, activation.signed)
    to_x, to_step = quantizer_gradient(to_code, f.activation_u, f.steps.activation, codes)
    grads.x += to_x
    grads.activation = grads.activation + np.sum(to_step)


def share(codes: np.ndarray, weight: WeightSpec, k: int, count: int) -> np.ndarray:
    """`alpha_k` of every code, over the planes that respond to a change of it: equal, as their significances are, or
    the lowest plane's alone."""
    by_sign = weight.encoding == "differential" and weight.subtract == "digital"
    planes = count // 2 if by_sign else count
    significances = 2.0 ** (weight.cell_bits * np.arange(planes))
    shares = {"equal": np.ones(planes), "significance": significances, "lowest": np.arange(planes) == 0}
    mine = shares[weight.plane_shares][k % planes] / np.sum(shares[weight.plane_shares])
    if not by_sign:
        return np.full(codes.shape, mine)
    sign = 1 if k < planes else -1
    return mine * np.where(codes == 0, 0.5, np.where(np.sign(codes) == sign, 1.0, 0.0))


def weight_backward(f: Forward, to_digits: np.ndarray, grads: Grads) -> None:
    """Through 3.3 and 3.2: plane k answers for `alpha_k` of a change of the code, by its own step if it has one."""
    geo, weight = f.geometry, f.geometry.spec.weight
    codes = np.broadcast_to(f.weight_codes, f.digits.shape)
    for a, k, o in np.ndindex(geo.A, geo.K, geo.O):
        at, place = (*array_index(geo, a), o), weight_place(geo, a, k, o)
        if weight.encoding == "learned_scales":
            u, step = f.weight_u[k][at], np.float64(f.steps.weight[place])
            passed = np.where(np.isfinite(u), to_digits[k][at], 0.0) / step
            grads.kernel[at] += passed / geo.K
            grads.weight[place] -= np.sum(passed * np.where(np.isfinite(u), u, 0.0))
            continue
        to_code = share(codes[k][at], weight, k, geo.K) * to_digits[k][at] / geo.planes[k].significance
        to_weight, to_step = quantizer_gradient(to_code, f.weight_u[k][at], f.steps.weight[place], weight_range(weight))
        grads.kernel[at] += to_weight
        grads.weight[place] += np.sum(to_step)


def backward(forward_result: Forward, cotangent: np.ndarray) -> Grads:
    """The gradients of `L = sum(cotangent * y)`; cotangent (N, OH, OW, O)."""
    f, steps, geo = forward_result, forward_result.steps, forward_result.geometry
    cotangent, s_a = np.asarray(cotangent, np.float64), np.float64(steps.activation)
    grads = Grads(
        x=np.zeros(f.activation_codes.shape),
        kernel=np.zeros(f.digits.shape[1:]),
        activation=np.sum(cotangent * f.y / s_a),
        weight=np.zeros(steps.weight.shape),
        gain=None if steps.gain is None else np.zeros(steps.gain.shape),
    )
    to_psums, to_sums = add_backward(f, cotangent * s_a, grads)
    if geo.spec.adc is not None:
        to_psums, grads.psum, to_zeros = convert_backward(
            to_psums, f.adc_codes, f.adc_u, steps.psum, column_conversions(geo, geo.spec.adc), geo.spec.adc
        )
        grads.offset = None if steps.offset is None else to_zeros
        if steps.reference is not None:
            conversions = reference_conversions(geo, geo.spec.adc)
            to_sums, grads.reference, to_zeros = convert_backward(
                to_sums, f.reference_codes, f.reference_u, steps.reference, conversions, geo.spec.adc
            )
            grads.reference_offset = None if steps.reference_offset is None else to_zeros
    to_slices, to_digits = product_backward(f, to_psums, to_sums)
    activation_backward(f, to_slices, grads)
    weight_backward(f, to_digits, grads)
    return grads
