"""What is specified of activations: their codes, their step, and the slices in which a DAC drives them."""

from __future__ import annotations

import dataclasses

from cimjax.spec import codes as codes_lib
from cimjax.spec.base import Spec, shown
from cimjax.spec.choices import StartRule, StepKind
from cimjax.spec.codes import CodeRange, Plane


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
    start: StartRule = StartRule.MAGNITUDE
    # Constant that multiplies LSQ's gradient factor 1/sqrt(n q) of this step; log-steps need more than raw ones.
    gradient_factor: float = 30.0

    def __post_init__(self) -> None:
        self._bits("bits", 1, 16, half=True)
        self._flag("signed")
        self._enum("step", StepKind)
        self._full_scale("inputs that the codes cover")
        self._enum("start", StartRule)
        self._gradient_factor()
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
