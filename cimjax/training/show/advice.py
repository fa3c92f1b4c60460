"""What a user should know of a run, one line each; a line advises only what the layers that it is about can do.

What is measured comes from `cimjax.training.metrics`; `cimjax.training.show.display` prints the lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cimjax.hardware.survey import Layer
from cimjax.nn.rules import Rules, rules_without_layer
from cimjax.spec import ADCSpec, StepKind

# When to say so: conversions beyond the ladder, codes that columns give, and movement of steps over a whole run.
SATURATED = 0.2
CODES_USED = 0.5
MOVED = 1e-3
# When to name the better cut: it needs at most this part of the reads.
FEWER_READS = 0.75


def before_training(layers: Sequence[Layer]) -> list[str]:
    """What the layers of a network waste, or have against their purpose, known without any data."""
    return [*_idle_rows(layers), *_offsets_of_fixed_adcs(layers)]


def on_rules(rules: Rules, layers: Sequence[Layer]) -> list[str]:
    """Rules that change no layer, as those do in which a path is misspelt."""
    names = [layer.name for layer in layers]
    return [
        f"`rules` has the pattern {pattern!r}, which names no layer that is left to it; the layers are "
        f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
        for pattern in rules_without_layer(rules, names)
    ]


def _idle_rows(layers: Sequence[Layer]) -> list[str]:
    """Conversions that read far fewer rows than they may, and what would use more."""

    def wasted(layer: Layer) -> tuple[Any, ...] | None:
        cost = layer.cost
        if layer.spec is None or cost is None or cost.fewest_read_groups > FEWER_READS * cost.read_groups:
            return None
        return cost.rows_driven, cost.rows_per_read, layer.spec.array.tiling

    lines = []
    for (driven, allowed, tiling), some in _grouped(layers, wasted).items():
        costs = [layer.cost for layer in some if layer.cost is not None]
        now, fewest = sum(cost.read_groups for cost in costs), sum(cost.fewest_read_groups for cost in costs)
        lines.append(
            f"{_named(some)}: a conversion drives {driven} of the {allowed} rows that it may, because tiling={tiling} "
            f"keeps kernels whole; with tiling=im2col columns would be read {fewest} times instead of {now}."
        )
    return lines


def _offsets_of_fixed_adcs(layers: Sequence[Layer]) -> list[str]:
    """Fixed ADCs that need another reference in every column after all."""

    def trouble(layer: Layer) -> ADCSpec | None:
        adc = None if layer.spec is None else layer.spec.adc
        return adc if adc is not None and adc.step == StepKind.FIXED and adc.offset else None

    return [
        f"{_named(some)}: the ADC's step is fixed, but every {adc.granularity} has an offset of its own, set from "
        "data; offset=false takes it away."
        for adc, some in _grouped(layers, trouble).items()
    ]


def adcs_on(layers: Sequence[Layer]) -> str:
    """What happens to ADCs when they replace ideal ones: what of them is set from data."""
    adcs = {layer.spec.adc for layer in layers if layer.spec is not None and layer.spec.adc is not None}
    fixed = [adc for adc in adcs if adc.step == StepKind.FIXED]
    if not fixed:
        what = "their steps set from data"
    elif len(fixed) < len(adcs):
        what = "their steps set from data where they are not fixed"
    elif any(adc.offset for adc in fixed):
        what = "their steps fixed and their offsets set from data"
    else:
        what = "their steps fixed"
    return f"ADCs on, {what}; until here they were ideal."


def on_adcs(health: Mapping[str, Mapping[str, float]], layers: Iterable[Layer]) -> list[str]:
    """Saturated ADCs and unused codes.

    Args:
      health: from `metrics.health_by_layer`.
      layers: the network's.
    """
    lines = []
    for layer in layers:
        of, adc = health.get(layer.name), None if layer.spec is None else layer.spec.adc
        if of is None or adc is None or layer.spec is None:
            continue
        codes = layer.spec.adc_codes
        if of["saturated"] > SATURATED:
            advice = _about_full_scale("raise", adc)
            lines.append(f"{layer.name}: {of['saturated']:.0%} of the conversions lie beyond the ADC's ladder{advice}.")
        if of["codes_used"] < CODES_USED * codes:
            advice = _about_full_scale("lower", adc)
            used = f"{of['codes_used']:.1f} of the ADC's {codes} codes"
            lines.append(f"{layer.name}: a column uses {used} on average{advice}.")
    return lines


def on_steps(moved: Mapping[str, float]) -> list[str]:
    """Kinds of steps that hardly moved.

    Args:
      moved: from `metrics.mean_movement`, of kinds that training moves and that had the time to.
    """
    return [
        f"{name.removesuffix('_moved')} steps moved by {distance:.1e} only (mean |log(s/s0)|): raise "
        "optimizer.step_factor."
        for name, distance in moved.items()
        if distance < MOVED
    ]


def _about_full_scale(change: str, adc: ADCSpec) -> str:
    """What can be done about a ladder that nothing but its user moves."""
    return f"; {change} full_scale, now {adc.full_scale:g}" if adc.step == StepKind.FIXED else ""


def _grouped(layers: Sequence[Layer], key: Callable[[Layer], Any]) -> dict[Any, list[Layer]]:
    """Layers by what is to be said of them; without those of which there is nothing (None)."""
    groups: dict[Any, list[Layer]] = {}
    for layer in layers:
        if (about := key(layer)) is not None:
            groups.setdefault(about, []).append(layer)
    return groups


def _named(layers: Sequence[Layer], most: int = 3) -> str:
    names = ", ".join(layer.name for layer in layers[:most])
    return f"{names} and {len(layers) - most} more" if len(layers) > most else names
