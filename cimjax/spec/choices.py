"""The choices that specifications offer, by the words that users type."""

from __future__ import annotations

import enum


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


class StartRule(enum.StrEnum):
    """How a step starts from data: the value of an activation's or a weight's step, or an ADC's ladder."""

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
