"""What is unwise in a network's design for a chip, known without any data: one line each, with what would be better."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cimjax.hardware.survey import Layer
from cimjax.spec import ADCSpec, StepKind

# When to name the better cut: it needs at most this part of the reads.
FEWER_READS = 0.75


def on_design(layers: Sequence[Layer]) -> list[str]:
    """What the layers of a network waste, or have against their purpose."""
    return [*_idle_rows(layers), *_offsets_of_fixed_adcs(layers)]


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
