"""What `cimjax bench` times: whole steps of a network, its programs, single layers, and how these grow.

Nothing here depends on the values of images: they are random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cimjax.analysis.timing import Compiled, Say, Timing, measured, silent, without_cache
from cimjax.core import conv
from cimjax.core import step_sizes as steps_lib
from cimjax.core.programs.contract import exact_in
from cimjax.core.programs.platforms import runs_on
from cimjax.core.programs.products import PRODUCTS
from cimjax.core.tiling import tile
from cimjax.data import Dataset
from cimjax.spec import (
    ActivationSpec,
    ADCSpec,
    ArraySpec,
    CIMSpec,
    Encoding,
    Execution,
    Granularity,
    Operands,
    Program,
    Residuals,
    TilingRule,
)
from cimjax.training.batches import Resident
from cimjax.training.experiment import Experiment, build
from cimjax.training.programs import most_steps, train_steps
from cimjax.training.random_streams import chip_key
from cimjax.training.train_step import eval_step


class Variant(NamedTuple):
    """What is timed: a specification, None for full precision, and how it is executed."""

    spec: CIMSpec | None
    execution: Execution = Execution()


def variants(spec: CIMSpec) -> dict[str, Variant]:
    """What a network is timed as: full precision, an ideal ADC, and an ADC of every granularity."""
    adc = spec.adc or ADCSpec()
    quantized = {
        f"psum {granularity}": Variant(dataclasses.replace(spec, adc=dataclasses.replace(adc, granularity=granularity)))
        for granularity in Granularity
    }
    return {"full precision": Variant(None), "ideal ADC": Variant(dataclasses.replace(spec, adc=None)), **quantized}


def programs_of(spec: CIMSpec) -> dict[str, Variant]:
    """The programs of one specification: the default, the definition, every product, cheap operands where they are
    exact, and partial sums computed again in the backward pass; where there is a GPU also its kernels, and without.
    Without ADCs there are no partial sums, and operands of one type."""
    found = {"default": Variant(spec), "reference": Variant(spec, Execution(program=Program.REFERENCE))}
    found |= {str(product): Variant(spec, Execution(product=product)) for product in PRODUCTS}
    if runs_on("gpu", "cuda", "rocm"):
        found |= {str(one): Variant(spec, Execution(program=one)) for one in (Program.PALLAS, Program.JOINED)}
    if spec.adc is None:
        return found
    for operands in (Operands.FLOAT32, Operands.BFLOAT16, Operands.INT8):
        if exact_in(spec, operands):
            found[f"{operands} operands"] = Variant(spec, Execution(operands=operands))
    return found | {"recomputed psums": Variant(spec, Execution(residuals=Residuals.INPUTS))}


def bench_steps(
    config: ConfigDict,
    programs: Mapping[str, Variant],
    *,
    image: tuple[int, int, int],
    classes: int,
    runs: int = 10,
    say: Say = silent,
) -> list[Timing]:
    """Time a training and an evaluation step of the network that a configuration describes, as every variant.

    Training steps are timed as a run dispatches them: `steps_per_dispatch` in one program, by itself 1 on CPU, else 16.

    Args:
      config: its batch size is used, and its data set is not.
      programs: variants by name.
      image: (H, W, C) of the random images.
      classes: their classes.
      runs: of each program.
      say: called with what is compiled or timed from then on.
    """
    dataset = random_images(config.batch_size, image, classes)
    compiled = []
    with without_cache():
        for name, variant in programs.items():
            say(f"compiling {name}, train and evaluate")
            changed = _as_variant(config, variant)
            compiled += [training_step(f"{name}, train", changed, dataset), _evaluation(name, changed, dataset)]
    return measured(compiled, runs, say)


def random_images(count: int, image: tuple[int, int, int], classes: int) -> Dataset:
    """Random images of (H, W, C) = `image`, the same to train on and to test with: nothing depends on their values."""
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (count, *image), np.uint8), rng.integers(0, classes, count)
    return Dataset.from_arrays("random", pixels, labels, pixels, labels, classes=classes)


def on_one_batch(config: ConfigDict) -> ConfigDict:
    """A copy of a configuration for a data set of one batch, all of which is trained on."""
    changed = ConfigDict(config.to_dict())
    changed.subset = ConfigDict({"classes": 0, "images": 0})
    changed.validation = 0.0
    changed.eval_batch_size = config.batch_size
    return changed


def training_step(name: str, config: ConfigDict, dataset: Dataset) -> Compiled:
    """The training step of a configuration on a data set of one batch, compiled for one device."""
    experiment: Experiment = build(config, dataset=dataset)
    setup = experiment.setup_on_one_device()
    batches = Resident(dataset.train, experiment.preparation, config.seed, jax.device_put)
    count = most_steps(config, experiment.devices.platform)

    def steps(state: Any, feed: Any) -> Any:
        return train_steps(setup, batches, state, feed, count)

    state = experiment.uncalibrated_state()
    return Compiled(name, steps, state, batches.feed(0, count), images=config.batch_size, carry=True, times=count)


def _evaluation(name: str, config: ConfigDict, dataset: Dataset) -> Compiled:
    experiment: Experiment = build(config, dataset=dataset)
    setup, size = experiment.setup_on_one_device(), config.batch_size
    images = Resident(dataset.train, experiment.preparation, config.seed, jax.device_put).data

    def measure(state: Any, pixels: Any, labels: Any) -> Any:
        batch = experiment.preparation.plain(pixels, labels)
        return eval_step(setup, state, batch, jnp.ones(size, bool), chip_key(state.seed))

    return Compiled(f"{name}, evaluate", measure, experiment.uncalibrated_state(), *images, images=size)


def _as_variant(config: ConfigDict, variant: Variant) -> ConfigDict:
    changed = on_one_batch(config)
    changed.spec = None if variant.spec is None else ConfigDict(variant.spec.to_dict())
    changed.execution = ConfigDict(variant.execution.to_dict())
    return changed


# Layers of ResNet-20: (height and width, input channels, output channels, stride).
LAYERS = ((32, 16, 16, 1), (32, 16, 32, 2), (16, 32, 32, 1), (16, 32, 64, 2), (8, 64, 64, 1))
# The layer on which growth is shown, and what grows on it.
GROWING = (16, 64, 64, 1)
PLANES = (2, 4, 6, 8)
TILES = (1, 2, 4, 8, 16)
# Rows of 256 that one conversion reads, bit-serial inputs and 1-bit cells; the first reads whole arrays.
ACTIVE_ROWS = (256, 64, 32, 16)


def bench_layers(spec: CIMSpec, *, batch: int = 64, runs: int = 10, say: Say = silent) -> list[Timing]:
    """Time 3 x 3 layers of ResNet-20, forwards and with all gradients: as a plain convolution, by the definition and by
    every product."""
    variants = {"plain": Variant(None), "reference": Variant(spec, Execution(program=Program.REFERENCE))}
    variants |= {str(product): Variant(spec, Execution(product=product)) for product in PRODUCTS}
    compiled = []
    with without_cache():
        for shape in LAYERS:
            compiled += _layer(variants, shape, batch, say)
    return measured(compiled, runs, say)


def bench_growth(spec: CIMSpec, *, batch: int = 64, runs: int = 10, say: Say = silent) -> list[Timing]:
    """Time one layer with more and more planes, in more and more row tiles, with partial sums kept and computed again;
    and in arrays of 256 rows of which fewer and fewer are read at once.

    Planes are those of two's-complement weights in 1-bit cells of one large array; row tiles have 2 planes; rows that
    are read at once have 4, and 4-bit inputs are driven bit by bit.
    """
    size, channels, features, stride = GROWING
    rows = 9 * channels

    def changed(bits: int, rows: int) -> CIMSpec:
        weight = dataclasses.replace(spec.weight, bits=bits, cell_bits=1, encoding=Encoding.TWOS_COMPLEMENT)
        array = dataclasses.replace(spec.array, rows=rows, columns=max(spec.array.columns, bits), active_rows=None)
        return dataclasses.replace(spec, weight=weight, array=array)

    def read(active_rows: int) -> CIMSpec:
        array = ArraySpec(rows=256, columns=256, tiling=TilingRule.IM2COL, active_rows=active_rows)
        return dataclasses.replace(changed(4, 256), activation=ActivationSpec(bits=4, slice_bits=1), array=array)

    variants = {f"{bits} planes": Variant(changed(bits, rows)) for bits in PLANES}
    variants |= {f"{tiles} tiles": Variant(changed(2, rows // tiles)) for tiles in TILES}
    again = Execution(residuals=Residuals.INPUTS)
    recomputed = {f"{name} recomputed": Variant(variant.spec, again) for name, variant in variants.items()}
    read_groups = {f"{rows} active rows": Variant(read(rows)) for rows in ACTIVE_ROWS}
    with without_cache():
        all_variants = {"plain": Variant(None)} | variants | recomputed | read_groups
        compiled = _layer(all_variants, (size, channels, features, stride), batch, say)
    return measured([program for program in compiled if program.name.endswith("gradients")], runs, say)


def _layer(variants: Mapping[str, Variant], shape: tuple[int, int, int, int], batch: int, say: Say) -> list[Compiled]:
    """One 3 x 3 layer as every variant, full precision being a plain convolution: forwards, and with all gradients."""
    size, channels, features, stride = shape
    key = jax.random.key(0)
    x = jax.nn.relu(jax.random.normal(key, (batch, size, size, channels)))
    kernel = 0.1 * jax.random.normal(key, (3, 3, channels, features))
    cotangent = jax.random.normal(key, (batch, size // stride, size // stride, features))
    label = f"{size}x{size} {channels}-{features}{f'/{stride}' if stride > 1 else ''}"
    compiled = []
    for name, variant in variants.items():
        say(f"compiling {label}, {name}, forward and gradients")
        function, arguments = _plain(stride), (x, kernel)  # type: tuple[Callable[..., Any], tuple[Any, ...]]
        if variant.spec is not None:
            function = _through_arrays(variant.spec, variant.execution, stride)
            arguments = (x, kernel, _some_steps(variant.spec, kernel))

        def with_gradients(cotangent: Any, *arguments: Any, function: Any = function) -> Any:
            y, pull = jax.vjp(function, *arguments)
            return y, pull(cotangent)

        compiled.append(Compiled(f"{label}, {name}, forward", function, *arguments, images=batch))
        compiled.append(Compiled(f"{label}, {name}, gradients", with_gradients, cotangent, *arguments, images=batch))
    return compiled


def _plain(stride: int) -> Callable[..., Any]:
    def plain(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return plain


def _through_arrays(spec: CIMSpec, execution: Execution, stride: int) -> Callable[..., Any]:
    def through_arrays(x: Any, kernel: Any, steps: Any) -> Any:
        return conv.cim_conv(x, kernel, steps, spec, strides=stride, padding=1, execution=execution)

    return through_arrays


def _some_steps(spec: CIMSpec, kernel: Any) -> steps_lib.StepSizes:
    shapes = steps_lib.shapes(tile(kernel.shape, spec), spec)._asdict().items()
    values = {"activation": 0.2, "weight": 0.05, "psum": 8.0, "reference": 8.0}
    return steps_lib.StepSizes(
        **{field: None if shape is None else jnp.full(shape, values.get(field, 0.0)) for field, shape in shapes}
    )
