"""What to build: the frozen, hashable specification of one compute-in-memory layer.

Every option of the library is a field here, and everything that a user can get wrong is refused here, at
construction, with a `ValueError` that names the argument, the value, the values allowed and what to do. What needs
the shape of a layer (a kernel larger than an array) is refused by `cimjax.core.tiling`. Nothing here touches arrays.
"""

from __future__ import annotations

import dataclasses

from cimjax.spec.activation import ActivationSpec
from cimjax.spec.adc import ADCSpec
from cimjax.spec.base import Spec
from cimjax.spec.choices import ADCRange, SignedCells, TilingRule, VariationTarget
from cimjax.spec.codes import CodeRange
from cimjax.spec.weight import WeightSpec

# At 2 one cell in a thousand holds more than 480 times its value: beyond any device, and still far from the end of
# float32, also where calibration squares it.
_LARGEST_SIGMA = 2


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
