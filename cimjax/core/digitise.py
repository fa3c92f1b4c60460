"""Array product and ADCs as one function, with one gradient: what the columns of a tile add to the output.

Source: the paper's eqs. 2 and 3. Joined, partial sums are kept for the backward pass as small integers and nothing
else is, and there is one weight gradient for all planes.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cimjax.core import conversion as conversion_lib
from cimjax.core.conversion import Conversion, Scales
from cimjax.core.lowering import Columns, Multiplication, Tiles
from cimjax.core.readout import of_slice, whole
from cimjax.core.schedule import after, apart
from cimjax.core.tiling import Tiling
from cimjax.core.window import Window
from cimjax.spec import CIMSpec, Residuals


def digitised(
    inputs: Array, columns: Columns, scales: Scales, tiling: Tiling, window: Window, spec: CIMSpec
) -> tuple[Array, Array | None]:
    """Multiply, convert, shift, dequantize and add: `sum_{t,r,k} g_t f_k s_w P^`.

    `P^ = s_p p + z`, `p = clip(floor((P - z) / s_p + 0.5), q_min, q_max)`, is what an ADC makes of a partial sum: one
    of exactly `2^bits` values (3 for 1.5 bits; a signed 1-bit ADC gives the sign of `P - z`), which depends on
    nothing but that partial sum and its step.

    Gradients are LSQ's (`lsq.quantize`): inside the ladder, `spec.adc.gradient_margin` steps beyond its outer codes
    included, `d P^/dP = 1`, `d P^/ds = p - u` and `d P^/dz = 0`; outside `0`, `p` and `1`.

    Args:
      inputs: (T N, H, W, C) float32, the slices of all images, slice by slice.
      columns: what is stored; after its planes a read group may have one column more, which sums its inputs.
      scales: of all columns.

    Returns:
      (N, OH, OW, O) float32, not yet multiplied by the activation's step, and the sums of the further columns,
      (T N, OH, OW, R), before any ADC; None where there are none.
    """
    conversions = tuple(Conversion.of(index, tiling, spec) for index in range(len(spec.activation.slices)))
    significances = tuple(float(part.significance) for part in spec.activation.slices)
    tiles = Tiles(inputs, columns, tiling, window, spec)
    total: Array | None = None
    references = list[Array]()
    for tile, of in zip(tiles, scales.split(len(tiles)), strict=True):
        reading = Reading(Multiplication.of(tile, tiling, spec), conversions, significances, spec, tiling, tiles.many)
        digits, codes = tile.columns.digits, tile.columns.codes
        total, reference = _digitised(reading, total, tile.inputs, digits, codes, of, scales.weight)
        total = tiles.after(total)
        references += [] if reference is None else [reference]
    assert total is not None
    return total, jnp.concatenate(references, axis=-1) if references else None


class Reading(NamedTuple):
    """What is fixed about a tile.

    conversions, significances: of each slice, its ADCs and what it counts.
    in_turn: whether it waits for the tile before, so that the partial sums of one tile at a time are held.
    """

    multiplication: Multiplication
    conversions: tuple[Conversion, ...]
    significances: tuple[float, ...]
    spec: CIMSpec
    tiling: Tiling
    in_turn: bool

    @property
    def width(self) -> int:
        """Columns of a read group that hold planes, `K O`."""
        return len(self.conversions[0].ranges) * self.conversions[0].features

    @property
    def has_reference(self) -> bool:
        """Whether each read group has a further column."""
        return self.multiplication.columns > self.width

    def psums(self, sums: Array) -> Array:
        """The planes' partial sums, (..., r K O), of a part as it was computed."""
        sums = whole(sums, self.spec)
        if not self.has_reference:
            return sums
        by_group = self._by_group(sums)
        return by_group[..., : self.width].reshape(*sums.shape[:-1], by_group.shape[-2] * self.width)

    def reference(self, sums: Array) -> Array | None:
        """The further column of each read group, (..., r), as it was computed."""
        return self._by_group(sums)[..., -1] if self.has_reference else None

    def _by_group(self, sums: Array) -> Array:
        columns = self.multiplication.columns
        return sums.reshape(*sums.shape[:-1], sums.shape[-1] // columns, columns)

    def together(self, of_psums: Array, of_reference: Array | None) -> Array:
        """Gradients of both as those of a part's sums: the inverse of `psums` and `reference`."""
        if of_reference is None:
            return of_psums
        groups = of_reference.shape[-1]
        by_group = of_psums.reshape(*of_psums.shape[:-1], groups, self.width)
        joined = jnp.concatenate([by_group, of_reference[..., None]], axis=-1)
        return joined.reshape(*of_psums.shape[:-1], groups * self.multiplication.columns)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _digitised(
    reading: Reading,
    before: Array | None,
    inputs: Array,
    digits: Array,
    codes: Array | None,
    of: Scales,
    known: Array,
) -> tuple[Array, Array | None]:
    """`before`, what the tiles before add up to, and what this one adds; and the sums of its further columns."""
    del codes
    return _read(reading, before, _sums(reading, before, inputs, digits), of, known)


def _sums(reading: Reading, before: Array | None, inputs: Array, digits: Array) -> tuple[Array, ...]:
    waiting = inputs if before is None or not reading.in_turn else after(inputs, before)
    return reading.multiplication.sums(waiting, digits)


def _read(
    reading: Reading, before: Array | None, parts: tuple[Array, ...], of: Scales, known: Array
) -> tuple[Array, Array | None]:
    def add(before: Array | None, parts: tuple[Array, ...], of: Scales) -> Array:
        total = jnp.float32(0) if before is None else before
        for part, of_part in zip(parts, _of_parts(of, len(parts)), strict=True):
            for index, conversion in enumerate(reading.conversions):
                psums = reading.psums(of_slice(part, index, len(reading.conversions)))
                total = total + conversion_lib.converted(
                    conversion, psums, _weighing(of_part, reading.significances[index])
                )
        return total

    total = apart(add, before, parts, of, known=known, like=before) if reading.in_turn else add(before, parts, of)
    references = [sums for part in parts if (sums := reading.reference(part)) is not None]
    return total, jnp.concatenate(references, axis=-1) if references else None


def _of_parts(of: Scales, parts: int) -> list[Scales]:
    """Scales (R, K O) as those of each part, (r K O,)."""
    return [jax.tree.map(lambda values: values.reshape(-1), part) for part in of.split(parts)]


def _weighing(of: Scales, significance: float) -> Scales:
    return of if significance == 1 else of._replace(weight=significance * of.weight)


def _digitised_forward(
    reading: Reading,
    before: Array | None,
    inputs: Array,
    digits: Array,
    codes: Array | None,
    of: Scales,
    known: Array,
) -> tuple[tuple[Array, Array | None], tuple[Any, ...]]:
    parts = _sums(reading, before, inputs, digits)
    # With further columns their sums are needed anyway, and with them this product: another one would come on top.
    again = reading.spec.residuals == Residuals.INPUTS and not reading.has_reference
    kept = None if again else _kept(reading, parts, known)
    residuals = (before is not None, inputs, digits, codes, of, kept, known)
    return _read(reading, before, parts, of, known), residuals


def _kept(reading: Reading, parts: tuple[Array, ...], known: Array) -> list[list[Array]]:
    """The planes' partial sums of every part and slice, as they are kept for the backward pass."""
    slices = len(reading.conversions)
    by_slice = [[of_slice(part, index, slices) for index in range(slices)] for part in parts]
    if not conversion_lib.fit_small_integers(reading.tiling, reading.spec):
        return [[reading.psums(sums) for sums in part] for part in by_slice]

    def keep(sums: Array) -> Array:
        return conversion_lib.as_small_integers(reading.psums(sums))

    # Apart, because XLA would keep the numbers that these are made of instead.
    return [[apart(keep, sums, known=known) for sums in part] for part in by_slice]


def _digitised_backward(
    reading: Reading, residuals: tuple[Any, ...], gradient: tuple[Array, Array | None]
) -> tuple[Array | None, Array, Array | None, Array | None, Scales, None]:
    follows, inputs, digits, codes, of, kept, known = residuals
    of_total, of_references = gradient
    if kept is None:
        # Otherwise all partial sums would be computed early, and held.
        kept = _kept(reading, reading.multiplication.sums(after(inputs, of_total), digits), known)
    references = [None] * len(kept) if of_references is None else jnp.split(of_references, len(kept), axis=-1)
    of_sums, to_scales = [], []
    for of_part, of_reference, slices in zip(_of_parts(of, len(kept)), references, kept, strict=True):
        to_slices, added = [], None
        for conversion, significance, psums in zip(reading.conversions, reading.significances, slices, strict=True):
            to_psums, to_part = conversion_lib.gradients(
                conversion, psums, _weighing(of_part, significance), of_total, known
            )
            to_slices.append(to_psums)
            to_part = _weighing(to_part, significance)
            added = to_part if added is None else jax.tree.map(jnp.add, added, to_part)
        to_psums = to_slices[0] if len(to_slices) == 1 else jnp.concatenate(to_slices)
        of_sums.append(reading.together(to_psums, of_reference))
        to_scales.append(
            jax.tree.map(lambda values: values.reshape(values.shape[0] // reading.width, reading.width), added)
        )
    to_inputs, to_digits, to_codes = reading.multiplication.gradients(inputs, digits, codes, tuple(of_sums))
    added_up = jax.tree.map(lambda *values: jnp.concatenate(values), *to_scales)
    return of_total if follows else None, to_inputs, to_digits, to_codes, added_up, None


_digitised.defvjp(_digitised_forward, _digitised_backward)
