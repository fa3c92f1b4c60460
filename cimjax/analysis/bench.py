"""Speed and memory of training and evaluation steps, and of single layers, side by side in one process.

Programs are compiled first, without the cache; then they run in turns, so that whatever else the machine does meets
all of them. Figures are medians. Nothing here depends on the values of images: they are random.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cimjax.core import conv
from cimjax.core import steps as steps_lib
from cimjax.core.lowering import LOWERINGS
from cimjax.core.tiling import tile
from cimjax.data import Dataset
from cimjax.spec import ADCSpec, CIMSpec, Granularity, Lowering
from cimjax.training.experiment import Experiment, build, on_device
from cimjax.training.step import order_of_epoch


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one program took.

    name: what it computes.
    milliseconds: median of its runs; `fastest` and `slowest` of them too.
    compile_seconds: tracing and compilation, without any cache.
    temporary_mb: what XLA allocates for a run beside arguments and results, in MB of 10^6 bytes; -1 where it says
      nothing.
    images: images that one run processes; 0 where there are none.
    """

    name: str
    milliseconds: float
    fastest: float
    slowest: float
    compile_seconds: float
    temporary_mb: float
    images: int

    @property
    def images_per_second(self) -> float:
        """Images processed in a second, by the median."""
        return 1e3 * self.images / self.milliseconds


class _Program:
    """A compiled program and the arguments it runs on; a state that it gives back is what it runs on next."""

    def __init__(self, name: str, function: Callable[..., Any], *arguments: Any, images: int = 0, carry: bool = False):
        self.name, self.images, self.carry = name, images, carry
        self.arguments = list(arguments)
        start = time.perf_counter()
        self.run = jax.jit(function, donate_argnums=(0,) if carry else ()).lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self.run.memory_analysis()
        self.temporary_mb = getattr(memory, "temp_size_in_bytes", -1e6) / 1e6

    def once(self) -> float:
        """Run it; the seconds it took."""
        start = time.perf_counter()
        result = jax.block_until_ready(self.run(*self.arguments))
        seconds = time.perf_counter() - start
        if self.carry:
            self.arguments[0] = result[0]
        return seconds


def _measured(programs: Sequence[_Program], runs: int) -> list[Timing]:
    """All programs in turns, after one run of each to warm up."""
    for program in programs:
        program.once()
    seconds = np.array([[program.once() for program in programs] for _ in range(runs)])
    return [
        Timing(
            name=program.name,
            milliseconds=1e3 * float(np.median(column)),
            fastest=1e3 * float(column.min()),
            slowest=1e3 * float(column.max()),
            compile_seconds=program.compile_seconds,
            temporary_mb=program.temporary_mb,
            images=program.images,
        )
        for program, column in zip(programs, seconds.T, strict=True)
    ]


def variants(spec: CIMSpec) -> dict[str, CIMSpec | None]:
    """What a network is timed as: full precision, an ideal ADC, and an ADC of every granularity."""
    adc = spec.adc or ADCSpec()
    quantized = {
        f"psum {granularity}": dataclasses.replace(spec, adc=dataclasses.replace(adc, granularity=granularity))
        for granularity in Granularity
    }
    return {"full precision": None, "ideal ADC": dataclasses.replace(spec, adc=None), **quantized}


def bench_steps(config: ConfigDict, *, image: tuple[int, int, int], classes: int, runs: int = 10) -> list[Timing]:
    """Time a training and an evaluation step of the network that a configuration describes, as every variant.

    Args:
      config: with a specification; its batch size is used, and its data set is not.
      image: (H, W, C) of the random images.
      classes: their classes.
      runs: of each program.

    Raises:
      ValueError: for a configuration without a specification, or fewer than one run.
    """
    if config.spec is None or runs < 1:
        raise ValueError("give a configuration that is not full precision, and at least one run.")
    size = config.batch_size
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (size, *image), np.uint8), rng.integers(0, classes, size)
    dataset = Dataset.from_arrays("random", pixels, labels, pixels, labels, classes=classes)
    programs = []
    with _without_cache():
        for name, spec in variants(CIMSpec.from_dict(config.spec.to_dict())).items():
            programs += _steps_of(name, _with_spec(config, spec), dataset)
    return _measured(programs, runs)


def _steps_of(name: str, config: ConfigDict, dataset: Dataset) -> list[_Program]:
    experiment: Experiment = build(config, dataset=dataset)
    stepper = experiment.stepper_on_one_device()
    data, size = on_device(dataset.train), config.batch_size
    order, real = order_of_epoch(experiment.key, 0, size), jnp.ones(size, bool)
    train, evaluate = (experiment.uncalibrated_state() for _ in range(2))
    return [
        _Program(f"{name}, train", stepper.train, train, data, order, images=size, carry=True),
        _Program(f"{name}, evaluate", stepper.evaluate, evaluate, data, real, images=size),
    ]


def _with_spec(config: ConfigDict, spec: CIMSpec | None) -> ConfigDict:
    changed = ConfigDict(config.to_dict())
    changed.spec = None if spec is None else ConfigDict(spec.to_dict())
    changed.subset = ConfigDict({"classes": 0, "images": 0})
    changed.eval_batch_size = config.batch_size
    return changed


