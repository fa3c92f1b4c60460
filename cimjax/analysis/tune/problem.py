"""What is timed: the layers of a network, the executions that may compute them, and the numbers that go in.

What comes out of two executions is compared here, too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from cimjax.core import step_sizes as steps_lib
from cimjax.core.programs import contract, tuning
from cimjax.core.programs.joined import is_loop
from cimjax.core.programs.platforms import runs_on
from cimjax.core.programs.products import PRODUCTS
from cimjax.core.step_sizes import StepSizes
from cimjax.core.window import output_size
from cimjax.data.dataset import Description
from cimjax.data.loading import shape_and_classes
from cimjax.spec import Execution, Operands, Program
from cimjax.training.experiment import build, view_of

# How far results may be from those of the built-in choice, relative to the terms that they add up: as in the tests of
# the contract.
TOLERANCE = 1e-5


class Problem(NamedTuple):
    """A layer to be timed.

    names: of the network's layers that it stands for.
    kernel: its shape, (kh, kw, C, O).
    input: the shape of its input, (N, H, W, C).
    layer: what the contract sees.
    """

    names: tuple[str, ...]
    kernel: tuple[int, ...]
    input: tuple[int, ...]
    layer: contract.Layer

    @property
    def key(self) -> str:
        """Its key in a table."""
        return tuning.key(self.layer.tiling, self.layer.window, self.layer.spec, self.input)

    @property
    def title(self) -> str:
        """The layer in a few words: "3x3/2 16-32, 32x32"; "ideal" without its ADC."""
        *size, channels, features = self.kernel
        stride = max(self.layer.window.strides, default=1)
        window = "x".join(map(str, size)) + (f"/{stride}" if stride > 1 else "")
        words = [f"{window} {channels}-{features}".strip(), "x".join(map(str, self.input[1:-1]))]
        return ", ".join(filter(None, [*words, "" if self.layer.spec.adc else "ideal"]))


def find_problems(config: ConfigDict, batch: int = 0) -> dict[str, Problem]:
    """The distinct layers in arrays of the network that a configuration describes, by their key in the table.

    Args:
      config: its data is not needed; with epochs of ideal ADCs each layer is there without its ADC, too.
      batch: images that a device computes at once; those of the configuration's training step if 0.
    """
    image, classes = shape_and_classes(config.dataset, config.data_dir or None, view=view_of(config))
    grey = (0.5,) * image[-1]
    data = Description(
        name=config.dataset,
        classes=config.subset.classes or classes,
        image_shape=image,
        mean=grey,
        std=grey,
        images=config.batch_size,
    )
    experiment = build(config, dataset=data, to_train=False)
    batch = batch or max(1, config.batch_size // experiment.devices.count // config.optimizer.accumulate)
    found: dict[str, Problem] = {}
    for one in experiment.layers:
        if one.spec is None:
            continue
        layer, shape = one.behind_seam(batch)
        specs = [one.spec, dataclasses.replace(one.spec, adc=None)] if experiment.ideal_epochs else [one.spec]
        for spec in specs:
            problem = Problem((one.name,), one.kernel, shape, layer._replace(spec=spec))
            names = found[problem.key].names if problem.key in found else ()
            found[problem.key] = problem._replace(names=(*names, one.name))
    return found


def executions(layer: contract.Layer, *, everything: bool = False) -> list[Execution]:
    """All that may compute a layer on this device, with their fields named; what is built in comes first.

    Args:
      everything: the definition, too.
    """
    spec, built_in = layer.spec, contract.built_in(layer.spec, cpu=runs_on("cpu"))
    operands = [one for one in Operands if one != Operands.AUTO and contract.exact_in(spec, one)]
    # A loop over read groups has a product of its own; without ADCs there is neither, and one type of operands.
    loop = spec.adc is not None and is_loop(Execution(), layer.tiling.groups)
    products = [built_in.product] if loop else list(PRODUCTS)
    of_products = operands if spec.adc is not None else [Operands.FLOAT32]
    found = [dataclasses.replace(built_in, product=row, operands=one) for row in products for one in of_products]
    kernels = [Execution(program=Program.PALLAS, operands=one) for one in operands]
    if runs_on("gpu", "cuda", "rocm"):
        found += kernels
    if everything:
        found.append(Execution(program=Program.REFERENCE))
    first = next((one for one in kernels if one.operands == Operands.BFLOAT16 and contract.fuses(layer)), built_in)
    return sorted(found, key=lambda one: one != first)


def draw(problem: Problem) -> tuple[Any, ...]:
    """Random input, kernel, steps and gradient of the output, such that ADCs are used as they are in training; NumPy
    arrays, float32."""
    spec, tiling = problem.layer.spec, problem.layer.tiling
    rng = np.random.default_rng(0)
    size = output_size(problem.input[1:-1], tiling.kernel_size, problem.layer.window)
    x, kernel = (rng.normal(size=shape).astype(np.float32) for shape in (problem.input, problem.kernel))
    cotangent = rng.normal(size=(problem.input[0], *size, tiling.features)).astype(np.float32)
    digit = max(plane.magnitude for plane in spec.weight.planes)
    psum = np.sqrt(tiling.rows_of_group.mean()) * max(part.magnitude for part in spec.activation.slices) * digit
    psum = psum / max(codes.magnitude for row in spec.adc_ranges for codes in row) if spec.adc else 1.0
    typical = StepSizes(
        activation=1.5 / spec.activation.code_range.magnitude,
        weight=1.5 / spec.weight.code_range.magnitude,
        psum=psum,
        offset=psum / 2,
        reference=2 * psum / digit,
        reference_offset=psum / digit,
        gain=1.0,
    )
    steps = StepSizes(
        *(
            None if shape is None else np.asarray(value * np.exp(rng.uniform(-0.5, 0.5, shape)), np.float32)
            for shape, value in zip(steps_lib.shapes(tiling, spec), typical, strict=True)
        )
    )
    x = x if spec.activation.signed else np.maximum(x, 0)
    return x, kernel, steps, cotangent


def difference(got: tuple[Any, ...], want: tuple[Any, ...], arguments: tuple[Any, ...]) -> str:
    """In what results differ by more than the order of sums may do; "" where they do not.

    Sums of few terms are compared with the largest of them. A gradient to kernel or step is the small difference of as
    many terms as there are positions, and is compared with the sum of their magnitudes, roughly.

    Args:
      got, want: the output, and its gradients to input, kernel and steps.
      arguments: as `draw` gives them.
    """
    x, _, steps, cotangent = jax.device_get(arguments)
    terms, largest = np.abs(cotangent).sum(), np.abs(want[0]).max(initial=0)
    rows = [
        ("the output", got[0], want[0], 0.0),
        ("the gradient to the input", got[1], want[1], 0.0),
        ("the gradient to the kernel", got[2], want[2], terms / cotangent.shape[-1] * np.abs(x).max(initial=0)),
    ]
    for name, step in steps._asdict().items():
        if step is not None:
            unit = {"offset": steps.psum, "reference_offset": steps.reference}.get(name, step)
            sharing = step.shape[-1] if step.ndim > 1 else 1
            scale = terms / sharing * largest / unit.min()
            rows.append((f"the gradient to `{name}`", getattr(got[3], name), getattr(want[3], name), scale))
    for name, one, other, scale in rows:
        error, scale = np.abs(one - other).max(initial=0), max(scale, np.abs(other).max(initial=0))
        # Not `error > ...`, which a NaN is not.
        if not error <= TOLERANCE * scale:
            return f"{name} differs by {error:.2g} of {scale:.2g}"
    return ""
