"""What to build: the frozen, hashable specification of one compute-in-memory layer.

Every option of the library is a field here, and everything that a user can get wrong is refused here, at
construction, with a `ValueError` that names the argument, the value, the values allowed and what to do. What needs
the shape of a layer (a kernel larger than an array) is refused by `cimjax.core.tiling`. Nothing here touches arrays.
"""

from __future__ import annotations

import dataclasses
import enum
import math

from cimjax.spec import codes as codes_lib
from cimjax.spec.base import Spec, shown
from cimjax.spec.codes import CodeRange, Plane

# Beyond these a gradient overflows float32, or a step no longer moves.
_GRADIENT_FACTORS = (1e-6, 1_000_000)
# In units of one psum, of which float32 counts 2^24; far beyond, the step or its reciprocal leaves float32.
_FULL_SCALES = (1e-6, 1_000_000_000)
# In steps; narrower ones are too high where they are not 0.
_NARROWEST_BUMP = 0.01
# At 2 one cell in a thousand holds more than 480 times its value: beyond any device, and still far from the end of
# float32, also where calibration squares it.
_LARGEST_SIGMA = 2


class Granularity(enum.StrEnum):
    """What shares one step: a whole layer, one array, or one column."""

    LAYER = "layer"
    ARRAY = "array"
    COLUMN = "column"


class Encoding(enum.StrEnum):
    """How a signed weight is stored in cells that hold non-negative digits.

    `learned_scales` has no code: the weight is a sum of learned steps, each with a digit of -1, 0 or +1.
    """

    TWOS_COMPLEMENT = "twos_complement"
    DIFFERENTIAL = "differential"
    OFFSET = "offset"
    LEARNED_SCALES = "learned_scales"


class Subtract(enum.StrEnum):
    """Where a `differential` code is subtracted: after two ADCs, or in analog before one."""

    DIGITAL = "digital"
    ANALOG = "analog"


class Reference(enum.StrEnum):
    """How the constant of an `offset` code is removed: an exact adder, or a dummy column with its own ADC."""

    DIGITAL = "digital"
    ADC = "adc"


class SignedCells(enum.StrEnum):
    """What a signed plane costs: two physical columns, or one (the paper's count, which cannot be exported)."""

    PAIRED = "paired"
    IDEAL = "ideal"


class StepKind(enum.StrEnum):
    """How an ADC step comes about; see `ADCSpec.step`."""

    LEARNED = "learned"
    CALIBRATED = "calibrated"
    FIXED = "fixed"
    POWER_OF_TWO = "power_of_two"


class StepStart(enum.StrEnum):
    """What sets the step of an activation or a weight from data; see `WeightSpec.start`."""

    LEAST_SQUARES = "least_squares"
    MAGNITUDE = "magnitude"
    RANGE = "range"
    PERCENTILE = "percentile"


class LadderStart(enum.StrEnum):
    """What sets an ADC's step and offset from data; see `ADCSpec.start`."""

    LEAST_SQUARES = "least_squares"
    MAGNITUDE = "magnitude"
    RANGE = "range"
    PERCENTILE = "percentile"


class ADCRange(enum.StrEnum):
    """Whether the ADC's codes follow the sign of its column (`auto`) or are always signed."""

    AUTO = "auto"
    SIGNED = "signed"


class TilingRule(enum.StrEnum):
    """How a stretched kernel is cut into arrays; see `ArraySpec.tiling`."""

    PACKED = "packed"
    BALANCED = "balanced"
    IM2COL = "im2col"


class PlaneShares(enum.StrEnum):
    """How much each plane says of a weight's gradient; see `WeightSpec.plane_shares`."""

    EQUAL = "equal"
    SIGNIFICANCE = "significance"
    LOWEST = "lowest"


class VariationTarget(enum.StrEnum):
    """What one variation factor multiplies: a weight (in all its planes), or each stored cell."""

    WEIGHTS = "weights"
    CELLS = "cells"


