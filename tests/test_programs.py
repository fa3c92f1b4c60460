"""Every program of the array layer against the oracle, values and gradients, over the contract table."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, ENCODINGS, PROGRAMS, QUICK, Case, draw, spec
from compare import assert_equals_oracle, assert_near

from cimjax.core import adc, conv, lsq
from cimjax.core import step_sizes as steps_lib
from cimjax.core.array_mac import snap_to_integers
from cimjax.core.programs import contract, cpu, joined, pallas, pallas_backward, pallas_blocks, products
from cimjax.core.programs import ladders as ladders_lib
from cimjax.core.programs.contract import Layer
from cimjax.core.programs.cpu import compiler_options
from cimjax.core.programs.kept_codes import smallest_type
from cimjax.core.programs.platforms import by_platform, compute_capability, runs_on
from cimjax.core.programs.products import PRODUCTS
from cimjax.core.tiling import tile
from cimjax.core.window import resolve
from cimjax.data import Dataset
from cimjax.spec import CodeRange, Execution, Operands, Product, Residuals, VariationSpec
from cimjax.spec.codes import code_range
from cimjax.training.config.file import load_config
from cimjax.training.experiment import build
from cimjax.training.train_step import train_step

CONFIGS = Path(__file__).parents[1] / "configs"
REST = [(case, program) for case in CASES for program in PROGRAMS if (case, program) not in QUICK]
CHEAP = (Operands.BFLOAT16, Operands.FLOAT16, Operands.INT8)
# Products differ in a linear map only: every encoding's columns, every tiling, and windows of every kind.
PRODUCT_CASES = [
    case
    for case in CASES
    if case.name.startswith(("tiling", "window"))
    and case.name.endswith(("adc", "twos"))
    and "kernel-1x1" not in case.name
][::2]
# How programs of one's own are compiled, and those of cimjax: `conftest` has not changed the latter's options yet.
FUSED = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in os.environ["XLA_FLAGS"] else {}
COMPILERS = {"default": {"xla_backend_optimization_level": "3"} | FUSED, "cimjax": cpu._OPTIONS | FUSED}


def name_of(value: Case | str) -> str:
    return value.name if isinstance(value, Case) else value


@pytest.mark.parametrize("case,program", QUICK, ids=name_of)
def test_values_and_gradients_equal_the_oracle(case: Case, program: str) -> None:
    assert_equals_oracle(case, program=program)


@pytest.mark.full
@pytest.mark.parametrize("case,program", REST, ids=name_of)
def test_values_and_gradients_equal_the_oracle_on_the_whole_table(case: Case, program: str) -> None:
    assert_equals_oracle(case, program=program)


@pytest.mark.parametrize("case", CASES[5::40], ids=name_of)
def test_layers_as_loops_equal_the_oracle(case: Case) -> None:
    """Whose partial sums are computed again, read group after read group."""
    assert_equals_oracle(case, residuals="inputs")


@pytest.mark.full
@pytest.mark.parametrize("case", CASES[1::8], ids=name_of)
def test_more_layers_as_loops_equal_the_oracle(case: Case) -> None:
    assert_equals_oracle(case, residuals="inputs")


@pytest.mark.full
@pytest.mark.parametrize("case", CASES[5::32], ids=name_of)
def test_the_fused_kernel_equals_the_oracle(case: Case) -> None:
    """Interpreted, as no GPU is needed for that."""
    assert_equals_oracle(case, program="pallas")


@pytest.mark.parametrize(
    "name", [pytest.param("slices-sliced-offset-adc", marks=pytest.mark.full), "window-stride-2-twos"]
)
def test_the_fused_kernel_equals_the_oracle_on_a_row_or_two(name: str) -> None:
    assert_equals_oracle(next(case for case in CASES if case.name == name), program="pallas")


def test_a_kernel_of_several_blocks_adds_them_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of positions, one after the other, and of outputs, each in a program of its own."""
    monkeypatch.setattr(pallas_backward, "_PROGRAMS", 2)
    monkeypatch.setattr(pallas_blocks, "MOST_OUTPUTS", 16)
    layer = spec(activation={"bits": 4}, weight={"bits": 4, "cell_bits": 2}, adc={"bits": 3, "offset": True})
    assert_equals_oracle(Case("", layer, x_shape=(3, 9, 9, 5), kernel_shape=(3, 3, 5, 20)), program="pallas")


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.full if place % 5 else (), id=case.name)
        for place, case in enumerate(CASES[::18])
    ],
)
def test_programs_as_users_compile_them_equal_the_oracle(case: Case, compiler: str) -> None:
    """By XLA's defaults, and by the options of cimjax's own programs; the suite compiles otherwise, more quickly."""
    assert_equals_oracle(case, options=COMPILERS[compiler])