# Layers of ResNet-20: (height and width, input channels, output channels, stride).
LAYERS = ((32, 16, 16, 1), (32, 16, 32, 2), (16, 32, 32, 1), (16, 32, 64, 2), (8, 64, 64, 1))


def bench_layers(spec: CIMSpec, *, batch: int = 64, runs: int = 10) -> list[Timing]:
    """Time 3 x 3 layers of ResNet-20, forwards and with all gradients: as a plain convolution and by every lowering."""
    programs = []
    with _without_cache():
        for size, channels, features, stride in LAYERS:
            programs += _layer(spec, batch, size, channels, features, stride)
    return _measured(programs, runs)


def _layer(spec: CIMSpec, batch: int, size: int, channels: int, features: int, stride: int) -> list[_Program]:
    key = jax.random.key(0)
    x = jax.nn.relu(jax.random.normal(key, (batch, size, size, channels)))
    kernel = 0.1 * jax.random.normal(key, (3, 3, channels, features))
    cotangent = jax.random.normal(key, (batch, size // stride, size // stride, features))
    label = f"{size}x{size} {channels}-{features}{f'/{stride}' if stride > 1 else ''}"

    def plain(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    programs = []
    for name in ("plain", *map(str, LOWERINGS)):
        layer_spec = spec if name == "plain" else dataclasses.replace(spec, lowering=Lowering(name))
        tiling = tile(kernel.shape, layer_spec)
        shapes = steps_lib.shapes(tiling, layer_spec)._asdict().items()
        values = {"activation": 0.2, "weight": 0.05, "psum": 8.0, "reference": 8.0}
        steps = steps_lib.Steps(
            **{field: None if shape is None else jnp.full(shape, values.get(field, 0.0)) for field, shape in shapes}
        )

        def through_arrays(x: Any, kernel: Any, steps: Any, layer_spec: CIMSpec = layer_spec) -> Any:
            return conv.cim_conv(x, kernel, steps, layer_spec, strides=stride, padding=1)

        function, arguments = (plain, (x, kernel)) if name == "plain" else (through_arrays, (x, kernel, steps))

        def with_gradients(cotangent: Any, *arguments: Any, function: Any = function) -> Any:
            return jax.vjp(function, *arguments)[1](cotangent)

        programs.append(_Program(f"{label}, {name}, forward", function, *arguments, images=batch))
        programs.append(_Program(f"{label}, {name}, gradients", with_gradients, cotangent, *arguments, images=batch))
    return programs


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Compile anew: the time of compilation is one of the figures."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def show(timings: Sequence[Timing]) -> str:
    """The table as text (Markdown); ratios are to the first row of the same kind (the words after the last comma)."""
    head = ["program", "ms", "fastest-slowest", "ratio", "images/s", "compile s", "temporary MB"]
    first: dict[str, float] = {}
    rows = []
    for timing in timings:
        *what, kind = timing.name.split(", ")
        group = kind if len(what) < 2 else f"{what[0]} {kind}"
        ratio = timing.milliseconds / first.setdefault(group, timing.milliseconds)
        spread = f"{timing.fastest:,.1f}-{timing.slowest:,.1f}"
        rows.append(
            [
                timing.name,
                f"{timing.milliseconds:,.1f}",
                spread,
                f"{ratio:.2f}",
                f"{timing.images_per_second:,.0f}",
                f"{timing.compile_seconds:.1f}",
                f"{timing.temporary_mb:,.0f}",
            ]
        )
    widths = [max(len(row[index]) for row in [head, *rows]) for index in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in lines
    )


def machine() -> dict[str, Any]:
    """What the figures belong to: hardware and versions."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processor": _processor(),
        "cores": _cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def save(timings: Sequence[Timing], path: str | Path) -> None:
    """Write machine and figures as JSON."""
    rows = [dataclasses.asdict(timing) | {"images_per_second": timing.images_per_second} for timing in timings]
    Path(path).write_text(json.dumps({**machine(), "timings": rows}, indent=1) + "\n")


def plot(timings: Sequence[Timing], path: str | Path) -> None:
    """Draw the medians as bars, with their spread, into a PNG or SVG file.

    Raises:
      ValueError: where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a plot needs matplotlib: pip install 'cimjax[plot]'.") from error
    figure = Figure(figsize=(8, 1 + 0.32 * len(timings)), layout="constrained")
    axes = figure.subplots()
    names = [timing.name for timing in timings]
    median = np.array([timing.milliseconds for timing in timings])
    low = median - [timing.fastest for timing in timings]
    high = np.array([timing.slowest for timing in timings]) - median
    kinds = [name.rpartition(", ")[2] for name in names]
    colours = {kind: f"C{index}" for index, kind in enumerate(dict.fromkeys(kinds))}
    bars = axes.barh(names, median, xerr=(low, high), color=[colours[kind] for kind in kinds], ecolor="0.4", capsize=2)
    axes.bar_label(bars, labels=[f" {value:,.0f}" for value in median], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds, median and range")
    axes.set_title(f"{machine()['processor']}, {_cores()} cores, jax {jax.__version__}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
