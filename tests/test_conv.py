"""The array convolution against the oracle, over the contract table, by every lowering."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, ENCODINGS, Case, draw, spec
from compare import assert_equals_oracle

from cimjax.core import conv, convolution, lowering
from cimjax.core import step_sizes as steps_lib
from cimjax.core.compiler import compiler_options
from cimjax.core.lowering import LOWERINGS, choose
from cimjax.core.recompute import smallest_type
from cimjax.core.schedule import in_turn
from cimjax.core.tiling import tile
from cimjax.core.window import shifted
from cimjax.spec import Lowering, Operands, Residuals
from cimjax.spec.codes import CodeRange, code_range

# What `auto` chooses here goes through the whole table; other lowerings, which differ in the array product only,
# through every sixth row and all windows.
CHOSEN = next(name for name, program in LOWERINGS.items() if program is choose(Lowering.AUTO))
OTHERS = [name for name in LOWERINGS if name != CHOSEN]
PART = [case for index, case in enumerate(CASES) if index % 6 == 0 or case.name.startswith("window")]
# Operands and residuals do not know of windows.
FEW = CASES[3::20]
CHEAP = (Operands.BFLOAT16, Operands.FLOAT16, Operands.INT8)
written_out = convolution._written_out


def changed(case: Case, **fields: Any) -> Case:
    return dataclasses.replace(case, spec=dataclasses.replace(case.spec, **fields))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_and_gradients_equal_the_oracle(case: Case) -> None:
    assert_equals_oracle(case)


@pytest.mark.parametrize("lowering", OTHERS, ids=str)
@pytest.mark.parametrize("case", PART, ids=lambda case: case.name)
def test_every_lowering_equals_the_oracle(case: Case, lowering: Lowering) -> None:
    assert_equals_oracle(changed(case, lowering=lowering))


@pytest.mark.parametrize(
    "case", [*CASES[5::32], *(case for case in CASES if "stride-2-1" in case.name)], ids=lambda case: case.name
)
def test_the_fused_kernel_equals_the_oracle(case: Case) -> None:
    """Interpreted, as no GPU is needed for that."""
    assert_equals_oracle(changed(case, lowering=Lowering.PALLAS))


@pytest.fixture
def traced_anew() -> Iterator[None]:
    """For what changes how layers are traced: those of equal shapes are traced once."""
    conv._through_arrays.clear_cache()
    yield
    conv._through_arrays.clear_cache()


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize("operands", [Operands.BFLOAT16, Operands.FLOAT32, Operands.INT8], ids=str)
def test_the_fused_kernel_is_lowered_for_gpus(operands: Operands, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into Triton, on any machine; how it runs there, no test here can say."""
    layer = spec(activation={"bits": 4}, weight=ENCODINGS["offset"], array={"rows": 128, "columns": 128})
    case = Case("", layer, x_shape=(32, 8, 8, 20), kernel_shape=(3, 3, 20, 36), strides=(2, 2))
    case = changed(case, lowering=Lowering.PALLAS, operands=operands)
    x, kernel, steps = draw(case)

    def with_gradients(x: Any, kernel: Any, steps: Any) -> Any:
        y, pull = jax.vjp(lambda *args: conv.cim_conv(*args, case.spec, **case.window), x, kernel, steps)
        return pull(y)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    lowered = jax.jit(with_gradients).trace(x, kernel, steps).lower(lowering_platforms=("cuda",)).as_text()
    # Two read groups: the kernel, and its backward kernel for each of them.
    assert lowered.count("triton") >= 3


@pytest.mark.usefixtures("traced_anew")
def test_the_fused_kernel_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    case = changed(CASES[0], lowering=Lowering.PALLAS)
    with pytest.raises(ValueError, match=r"`lowering` is 'pallas', a kernel for GPUs, and this is a tpu"):
        conv.cim_conv(*draw(case), case.spec, **case.window)


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize(
    "index,case",
    list(enumerate(case for case in CASES if case.name.startswith("window")))[::2],
    ids=lambda value: getattr(value, "name", ""),
)
def test_gradients_by_matrix_products_equal_the_oracle(index: int, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are for many positions, where they pay; every other time they would write too much."""
    monkeypatch.setattr(convolution, "FEW", 0)
    monkeypatch.setattr(convolution, "POSITIONS", 1)
    monkeypatch.setattr(convolution, "WIDENING", 0)
    monkeypatch.setattr(convolution, "PLACES", convolution.PLACES * (index % 4 == 0))
    used = []
    monkeypatch.setattr(convolution, "shifted", lambda *args: used.append(1) or shifted(*args))
    assert_equals_oracle(changed(case, lowering=Lowering.CONV_PER_TILE))
    assert bool(used) == (index % 4 == 0)


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.startswith("window")][1::2], ids=lambda case: case.name
)
def test_convolutions_written_out_equal_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are for kernels of few weights that meet many positions."""
    used = []
    monkeypatch.setattr(convolution, "POSITIONS", 1)
    monkeypatch.setattr(convolution, "FEW", 10_000)
    monkeypatch.setattr(convolution, "_written_out", lambda *args: used.append(1) or written_out(*args))
    assert_equals_oracle(changed(case, lowering=Lowering.CONV_PER_TILE))
    assert used


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.startswith("tiling")][::3], ids=lambda case: case.name
)
def test_gradients_of_tiles_in_turn_equal_the_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for many tiles."""
    turns = []
    monkeypatch.setattr(lowering, "MANY_TILES", 2)
    monkeypatch.setattr(lowering, "LARGE", 0)
    monkeypatch.setattr(lowering, "in_turn", lambda *args: turns.append(1) or in_turn(*args))
    assert_equals_oracle(changed(case, lowering=Lowering.CONV_PER_TILE))
    assert len(turns) == tile(case.kernel_shape, case.spec).groups - 1 > 1


@pytest.mark.parametrize("case", CASES[::20], ids=lambda case: case.name)
def test_programs_of_the_compilers_default_level_equal_the_oracle(case: Case) -> None:
    """By which programs of one's own are compiled; the suite is by the first, as the programs of cimjax are."""
    assert_equals_oracle(case, options={"xla_backend_optimization_level": "3"})


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is nothing to ask the compiler for but on CPU")
def test_convolutions_are_not_left_to_a_library_that_uses_one_core() -> None:
    def product(x: Any, kernel: Any) -> Any:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, kernel = jnp.ones((4, 8, 8, 16)), jnp.ones((3, 3, 16, 48))
    programs = [
        jax.jit(product, compiler_options=options).lower(x, kernel).compile() for options in ({}, compiler_options())
    ]
    assert "ynn" not in programs[1].as_text()
    np.testing.assert_array_equal(*(program(x, kernel) for program in programs))


