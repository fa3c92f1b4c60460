"""What is shown of a run, as rows of plain data for the display."""

from __future__ import annotations

import collections
import shlex
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from cimjax.core.programs import contract
from cimjax.hardware.survey import Layer
from cimjax.spec import CIMSpec, StepKind
from cimjax.training.experiment import Experiment
from cimjax.training.show.tables import LayerRow

if TYPE_CHECKING:
    from cimjax.training.train import Result


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
            + (f" ({devices.kind})" if devices.kind != "cpu" else ""),
            **_programs(experiment),
        },
    }


def _programs(experiment: Experiment) -> dict[str, str]:
    """For how many layers of a training step a table of this device chooses the program; nothing where it does not."""
    config, devices = experiment.config, experiment.devices
    images = config.batch_size // devices.count // config.optimizer.accumulate
    layers = [layer.behind_seam(images) for layer in experiment.layers if layer.spec is not None]
    changed = sum(contract.tuned(layer, shape) != layer.execution for layer, shape in layers)
    return {"programs": f"tuned for {devices.kind}, {changed} of {len(layers)} array layers"} if changed else {}


def _counted(number: float, what: str) -> str:
    return f"{number:,.10g} {what}{'' if number == 1 else 's'}"


def _with_ideal_adcs(epochs: int) -> str:
    first = "the first epoch" if epochs == 1 else f"the first {epochs} epochs"
    return f", {first} with ideal ADCs" if epochs else ""


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
    psum = "P-" if spec.adc is None else f"P{spec.adc.bits:g}"
    return f"{activation} W{spec.weight.bits:g}/{spec.weight.cell_bits} {psum}"


def layer_rows(layers: Sequence[Layer]) -> list[LayerRow]:
    """The rows of the table before training."""
    return [
        LayerRow(
            name=layer.name,
            kind="full precision" if layer.spec is None else "cim",
            kernel=layer.kernel,
            output=layer.output,
            bits="-" if layer.spec is None else describe_bits(layer.spec),
            cost=layer.cost,
            parameters=layer.parameters,
            copies=layer.copies,
        )
        for layer in layers
    ]


def step_rows(
    experiment: Experiment, moved: dict[str, dict[str, float]], health: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    """The rows of the table after training: how far steps moved, and how ADCs fare, for each array layer."""
    rows = []
    for layer in experiment.layers:
        if layer.spec is None:
            continue
        drift = {kind: layers[layer.name] for kind, layers in moved.items() if layer.name in layers}
        of = health.get(layer.name, {})
        codes = experiment.codes.get(layer.name)
        rows.append({"layer": layer.name, "drift": drift, "codes": codes, **of})
    return rows


def final_rows(result: Result, *, own: bool) -> dict[str, str]:
    """What a run came to, in words; `own` when its network or images are the caller's, which no command knows."""
    folder = str(result.workdir)
    again = f"cimjax.load({folder!r}, model=..., dataset=...)" if own else f"cimjax evaluate {shlex.quote(folder)}"
    rows = {"run folder": folder, "again": again}
    if "fresh_chips" in result.more:
        mean, spread = result.more["fresh_chips"], result.more["fresh_chips_spread"]
        rows["on fresh chips"] = f"{mean:.2%} ± {spread:.2%}"
    for name, text in {"average_accuracy": "averaged parameters", "best_accuracy": "best on held-out images"}.items():
        if name in result.more:
            rows[text] = f"{result.more[name]:.2%}"
    return {**rows, "test accuracy": f"{result.accuracy:.2%}"}
