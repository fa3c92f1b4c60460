"""What is specified of ADCs: their codes, their steps and offsets, and the gradient that passes them."""

from __future__ import annotations

import dataclasses

from cimjax.spec import codes as codes_lib
from cimjax.spec.base import Spec, shown
from cimjax.spec.choices import ADCRange, Granularity, StartRule, StepKind
from cimjax.spec.codes import CodeRange

# In steps; narrower ones are too high where they are not 0.
_NARROWEST_BUMP = 0.01


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
    start: StartRule = StartRule.LEAST_SQUARES
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
        self._enum("start", StartRule)
        self._enum("range", ADCRange)
        self._gradient_factor()
        self._number("gradient_margin", 0, 1_000_000)
        self._number("gradient_bumps", 0, 100)
        self._flag("digital_gain")
        self._check_bumps_and_gain()
        self._full_scale("psums that the ADC covers")
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