@pytest.mark.parametrize("index,case", list(enumerate(FEW)), ids=lambda value: getattr(value, "name", ""))
def test_cheap_operands_equal_the_oracle(index: int, case: Case) -> None:
    """Each row with one kind of operand and one lowering, so that all pairs of them occur."""
    operands = CHEAP[index % len(CHEAP)]
    if not case.spec.exact_in(operands):
        operands = Operands.FLOAT16
    assert_equals_oracle(changed(case, operands=operands, lowering=list(LOWERINGS)[index // len(CHEAP) % 3]))


@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_recomputed_partial_sums_equal_the_oracle(case: Case) -> None:
    assert_equals_oracle(changed(case, residuals=Residuals.INPUTS))


@pytest.mark.parametrize("operands", CHEAP, ids=str)
def test_operands_are_used_and_hold_the_integers_that_they_claim(operands: Operands) -> None:
    largest = operands.largest_integer
    assert int(jnp.dtype(operands.value).type(largest)) == largest
    if operands != Operands.INT8:
        assert int(jnp.dtype(operands.value).type(largest + 1)) == largest
    case = changed(CASES[0], operands=operands)
    jaxpr = str(jax.make_jaxpr(lambda x, k, s: conv.cim_conv(x, k, s, case.spec, **case.window))(*draw(case)))
    short = {"bfloat16": "bf16", "float16": "f16", "int8": "i8"}[operands]
    assert f"{short}[" in jaxpr


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


def test_recomputation_takes_less_memory() -> None:
    """In XLA's own account of six layers, of which the partial sums of one at a time are held."""
    base = spec(activation={"bits": 4}, weight={"bits": 4, "cell_bits": 1}, array={"rows": 64, "columns": 64})
    kernel, x = jnp.ones((3, 3, 32, 32)), jnp.ones((4, 16, 16, 32))
    steps = steps_lib.StepSizes(jnp.float32(1.0), jnp.ones((1, 1)), jnp.ones((1, 1, 1)))

    def temporary(residuals: Residuals) -> int:
        one = dataclasses.replace(base, residuals=residuals)

        def loss(kernel: Any, steps: Any) -> Any:
            y = x
            for _ in range(6):
                y = conv.cim_conv(y, kernel, steps, one)
            return jnp.sum(y)

        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(kernel, steps).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(Residuals.INPUTS) < 0.6 * temporary(Residuals.PSUMS)


@pytest.mark.usefixtures("traced_anew")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere tiles take no turns")
def test_memory_grows_with_tiles_by_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """In XLA's own account: by 16 bits for each partial sum, and by nothing where these are computed again."""
    monkeypatch.setattr(lowering, "LARGE", 0)
    monkeypatch.setattr(lowering, "MANY_TILES", 3)
    x, kernel = jnp.ones((32, 8, 8, 48)), jnp.ones((3, 3, 48, 64))
    steps = steps_lib.StepSizes(jnp.float32(1.0), jnp.ones((1, 1)), jnp.ones((1, 1, 1)))

    def temporary(tiles: int, residuals: Residuals) -> int:
        layer = spec(weight={"bits": 2, "cell_bits": 1}, array={"rows": 9 * 48 // tiles, "columns": 128})
        layer = dataclasses.replace(layer, residuals=residuals)

        def loss(x: Any, kernel: Any, steps: Any) -> Any:
            return jnp.sum(jnp.square(conv.cim_conv(x, kernel, steps, layer)))

        compiled = jax.jit(jax.grad(loss, (0, 1, 2)), compiler_options=compiler_options())
        return compiled.lower(x, kernel, steps).compile().memory_analysis().temp_size_in_bytes

    sums_of_a_tile = 32 * 8 * 8 * 2 * 64
    for residuals, each in ((Residuals.PSUMS, 2), (Residuals.INPUTS, 0)):
        growth = temporary(6, residuals) - temporary(3, residuals)
        assert growth <= 3 * sums_of_a_tile * (each + 0.5), residuals


def test_a_lowering_can_be_forced() -> None:
    assert {choose(name) for name in LOWERINGS} == set(LOWERINGS.values())
