"""What is shown before and after a run, as text for the display."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cimjax.core.programs import contract
from cimjax.hardware.survey import Layer
from cimjax.hardware.table import Column, TextTable, show
from cimjax.spec import Program
from cimjax.spec.words import describe_specs
from cimjax.training.experiment import Experiment

if TYPE_CHECKING:
    from cimjax.training.result import Result


def describe_run(experiment: Experiment) -> dict[str, Any]:
    """Title and facts of a run, as `Display.start` takes them."""
    data, config, devices = experiment.dataset, experiment.config, experiment.devices
    parameters = sum(layer.parameters for layer in experiment.layers)
    shape = " x ".join(str(size) for size in data.image_shape)
    specs, optimizer = list(experiment.specs.values()), config.optimizer
    return {
        "title": f"{type(experiment.model).__name__} on {data.name}, {describe_specs(specs)}",
        "facts": {
            "data": f"{len(data.train):,} training and {len(data.test):,} test images, {shape}, {data.classes} classes",
            "training": f"{_counted(config.epochs, 'epoch')}, {_counted(experiment.total_steps, 'step')} of "
            f"{_counted(config.batch_size, 'image')}, "
            + (f"{optimizer.name} at {optimizer.learning_rate:g}" if experiment.schedule else "an optimizer of its own")
            + _with_ideal_adcs(experiment.ideal_epochs),
            "network": f"{parameters:,} weights in {len(experiment.layers)} layers",
            "devices": f"{devices.count} x {devices.platform}"
            + (f" ({devices.kind})" if devices.kind != "cpu" else "")
            + (f" in {devices.processes.count} processes" if devices.processes.count > 1 else ""),
            **_programs(experiment),
        },
    }


def _programs(experiment: Experiment) -> dict[str, str]:
    """For how many layers of a training step a table of this device chooses the program, or that kernels for GPUs are
    interpreted; otherwise nothing."""
    config, devices = experiment.config, experiment.devices
    asked = {layer.execution.program for layer in experiment.layers if layer.spec is not None}
    if devices.platform == "cpu" and Program.PALLAS in asked:
        return {"programs": "kernels for GPUs, which a CPU interprets for tests, very slowly; program='auto' is fast"}
    images = config.batch_size // devices.count // config.optimizer.accumulate
    layers = [layer.behind_seam(images) for layer in experiment.layers if layer.spec is not None]
    changed = sum(contract.tuned(layer, shape) != layer.execution for layer, shape in layers)
    return {"programs": f"tuned for {devices.kind}, {changed} of {len(layers)} array layers"} if changed else {}


def _counted(number: float, what: str) -> str:
    return f"{number:,.10g} {what}{'' if number == 1 else 's'}"


def _with_ideal_adcs(epochs: int) -> str:
    first = "the first epoch" if epochs == 1 else f"the first {epochs} epochs"
    return f", {first} with ideal ADCs" if epochs else ""


def step_table(
    layers: Sequence[Layer], moved: Mapping[str, Mapping[str, float]], usage: Mapping[str, Mapping[str, float]]
) -> TextTable:
    """How far steps moved, and how ADCs fare, in each array layer.

    Args:
      layers: the network's.
      moved: from `metrics.movement`.
      usage: from `metrics.adc_usage_by_layer`.
    """
    meanings = {"offset": "mean move of the ladder's middle, in about its first step"}
    columns = [
        Column("layer", 0),
        *(Column(f"{kind}\nmoved", 3, meanings.get(kind, "mean |log(s/s0)|, 0.01 is 1 %")) for kind in moved),
        Column("saturated", 1, "conversions beyond the ADC's outer codes"),
        Column("codes\nused", 0, "codes that a column gives, on average"),
    ]
    rows = []
    for layer in layers:
        if layer.spec is None:
            continue
        row = {"layer": layer.name}
        row |= {f"{kind}\nmoved": show(by[layer.name]) for kind, by in moved.items() if layer.name in by}
        if adcs := usage.get(layer.name):
            row["saturated"] = show(adcs["saturated"], ".1%")
            row["codes\nused"] = f"{show(adcs['codes_used'])} of {layer.spec.adc_codes}"
        rows.append(row)
    return TextTable(columns, rows, {})


def final_rows(result: Result, *, own: bool) -> dict[str, str]:
    """What a run came to, in words; `own` when its network or images are the caller's, which no command knows."""
    folder = str(result.workdir)
    again = f"cimjax.load({folder!r}, model=..., dataset=...)" if own else f"cimjax evaluate {shlex.quote(folder)}"
    moved = ", ".join(f"{name.removesuffix('_moved')} {show(distance)}" for name, distance in result.moved.items())
    rows = {**({"steps moved": moved} if moved else {}), "run folder": folder, "again": again}
    if "fresh_chips" in result.more:
        mean, spread = result.more["fresh_chips"], result.more["fresh_chips_spread"]
        rows["on fresh chips"] = f"{mean:.2%} ± {spread:.2%}"
    for name, text in {"average_accuracy": "averaged parameters", "best_accuracy": "best on held-out images"}.items():
        if name in result.more:
            rows[text] = f"{result.more[name]:.2%}"
    return {**rows, "test accuracy": f"{result.accuracy:.2%}"}
