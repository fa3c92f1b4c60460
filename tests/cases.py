"""The contract table: layers of every kind, small enough for the oracle. A new program or option joins by a row.

A case is a specification, shapes and a window; `draw` makes random inputs and steps for it that reach codes inside,
outside and at both ends of every quantizer.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from cimjax.core import step_sizes as steps_lib
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import tile
from cimjax.spec import ActivationSpec, ADCSpec, ArraySpec, CIMSpec, WeightSpec


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    spec: CIMSpec
    x_shape: tuple[int, ...] = (2, 5, 4, 4)
    kernel_shape: tuple[int, ...] = (3, 3, 4, 5)
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    dilation: tuple[int, int] = (1, 1)
    # Whether many of the numbers that `draw` gives lie in the middle between two codes.
    ties: bool = False

    @property
    def window(self) -> dict[str, Any]:
        """Keyword arguments of `cim_conv`."""
        return {"strides": self.strides, "padding": self.padding, "kernel_dilation": self.dilation}


def spec(
    *,
    activation: dict[str, Any] | None = None,
    weight: dict[str, Any] | None = None,
    adc: dict[str, Any] | bool | None = True,
    array: dict[str, Any] | None = None,
) -> CIMSpec:
    """A specification of small arrays from dictionaries; `adc=False` is an ideal ADC."""
    return CIMSpec(
        activation=ActivationSpec(**{"bits": 3} | (activation or {})),
        weight=WeightSpec(**{"bits": 3, "cell_bits": 1} | (weight or {})),
        adc=None if adc is False else ADCSpec(**({} if adc is True or adc is None else adc)),
        array=ArraySpec(**{"rows": 30, "columns": 8} | (array or {})),
    )


ENCODINGS: dict[str, dict[str, Any]] = {
    "twos": {"encoding": "twos_complement"},
    "twos-wide-top": {"encoding": "twos_complement", "bits": 4, "cell_bits": 2},
    "twos-narrow-top": {"encoding": "twos_complement", "bits": 5, "cell_bits": 2},
    "twos-one-cell": {"encoding": "twos_complement", "bits": 3, "cell_bits": 4},
    "twos-planes": {"encoding": "twos_complement", "bits": 4, "cell_bits": 2, "step_per_plane": True},
    "twos-planes-1b": {"encoding": "twos_complement", "step_per_plane": True},
    "diff-digital": {"encoding": "differential", "bits": 4, "cell_bits": 2},
    "diff-digital-1": {"encoding": "differential", "bits": 1},
    "diff-digital-1.5": {"encoding": "differential", "bits": 1.5},
    "diff-analog": {"encoding": "differential", "bits": 4, "cell_bits": 2, "subtract": "analog"},
    "diff-analog-1.5": {"encoding": "differential", "bits": 1.5, "subtract": "analog"},
    "offset": {"encoding": "offset", "bits": 4, "cell_bits": 3},
    "offset-1": {"encoding": "offset", "bits": 1},
    "offset-adc": {"encoding": "offset", "bits": 3, "reference": "adc"},
    "offset-adc-1": {"encoding": "offset", "bits": 1, "reference": "adc"},
    "offset-planes": {"encoding": "offset", "bits": 3, "cell_bits": 2, "step_per_plane": True},
    "offset-adc-planes": {"encoding": "offset", "bits": 3, "cell_bits": 2, "step_per_plane": True, "reference": "adc"},
    "scales-3": {"encoding": "learned_scales", "bits": 3, "cell_bits": 1, "step_per_plane": True},
    "scales-1": {"encoding": "learned_scales", "bits": 1, "cell_bits": 1, "step_per_plane": True},
    "twos-by-significance": {"encoding": "twos_complement", "bits": 4, "plane_shares": "significance"},
    "twos-lowest": {"encoding": "twos_complement", "bits": 4, "cell_bits": 2, "plane_shares": "lowest"},
    "twos-planes-lowest": {"encoding": "twos_complement", "step_per_plane": True, "plane_shares": "lowest"},
    "diff-digital-by-significance": {"encoding": "differential", "bits": 4, "plane_shares": "significance"},
    "diff-analog-lowest": {"encoding": "differential", "bits": 4, "subtract": "analog", "plane_shares": "lowest"},
    "eight-bits": {"encoding": "twos_complement", "bits": 8, "cell_bits": 3},
}
# Three row tiles or more, of unequal sizes, where most rows of the table have two.
_MANY_TILES: dict[str, Any] = {"x_shape": (2, 5, 4, 7), "kernel_shape": (3, 3, 7, 5)}
# Encodings whose columns are wide need a wider array than 8.
_WIDE = {"columns": 16}
TILINGS: dict[str, dict[str, Any]] = {
    "packed": {"tiling": "packed"},
    "balanced": {"tiling": "balanced"},
    "im2col": {"tiling": "im2col"},
    "packed-read": {"tiling": "packed", "rows": 40, "active_rows": 19},
    "balanced-read": {"tiling": "balanced", "rows": 40, "active_rows": 27},
    "im2col-read": {"tiling": "im2col", "rows": 26, "active_rows": 11},
}
SLICES: dict[str, dict[str, Any]] = {
    "unsigned": {"bits": 3},
    "unsigned-1": {"bits": 1},
    "signed": {"bits": 3, "signed": True},
    "signed-1": {"bits": 1, "signed": True},
    "signed-1.5": {"bits": 1.5, "signed": True},
    "sliced": {"bits": 4, "slice_bits": 2},
    "sliced-uneven": {"bits": 5, "slice_bits": 2},
    "sliced-signed": {"bits": 4, "signed": True, "slice_bits": 2},
    "sliced-signed-1": {"bits": 3, "signed": True, "slice_bits": 1},
}
ADCS: dict[str, dict[str, Any]] = {
    "3": {},
    "1": {"bits": 1},
    "1.5": {"bits": 1.5},
    "8": {"bits": 8},
    "3-offset": {"offset": True},
    "1-offset": {"bits": 1, "offset": True},
    "1.5-offset": {"bits": 1.5, "offset": True},
    "3-signed-offset": {"range": "signed", "offset": True},
    "3-margin": {"gradient_margin": 0.5},
    "by-plane": {"plane_bits": (1.5, 3)},
    "by-plane-offset": {"plane_bits": (3, 1), "offset": True},
    "2-margin-2-offset": {"bits": 2, "gradient_margin": 2, "offset": True},
    "1-signed-offset": {"bits": 1, "range": "signed", "offset": True},
    "1-bumps": {"bits": 1, "gradient_bumps": 0.5},
    "2-bumps-offset": {"bits": 2, "gradient_bumps": 0.3, "offset": True},
    "3-gain": {"digital_gain": True},
    "2-gain-offset": {"bits": 2, "digital_gain": True, "offset": True},
    "3-gain-fixed-layer": {"granularity": "layer", "step": "fixed", "full_scale": 7.0, "digital_gain": True},
    "3-gain-array": {"granularity": "array", "digital_gain": True, "offset": True},
}
GRANULARITIES = ("layer", "array", "column")


def _cases() -> list[Case]:
    cases = []
    # Every granularity pair, with and without an offset.
    for w, p, offset in itertools.product(GRANULARITIES, GRANULARITIES, (False, True)):
        s = spec(weight={"granularity": w}, adc={"granularity": p, "offset": offset})
        cases.append(Case(f"pair-{w}-{p}{'-offset' if offset else ''}", s))
    # Every encoding, with psum steps per column, per layer with an offset, and with an ideal ADC.
    for name, weight in ENCODINGS.items():
        array = _WIDE if name in ("eight-bits", "diff-digital", "twos-planes", "twos-narrow-top") else None
        array = _WIDE if "significance" in name else array
        cases.append(Case(f"encoding-{name}", spec(weight=weight, array=array)))
        layer = {"granularity": "layer", "offset": True}
        cases.append(Case(f"encoding-{name}-layer", spec(weight=weight, adc=layer, array=array)))
        cases.append(Case(f"encoding-{name}-ideal", spec(weight=weight, adc=False, array=array)))
    # Every tiling with an encoding that stores something in rows of code 0, and array-wise steps.
    for (name, array), w in itertools.product(TILINGS.items(), ("twos", "offset-adc")):
        weight = ENCODINGS[w] | {"granularity": "array"}
        s = spec(weight=weight, adc={"granularity": "array", "offset": True}, array=array)
        cases.append(Case(f"tiling-{name}-{w}", s, **_MANY_TILES))
    # Every kind of slice, with planes whose signs differ, and with the offset's dummy column.
    for (name, activation), w in itertools.product(SLICES.items(), ("twos-wide-top", "offset-adc")):
        cases.append(Case(f"slices-{name}-{w}", spec(activation=activation, weight=ENCODINGS[w])))
        ideal = spec(activation=activation, weight=ENCODINGS[w], adc=False)
        cases.append(Case(f"slices-{name}-{w}-ideal", ideal))
    # Every ADC, on planes whose signs differ; forced signed codes without an offset need signed columns.
    for name, adc in ADCS.items():
        cases.append(Case(f"adc-{name}", spec(weight=ENCODINGS["twos-wide-top"], adc=adc)))
        if "by-plane" in name:
            adc = adc | {"plane_bits": (1, *adc["plane_bits"])}
        cases.append(Case(f"adc-{name}-offset-adc", spec(weight=ENCODINGS["offset-adc"], adc=adc)))
    analog = ENCODINGS["diff-analog"]
    for bits in (1, 1.5, 3):
        cases.append(Case(f"adc-{bits}-signed", spec(weight=analog, adc={"bits": bits, "range": "signed"})))
    # Windows, kernels and channels.
    offset = spec(weight=ENCODINGS["offset-adc"], array={"rows": 64, "tiling": "im2col"})
    for name, changes in {
        "stride-2": {"strides": (2, 2)},
        "stride-2-1-uneven-padding": {"strides": (2, 1), "padding": ((0, 1), (2, 0))},
        "valid": {"padding": ((0, 0), (0, 0))},
        "dilation-2": {"dilation": (2, 2), "padding": ((2, 2), (2, 2))},
        "kernel-1x1": {"kernel_shape": (1, 1, 4, 5), "padding": ((0, 0), (0, 0))},
        "kernel-7x7": {"kernel_shape": (7, 7, 3, 4), "x_shape": (1, 6, 7, 3), "padding": ((3, 3), (3, 3))},
        "kernel-1x3": {"kernel_shape": (1, 3, 4, 5), "padding": ((0, 0), (1, 1))},
        "one-channel": {"kernel_shape": (3, 3, 1, 5), "x_shape": (2, 5, 4, 1)},
        "one-output": {"kernel_shape": (3, 3, 4, 1)},
        "many-outputs": {"kernel_shape": (3, 3, 3, 11), "x_shape": (2, 3, 3, 3)},
    }.items():
        cases.append(Case(f"window-{name}", offset, **changes))
        if name != "kernel-7x7":
            cases.append(Case(f"window-{name}-twos", spec(array={"tiling": "balanced"}), **changes))

    # Macros of many read groups: a loop, where layers of few are written out.
    read = {"rows": 64, "active_rows": 5, "tiling": "im2col"}
    bits = {"bits": 3, "slice_bits": 1}
    for name in ("twos", "offset-adc", "diff-digital"):
        one_adc = {"granularity": "layer", "step": "fixed", "full_scale": 7.0}
        macro = spec(activation=bits, weight=ENCODINGS[name], adc=one_adc, array=_WIDE | read)
        cases.append(Case(f"macro-{name}", macro, **_MANY_TILES))
        macro = spec(activation=bits, weight=ENCODINGS[name], adc={"offset": True}, array=_WIDE | read)
        cases.append(Case(f"macro-{name}-column", macro, strides=(2, 1), **_MANY_TILES))

    # Numbers that lie in the middle between two codes, of every quantizer.
    for name, offset in (("twos", False), ("offset-adc", True)):
        cases.append(Case(f"ties-{name}", spec(weight=ENCODINGS[name], adc={"offset": offset}), ties=True))
    # Partial sums beyond 16 bits.
    large = {"encoding": "offset", "bits": 8, "cell_bits": 8}
    cases.append(Case("large-psums", spec(activation={"bits": 8}, weight=large, adc={"bits": 8})))
    return cases


# The programs that run everywhere.
PROGRAMS = ("reference", "joined")


def kinds(case: Case) -> dict[str, Any]:
    """What of a case may meddle with what: its options, widths told apart only where codes are of another kind."""
    s, adc = case.spec, case.spec.adc

    def width(bits: float) -> float:
        return min(bits, 2)

    weight = s.weight
    return {
        "slices": (width(s.activation.bits), s.activation.signed, s.activation.slice_bits is not None),
        "encoding": (weight.encoding, weight.subtract, weight.reference, weight.step_per_plane, weight.plane_shares),
        "width": width(weight.bits),
        "weight": weight.granularity,
        "ties": case.ties,
        "tiling": (s.array.tiling, s.array.active_rows is not None),
        "psum": adc and adc.granularity,
        "adc": adc and (width(adc.bits), adc.offset, adc.range, adc.step),
        "gradient": adc and (adc.gradient_margin > 0, adc.gradient_bumps > 0, adc.digital_gain),
    }


def whole_options(case: Case) -> dict[str, Any]:
    """Every group of options as it is, granularity apart."""
    s = case.spec
    return {
        "activation": s.activation,
        "weights": dataclasses.replace(s.weight, granularity="column"),
        "adcs": s.adc and dataclasses.replace(s.adc, granularity="column"),
        "kernel": case.kernel_shape,
        "size": case.name.partition("-")[0] in ("macro", "large"),
    }


def quick(cases: list[Case]) -> list[tuple[Case, str]]:
    """A part of the table, as cases with a program each.

    The default program meets every group of options; both meet every kind and every window; and every pair of kinds
    that the table has is met by one of them.
    """
    found: dict[tuple[Case, str], set[Any]] = {}
    for case, program in itertools.product(cases, PROGRAMS):
        of_case = sorted(kinds(case).items())
        found[case, program] = {("pair", *pair) for pair in itertools.combinations(of_case, 2)}
        window = ("window", case.strides, case.padding, case.dilation)
        found[case, program] |= {(program, *kind) for kind in (*of_case, window)}
        if program == "joined":
            found[case, program] |= set(whole_options(case).items())
    missing: set[Any] = set().union(*found.values())
    chosen = []
    while missing:
        best = max(found, key=lambda run: len(found[run] & missing))
        chosen.append(best)
        missing -= found[best]
    return sorted(chosen, key=list(found).index)


CASES = _cases()
QUICK = quick(CASES)


def draw(case: Case, seed: int = 0) -> tuple[np.ndarray, np.ndarray, StepSizes]:
    """Random input, kernel and steps for a case, float32, from a seed."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=case.x_shape).astype(np.float32)
    if not case.spec.activation.signed:
        # Mostly positive, with exact zeros as after a ReLU.
        x = np.where(rng.random(x.shape) < 0.3, 0, np.abs(x)).astype(np.float32)
    kernel = rng.normal(size=case.kernel_shape).astype(np.float32)
    tiling = tile(case.kernel_shape, case.spec)
    shapes = steps_lib.shapes(tiling, case.spec)

    def near(shape: tuple[int, ...] | None, value: float) -> np.ndarray | None:
        if shape is None:
            return None
        return (value * np.exp(rng.uniform(-0.5, 0.5, shape))).astype(np.float32)

    a, w = case.spec.activation.code_range.magnitude, case.spec.weight.code_range.magnitude
    steps = StepSizes(
        activation=near(shapes.activation, 1.5 / a),
        weight=near(shapes.weight, 1.5 / w),
        psum=None,
    )
    if case.ties:
        steps = steps._replace(activation=power_of_two(steps.activation), weight=power_of_two(steps.weight))
        x, kernel = (np.rint(2 * v / s.min()) * s.min() / 2 for v, s in ((x, steps.activation), (kernel, steps.weight)))
    if case.spec.adc is None:
        return x, kernel, steps
    # A typical psum: the root of the rows times typical codes; the ladder covers about twice that.
    codes = max(c.magnitude for row in case.spec.adc_ranges for c in row)
    slice_size = max(s.magnitude for s in case.spec.activation.slices)
    digit_size = max(p.magnitude for p in case.spec.weight.planes)
    typical = np.sqrt(tiling.rows_of_group.mean()) * slice_size * digit_size / 2
    psum = near(shapes.psum, 2 * typical / codes)
    assert psum is not None
    reference = near(shapes.reference, 4 * typical / codes / digit_size)
    offset = None if shapes.offset is None else (psum * rng.uniform(-1, 2, psum.shape)).astype(np.float32)
    reference_offset = None
    if shapes.reference_offset is not None and reference is not None:
        reference_offset = (reference * rng.uniform(-1, 2, reference.shape)).astype(np.float32)
    if case.ties:
        # Partial sums are integers.
        psum, reference = power_of_two(psum), None if reference is None else power_of_two(reference)
        offset, reference_offset = (None if z is None else np.rint(z) for z in (offset, reference_offset))
    steps = steps._replace(psum=psum, offset=offset, reference=reference, reference_offset=reference_offset)
    return x, kernel, steps._replace(gain=near(shapes.gain, 1.0))


def power_of_two(step: np.ndarray) -> np.ndarray:
    """The nearest power of two."""
    return np.exp2(np.rint(np.log2(step))).astype(np.float32)
