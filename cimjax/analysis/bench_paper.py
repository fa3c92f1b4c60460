"""What a training step takes on paper: arithmetic, traffic of the device's memory, and what binds several devices.

Nothing is computed: layers are looked up in the traced network, and each part of a step takes as long as its arithmetic
or its traffic, whichever is longer. That is a lower bound: it knows of no kernel's start, no bad layout and no idle
unit. docs/scale.md says by how much measured steps are longer.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cimjax.analysis.studies.output import markdown
from cimjax.core.encoding import plane_gradient_weights
from cimjax.core.programs.contract import built_in
from cimjax.core.programs.joined import has_one_gradient, is_loop
from cimjax.hardware.survey import Layer
from cimjax.spec import CIMSpec, Execution, Operands, Product


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A device, and what it is connected by; peaks, which no program reaches.

    bfloat16, tf32, float32: FLOP/s of dense products.
    memory: bytes/s.
    link: bytes/s in each direction to the other devices of its machine.
    network: bytes/s in each direction of a machine to others.
    in_machine: devices of a machine.
    """

    name: str
    bfloat16: float
    tf32: float
    float32: float
    memory: float
    link: float
    network: float
    in_machine: int


# NVIDIA's data sheet of the H100 SXM (without sparsity); one port of 400 Gb/s for each machine, where many have more.
H100 = Accelerator("H100 SXM", 989e12, 495e12, 67e12, 3.35e12, 450e9, 50e9, 8)
# Images/s of one core through the whole pipeline, as docs/scale.md measured it.
IMAGES_PER_CORE = 221.0
# Bytes of an image's element that cross the memory besides products: a normalisation and a nonlinearity behind each
# layer (forwards read for the statistics, read, written; back both gradient and input read twice, and one written).
_NORMALISED = 12 + 20
# The same of a quantizer of activations: read and written as codes twice (to drive, and to keep); back the gradient and
# the input read, the gradient written.
_QUANTIZED = 4 + 2 + 1 + 12
# Bytes of a parameter in a step: read twice, its gradient written and read, momentum and parameter read and written.
_UPDATED = 8 + 8 + 16


