"""What codes are multiplied by behind the ADCs, and added up with, in integers.

`y = s_a (sum_{t,r,k} g_t f_k s_w s_p p + ...)`: but for its slice and the activation's step a code is multiplied by one
factor for each column, `f_k s_w s_p`, in units of `2^exponent`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from cimjax.core import readout, step_sizes
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import Tiling
from cimjax.hardware.thresholds import ADCTable
from cimjax.spec import CIMSpec, Encoding, Reference

# What accumulators hold.
INT32 = 2**31 - 1
# The fewest bits of a factor that are taken, and the most (docs/export.md has what they change).
_FEWEST, MOST_BITS = 2, 24


def int32(values: np.ndarray, exponent: int = 0) -> np.ndarray:
    """Real numbers in units of `2^exponent`, rounded; those that an int32 does not hold are cut off."""
    return np.clip(np.rint(np.ldexp(values, -exponent)), -INT32, INT32).astype(np.int32)


class Factors(NamedTuple):
    """What codes are multiplied by, (R, K, O), the sums of inputs, (R, O) or None, and what is added, (O,).

    Real numbers, float64, or integers, int32, in units of `2^exponent`.
    """

    of_codes: np.ndarray
    of_sums: np.ndarray | None
    added: np.ndarray
    exponent: int = 0

    @property
    def largest(self) -> float:
        """The largest magnitude of what is multiplied by."""
        return max(float(np.abs(each).max()) for each in (self.of_codes, self.of_sums) if each is not None)

    def scaled(self, factor: np.ndarray | float, added: np.ndarray | float = 0.0) -> Factors:
        """Of `factor` times the output, plus what is `added`, each of every output, (O,), or of all."""
        of_sums = None if self.of_sums is None else self.of_sums * factor
        return Factors(self.of_codes * factor, of_sums, self.added * factor + added)

    def in_units(self, exponent: int) -> Factors:
        """Rounded to units of `2^exponent`."""
        of_sums = None if self.of_sums is None else int32(self.of_sums, exponent)
        return Factors(int32(self.of_codes, exponent), of_sums, int32(self.added, exponent), exponent)

    def rounded(self, bits: int) -> Factors:
        """In units of the power of two by which the largest factor has so many bits, with its sign."""
        return self.in_units(exponent_of_bits(self.largest, bits))

    def largest_total(self, reach: Reach) -> float:
        """What an accumulator can come to."""
        total = np.einsum("rk,rko->o", reach.codes, np.abs(self.of_codes.astype(np.float64)))
        if self.of_sums is not None:
            total += np.einsum("r,ro->o", reach.sums, np.abs(self.of_sums.astype(np.float64)))
        return float((total + np.abs(self.added.astype(np.float64))).max())


class Reach(NamedTuple):
    """The largest magnitudes of what is multiplied, all slices with their significances added up: of the codes behind
    columns, (R, K), and of the sums of a read group's inputs, (R,)."""

    codes: np.ndarray
    sums: np.ndarray


def exponent_of_bits(largest: float, bits: int) -> int:
    """Of the least power of two in whose units `largest` is an integer of so many bits, with its sign."""
    return math.ceil(math.log2(largest / (2 ** (bits - 1) - 1)))


def check_bits(bits: int | None) -> None:
    """Refuse a number of bits that factors cannot have."""
    if bits is not None and not _FEWEST <= bits <= MOST_BITS:
        raise ValueError(f"`factor_bits` is {bits}; give {_FEWEST} to {MOST_BITS}.")


def reach_of(tables: tuple[ADCTable | None, ADCTable | None], tiling: Tiling, spec: CIMSpec) -> Reach:
    """What codes and sums can come to, whatever drives the rows.

    Args:
      tables: of the ADCs of columns, and of dummy columns; None where they are ideal.
    """
    table, dummy_table = tables
    significances, magnitudes = np.array([[abs(s.significance), s.magnitude] for s in spec.activation.slices]).T
    inputs = tiling.rows_of_group[:, None] * magnitudes  # (R, T), the largest sums of inputs
    planes = np.array([plane.magnitude for plane in spec.weight.planes])
    of_columns = inputs[:, :, None] * planes if table is None else table.largest[None]
    of_sums = inputs if dummy_table is None else dummy_table.largest[:, 0] * np.ones_like(inputs)
    return Reach(
        np.einsum("rtk,t->rk", of_columns * np.ones_like(inputs[:, :, None]), significances), of_sums @ significances
    )


def integer_factors(real: Factors, reach: Reach, name: str, bits: int | None) -> Factors:
    """Factors of so many bits, or of as many as an accumulator of 32 bits has room for, whatever comes in.

    Args:
      real: from `real_factors`.
      name: what messages call the layer.
      bits: None for 24, or as many as there is room for.
    """
    check_bits(bits)
    name = name or "the layer"
    for tried in range(MOST_BITS if bits is None else bits, _FEWEST - 1, -1):
        found = real.rounded(tried)
        if found.largest_total(reach) <= INT32:
            if bits is not None and tried < bits:
                raise ValueError(
                    f"{name} can leave an int32 with factors of {bits} bits; give `factor_bits` {tried}, or None."
                )
            return found
    raise ValueError(f"{name} can leave an int32 whatever its factors are; use fewer bits or rows.")


def real_factors(steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> Factors:
    """The factors before they are rounded: what they give times the step of the input is the output."""

    def of_columns(value: Any) -> np.ndarray:
        shape = (tiling.groups, len(spec.weight.planes), tiling.features)
        return np.broadcast_to(np.asarray(value, np.float64), shape)

    of_codes = of_columns(readout.output_scale(steps, tiling, spec))
    slices, added = readout.slice_significances(spec).sum(), np.zeros(tiling.features)
    if spec.adc is not None:
        if steps.offset is not None:
            offset = of_columns(step_sizes.expand_outputs(steps.offset, tiling))
            added = added + slices * (of_codes * offset).sum((0, 1))
        of_codes = of_codes * of_columns(step_sizes.expand_outputs(steps.psum, tiling))
    if spec.weight.encoding != Encoding.OFFSET:
        return Factors(of_codes, None, added)
    of_sums = np.asarray(readout.constant(steps, tiling, spec), np.float64)
    if spec.adc is not None and spec.weight.reference == Reference.ADC:
        if steps.reference_offset is not None:
            added = added + slices * (of_sums * np.asarray(steps.reference_offset, np.float64)[:, None]).sum(0)
        of_sums = of_sums * np.asarray(steps.reference, np.float64)[:, None]
    return Factors(of_codes, of_sums, added)
