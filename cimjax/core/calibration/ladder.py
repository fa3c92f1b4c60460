"""Starting values of ADC ladders: the search for the least squared error, and three simpler rules; all traceable.

The search is a grid, then alternating least squares. A *ladder* is a step and the offset of its code 0. Which partial
sums share a ladder is told by a `Grouping`; which of them are looked at is decided in `cimjax.core.calibration.steps`.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.core import lsq
from cimjax.core.calibration.quantile import PERCENTILE, quantile
from cimjax.core.step_sizes import fixed_step
from cimjax.spec import ADCSpec, CIMSpec, CodeRange, StartRule, StepKind

# Candidate steps, as fractions of the step whose ladder just covers every partial sum.
SCALES = (1.0, *np.geomspace(1.5, 1 / 48, 32))
# Candidate ladders are placed across the range of the partial sums (fractions of the play that a ladder has in it)
# and around their mean (standard deviations).
ACROSS = tuple(np.linspace(0.0, 1.0, 9))
AROUND = (-1.0, -0.5, 0.0, 0.5, 1.0)
# Rounds of alternating least squares: levels given codes, then codes given levels.
REFINEMENTS = 12
# Parts of the samples that are added up before sums over them.
_PARTS = 8


class Grouping(NamedTuple):
    """What shares a ladder.

    expand: ladders of groups, made broadcastable to columns.
    total: sums of columns over the group of each.
    largest: maxima of columns over the group of each.
    """

    expand: Callable[[Array], Array]
    total: Callable[[Array], Array]
    largest: Callable[[Array], Array]


class _Ladder(NamedTuple):
    error: Array
    step: Array
    offset: Array


def fit(
    values: Array, weight: Array, codes: CodeRange, grouping: Grouping, spec: CIMSpec
) -> tuple[Array, Array | None]:
    """Step and offset for every group by `spec.adc.start`; with `P^` the value after the ADC, by default of least
    `sum weight (P^ - P)^2`.

    Args:
      values: (T, S, *columns) float32 partial sums.
      weight: (T, 1, *columns) float32, the square of each partial sum's weight in the output.
      codes: code ranges (lowest, highest, count), broadcastable to `values`.
      grouping: what shares a ladder.
      spec: its `adc` tells whether there is an offset, and which steps are allowed.

    Returns:
      Step, > 0, and offset (None without one), float32 of the groups' shape. A group of zeros gets 1 and 0.
    """
    adc = spec.adc
    assert adc is not None
    problem = _Problem(values.astype(jnp.float32), weight.astype(jnp.float32), codes, grouping, spec)
    shape = jax.eval_shape(grouping.largest, jax.ShapeDtypeStruct(values.shape[2:], jnp.float32)).shape
    start = _Ladder(*(jnp.full(shape, value, jnp.float32) for value in (jnp.inf, 1.0, 0.0)))
    if adc.start == StartRule.MAGNITUDE:
        best = problem.of_magnitude(start)
    elif adc.start == StartRule.RANGE:
        best = problem.covering(start)
    elif adc.start == StartRule.PERCENTILE:
        best = problem.covering(start, PERCENTILE)
    else:
        search = problem.search_with_offset if adc.offset else problem.search
        best = jax.lax.fori_loop(0, REFINEMENTS, lambda _, ladder: problem.refine(ladder), search(start))
    silent = grouping.largest(jnp.max(jnp.abs(values), axis=(0, 1))) == 0
    step = jnp.where(silent, problem.allowed(start.step), best.step)
    return step, jnp.where(silent, 0.0, best.offset) if adc.offset else None


class _Problem:
    """One least-squares problem: the data, and the moves that a search makes."""

    def __init__(self, values: Array, weight: Array, codes: CodeRange, grouping: Grouping, spec: CIMSpec) -> None:
        assert spec.adc is not None
        self.values, self.weight, self.codes = values, weight, codes
        self.q_min, self.q_max = np.asarray(codes[0]), np.asarray(codes[1])
        self.grouping, self.spec = grouping, spec
        self.adc: ADCSpec = spec.adc
        # The lowest and the highest code of each group.
        self.lowest, self.highest = -self._of_groups(-self.q_min), self._of_groups(self.q_max)

    def _of_groups(self, codes: np.ndarray) -> Array:
        """The largest of codes, broadcastable to the values, in each group."""
        columns = jnp.broadcast_to(jnp.asarray(codes, jnp.float32), (*codes.shape[:2], *self.values.shape[2:]))
        return self.grouping.largest(jnp.max(columns, axis=(0, 1)))

    def total(self, elements: Array) -> Array:
        """Sums over slices, samples and the columns of each group."""
        elements = jnp.broadcast_to(elements, self.values.shape)
        # XLA's CPU backend writes what it sums to memory: an eighth of it after these additions.
        parts = jnp.split(elements, math.gcd(elements.shape[1], _PARTS), axis=1)
        return self.grouping.total(jnp.sum(functools.reduce(jnp.add, parts), axis=(0, 1)))

    def allowed(self, step: Array) -> Array:
        """The nearest step that the ADC may have; below 1 only for one bit, since partial sums are integers.

        Two levels around an offset lie at least 1 apart, as a step or as two (signed codes): smaller steps fit only
        groups of one value, whose offset would be too many steps to be stored. Without an offset a mean magnitude
        may be as small as it likes.
        """
        if self.adc.step == StepKind.FIXED:
            return jnp.full_like(step, fixed_step(self.spec))
        of_two = 0.5 if self.adc.offset else 1e-6
        size = self._of_groups(np.asarray(self.codes[2]))
        step = jnp.maximum(step, jnp.where(size > 2, 1.0, of_two))
        return lsq.nearest_power_of_two(step) if self.adc.step == StepKind.POWER_OF_TWO else step

    def keep_better(self, best: _Ladder, step: Array, offset: Array) -> _Ladder:
        """The better of two ladders, for every group."""
        step_of, offset_of = self.grouping.expand(step), self.grouping.expand(offset)
        rounded = lsq.fake_quantize(self.values, step_of, self.codes, offset_of, half_up=True)
        error = self.total(self.weight * jnp.square(rounded - self.values))
        better = error < best.error
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), _Ladder(error, step, offset), best)

    def of_magnitude(self, start: _Ladder) -> _Ladder:
        """LSQ's rule for real numbers, `2 mean|P| / sqrt(q)`, code 0 at 0 (Esser et al. 2020, section 2.1); `mean|P|`
        for {-1, +1}, whose levels are where the codes are."""
        count = self.total(jnp.ones_like(self.values))
        mean = self.total(jnp.abs(self.values)) / count
        size = self._of_groups(np.asarray(self.codes[2]))
        factor = jnp.where(CodeRange(self.lowest, self.highest, size).binary, 1.0, 2.0)
        return start._replace(step=self.allowed(factor * mean / jnp.sqrt(jnp.maximum(-self.lowest, self.highest))))

    def covering(self, start: _Ladder, part: float = 1.0) -> _Ladder:
        """The ladder whose lowest and highest code just reach the extremes, without the outermost ones on either side
        if only a `part` of the partial sums shall lie inside."""
        if not self.adc.offset:
            return start._replace(step=self.allowed(self._reach(part)))
        low, high = -self._largest(-self.values, part), self._largest(self.values, part)
        step = self.allowed((high - low) / (self.highest - self.lowest))
        return start._replace(step=step, offset=low - step * self.lowest)

    def _reach(self, part: float = 1.0) -> Array:
        """The step at which the highest and the lowest code just reach the extremes, code 0 at 0."""
        below = jnp.where(self.q_min < 0, self.values / np.minimum(self.q_min, -1), 0.0)
        return self._largest(jnp.maximum(self.values / self.q_max, below), part)

    def _largest(self, values: Array, part: float = 1.0) -> Array:
        """The largest value of each group, or the one that a `part` of them does not exceed."""
        if part == 1.0:
            return self.grouping.largest(jnp.max(values, axis=(0, 1)))
        return quantile(values, part, self.grouping.expand, self.total, jnp.float32(1))

    def search(self, start: _Ladder) -> _Ladder:
        """The best step of the grid, code 0 at 0."""
        covering = self._reach()

        def visit(best: _Ladder, scale: Array) -> tuple[_Ladder, None]:
            return self.keep_better(best, self.allowed(covering * scale), start.offset), None

        return jax.lax.scan(visit, start, jnp.asarray(SCALES, jnp.float32))[0]

    def search_with_offset(self, start: _Ladder) -> _Ladder:
        """The best step and ladder position of the grid."""
        # With an offset the codes of a group are all the same.
        reach, middle = self.highest - self.lowest, (self.highest + self.lowest) / 2
        low, high = -self._largest(-self.values), self._largest(self.values)
        mass = self.total(self.weight)
        mean = self.total(self.weight * self.values) / mass
        spread = jnp.sqrt(self.total(self.weight * jnp.square(self.values - self.grouping.expand(mean))) / mass)

        def visit(best: _Ladder, candidate: tuple[Array, Array, Array]) -> tuple[_Ladder, None]:
            scale, place, is_across = candidate
            step = self.allowed((high - low) / reach * scale)
            half = step * reach / 2
            centre = jnp.where(is_across, low + half + place * (high - low - 2 * half), mean + place * spread)
            return self.keep_better(best, step, centre - step * middle), None

        places = [(place, True) for place in ACROSS] + [(place, False) for place in AROUND]
        grid = [(scale, *place) for scale, place in itertools.product(SCALES, places)]
        scales, positions, across = zip(*grid, strict=True)
        candidates = jnp.asarray(scales, jnp.float32), jnp.asarray(positions, jnp.float32), jnp.asarray(across)
        return jax.lax.scan(visit, start, candidates)[0]

    def refine(self, best: _Ladder) -> _Ladder:
        """The ladder that fits the present codes best (linear regression of values on codes), if it is better."""
        expand = self.grouping.expand
        p = lsq.quantize(self.values, expand(best.step), self.codes, expand(best.offset), half_up=True)
        if not self.adc.offset:
            slope = self.total(self.weight * p * self.values) / self.total(self.weight * jnp.square(p))
            return self.keep_better(best, self.allowed(jnp.where(jnp.isfinite(slope), slope, best.step)), best.offset)
        mass = self.total(self.weight)
        mean_code, mean_value = self.total(self.weight * p) / mass, self.total(self.weight * self.values) / mass
        from_mean = p - expand(mean_code)
        slope = self.total(self.weight * from_mean * self.values) / self.total(self.weight * jnp.square(from_mean))
        step = self.allowed(jnp.where(jnp.isfinite(slope), slope, best.step))
        return self.keep_better(best, step, mean_value - step * mean_code)
