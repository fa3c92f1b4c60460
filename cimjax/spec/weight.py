"""What is specified of weights: their codes, their steps, and the digits that cells hold."""

from __future__ import annotations

import dataclasses
import math

from cimjax.spec import codes as codes_lib
from cimjax.spec.base import Spec
from cimjax.spec.choices import Encoding, Granularity, PlaneShares, Reference, SignedCells, StartRule, Subtract
from cimjax.spec.codes import CodeRange, Plane


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
    start: StartRule = StartRule.MAGNITUDE
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
        self._enum("start", StartRule)
        self._gradient_factor()
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
