"""What a user should know of a run, one line each; a line advises only what the layers that it is about can do.

What is measured comes from `cimjax.training.metrics`; `cimjax.training.show.display` prints the lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cimjax.hardware.survey import Layer
from cimjax.spec import ADCSpec, StepKind

# When to say so: conversions beyond the ladder, codes that columns give, and movement of steps over a whole run.
SATURATED = 0.2
CODES_USED = 0.5
MOVED = 1e-3


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


def on_adcs(usage: Mapping[str, Mapping[str, float]], layers: Iterable[Layer]) -> list[str]:
    """Saturated ADCs and unused codes.

    Args:
      usage: from `metrics.adc_usage_by_layer`.
      layers: the network's.
    """
    lines = []
    for layer in layers:
        used, adc = usage.get(layer.name), None if layer.spec is None else layer.spec.adc
        if used is None or adc is None or layer.spec is None:
            continue
        codes = layer.spec.adc_codes
        if used["saturated"] > SATURATED:
            advice = _about_full_scale("raise", adc)
            lines.append(
                f"{layer.name}: {used['saturated']:.0%} of the conversions lie beyond the ADC's ladder{advice}."
            )
        if used["codes_used"] < CODES_USED * codes:
            advice = _about_full_scale("lower", adc)
            given = f"{used['codes_used']:.1f} of the ADC's {codes} codes"
            lines.append(f"{layer.name}: a column uses {given} on average{advice}.")
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