def _check_full_scale(spec: ActivationSpec | ADCSpec, covered: str) -> None:
    """Refuse a `full_scale` without a fixed step, and the reverse."""
    if spec.step == StepKind.FIXED:
        if spec.full_scale is None:
            raise ValueError(f"`full_scale` is None with `step` 'fixed'; give the span of {covered}, as in 64.")
        spec._number("full_scale", *_FULL_SCALES)
    elif spec.full_scale is not None:
        raise ValueError(
            f"`full_scale` is {shown(spec.full_scale)} with `step` {spec.step!s}; it belongs to `step` 'fixed'."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationSpec(Spec):
    """Quantization of a layer's input: one learned step per tensor."""

    # Bits of an activation code: 1 to 16, or 1.5 (signed only).
    bits: float = 4
    # Unsigned codes suit inputs after a ReLU; signed ones everything else.
    signed: bool = False
    # Bits that the DAC drives in one cycle; None drives the whole code at once. Not for 1 and 1.5 bits.
    slice_bits: int | None = None
    # As `ADCSpec.step`: a sensor or a DAC may have a scale of its own.
    step: StepKind = StepKind.LEARNED
    # `fixed` only: the span of inputs that the codes cover, in units of the input; the step is this / (codes - 1).
    full_scale: float | None = None
    # As `WeightSpec.start`.
    start: StepStart = StepStart.MAGNITUDE
    # Constant that multiplies LSQ's gradient factor 1/sqrt(n q) of this step; log-steps need more than raw ones.
    gradient_factor: float = 30.0

    def __post_init__(self) -> None:
        self._bits("bits", 1, 16, half=True)
        self._flag("signed")
        self._enum("step", StepKind)
        _check_full_scale(self, "inputs that the codes cover")
        self._enum("start", StepStart)
        self._number("gradient_factor", *_GRADIENT_FACTORS)
        if self.bits == 1.5 and not self.signed:
            raise ValueError("`bits` is 1.5 for an unsigned activation; set `signed=True` or use 1 or 2 bits.")
        if self.slice_bits is not None:
            if self.bits < 2:
                raise ValueError(
                    f"`slice_bits` is {shown(self.slice_bits)} for {self.bits}-bit codes; these are one slice."
                )
            self._bits("slice_bits", 1, 16, half=False)

    @property
    def code_range(self) -> CodeRange:
        """The activation's codes."""
        return codes_lib.code_range(self.bits, signed=self.signed)

    @property
    def fixed_step(self) -> float:
        """The step of a `fixed` activation, in units of the input."""
        assert self.full_scale is not None
        return self.full_scale / (self.code_range.size - 1)

    @property
    def slices(self) -> tuple[Plane, ...]:
        """The slices of a code, lowest first: significance `g_t` and digit range."""
        if self.slice_bits is None:
            return (Plane(1, self.code_range.q_min, self.code_range.q_max),)
        split = codes_lib.twos_complement_planes if self.signed else codes_lib.unsigned_planes
        return split(int(self.bits), self.slice_bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightSpec(Spec):
    """Quantization of the kernel and its storage in memory cells."""

    # Bits of a weight code: 1 to 8, or 1.5 (`differential` only). One bit is not for `twos_complement`. Of
    # `learned_scales` the number of steps, 1 to 5.
    bits: float = 4
    # Bits that one cell stores, 1 to 8; need not divide `bits`.
    cell_bits: int = 2
    # What shares one weight step.
    granularity: Granularity = Granularity.COLUMN
    # How a signed code becomes non-negative digits.
    encoding: Encoding = Encoding.TWOS_COMPLEMENT
    # `differential` only: where plus and minus are subtracted.
    subtract: Subtract = Subtract.DIGITAL
    # `offset` only: how the constant is removed.
    reference: Reference = Reference.DIGITAL
    # What a signed plane costs in physical columns.
    signed_cells: SignedCells = SignedCells.PAIRED
    # One step per plane, each plane's digit from its own rounding (the paper's code); `column` granularity only. That
    # is what `learned_scales` are.
    step_per_plane: bool = False
    # Where calibration starts the step: `least_squares`: where rounding changes the tensor least; `magnitude`: LSQ's
    # rule, `2 mean|x| / sqrt(q)` (`mean|x|` for {-1, +1}); `range`: where the codes just cover all values;
    # `percentile`: 99.9 % of them.
    start: StepStart = StepStart.MAGNITUDE
    # Constant that multiplies LSQ's gradient factor 1/sqrt(n q) of this step; log-steps need more than raw ones.
    gradient_factor: float = 30.0
    # What a plane's gradient counts in that of the weight: all the same, by its significance, or the lowest alone (the
    # paper's code). With an ideal ADC all planes say the same.
    plane_shares: PlaneShares = PlaneShares.EQUAL

    def __post_init__(self) -> None:
        self._bits("bits", 1, 8, half=True)
        self._bits("cell_bits", 1, 8, half=False)
        self._enum("granularity", Granularity)
        self._enum("encoding", Encoding)
        self._enum("subtract", Subtract)
        self._enum("reference", Reference)
        self._enum("signed_cells", SignedCells)
        self._flag("step_per_plane")
        self._enum("start", StepStart)
        self._number("gradient_factor", *_GRADIENT_FACTORS)
        self._enum("plane_shares", PlaneShares)
        if self.bits == 1.5 and self.encoding != Encoding.DIFFERENTIAL:
            raise ValueError(f"`bits` is 1.5 with `encoding` {self.encoding!s}; three codes need 'differential'.")
        if self.bits == 1 and self.encoding == Encoding.TWOS_COMPLEMENT:
            raise ValueError(
                "`bits` is 1 with `encoding` twos_complement, which has no {-1, +1}; use 'differential' or 'offset'."
            )
        if self.subtract == Subtract.ANALOG and self.encoding != Encoding.DIFFERENTIAL:
            raise ValueError(f"`subtract` is 'analog' with `encoding` {self.encoding!s}; it belongs to 'differential'.")
        if self.reference == Reference.ADC and self.encoding != Encoding.OFFSET:
            raise ValueError(f"`reference` is 'adc' with `encoding` {self.encoding!s}; it belongs to 'offset'.")
        if self.step_per_plane and self.granularity != Granularity.COLUMN:
            raise ValueError(
                f"`step_per_plane` is True with `granularity` {self.granularity!s}; it needs `granularity` 'column'."
            )
        if self.step_per_plane and self.encoding == Encoding.DIFFERENTIAL:
            raise ValueError(
                "`step_per_plane` is True with `encoding` differential; use 'twos_complement' or 'offset', or one step."
            )
        if self.encoding == Encoding.LEARNED_SCALES:
            self._check_learned_scales()

    def _check_learned_scales(self) -> None:
        """Refuse what contradicts one-bit cells with a step per plane."""
        if self.bits not in range(1, 6):
            raise ValueError(
                f"`bits` is {self.bits:g} with `encoding` learned_scales, whose sums of that many steps are all "
                "compared; give 1 to 5."
            )
        if self.cell_bits != 1:
            raise ValueError(
                f"`cell_bits` is {self.cell_bits} with `encoding` learned_scales, whose digits are -1, 0, +1; give 1."
            )
        if not self.step_per_plane:
            raise ValueError(
                "`step_per_plane` is False with `encoding` learned_scales, which learns a step for every plane; give "
                "True."
            )
        if self.plane_shares != PlaneShares.EQUAL:
            raise ValueError(
                f"`plane_shares` is {self.plane_shares!s} with `encoding` learned_scales, whose planes share equally; "
                "give 'equal'."
            )

    @property
    def code_range(self) -> CodeRange:
        """The weight's codes; of `learned_scales` in units of the lowest step while each is twice the next lower."""
        if self.encoding == Encoding.LEARNED_SCALES:
            largest = 2 ** int(self.bits) - 1
            return CodeRange(-largest, largest, 2 * largest + 1)
        return codes_lib.weight_range(self.bits, symmetric=self.encoding == Encoding.DIFFERENTIAL)

    @property
    def planes(self) -> tuple[Plane, ...]:
        """The planes of a code, lowest first (`differential` digital: plus planes, then minus planes)."""
        if self.encoding == Encoding.TWOS_COMPLEMENT:
            return codes_lib.twos_complement_planes(int(self.bits), self.cell_bits)
        if self.encoding == Encoding.DIFFERENTIAL:
            magnitude_bits = max(1, math.floor(self.bits) - 1)
            return codes_lib.magnitude_planes(magnitude_bits, self.cell_bits, analog=self.subtract == Subtract.ANALOG)
        if self.encoding == Encoding.LEARNED_SCALES:
            return (Plane(1, -1, 1),) * int(self.bits)
        if self.bits == 1:
            return (Plane(2, 0, 1),)
        return codes_lib.unsigned_planes(int(self.bits), self.cell_bits)

    @property
    def constant(self) -> int:
        """What the digits of a code lack: `q = sum_k f_k d_k + constant`; 0 except for `offset`."""
        return self.code_range.q_min if self.encoding == Encoding.OFFSET else 0

    @property
    def columns_per_output(self) -> int:
        """Physical columns that the planes of one output take (a dummy reference column not included)."""
        paired = self.signed_cells == SignedCells.PAIRED
        return sum(2 if plane.signed and paired else 1 for plane in self.planes)

    @property
    def dummy_columns(self) -> int:
        """Physical columns that every array spends on the offset's reference."""
        return 1 if self.encoding == Encoding.OFFSET and self.reference == Reference.ADC else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ADCSpec(Spec):
    """Quantization of partial sums: the ADC behind every column."""

    # Bits of an ADC code: 1 to 16, or 1.5 (three codes).
    bits: float = 3
    # Bits behind the columns of each plane, lowest plane first, as in (2, 3), where they differ; for `column`
    # granularity and steps that are not `fixed`. A dummy column keeps `bits`.
    plane_bits: tuple[float, ...] | None = None
    # What shares one psum step (and one offset).
    granularity: Granularity = Granularity.COLUMN
    # Whether the ladder starts at a learned offset `z` instead of at 0.
    offset: bool = False
    # `learned`; `calibrated`: frozen after calibration; `fixed`: `full_scale / (codes - 1)`; `power_of_two`: learned,
    # rounded to the nearest power of two.
    step: StepKind = StepKind.LEARNED
    # Where calibration puts the ladder: `least_squares`: where the output changes least; `magnitude`: LSQ's rule for
    # real numbers, `2 mean|P| / sqrt(q)` from 0 (`mean|P|` for {-1, +1}); `range`: over all partial sums that occur;
    # `percentile`: over all but the outermost 0.1 % on either side.
    start: LadderStart = LadderStart.LEAST_SQUARES
    # `auto`: signed codes where a column can be negative and there is no offset; `signed`: always.
    range: ADCRange = ADCRange.AUTO
    # `fixed` only: the span of psums that the ladder covers, in units of one psum.
    full_scale: float | None = None
    # Constant that multiplies LSQ's gradient factor 1/sqrt(n q) of this step and of the offset; see `ActivationSpec`.
    gradient_factor: float = 10.0
    # How far beyond the outer codes a partial sum still passes its gradient, in steps; 0 is LSQ's rule. At 1/2 all that
    # are rounded by no more than half a step do.
    gradient_margin: float = 0.0
    # Standard deviation, in steps, of Gaussian bumps at the ladder's thresholds through which gradients pass, instead
    # of LSQ's window over its codes; 0 is the window.
    gradient_bumps: float = 0.0
    # Whether what a code counts is learned apart from the step that converts: a digital factor behind each ADC, shared
    # as steps are. It is multiplied into a factor that is there anyway; a dummy column has none.
    digital_gain: bool = False

    def __post_init__(self) -> None:
        self._bits("bits", 1, 16, half=True)
        self._enum("granularity", Granularity)
        self._flag("offset")
        self._enum("step", StepKind)
        self._enum("start", LadderStart)
        self._enum("range", ADCRange)
        self._number("gradient_factor", *_GRADIENT_FACTORS)
        self._number("gradient_margin", 0, 1_000_000)
        self._number("gradient_bumps", 0, 100)
        self._flag("digital_gain")
        self._check_bumps_and_gain()
        _check_full_scale(self, "psums that the ADC covers")
        if self.plane_bits is not None:
            self._several_bits("plane_bits", 1, 16)
            if self.granularity != Granularity.COLUMN or self.step == StepKind.FIXED:
                raise ValueError(
                    f"`plane_bits` is {self.plane_bits} with `granularity` {self.granularity!s} and `step` "
                    f"{self.step!s}; ADCs of different bits need 'column', and a step that is not 'fixed'."
                )

    def _check_bumps_and_gain(self) -> None:
        """Refuse bumps too narrow to meet a partial sum or beside a margin, and a gain that undoes its step."""
        if 0 < self.gradient_bumps < _NARROWEST_BUMP:
            raise ValueError(
                f"`gradient_bumps` is {shown(self.gradient_bumps)}, too narrow to pass anything; give 0, or "
                f"{_NARROWEST_BUMP} to 100."
            )
        if self.gradient_bumps and self.gradient_margin:
            raise ValueError(
                f"`gradient_bumps` is {shown(self.gradient_bumps)} with `gradient_margin` "
                f"{shown(self.gradient_margin)}, which widens the window that bumps replace; leave one of them at 0."
            )
        if self.digital_gain and self.step == StepKind.POWER_OF_TWO:
            raise ValueError(
                "`digital_gain` is True with `step` 'power_of_two', whose codes are shifted, not multiplied; give "
                "'learned', or no gain."
            )

    @property
    def trainable(self) -> bool:
        """Whether training moves the step and the offset."""
        return self.step in (StepKind.LEARNED, StepKind.POWER_OF_TWO)

    def code_range(self, *, signed: bool, plane: int | None = None) -> CodeRange:
        """The codes for a column of a plane whose psums can be negative (`signed`) or cannot.

        Args:
          plane: from the lowest, 0; None for a dummy column.
        """
        bits = self.bits if self.plane_bits is None or plane is None else self.plane_bits[plane]
        forced = self.range == ADCRange.SIGNED
        return codes_lib.code_range(bits, signed=forced or (signed and not self.offset))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArraySpec(Spec):
    """The memory array and the rule that cuts a layer into arrays."""

    # Cells in one column and in one row of an array.
    rows: int = 128
    columns: int = 128
    # `packed`: whole kernels, `rows // (kh*kw)` channels a tile (the paper); `balanced`: as many tiles, channels spread
    # evenly; `im2col`: the stretched kernel cut every `rows` rows.
    tiling: TilingRule = TilingRule.PACKED
    # Rows that one conversion reads at once; None reads all.
    active_rows: int | None = None

    def __post_init__(self) -> None:
        self._count("rows")
        self._count("columns")
        self._enum("tiling", TilingRule)
        if self.active_rows is not None:
            self._count("active_rows")
            if self.active_rows > self.rows:
                raise ValueError(
                    f"`active_rows` is {self.active_rows} but an array has {self.rows} rows; give at most that many."
                )

    @property
    def rows_per_read(self) -> int:
        """Rows that one conversion reads at most."""
        return self.rows if self.active_rows is None else self.active_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class VariationSpec(Spec):
    """Log-normal variation of stored values: every one is multiplied by `exp(theta)`, `theta ~ N(0, sigma^2)`."""

    # Standard deviation of `theta`, at most 2; 0 keeps the analog path without variation.
    sigma: float
    # One `theta` per weight, shared by its planes (the paper), or one per stored cell.
    on: VariationTarget = VariationTarget.WEIGHTS

    def __post_init__(self) -> None:
        self._number("sigma", 0, _LARGEST_SIGMA)
        self._enum("on", VariationTarget)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CIMSpec(Spec):
    """One compute-in-memory layer: activation, weight, ADC, array, and optional variation of the cells.

    Hashable, and equal when all fields are, so that a specification can be a static argument of a jitted function.
    """

    activation: ActivationSpec = ActivationSpec()
    weight: WeightSpec = WeightSpec()
    # None is an ideal ADC: partial sums stay exact.
    adc: ADCSpec | None = ADCSpec()
    array: ArraySpec = ArraySpec()
    # None keeps the integer path, in which partial sums are exact integers.
    variation: VariationSpec | None = None

    def __post_init__(self) -> None:
        self._nested("activation", ActivationSpec)
        self._nested("weight", WeightSpec)
        self._nested("adc", ADCSpec, optional=True)
        self._nested("array", ArraySpec)
        self._nested("variation", VariationSpec, optional=True)
        if self.outputs_per_array < 1:
            need = self.weight.columns_per_output + self.weight.dummy_columns
            raise ValueError(
                f"`columns` is {self.array.columns} but one output needs {need} columns ({len(self.weight.planes)} "
                "planes, two columns for a signed plane, one dummy column if any); use wider arrays or fewer planes."
            )
        own = None if self.adc is None else self.adc.plane_bits
        if own is not None and len(own) != len(self.weight.planes):
            raise ValueError(
                f"`plane_bits` is {own} for {len(self.weight.planes)} planes; give bits for each, lowest plane first."
            )
        forced = self.adc is not None and self.adc.range == ADCRange.SIGNED and not self.adc.offset
        if forced and not all(signed for row in self.signed_psums for signed in row):
            raise ValueError(
                "`range` is 'signed' without an offset, but some columns are never negative, so half of the codes "
                "would be lost; use range='auto', or offset=True."
            )

    @property
    def outputs_per_array(self) -> int:
        """How many outputs share one array."""
        return max(0, self.array.columns - self.weight.dummy_columns) // self.weight.columns_per_output

    @property
    def skips_decomposition(self) -> bool:
        """Whether slices and planes only cut up exact integers that an ideal ADC puts together again unchanged."""
        return self.adc is None and self.variation is None and not self.weight.step_per_plane

    @property
    def largest_operand(self) -> int:
        """The largest magnitude among the integers that the array product multiplies."""
        if self.skips_decomposition:
            return int(max(self.activation.code_range.magnitude, self.weight.code_range.magnitude))
        return int(max(part.magnitude for part in (*self.activation.slices, *self.weight.planes)))

    @property
    def signed_psums(self) -> tuple[tuple[bool, ...], ...]:
        """For every slice t and plane k, whether a partial sum can be negative."""
        return tuple(tuple(s.signed or p.signed for p in self.weight.planes) for s in self.activation.slices)

    @property
    def adc_ranges(self) -> tuple[tuple[CodeRange, ...], ...]:
        """For every slice t and plane k, the ADC's codes.

        Raises:
          ValueError: with an ideal ADC, which has no codes.
        """
        if self.adc is None:
            raise ValueError("`adc` is None: an ideal ADC has no codes; give an `ADCSpec`.")
        return tuple(
            tuple(self.adc.code_range(signed=signed, plane=k) for k, signed in enumerate(row))
            for row in self.signed_psums
        )

    @property
    def adc_codes(self) -> int:
        """How many codes an ADC has, the most of any slice and plane; errors as for `adc_ranges`."""
        return max(codes.size for row in self.adc_ranges for codes in row)

    @property
    def reference_ranges(self) -> tuple[CodeRange, ...]:
        """For every slice t, the codes of the ADC behind the dummy column of `reference="adc"`."""
        if self.adc is None:
            raise ValueError("`adc` is None: an ideal ADC has no codes; give an `ADCSpec`.")
        return tuple(self.adc.code_range(signed=s.signed) for s in self.activation.slices)

    def require_exportable(self) -> None:
        """Check that the specification describes cells that exist.

        Raises:
          ValueError: with `signed_cells="ideal"` where a plane is signed.
        """
        if self.weight.signed_cells == SignedCells.IDEAL and any(p.signed for p in self.weight.planes):
            raise ValueError(
                "`signed_cells` is 'ideal', which counts one column for a plane that needs two; use 'paired' to export."
            )