class Part(NamedTuple):
    """A part of a step, for one image: its FLOP by the type that is multiplied, and the bytes of memory it reads and
    writes."""

    name: str
    bfloat16: float = 0.0
    tf32: float = 0.0
    float32: float = 0.0
    memory: float = 0.0

    def seconds(self, device: Accelerator) -> float:
        """How long it takes at least."""
        arithmetic = self.bfloat16 / device.bfloat16 + self.tf32 / device.tf32 + self.float32 / device.float32
        return max(arithmetic, self.memory / device.memory)


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step of a network on paper.

    parts: of all layers, for one image.
    parameters: weights and biases, which a step reads and updates once, whatever the batch.
    psums: partial sums of an image.
    batch: images of a device.
    """

    name: str
    parts: tuple[Part, ...]
    parameters: int
    psums: int
    batch: int

    def total(self, name: str) -> float:
        """FLOP or bytes of an image, by a field of `Part`."""
        return sum(getattr(part, name) for part in self.parts)

    def traffic_of(self, *names: str) -> float:
        """Bytes of an image in parts of these names."""
        return sum(part.memory for part in self.parts if part.name in names)

    def seconds(self, device: Accelerator) -> float:
        """How long a step takes at least on one device."""
        update = _UPDATED * self.parameters / device.memory
        return self.batch * sum(part.seconds(device) for part in self.parts) + update

    def share_of(self, device: Accelerator, *names: str) -> float:
        """The part of a step that is spent in parts of these names, 0 to 1."""
        spent = sum(part.seconds(device) for part in self.parts if part.name in names)
        return self.batch * spent / self.seconds(device)

    def all_reduce_seconds(self, device: Accelerator, count: int) -> float:
        """How long the mean of float32 gradients over so many devices takes at least.

        In rings: each device sends and receives `2 (n - 1) / n` of all bytes in its machine, and so does each machine.
        """
        size, inside = 4 * self.parameters, min(count, device.in_machine)
        machines = -(-count // device.in_machine)
        within = 2 * (inside - 1) / inside * size / device.link
        return within + 2 * (machines - 1) / machines * size / device.network


PRODUCT, PSUMS, TO_INPUTS, TO_WEIGHTS, REST = (
    "products forwards",
    "partial sums through ADCs",
    "gradients to inputs",
    "gradients to weights",
    "normalisation and the rest",
)


def step_of(name: str, layers: Sequence[Layer], batch: int) -> Step:
    """A training step of a network of these layers, the first of which has no gradient to its input."""
    parts: list[Part] = []
    psums = 0
    for number, layer in enumerate(layers):
        of_layer = _in_full_precision(layer) if layer.spec is None else _in_arrays(layer, layer.spec)
        parts += [part for part in of_layer if number or part.name != TO_INPUTS]
        psums += 0 if layer.spec is None else _psums(layer, layer.spec)
    return Step(name, tuple(parts), sum(layer.parameters for layer in layers), psums, batch)


def _sizes(layer: Layer) -> tuple[int, int, int]:
    """Of an image: multiplications, elements of the input, and of the output, all copies together."""
    positions = layer.copies * math.prod(layer.output)
    outputs = positions * layer.kernel[-1]
    return positions * math.prod(layer.kernel), layer.copies * math.prod(layer.input), outputs


def _in_full_precision(layer: Layer) -> list[Part]:
    """Products of float32 numbers, for which XLA takes TF32 on a GPU unless told otherwise."""
    products, inputs, outputs = _sizes(layer)
    each = Part(PRODUCT, tf32=2 * products, memory=4 * (inputs + outputs))
    rest = _NORMALISED * outputs if layer.output else 0
    return [each, each._replace(name=TO_INPUTS), each._replace(name=TO_WEIGHTS), Part(REST, memory=rest)]


def _psums(layer: Layer, spec: CIMSpec) -> int:
    if spec.adc is None:
        return 0
    planes, slices = len(spec.weight.planes), len(spec.activation.slices)
    _, _, outputs = _sizes(layer)
    groups = 1 if layer.cost is None else layer.cost.read_groups
    return outputs * groups * planes * slices


def _in_arrays(layer: Layer, spec: CIMSpec) -> list[Part]:
    """A layer as `core.programs.joined` computes it: products of codes in the type in which they are exact, gradients
    in float32, one weight gradient for all planes of a sign; layers of many read groups as a loop, whose products are
    computed again and write what each position sees. Without ADCs it is one convolution in float32."""
    products, inputs, outputs = _sizes(layer)
    rest = Part(REST, memory=_QUANTIZED * inputs + (_NORMALISED * outputs if layer.output else 0))
    if spec.adc is None:
        each = Part(PRODUCT, float32=2 * products, memory=4 * (inputs + outputs))
        return [each, each._replace(name=TO_INPUTS), each._replace(name=TO_WEIGHTS), rest]
    planes, slices = len(spec.weight.planes), len(spec.activation.slices)
    one_gradient = has_one_gradient(spec)
    mixed = len(plane_gradient_weights(spec.weight)) if one_gradient else planes
    psums, execution = _psums(layer, spec), layer.execution
    loop = layer.cost is not None and is_loop(execution, layer.cost.read_groups)
    # What each position sees, written and read, besides the inputs themselves.
    patches = loop or execution.product == Product.PATCHES
    seen = 2 * slices * products // layer.kernel[-1] if patches else 0
    cheap = _operands(spec, execution) != Operands.FLOAT32
    flop, size = 2.0 * products * planes * slices, 2 if cheap else 4
    forwards = Part(PRODUCT, memory=size * (slices * inputs + seen) + 4 * psums)
    forwards = forwards._replace(bfloat16=flop) if cheap else forwards._replace(float32=flop)
    # Forwards read, and kept as 16 bits; back read twice, and the gradient to each written and read once for the sums.
    through = Part(PSUMS, memory=(4 + 2 + 2 + 4 + 2 + 4) * psums + 4 * 2 * outputs)
    mixing = 4 * psums + 8 * psums * mixed / planes if one_gradient else 4 * psums
    back = 4 * (slices * inputs + seen)
    return [
        forwards,
        *([forwards] if loop else []),
        through,
        Part(TO_INPUTS, float32=flop, memory=back + 4 * psums),
        Part(TO_WEIGHTS, float32=2.0 * products * mixed * slices, memory=back + mixing),
        rest,
    ]


def _operands(spec: CIMSpec, execution: Execution) -> Operands:
    return built_in(spec, cpu=False).operands if execution.operands == Operands.AUTO else execution.operands


def show_steps(steps: Sequence[Step], device: Accelerator) -> str:
    """What a step takes on one device, as text (Markdown)."""
    head = ["of an image", *(step.name for step in steps)]
    rows = [
        ["GFLOP in bfloat16", *(f"{step.total('bfloat16') / 1e9:.2f}" for step in steps)],
        ["GFLOP in TF32", *(f"{step.total('tf32') / 1e9:.2f}" for step in steps)],
        ["GFLOP in float32", *(f"{step.total('float32') / 1e9:.2f}" for step in steps)],
        ["partial sums, million", *(f"{step.psums / 1e6:.2f}" for step in steps)],
        ["memory traffic, MB", *(f"{step.total('memory') / 1e6:,.0f}" for step in steps)],
    ]
    rows += [[f"{name}, MB", *(f"{step.traffic_of(name) / 1e6:,.0f}" for step in steps)] for name in _NAMES]
    rows += [[f"{name}, % of a step", *(f"{step.share_of(device, name):.0%}" for step in steps)] for name in _NAMES]
    rows += [
        [f"step of {steps[0].batch} images, ms, at least", *(f"{1e3 * step.seconds(device):.2f}" for step in steps)],
        ["images/s, at most", *(f"{step.batch / step.seconds(device):,.0f}" for step in steps)],
    ]
    return markdown(head, rows)


_NAMES = (PRODUCT, PSUMS, TO_INPUTS, TO_WEIGHTS, REST)


def show_devices(steps: Sequence[Step], device: Accelerator, counts: Sequence[int], *, from_files: bool) -> str:
    """What several devices do, as text (Markdown); gradients are added up when all are there.

    Args:
      from_files: whether images are decoded while the network trains: then also how many cores feed the devices.
    """
    head = ["", "devices", "images/s, at most", "MB of gradients", "their mean, ms", "% of a step"]
    rows = []
    for step, count in itertools.product(steps, counts):
        mean = step.all_reduce_seconds(device, count)
        seconds = step.seconds(device) + mean
        rate = count * step.batch / seconds
        cells = [f"{4 * step.parameters / 1e6:.0f}", f"{1e3 * mean:.2f}", f"{mean / seconds:.1%}"]
        cores = [f"{math.ceil(rate / IMAGES_PER_CORE):,}"] if from_files else []
        rows.append([step.name, str(count), f"{rate:,.0f}", *cells, *cores])
    return markdown([*head, "cores to feed them"] if from_files else head, rows)


def assumptions(device: Accelerator) -> str:
    """One line: the peaks that a step is held against."""
    return (
        f"{device.name}: {device.bfloat16 / 1e12:.0f} TFLOP/s bfloat16, {device.tf32 / 1e12:.0f} TF32, "
        f"{device.float32 / 1e12:.0f} float32, {device.memory / 1e12:.2f} TB/s; {device.link / 1e9:.0f} GB/s within a "
        f"machine of {device.in_machine}, {device.network / 1e9:.0f} GB/s between machines; a core feeds "
        f"{IMAGES_PER_CORE:.0f} images/s"
    )


def save(steps: Sequence[Step], device: Accelerator, path: str | Path) -> None:
    """Write all figures as JSON."""
    rows: list[dict[str, Any]] = [
        {
            **dataclasses.asdict(step),
            "parts": [part._asdict() for part in step.parts],
            "seconds": step.seconds(device),
        }
        for step in steps
    ]
    Path(path).write_text(json.dumps({"device": dataclasses.asdict(device), "steps": rows}, indent=1) + "\n")
