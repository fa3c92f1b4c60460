"""The ADCs of columns, on partial sums that lie side by side: what they read, and the gradients of it.

On arrays (T, positions, K O) for `joined`, and on blocks (positions, O) of one plane for the GPU kernels.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.core import adc, lsq, readout
from cimjax.core.programs.contract import Layer
from cimjax.core.programs.cpu import materialize, sum_over_positions
from cimjax.core.reciprocal import reciprocal
from cimjax.spec import CodeRange


class ColumnScales(NamedTuple):
    """What every column's ADC and its result are scaled by: (R, K O) float32 or, of one read group, (K O,).

    step: in psum units, > 0; None behind an ideal ADC.
    offset: the partial sum of code 0; None where there is none.
    output_scale: what a partial sum counts but for its slice, `f_k s_w`.
    """

    step: Any
    offset: Any
    output_scale: Any


class Ladders(NamedTuple):
    """What passes over partial sums look up, (R, K O) float32 or, of one read group, (K O,); see `ColumnScales`.

    reciprocal: of the step; with step, offset and read_scale None behind an ideal ADC.
    read_scale: what a code counts but for its slice, `step f_k s_w`.
    """

    step: Any
    reciprocal: Any
    offset: Any
    output_scale: Any
    read_scale: Any

    @classmethod
    def of_groups(cls, scales: ColumnScales) -> Ladders:
        """The ladders of all read groups, written to memory, or XLA:CPU would compute them for each partial sum."""
        step, offset, scale = scales
        every = [
            step,
            None if step is None else reciprocal(step),
            offset,
            scale,
            None if step is None else step * scale,
        ]
        present = [values for values in every if values is not None]
        rows = iter(materialize(lambda *values: jnp.stack(values), *present))
        return cls(*(None if values is None else next(rows) for values in every))

    def of_group(self, group: int) -> Ladders:
        """The ladders of one read group."""
        return Ladders(*(None if values is None else values[group] for values in self))


class SliceADC(NamedTuple):
    """What is fixed about the ADCs of a read group's columns, in all slices.

    bounds: of the codes, broadcastable to (T, positions, K O); None for ideal ADCs.
    significances: `g_t`, (T, 1, 1).
    features: `O`.
    """

    bounds: lsq.Bounds | None
    significances: np.ndarray
    features: int

    @classmethod
    def of_layer(cls, layer: Layer) -> SliceADC:
        """The ADCs of a layer; where codes are not divided, of one slice."""
        spec, features = layer.spec, layer.tiling.features
        significances = np.ones(1, np.float32) if spec.skips_decomposition else readout.slice_significances(spec)
        if spec.adc is None:
            return cls(None, significances[:, None, None], features)
        entries = [np.repeat(entry[:, :, 0, :, 0], features, axis=-1) for entry in adc.psum_ranges(spec)]
        same = all(np.all(entry == entry.flat[0]) for entry in entries)
        code_range = CodeRange(*(entry.flat[0] if same else entry for entry in entries))
        bounds = lsq.Bounds.of(code_range, spec.adc.gradient_margin, spec.adc.gradient_bumps)
        return cls(bounds, significances[:, None, None], features)

    def read(self, psums: Array, ladders: Ladders) -> Array:
        """`sum_{t,k} g_t output_scale P^`: (T, positions, K O) to (positions, O), all float32."""
        assert self.bounds is not None
        u = lsq.in_steps(psums, ladders.reciprocal, ladders.offset)
        codes = lsq.round_to_codes(u, psums, ladders.offset, self.bounds, half_up=True)
        # `s w p + z w`, of which the second part is the same at all positions.
        total = self._add(codes * ladders.read_scale)
        if ladders.offset is None:
            return total
        constant = ladders.offset * ladders.output_scale
        return total + self._add(jnp.broadcast_to(constant, (len(self.significances), 1, psums.shape[-1])))

    def gradients(self, psums: Array, ladders: Ladders, gradient: Array) -> tuple[Array, ColumnScales]:
        """Of `read`, with LSQ's for the ADC (`lsq.passed`): to partial sums, (T, positions, K O), and to ladders.

        Args:
          psums: (T, positions, K O), float32 or small integers.
          gradient: (positions, O) float32.
        """
        to_columns = self._to_columns(gradient, psums.shape[-1])
        if self.bounds is None:
            return to_columns * ladders.output_scale, ColumnScales(None, None, sum_over_positions(to_columns * psums))
        # Written before all that reads it, on CPU.
        to_psums = materialize(self._to_psums, psums, ladders, gradient)
        terms = ladder_terms(psums.astype(jnp.float32), to_psums, to_columns, ladders, self.bounds)
        sums = jax.tree.map(sum_over_positions, terms)
        return to_psums, ladder_gradients(sums, ladders, self.bounds)

    def _to_columns(self, gradient: Array, columns: int) -> Array:
        """The gradient of the output, for every column: (positions, O) to (T, positions, K O)."""
        return jnp.concatenate([gradient] * (columns // self.features), axis=-1) * self.significances

    def _to_psums(self, psums: Array, ladders: Ladders, gradient: Array) -> Array:
        assert self.bounds is not None
        u = lsq.in_steps(psums.astype(jnp.float32), ladders.reciprocal, ladders.offset)
        to_columns = self._to_columns(gradient, psums.shape[-1])
        return lsq.passed(to_columns * ladders.output_scale, u, self.bounds)

    def _add(self, values: Array) -> Array:
        """The sum over slices and planes."""
        values = functools.reduce(jnp.add, list(values * self.significances))
        # Sums over a short middle axis are slow on CPU.
        return functools.reduce(jnp.add, jnp.split(values, values.shape[-1] // self.features, axis=-1))


class LadderSums(NamedTuple):
    """What the gradients to ladders are made of: terms (T, positions, K O) or (positions, O), or their sums (K O,).

    step: the gradient to the step; None behind an ideal ADC.
    distance: of a partial sum from the offset, times what passed of the gradient to it.
    beyond: the gradient to the offset, but for `output_scale` where no bumps are; None where there is no offset.
    gradient: to the codes of a column, but for what they are scaled by; None where there is no offset.
    """

    step: Any
    distance: Any
    beyond: Any
    gradient: Any


def ladder_terms(
    psums: Array, to_psums: Array, to_columns: Array, ladders: Ladders, bounds: lsq.Bounds | None
) -> LadderSums:
    """The terms at every position.

    Args:
      psums: float32.
      to_psums: what passed of the gradient to them (`lsq.passed`).
      to_columns: the gradient of the output, for every column.
    """
    if bounds is None:
        return LadderSums(None, psums * to_psums, None, None)
    u = lsq.in_steps(psums, ladders.reciprocal, ladders.offset)
    codes = lsq.round_to_codes(u, psums, ladders.offset, bounds, half_up=True)
    # What has passed is 0 outside, where `u` does not count; nor does it for a sign.
    rest, distance = u * to_psums, (psums if ladders.offset is None else psums - ladders.offset) * to_psums
    if bounds.sign is not None:
        rest, distance = (jnp.where(bounds.sign, 0.0, values) for values in (rest, distance))
    # Small terms are added up: the difference of the sums of codes and of `u` would lose what matters.
    step = to_columns * (ladders.output_scale * codes) - rest
    if ladders.offset is None:
        return LadderSums(step, distance, None, None)
    if bounds.bumps is None:
        return LadderSums(step, distance, jnp.where(to_psums == 0, to_columns, 0.0), to_columns)
    return LadderSums(step, distance, to_columns * ladders.output_scale - to_psums, to_columns)


def ladder_gradients(sums: LadderSums, ladders: Ladders, bounds: lsq.Bounds | None) -> ColumnScales:
    """The gradients to a column's step, offset and scale, of the sums over all positions."""
    if bounds is None:
        return ColumnScales(None, None, sums.distance / ladders.output_scale)
    # With the sum of `u` that of codes follows, without computing these again.
    to_codes = (sums.step + sums.distance * ladders.reciprocal) / ladders.output_scale
    if ladders.offset is None:
        return ColumnScales(sums.step, None, ladders.step * to_codes)
    to_offset = sums.beyond if bounds.bumps is not None else ladders.output_scale * sums.beyond
    return ColumnScales(sums.step, to_offset, ladders.step * to_codes + ladders.offset * sums.gradient)
