"""Specifications in a few words, for titles and tables."""

from __future__ import annotations

import collections
from collections.abc import Collection

from cimjax.spec.choices import StepKind
from cimjax.spec.layer import CIMSpec


def describe_specs(specs: Collection[CIMSpec]) -> str:
    """The specifications of all array layers in a few words: the most frequent one, and how many others there are."""
    if not specs:
        return "full precision"
    (most, times), *_ = collections.Counter(specs).most_common(1)
    others = len(specs) - times
    more = f", {others} {'layer' if others == 1 else 'layers'} otherwise" if others else ""
    return f"{describe_spec(most)}{more}"


def describe_spec(spec: CIMSpec) -> str:
    """A specification in a few words: "weights column, psums column, A3 W3/1 P3"."""
    if spec.adc is None:
        psums = "ideal ADC"
    elif spec.adc.step == StepKind.FIXED:
        psums = f"psums fixed to {spec.adc.full_scale:g}"
    else:
        psums = f"psums {spec.adc.granularity}"
    return f"weights {spec.weight.granularity}, {psums}, {describe_bits(spec)}"


def describe_bits(spec: CIMSpec) -> str:
    """Bits of activations (per slice if there are several), weights (per cell) and partial sums: "A4/1 W3/1 P3"."""
    activation = f"A{spec.activation.bits:g}"
    if len(spec.activation.slices) > 1:
        activation = f"{activation}/{spec.activation.slice_bits}"
    own = [] if spec.adc is None else spec.adc.plane_bits or [spec.adc.bits]
    psum = f"P{'/'.join(f'{bits:g}' for bits in own) or '-'}"
    return f"{activation} W{spec.weight.bits:g}/{spec.weight.cell_bits} {psum}"
