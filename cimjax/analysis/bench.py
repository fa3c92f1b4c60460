"""What `cimjax bench` times: whole steps of a network, its lowerings, single layers, and how these grow.

Nothing here depends on the values of images: they are random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cimjax.analysis.timing import Program, Timing, measured, without_cache
from cimjax.core import conv
from cimjax.core import step_sizes as steps_lib
from cimjax.core.lowering import LOWERINGS
from cimjax.core.tiling import tile
from cimjax.data import Dataset
from cimjax.spec import ADCSpec, CIMSpec, Encoding, Granularity, Lowering, Operands, Residuals
from cimjax.training.experiment import Experiment, build, on_device
from cimjax.training.step import order_of_epoch


def variants(spec: CIMSpec) -> dict[str, CIMSpec | None]:
    """What a network is timed as: full precision, an ideal ADC, and an ADC of every granularity."""
    adc = spec.adc or ADCSpec()
    quantized = {
        f"psum {granularity}": dataclasses.replace(spec, adc=dataclasses.replace(adc, granularity=granularity))
        for granularity in Granularity
    }
    return {"full precision": None, "ideal ADC": dataclasses.replace(spec, adc=None), **quantized}


def programs_of(spec: CIMSpec) -> dict[str, CIMSpec | None]:
    """The programs of one specification: as it stands, by every lowering that runs here, with cheap operands where they
    are exact, and with its partial sums computed again in the backward pass."""
    found: dict[str, CIMSpec | None] = {"as specified": spec}
    fused = () if jax.default_backend() == "cpu" else (Lowering.PALLAS,)
    for lowering in (*LOWERINGS, *fused):
        found[str(lowering)] = dataclasses.replace(spec, lowering=lowering)
    for operands in (Operands.FLOAT32, Operands.BFLOAT16, Operands.INT8):
        if spec.exact_in(operands):
            found[f"{operands} operands"] = dataclasses.replace(spec, operands=operands)
    return found | {"recomputed psums": dataclasses.replace(spec, residuals=Residuals.INPUTS)}


def bench_steps(
    config: ConfigDict,
    of: Mapping[str, CIMSpec | None],
    *,
    image: tuple[int, int, int],
    classes: int,
    runs: int = 10,
) -> list[Timing]:
    """Time a training and an evaluation step of the network that a configuration describes, as every specification.

    Args:
      config: its batch size is used, and its data set is not.
      of: specifications by name; None is full precision.
      image: (H, W, C) of the random images.
      classes: their classes.
      runs: of each program.
    """
    size = config.batch_size
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (size, *image), np.uint8), rng.integers(0, classes, size)
    dataset = Dataset.from_arrays("random", pixels, labels, pixels, labels, classes=classes)
    programs = []
    with without_cache():
        for name, spec in of.items():
            programs += _steps_of(name, _with_spec(config, spec), dataset)
    return measured(programs, runs)


def _steps_of(name: str, config: ConfigDict, dataset: Dataset) -> list[Program]:
    experiment: Experiment = build(config, dataset=dataset)
    stepper = experiment.stepper_on_one_device()
    data, size = on_device(dataset.train), config.batch_size
    order, real = order_of_epoch(experiment.key, 0, size), jnp.ones(size, bool)
    train, evaluate = (experiment.uncalibrated_state() for _ in range(2))
    return [
        Program(f"{name}, train", stepper.train, train, data, order, images=size, carry=True),
        Program(f"{name}, evaluate", stepper.evaluate, evaluate, data, real, images=size),
    ]


def _with_spec(config: ConfigDict, spec: CIMSpec | None) -> ConfigDict:
    changed = ConfigDict(config.to_dict())
    changed.spec = None if spec is None else ConfigDict(spec.to_dict())
    changed.subset = ConfigDict({"classes": 0, "images": 0})
    changed.eval_batch_size = config.batch_size
    return changed


# Layers of ResNet-20: (height and width, input channels, output channels, stride).
LAYERS = ((32, 16, 16, 1), (32, 16, 32, 2), (16, 32, 32, 1), (16, 32, 64, 2), (8, 64, 64, 1))
# The layer on which growth is shown, and what grows on it.
GROWING = (16, 64, 64, 1)
PLANES = (2, 4, 6, 8)
TILES = (1, 2, 4, 8, 16)


def bench_layers(spec: CIMSpec, *, batch: int = 64, runs: int = 10) -> list[Timing]:
    """Time 3 x 3 layers of ResNet-20, forwards and with all gradients: as a plain convolution and by every lowering."""
    of = {"plain": None} | {str(name): dataclasses.replace(spec, lowering=name) for name in LOWERINGS}
    programs = []
    with without_cache():
        for shape in LAYERS:
            programs += _layer(of, shape, batch)
    return measured(programs, runs)


def bench_growth(spec: CIMSpec, *, batch: int = 64, runs: int = 10) -> list[Timing]:
    """Time one layer with more and more planes, and in more and more row tiles; partial sums kept and computed again.

    Planes are those of two's-complement weights in 1-bit cells of one large array; row tiles have 2 planes.
    """
    size, channels, features, stride = GROWING
    rows = 9 * channels

    def changed(bits: int, rows: int) -> CIMSpec:
        weight = dataclasses.replace(spec.weight, bits=bits, cell_bits=1, encoding=Encoding.TWOS_COMPLEMENT)
        array = dataclasses.replace(spec.array, rows=rows, columns=max(spec.array.columns, bits), active_rows=None)
        return dataclasses.replace(spec, weight=weight, array=array)

    of: dict[str, CIMSpec | None] = {"plain": None}
    of |= {f"{bits} planes": changed(bits, rows) for bits in PLANES}
    of |= {f"{tiles} tiles": changed(2, rows // tiles) for tiles in TILES}
    recomputed = {
        f"{name} recomputed": dataclasses.replace(one, residuals=Residuals.INPUTS)
        for name, one in of.items()
        if one is not None
    }
    with without_cache():
        programs = _layer(of | recomputed, (size, channels, features, stride), batch)
    return measured([program for program in programs if program.name.endswith("gradients")], runs)


def _layer(of: Mapping[str, CIMSpec | None], shape: tuple[int, int, int, int], batch: int) -> list[Program]:
    """One 3 x 3 layer as every specification, None being a plain convolution: forwards, and with all gradients."""
    size, channels, features, stride = shape
    key = jax.random.key(0)
    x = jax.nn.relu(jax.random.normal(key, (batch, size, size, channels)))
    kernel = 0.1 * jax.random.normal(key, (3, 3, channels, features))
    cotangent = jax.random.normal(key, (batch, size // stride, size // stride, features))
    label = f"{size}x{size} {channels}-{features}{f'/{stride}' if stride > 1 else ''}"
    programs = []
    for name, spec in of.items():
        function, arguments = _plain(stride), (x, kernel)  # type: tuple[Callable[..., Any], tuple[Any, ...]]
        if spec is not None:
            function, arguments = _through_arrays(spec, stride), (x, kernel, _some_steps(spec, kernel))

        def with_gradients(cotangent: Any, *arguments: Any, function: Any = function) -> Any:
            y, pull = jax.vjp(function, *arguments)
            return y, pull(cotangent)

        programs.append(Program(f"{label}, {name}, forward", function, *arguments, images=batch))
        programs.append(Program(f"{label}, {name}, gradients", with_gradients, cotangent, *arguments, images=batch))
    return programs


def _plain(stride: int) -> Callable[..., Any]:
    def plain(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return plain


def _through_arrays(spec: CIMSpec, stride: int) -> Callable[..., Any]:
    def through_arrays(x: Any, kernel: Any, steps: Any) -> Any:
        return conv.cim_conv(x, kernel, steps, spec, strides=stride, padding=1)

    return through_arrays


def _some_steps(spec: CIMSpec, kernel: Any) -> steps_lib.StepSizes:
    shapes = steps_lib.shapes(tile(kernel.shape, spec), spec)._asdict().items()
    values = {"activation": 0.2, "weight": 0.05, "psum": 8.0, "reference": 8.0}
    return steps_lib.StepSizes(
        **{field: None if shape is None else jnp.full(shape, values.get(field, 0.0)) for field, shape in shapes}
    )