# The products.


def product_problem(case: Case, product: Product, operands: str = "auto") -> tuple[Layer, Any, Any]:
    """A layer, and random integers for its slices and columns."""
    execution = Execution(product=product, operands=operands)
    tiling = tile(case.kernel_shape, case.spec)
    window = resolve(case.x_shape[1:3], case.kernel_shape[:2], **case.window)
    rng = np.random.default_rng(0)
    inputs = rng.integers(-4, 5, case.x_shape).astype(np.float32)
    columns = rng.integers(-3, 4, (*case.kernel_shape[:2], *tiling.channels.shape, 6)).astype(np.float32)
    columns = np.where(tiling.stored[..., None], columns, 0)
    return Layer(tiling, window, case.spec, execution), inputs, columns


def multiplied(layer: Layer, inputs: Any, columns: Any) -> Any:
    """Sums and, of a gradient of ones and twos, what goes to inputs and columns."""

    @jax.jit
    def run(inputs: Any, columns: Any) -> Any:
        sums = products.sums(layer, inputs, columns)
        gradient = tuple(1 + (part > 0).astype(jnp.float32) for part in sums)
        return (
            sums,
            products.to_inputs(layer, inputs, columns, gradient),
            products.to_columns(layer, inputs, columns, gradient),
        )

    return run(inputs, columns)


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
@pytest.mark.parametrize("case", PRODUCT_CASES, ids=name_of)
def test_products_are_sums_over_rows_and_their_transposes(case: Case, product: Product) -> None:
    """Integers all, and so equal to the last bit, to what NumPy adds up place by place."""
    layer, inputs, columns = product_problem(case, product)
    sums, to_inputs, to_columns = multiplied(layer, inputs, columns)
    (low, high), (left, right) = layer.window.padding
    padded = np.pad(inputs, ((0, 0), (low, high), (left, right), (0, 1)))
    want_inputs, want_columns = np.zeros_like(padded), np.zeros_like(columns)
    size = sums[0].shape[1:3]
    for r, channels in enumerate(layer.tiling.channels):
        gradient, total = 1 + (np.asarray(sums[r]) > 0), np.zeros(sums[r].shape)
        for i, j in np.ndindex(*case.kernel_shape[:2]):
            steps = zip((i, j), layer.window.kernel_dilation, layer.window.strides, size, strict=True)
            rows, lines = (np.arange(count) * stride + at * gap for at, gap, stride, count in steps)
            place = np.ix_(np.arange(len(padded)), rows, lines, channels)
            total += padded[place] @ columns[i, j, r]
            np.add.at(want_inputs, place, gradient @ columns[i, j, r].T)
            want_columns[i, j, r] = np.einsum("nhwc,nhwm->cm", padded[place], gradient)
        np.testing.assert_array_equal(sums[r], total)
    height, width = inputs.shape[1:3]
    np.testing.assert_array_equal(to_inputs, want_inputs[:, low : low + height, left : left + width, :-1])
    stored = layer.tiling.stored[..., None]
    np.testing.assert_array_equal(np.where(stored, to_columns, 0), np.where(stored, want_columns, 0))


@pytest.mark.parametrize("operands", CHEAP, ids=str)
@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_cheap_operands_give_the_same_integers(operands: Operands, product: Product) -> None:
    layer, inputs, columns = product_problem(PRODUCT_CASES[1], product)
    cheap = layer._replace(execution=dataclasses.replace(layer.execution, operands=operands))
    for got, want in zip(*(jax.tree.leaves(multiplied(one, inputs, columns)) for one in (cheap, layer)), strict=True):
        np.testing.assert_array_equal(got, want)
    text = str(jax.jit(functools.partial(products.sums, cheap)).lower(inputs, columns).as_text())
    assert {"bfloat16": "xbf16>", "float16": "xf16>", "int8": "xi8>"}[operands] in text


