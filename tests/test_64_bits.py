"""With JAX_ENABLE_X64, which holds for a whole process: what is wide is used in float32, and gradients have its type.

Checks run in a process of their own, `python tests/test_64_bits.py CHECK ...`.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cimjax
from cimjax import ActivationSpec, ADCSpec, ArraySpec, CIMConv, CIMDense, CIMSpec, Execution, StepSizes, WeightSpec
from cimjax.core.step_sizes import shapes
from cimjax.core.tiling import tile
from cimjax.hardware import engine
from cimjax.hardware.on_chip import apply_on_chip
from cimjax.hardware.survey import layers_of
from cimjax.training.config.file import load_config
from cimjax.training.show.display import Display

ROOT = Path(__file__).parents[1]
SPEC = CIMSpec(
    activation=ActivationSpec(bits=4, slice_bits=2),
    weight=WeightSpec(bits=3, cell_bits=2, encoding="offset", reference="adc"),
    adc=ADCSpec(bits=3, offset=True, start="magnitude"),
    array=ArraySpec(rows=36, columns=32),
)
IDEAL = dataclasses.replace(SPEC, adc=None)
PER_PLANE = WeightSpec(bits=3, cell_bits=1, step_per_plane=True)
FIXED = ADCSpec(step="fixed", full_scale=30.0)
REFERENCE, JOINED = Execution(program="reference"), Execution(program="joined")
WIDE_LAYER = CIMConv(4, (3, 3), spec=SPEC, param_dtype=jnp.float64)
RNG = np.random.default_rng(0)


def check_core(
    spec: CIMSpec = SPEC,
    *executions: Execution,
    x: Any = jnp.float64,
    kernel: Any = jnp.float64,
    steps: Any = jnp.float64,
    shape: tuple[int, ...] = (2, 4, 3, 7),
) -> None:
    """Values are those of float32 operands; gradients too, each of the type of what it is taken to."""
    kernel_shape = (*(3 for _ in shape[2:]), shape[-1], 4)
    wide = (
        jnp.asarray(RNG.uniform(-2, 9, shape), x),
        jnp.asarray(RNG.normal(size=kernel_shape), kernel),
        StepSizes(
            *(s if s is None else jnp.full(s, 0.4, steps) for s in shapes(tile(kernel_shape, spec), spec)),
        ),
    )
    single = jax.tree.map(lambda value: value.astype(jnp.float32), wide)
    tolerance = 1e-2 if jnp.bfloat16 in (x, kernel) else 2e-4
    moved = (*(i for i in (0, 1) if jnp.issubdtype(wide[i].dtype, jnp.floating)), 2)
    compute = cimjax.cim_conv if len(shape) == 4 else cimjax.cim_dense
    expected: Any = None
    for execution in executions or (REFERENCE, JOINED):

        def loss(*operands: Any, execution: Execution = execution) -> Any:
            y = compute(*operands, spec, execution=execution)
            assert y.dtype == jnp.float32
            return jnp.sum(jnp.sin(y))

        gradients = jax.jit(jax.value_and_grad(loss, argnums=moved))
        value, gradient = gradients(*wide)
        chex.assert_trees_all_equal_shapes_and_dtypes(gradient, tuple(wide[i] for i in moved))
        if expected is None:
            expected = gradients(*single)
        chex.assert_trees_all_close(_single((value, gradient)), _single(expected), rtol=tolerance, atol=10 * tolerance)


def check_layer(layer: Any = WIDE_LAYER, x: Any = jnp.float64) -> None:
    """`init` and `calibrate` leave float32 steps; results and gradients have the types that Flax gives them."""
    pixels = RNG.uniform(0, 9, (2, 4, 3, 7))
    inputs = jnp.asarray(pixels, x)
    variables = jax.jit(layer.init)(jax.random.key(1), inputs)
    # Compilers may leave a half kernel as it was drawn.
    tolerance = 1e-2 if layer.param_dtype == jnp.bfloat16 else 1e-5
    again = jax.jit(cimjax.calibrate, static_argnums=0)(layer, variables, inputs)
    chex.assert_trees_all_equal_shapes_and_dtypes(variables, again)
    chex.assert_trees_all_close(_single(again), _single(variables), rtol=tolerance, atol=tolerance)
    for name, value in variables["params"].items():
        assert value.dtype == (layer.param_dtype if name in ("kernel", "bias") else jnp.float32), name
    y, gradient = jax.jit(jax.value_and_grad(lambda v: jnp.sum(layer.apply(v, inputs))))(variables)
    assert y.dtype == jnp.result_type(inputs.dtype, layer.param_dtype)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, variables)
    chex.assert_tree_all_finite(gradient)
    (found,) = layers_of(layer, inputs)
    assert found.cost is not None and found.cost.arrays > 0


def check_training(options: str = "smoke", *, folder: str = "", **fields: Any) -> None:
    """A run starts, goes on to its end and is loaded, all of it in float32."""
    config = load_config(f"configs/digits.py:{options}", [])
    with config.unlocked():
        config.model.width, config.epochs, config.augment.shift, config.augment.flip = 4, 0.15, 1, True
        config.rules = (("conv[12]", None),)
        for name, value in fields.items():
            config[name] = value
    run = Path(folder or os.environ["RUNS"]) / options
    with open(os.devnull, "w") as nothing:
        result = cimjax.train(config, workdir=run, display=Display(stream=nothing))
    assert result.steps >= 3 and cimjax.evaluate(run)["accuracy"] == result.accuracy
    assert {leaf.dtype for leaf in jax.tree.leaves(cimjax.load(run).variables)} == {jnp.dtype(jnp.float32)}


def check_frozen() -> None:
    """The frozen form and its engine: every conversion is that of single precision."""
    network, x = CIMConv(4, (3, 3), spec=SPEC), jax.nn.relu(jax.random.normal(jax.random.key(0), (2, 4, 4, 3)))
    variables, calls = network.init(jax.random.key(1), x), list[Any]()
    layers = cimjax.freeze(network, variables, x)
    y = apply_on_chip(network, variables, layers, x, watch=calls.append)
    chex.assert_trees_all_close(y, network.apply(variables, x), rtol=1e-4, atol=1e-4)
    with jax.enable_x64(False):
        again = cimjax.freeze(network, _single(variables), _single(x))
    of_wide, of_single = (each[""].table for each in (layers, again))
    assert of_wide is not None and of_single is not None
    np.testing.assert_array_equal(of_wide.thresholds, of_single.thresholds)
    np.testing.assert_array_equal(calls[0].readings.accumulators, engine.run(again[""], calls[0].codes).accumulators)


def _single(tree: Any) -> Any:
    return jax.tree.map(lambda value: value.astype(jnp.float32), tree)


CHECKS = {
    "core": check_core,
    "layer": check_layer,
    "training": check_training,
    "frozen": check_frozen,
    "ideal": lambda: check_core(IDEAL, shape=(3, 44)),
    "inputs": lambda: check_core(SPEC, Execution(residuals="inputs"), Execution(product="patches")),
    "grouped": lambda: check_core(SPEC, Execution(product="grouped_conv"), Execution(operands="int8")),
    "pallas": lambda: [check_core(SPEC, Execution(program="pallas"), shape=shape) for shape in ((3, 44), (2, 4, 3, 7))],
    "plane": lambda: check_core(dataclasses.replace(SPEC, weight=PER_PLANE)),
    "fixed": lambda: check_core(dataclasses.replace(SPEC, adc=FIXED), steps=jnp.float32),
    "whole numbers": lambda: check_core(x=jnp.int64),
    "pixels": lambda: check_core(x=jnp.uint8, kernel=jnp.float32),
    "whole weights": lambda: check_core(kernel=jnp.int64),
    "half": lambda: check_core(x=jnp.bfloat16, kernel=jnp.bfloat16),
    "dense layer": lambda: check_layer(CIMDense(4, spec=SPEC)),
    "half layer": lambda: check_layer(CIMConv(4, (3, 3), spec=IDEAL, param_dtype=jnp.bfloat16), jnp.bfloat16),
    "ideal training": lambda: check_training("smoke,psum=none"),
    "full precision": lambda: check_training("smoke,weight=none"),
    "two stages": lambda: check_training("smoke,offset=false", epochs=2.0, ideal_share=0.5, mixup=0.2),
}
QUICK = ("core", "layer", "training")


def run_checks(folder: Path, *names: str) -> None:
    environment = os.environ | {"JAX_ENABLE_X64": "1", "RUNS": str(folder)}
    command = [sys.executable, __file__, *names]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == list(names)


def test_the_mathematics_layers_and_training_hold_with_64_bits(tmp_path: Path) -> None:
    run_checks(tmp_path, *QUICK)


@pytest.mark.full
def test_everything_else_holds_with_64_bits(tmp_path: Path) -> None:
    # The next test runs the last one.
    run_checks(tmp_path, *(name for name in CHECKS if name not in (*QUICK, "ideal training")))


@pytest.mark.full
def test_a_run_with_64_bits_learns_what_one_without_learns(tmp_path: Path) -> None:
    """Of ideal ADCs: behind others, a code at a tie may round differently and runs part."""
    check_training("smoke,psum=none", folder=str(tmp_path / "single"))
    run_checks(tmp_path / "wide", "ideal training")
    wide, single = (cimjax.load(tmp_path / name / "smoke,psum=none").variables for name in ("wide", "single"))
    chex.assert_trees_all_close(wide, single, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    from cimjax.compilation_cache import keep_compiled_programs

    assert jax.config.jax_enable_x64
    keep_compiled_programs()
    for name in sys.argv[1:]:
        CHECKS[name]()
        print(name, flush=True)