@pytest.mark.parametrize("operands", ["float32", *map(str, CHEAP)])
def test_what_is_no_number_stays_none_in_cheap_operands(operands: str) -> None:
    """In the images and columns that have it, and only there."""
    for product in PRODUCTS:
        layer, inputs, columns = product_problem(CASES[0], product, operands)
        inputs[0, 2, 2, 3] = np.nan
        sums = np.stack(multiplied(layer, inputs, columns)[0])
        assert np.isnan(sums[:, 0]).any() and not np.isnan(sums[:, 1]).any()
        inputs[0, 2, 2, 3], columns[0, 0, 0, 0, 2] = 0, np.nan
        sums = np.stack(multiplied(layer, inputs, columns)[0])
        assert np.isnan(sums[0, ..., 2]).any() and not np.isnan(np.delete(sums, 2, axis=-1)).any()


def test_nothing_but_numbers_come_out_where_the_input_has_one_that_is_none() -> None:
    x, kernel, steps = draw(CASES[0])
    x[1, 2, 2, 0] = np.nan
    for operands in ("float32", *map(str, CHEAP)):
        y = np.asarray(conv.cim_conv(x, kernel, steps, CASES[0].spec, execution=Execution(operands=operands)))
        assert np.isnan(y[1]).any() and not np.isnan(y[0]).any(), operands


@pytest.mark.parametrize("operands", CHEAP, ids=str)
def test_operands_hold_the_integers_that_they_claim(operands: Operands) -> None:
    largest = operands.largest_integer
    assert int(jnp.dtype(operands.value).type(largest)) == largest
    if operands != Operands.INT8:
        assert int(jnp.dtype(operands.value).type(largest + 1)) == largest
    x, kernel, steps = draw(CASES[0])
    wide = dataclasses.replace(CASES[0].spec, activation=dataclasses.replace(CASES[0].spec.activation, bits=12))
    with pytest.raises(ValueError, match=rf"`operands` is {operands!s}, but inputs and digits reach 4095, beyond its"):
        conv.cim_conv(x, kernel, steps, wide, execution=Execution(operands=operands))


# What a program is lowered for, and what it keeps.


def test_the_row_of_the_platform_is_lowered_and_no_other() -> None:
    traced = []

    def row(name: str, x: Any) -> Any:
        traced.append(name)
        # Of each row its own operations alone: what is not used would stand in the text, too.
        return {"plain": lambda: x + 1, "cpu": lambda: x + 2, "cuda": lambda: x * 3}[name]()

    rows = {name: functools.partial(row, name) for name in ("cpu", "cuda")}
    chosen = by_platform(functools.partial(row, "plain"), **rows)
    assert float(jax.jit(chosen)(1.0)) == 3.0 and "cuda" not in traced
    np.testing.assert_array_equal(jax.vmap(chosen)(jnp.arange(3.0)), [2, 3, 4])
    np.testing.assert_array_equal(chosen(jnp.float32(1)), 3)
    for platform, operation in (("cuda", "multiply"), ("tpu", "add")):
        text = jax.jit(chosen).trace(1.0).lower(lowering_platforms=(platform,)).as_text()
        assert f"stablehlo.{operation}" in text and "case" not in text


@pytest.mark.parametrize(
    "capability,layer,execution,fused",
    [
        (9.0, {}, {}, True),
        (9.0, {"adc": False}, {}, True),
        (8.0, {}, {"operands": "bfloat16"}, True),
        (7.5, {}, {}, False),
        (0.0, {}, {}, False),
        (9.0, {}, {"product": "patches"}, False),
        (9.0, {}, {"residuals": "inputs"}, False),
        (9.0, {}, {"operands": "float32"}, False),
        (9.0, {}, {"program": "joined"}, False),
        (9.0, {"adc": {"gradient_bumps": 0.25}}, {}, False),
        (9.0, {"array": {"rows": 1024}}, {}, False),
        (9.0, {"array": {"rows": 288, "columns": 128}}, {}, True),
        (9.0, {"weight": {"encoding": "differential"}, "array": {"rows": 288, "columns": 128}}, {}, False),
    ],
)
def test_kernels_are_the_default_where_they_were_faster(
    monkeypatch: pytest.MonkeyPatch, capability: float, layer: Any, execution: Any, fused: bool
) -> None:
    monkeypatch.setattr(contract, "compute_capability", lambda: capability)
    one = spec(**layer)
    window = resolve((8, 8), (3, 3), padding="SAME")
    chosen = contract.choose(Layer(tile((3, 3, 100, 36), one), window, one, Execution(**execution)))
    assert chosen is (pallas if fused else joined).run


@pytest.mark.parametrize("known,capability", [("9.0", 9.0), ("gfx90a", 0.0), (None, 0.0)])
def test_the_default_device_is_asked_for_its_platform_and_compute_capability(
    monkeypatch: pytest.MonkeyPatch, known: str | None, capability: float
) -> None:
    device = types.SimpleNamespace(compute_capability=known, platform="gpu")
    monkeypatch.setattr(jax, "devices", lambda *_: [device])
    assert compute_capability() == capability and runs_on("gpu", "cuda") and not runs_on("cpu")
    monkeypatch.undo()
    with jax.default_device(jax.devices()[0]):
        assert compute_capability() == 0 and runs_on("cpu") and not runs_on("gpu")
    with jax.default_device("cpu"):
        assert compute_capability() == 0 and runs_on("cpu") and not runs_on("gpu")


@pytest.mark.parametrize("operands", ["bfloat16", "float32", "int8"])
def test_the_fused_kernel_is_lowered_for_gpus(operands: str) -> None:
    """Into Triton, on any machine; how it runs there, no test here can say."""
    layer = spec(activation={"bits": 4}, weight=ENCODINGS["offset"], array={"rows": 128, "columns": 128})
    case = Case("", layer, x_shape=(32, 8, 8, 20), kernel_shape=(3, 3, 20, 36), strides=(2, 2))
    x, kernel, steps = draw(case)
    execution = Execution(program="pallas", operands=operands)

    def with_gradients(x: Any, kernel: Any, steps: Any) -> Any:
        y, pull = jax.vjp(lambda *args: conv.cim_conv(*args, layer, strides=2, execution=execution), x, kernel, steps)
        return pull(y)

    # From 0.11 on jax wants to know which GPU.
    card = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=card)):
        traced = jax.jit(with_gradients).trace(x, kernel, steps)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
    with pytest.raises(Exception, match="`program` is 'pallas', a kernel for GPUs, and this is a TPU"):
        traced.lower(lowering_platforms=("tpu",))


@pytest.mark.full
def test_the_step_of_a_network_is_lowered_for_the_platform_that_is_asked_for() -> None:
    """On a CPU host for a GPU: none of what is for the CPU, and cheap operands where these are exact."""
    config = load_config(str(CONFIGS / "resnet20_c10.py"))
    with config.unlocked():
        config.batch_size = 8
    pixels, labels = np.zeros((8, 32, 32, 3), np.uint8), np.arange(8)
    experiment = build(config, dataset=Dataset.from_arrays("random", pixels, labels, pixels, labels, classes=10))
    setup, plain = experiment.setup_on_one_device(), experiment.preparation.plain

    def step(state: Any, pixels: Any, labels: Any) -> Any:
        return train_step(setup, state, plain(pixels, labels))

    traced = jax.jit(step).trace(experiment.abstract_state(), pixels, labels)
    texts = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cuda", "cpu")}
    assert "stablehlo.case" not in texts["cuda"] and "stablehlo.case" in texts["cpu"]
    products = {name: re.findall(r"stablehlo\.convolution.*xbf16>", text) for name, text in texts.items()}
    # One for each of the 18 array layers of one shape, which are traced once.
    assert len(products["cuda"]) >= 5 and not products["cpu"]


def test_the_definition_is_what_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel, steps = draw(CASES[0])
    run = functools.partial(conv.cim_conv, x, kernel, steps, CASES[0].spec, execution=Execution(program="reference"))
    before = run()
    monkeypatch.setattr(adc, "convert", lambda psums, *_: jnp.zeros_like(psums))
    assert np.any(before) and not np.any(run())


@pytest.mark.parametrize(
    "codes,dtype",
    [
        (code_range(4, signed=False), np.int8),
        (code_range(8, signed=False), np.uint8),
        (code_range(8, signed=True), np.int8),
        (code_range(9, signed=True), np.int16),
        (code_range(16, signed=False), np.uint16),
        (code_range(1, signed=True), np.int8),
    ],
)
def test_codes_are_kept_in_the_smallest_type(codes: CodeRange, dtype: type) -> None:
    assert smallest_type(codes) == dtype


@pytest.mark.parametrize("weight", ["offset-adc", "twos-planes"])
def test_without_adcs_a_layer_is_one_convolution(weight: str) -> None:
    """However many read groups, planes and slices."""
    case = without_adcs(weight)
    assert_equals_oracle(case)
    step = jax.grad(lambda *args: jnp.sum(jnp.cos(conv.cim_conv(*args, case.spec))), (0, 1, 2))
    text = jax.jit(step).lower(*draw(case)).compile().as_text()
    assert text.count(" convolution(") == 3  # forwards, to inputs and to the kernel


@pytest.mark.parametrize("weight", ["offset-adc", "twos-planes"])
def test_without_adcs_cells_vary_as_the_definition_has_it(weight: str) -> None:
    case = without_adcs(weight)
    varied = dataclasses.replace(case.spec, variation=VariationSpec(sigma=0.2))

    def run(program: str) -> Any:
        how = {"variation_key": jax.random.key(0), "execution": Execution(program=program)}
        y, pull = jax.vjp(lambda *args: conv.cim_conv(*args, varied, **how), *draw(case))
        return jax.tree.leaves((y, pull(jnp.cos(y))))

    for want, got in zip(*map(run, PROGRAMS), strict=True):
        assert_near(got, want, "")


def without_adcs(weight: str) -> Case:
    array = {"rows": 64, "active_rows": 9, "tiling": "im2col"}
    layer = spec(activation={"bits": 3, "slice_bits": 1}, weight=ENCODINGS[weight], adc=False, array=array)
    return Case("", layer, x_shape=(2, 5, 4, 20), kernel_shape=(3, 3, 20, 5))


def temporary(layer: Any, execution: Execution, x: Any, kernel: Any, layers: int = 1) -> int:
    """Bytes of a gradient step of some layers, in XLA's own account."""
    shapes = steps_lib.shapes(tile(kernel.shape, layer), layer)
    steps = steps_lib.StepSizes(*(None if shape is None else jnp.ones((1,) * len(shape)) for shape in shapes))

    def loss(kernel: Any, steps: Any) -> Any:
        y = x
        for _ in range(layers):
            y = conv.cim_conv(y, kernel, steps, layer, execution=execution)
        return jnp.sum(jnp.square(y))

    compiled = jax.jit(jax.grad(loss, (0, 1)), compiler_options=compiler_options()).lower(kernel, steps).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.full
def test_recomputation_takes_less_memory() -> None:
    """Of six layers the partial sums of one read group at a time are held."""
    base = spec(activation={"bits": 4}, weight={"bits": 4, "cell_bits": 1}, array={"rows": 64, "columns": 64})
    kernel, x = jnp.ones((3, 3, 32, 32)), jnp.ones((4, 16, 16, 32))
    kept, again = (
        temporary(base, Execution(residuals=how), x, kernel, layers=6) for how in (Residuals.PSUMS, Residuals.INPUTS)
    )
    assert again < 0.6 * kept


def test_memory_does_not_grow_with_read_groups() -> None:
    """At most three times that of whole arrays, for 16 of 256 rows at a time, bit-serial inputs and 1-bit cells."""
    activation = {"bits": 4, "slice_bits": 1}
    x, kernel = jnp.ones((8, 16, 16, 64)), jnp.ones((3, 3, 64, 64))
    whole, read = (
        temporary(
            spec(activation=activation, array={"rows": 256, "columns": 256, "tiling": "im2col", "active_rows": rows}),
            Execution(),
            x,
            kernel,
        )
        for rows in (256, 16)
    )
    assert read <= 3 * whole


def test_the_program_does_not_grow_with_read_groups() -> None:
    def lines(rows: int) -> int:
        layer = spec(array={"rows": 64, "tiling": "im2col", "active_rows": rows})
        case = Case("", layer, x_shape=(2, 6, 6, 64), kernel_shape=(3, 3, 64, 8))
        loss = jax.grad(lambda *args: jnp.sum(conv.cim_conv(*args, layer)), (0, 1, 2))
        return len(jax.jit(loss).lower(*draw(case)).as_text().splitlines())

    assert lines(4) <= 1.1 * lines(16)


def test_convolutions_are_not_left_to_a_library_that_uses_one_core() -> None:
    def product(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, kernel = jnp.ones((4, 8, 8, 16)), jnp.ones((3, 3, 16, 48))
    programs = [
        jax.jit(product, compiler_options=options).lower(x, kernel).compile() for options in ({}, compiler_options())
    ]
    assert "ynn" not in programs[1].as_text()
    np.testing.assert_array_equal(*(program(x, kernel) for program in programs))


# Edges.


@pytest.mark.parametrize("bits", [3, 8, 12])
def test_the_gradient_to_a_step_is_small_and_right_where_nothing_is_clipped(bits: int) -> None:
    """To a tolerance of itself, not of the codes that it is a difference of; that to an offset is exactly 0."""
    rng, features = np.random.default_rng(0), 4
    codes = code_range(bits, signed=False)
    step, offset = rng.uniform(1.5, 2.5, features).astype(np.float32), np.full(features, 3.25, np.float32)
    psums = np.rint(offset + step * rng.uniform(0.5, codes.q_max - 0.5, (1, 2048, features))).astype(np.float32)
    gradient = (1 + rng.normal(size=psums.shape[1:])).astype(np.float32)
    weight = rng.uniform(0.1, 1, features).astype(np.float32)
    ones = np.ones((1, 1, 1), np.float32)
    slice_adc = ladders_lib.SliceADC(lsq.Bounds.of(codes, 0.0), ones, features)

    @jax.jit
    def run(step: Any, offset: Any, weight: Any) -> Any:
        scales = ladders_lib.ColumnScales(*(values[None] for values in (step, offset, weight)))
        ladders = ladders_lib.Ladders.of_groups(scales).of_group(0)
        return slice_adc.gradients(jnp.asarray(psums, jnp.int16), ladders, gradient)

    to_psums, to = run(step, offset, weight)
    u = (psums - offset) * (np.float32(1) / step)
    rounded = np.floor(u + np.float32(0.5)).astype(np.float64)
    difference = rounded - u.astype(np.float64)
    want = np.sum(weight * gradient.astype(np.float64) * difference, axis=(0, 1))
    np.testing.assert_allclose(to.step, want, atol=1e-5 * np.max(np.abs(want)) * 2**bits / 8)
    np.testing.assert_array_equal(to.offset, 0)
    np.testing.assert_array_equal(to_psums[0], weight * gradient)
    read = step.astype(np.float64) * rounded + offset
    np.testing.assert_allclose(to.output_scale, np.sum(gradient * read, axis=(0, 1)), rtol=1e-5)


@pytest.mark.parametrize(
    "execution,x_shape,padding",
    [
        ({}, (0, 6, 5, 7), "SAME"),
        ({"residuals": "inputs"}, (2, 2, 2, 7), "VALID"),
        pytest.param({"program": "reference"}, (0, 6, 5, 7), "SAME", marks=pytest.mark.full),
        pytest.param({"program": "reference"}, (2, 2, 2, 7), "VALID", marks=pytest.mark.full),
        pytest.param({"residuals": "inputs"}, (0, 6, 5, 7), "SAME", marks=pytest.mark.full),
        pytest.param({}, (2, 2, 2, 7), "VALID", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_layers_without_images_or_outputs_have_gradients_of_zero(
    execution: dict[str, str], x_shape: tuple[int, ...], padding: str
) -> None:
    layer = spec(activation={"bits": 4, "slice_bits": 2}, weight=ENCODINGS["offset"])
    kernel, steps = draw(Case("", layer, x_shape=(2, 6, 5, 7), kernel_shape=(3, 3, 7, 5)))[1:]

    def loss(kernel: Any, steps: Any) -> Any:
        y = conv.cim_conv(jnp.ones(x_shape), kernel, steps, layer, padding=padding, execution=Execution(**execution))
        return jnp.sum(y)

    for gradient in jax.tree.leaves(jax.grad(loss, (0, 1))(kernel, steps)):
        assert not np.any(gradient)


def test_a_matrix_product_of_no_rows_keeps_its_outputs() -> None:
    layer = spec()
    kernel, steps = draw(Case("", layer, x_shape=(2, 1, 1, 7), kernel_shape=(1, 1, 7, 5)))[1:]
    assert conv.cim_dense(jnp.ones((3, 0, 7)), kernel[0, 0], steps, layer).shape == (3, 0, 5)


def test_sums_are_rounded_only_where_they_are_integers() -> None:
    sums = jnp.asarray([0.9999, 2.0001])
    np.testing.assert_array_equal(snap_to_integers(sums, spec()), [1, 2])
    gradient = jax.grad(lambda s: jnp.sum(snap_to_integers(s, spec()) * s))(sums)
    np.testing.assert_allclose(gradient, [1.9999, 4.0001], rtol=1e-6)


def test_a_broken_image_does_not_reach_its_neighbours() -> None:
    x, kernel, steps = draw(CASES[0])
    broken = np.asarray(x).copy()
    broken[0, 0, 0, 0] = np.nan
    for execution in (Execution(), Execution(residuals="inputs")):
        run = functools.partial(conv.cim_conv, kernel=kernel, steps=steps, spec=CASES[0].spec, execution=execution)
        y = np.asarray(run(broken))
        assert np.isnan(y[0]).any()
        assert_near(y[1], np.asarray(run(x))[1], "neighbour")
