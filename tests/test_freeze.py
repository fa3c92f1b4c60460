"""The frozen form and its engine in NumPy, held against the oracle, against networks, and against what files hold."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest
from cases import CASES, QUICK, Case, draw
from compare import expected
from test_training import config, quiet

import cimjax
from cimjax.cli import main
from cimjax.core import window as window_lib
from cimjax.core.tiling import tile
from cimjax.hardware import engine, export
from cimjax.hardware.freeze import FrozenLayer, freeze_layer
from cimjax.hardware.network import files as network_files
from cimjax.hardware.network.operations import Entry
from cimjax.hardware.on_chip import Call, apply_on_chip
from cimjax.nn.models import build_model
from cimjax.nn.rules import conv_maker

# One of every few of what is quick elsewhere, and those that faults are caught by.
SOME = {*sorted({case.name for case, _ in QUICK})[::4], "adc-1-signed-offset", "slices-sliced-signed-offset-adc"}
EVERY = [pytest.param(case, id=case.name, marks=[] if case.name in SOME else pytest.mark.full) for case in CASES]
ROOT = Path(__file__).parents[1]
SMALL = cimjax.CIMSpec(adc=cimjax.ADCSpec(bits=3, offset=True), array=cimjax.ArraySpec(rows=64, columns=32))
KEY = jax.random.key(1)
IMAGES = jax.nn.relu(jax.random.normal(jax.random.key(0), (3, 8, 8, 3)))


def frozen(case: Case, **options: Any) -> FrozenLayer:
    _, kernel, steps = draw(case)
    window = window_lib.resolve(case.x_shape[1:-1], kernel.shape[:-2], **case.window)
    return freeze_layer(kernel, steps, window, case.spec, name=case.name, **options)


def layer(spec: cimjax.CIMSpec = SMALL, **options: Any) -> FrozenLayer:
    return frozen(Case("layer", spec, kernel_shape=(3, 3, 4, 5)), **options)


@pytest.mark.parametrize("case", EVERY)
def test_conversions_are_the_oracles_and_outputs_too_but_for_rounded_factors(case: Case) -> None:
    forward, _, _ = expected(case)
    of_case = frozen(case, factor_bits=20)
    readings = engine.run(of_case, forward.activation_codes)
    slices, images, height, width, groups, planes, outputs = forward.psums.shape
    flat = (slices, images * height * width, groups, planes, outputs)
    np.testing.assert_array_equal(readings.psums, forward.psums.reshape(flat))
    codes = forward.psums if forward.adc_codes is None else forward.adc_codes
    np.testing.assert_array_equal(readings.codes, codes.reshape(flat))
    assert of_case.activation_step is not None
    unit = np.ldexp(of_case.activation_step, of_case.exponent)
    # Every factor is off by half a unit at most, and so is what is added.
    terms = np.abs(codes).sum(axis=(0, 4, 5)) + 1
    if forward.reference_psums is not None:
        sums = forward.reference_psums if forward.reference_codes is None else forward.reference_codes
        terms = terms + np.abs(sums).sum(axis=(0, 4))[..., None]
    off = 0.5 * unit * terms * max(abs(part.significance) for part in of_case.slices)
    of_float32 = 1e-5 * np.abs(forward.y).max()
    assert (np.abs(readings.accumulators * unit - forward.y) <= off + of_float32).all()


@pytest.mark.parametrize("case", EVERY[:: len(EVERY) // 12])
def test_cells_hold_the_digits_of_every_weight_once(case: Case) -> None:
    forward, _, _ = expected(case)
    of_case, spec = frozen(case), case.spec
    area = int(np.prod(of_case.kernel_size))
    digits = np.full((len(spec.weight.planes), area, *case.kernel_shape[-2:]), -99)
    used = np.zeros(of_case.cells.shape, bool)
    for array, row in np.argwhere(of_case.inputs >= 0):
        channel, place = divmod(int(of_case.inputs[array, row]), area)
        for output, beside in enumerate(of_case.array_of_output):
            for plane, (plus, minus) in enumerate(of_case.columns[:, :, output]):
                held = of_case.cells[array, beside, row].astype(int)
                assert digits[plane, place, channel, output] == -99
                digits[plane, place, channel, output] = held[plus] - (held[minus] if minus >= 0 else 0)
                used[array, beside, row, [each for each in (plus, minus) if each >= 0]] = True
        if of_case.dummy >= 0:
            assert (of_case.cells[array, :, row, of_case.dummy] == 1).all()
            used[array, :, row, of_case.dummy] = True
    np.testing.assert_array_equal(digits, forward.digits.reshape(digits.shape))
    assert not of_case.cells[~used].any() and of_case.cells.max() < 2**spec.weight.cell_bits
    cost = cimjax.layer_cost(case.kernel_shape, (1, 1), spec)
    assert (used.sum(), used.size) == (cost.used_cells, cost.cells)


def test_dense_layers_and_windows_of_one_axis() -> None:
    networks = {
        "dense": cimjax.CIMDense(6, spec=SMALL),
        "line": cimjax.CIMConv(6, 3, strides=2, padding=((2, 1),), kernel_dilation=2, spec=SMALL),
        "spread": cimjax.CIMConv(6, (3, 2), input_dilation=(1, 3), padding=((1, 0), (-1, 2)), spec=SMALL),
        "without bias": cimjax.CIMConv(6, (3, 3), use_bias=False, dtype=np.float16, spec=SMALL),
    }
    for name, network in networks.items():
        x = IMAGES.reshape(3, 64, 3) if name == "line" else IMAGES
        variables = network.init(KEY, x)
        on_chip = apply_on_chip(network, variables, cimjax.freeze(network, variables, x, factor_bits=20), x)
        y = network.apply(variables, x)
        assert on_chip.dtype == y.dtype
        np.testing.assert_allclose(on_chip, y, atol=2e-3 * float(np.abs(y).max()), err_msg=name)


@pytest.mark.full
@pytest.mark.parametrize("options", [{}, {"shortcut": "projection", "preactivation": True}], ids=["plain", "codes"])
def test_every_conversion_of_a_network_is_the_engines(options: dict[str, Any]) -> None:
    network = build_model("resnet8", classes=4, conv=conv_maker(SMALL), rules=(), width=0.5, **options)
    variables = network.init(KEY, IMAGES, train=False)
    layers = cimjax.freeze(network, variables, IMAGES[:1], train=False)
    calls: list[Call] = []
    given, sown = apply_on_chip(
        network, variables, layers, IMAGES, watch=calls.append, feeds_on=False, mutable=["partial_sums"], train=False
    )
    chex.assert_trees_all_equal(given, network.apply(variables, IMAGES, train=False))
    assert [call.layer for call in calls] == list(layers)
    for call in calls:
        found = sown["partial_sums"]
        for part in call.layer.split("/"):
            found = found[part]
        ((psums, _),) = found["adc"]
        np.testing.assert_array_equal(call.readings.psums, psums)
    on_chip = apply_on_chip(network, variables, layers, IMAGES, train=False)
    np.testing.assert_allclose(on_chip, given, atol=0.2 * float(np.abs(given).max()))


def test_more_bits_of_factors_come_nearer() -> None:
    network = nn.Sequential([cimjax.CIMConv(8, (3, 3), spec=SMALL)])
    variables = network.init(KEY, IMAGES)
    y = network.apply(variables, IMAGES)
    off = [
        np.abs(apply_on_chip(network, variables, cimjax.freeze(network, variables, IMAGES, factor_bits=b), IMAGES) - y)
        for b in (4, 8, 16)
    ]
    assert off[0].max() > 8 * off[1].max() > 64 * off[2].max()


def test_files_hold_the_layers_whole(tmp_path: Path) -> None:
    offset = dataclasses.replace(SMALL, weight=cimjax.WeightSpec(bits=3, encoding="offset", reference="adc"))
    ideal = dataclasses.replace(SMALL, adc=None, activation=cimjax.ActivationSpec(bits=4, slice_bits=2))
    layers = {
        name: dataclasses.replace(layer(spec), name=name)
        for name, spec in {"block/conv1": SMALL, "offset": offset, "ideal": ideal}.items()
    }
    codes = np.random.default_rng(0).integers(0, 8, (2, 5, 4, 4))
    calls = [Call(name, codes, engine.run(each, codes)) for name, each in layers.items()]
    export.write(layers, tmp_path, calls)
    read = export.read(tmp_path)
    assert list(read) == list(layers)
    for call in calls:
        chex.assert_trees_all_equal(engine.run(read[call.layer], codes)._asdict(), call.readings._asdict())
        mine, theirs = (dataclasses.asdict(each) for each in (layers[call.layer], read[call.layer]))
        chex.assert_trees_all_equal_shapes_and_dtypes(_arrays(mine), _arrays(theirs))
        assert _plain(mine) == _plain(theirs)
        with np.load(tmp_path / f"{call.layer.replace('/', '.')}.vectors.npz") as vectors:
            np.testing.assert_array_equal(vectors["inputs"], codes)
            np.testing.assert_array_equal(vectors["accumulators"], call.readings.accumulators)
    described = json.loads((tmp_path / "layers.json").read_text())["tables"]
    for each in layers:
        with np.load(tmp_path / f"{each.replace('/', '.')}.npz") as tables:
            assert set(tables) <= set(described)


def _arrays(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if not isinstance(value, np.ndarray | dict)}


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda folder: (folder / "layers.json").unlink(),
    "no JSON": lambda folder: (folder / "layers.json").write_text("{"),
    "another list": lambda folder: (folder / "layers.json").write_text("[]"),
    "a later format": lambda folder: (folder / "layers.json").write_text('{"format": 2}'),
    "no tables": lambda folder: (folder / "layer.npz").unlink(),
    "cut tables": lambda folder: (folder / "layer.npz").write_bytes((folder / "layer.npz").read_bytes()[:500]),
    "empty tables": lambda folder: (folder / "layer.npz").write_bytes(b""),
    "other tables": lambda folder: np.savez(folder / "layer.npz", lowest=np.zeros(3)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    export.write({"layer": layer()}, tmp_path)
    DAMAGE[name](tmp_path)
    with pytest.raises(ValueError, match=r"holds no layers of `cimjax export`, or damaged ones|has format 2; this"):
        export.read(tmp_path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "variation": ({"variation": cimjax.VariationSpec(sigma=0.1)}, "has `variation`: its cells hold real numbers"),
    "cells": ({"weight": cimjax.WeightSpec(signed_cells="ideal")}, "`signed_cells` is 'ideal'"),
    "ADC": (
        {"adc": cimjax.ADCSpec(bits=12)},
        "tables of thresholds at most 10; give `adc.bits` of 10 at most",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_of_integers_is_refused(name: str) -> None:
    fields, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        layer(dataclasses.replace(SMALL, **fields))


def test_accumulators_fit_int32_or_the_layer_is_refused_with_what_fits() -> None:
    wide = cimjax.CIMSpec(activation=cimjax.ActivationSpec(bits=8), weight=cimjax.WeightSpec(bits=8), adc=None)
    with pytest.raises(
        ValueError, match=r"layer can leave an int32 with factors of 24 bits; give `factor_bits` \d+, or"
    ) as e:
        layer(wide, factor_bits=24)
    fits = int(str(e.value).rsplit("`factor_bits` ", 1)[1].split(",")[0])
    of_layer = layer(wide, factor_bits=fits)
    with pytest.raises(ValueError, match="can leave an int32"):
        layer(wide, factor_bits=fits + 1)
    np.testing.assert_array_equal(layer(wide).factors, layer(wide, factor_bits=fits).factors)
    codes = np.full((1, 5, 4, 4), wide.activation.code_range.q_max)
    readings = engine.run(of_layer, codes)
    exact = np.einsum("tmrko,rko->mo", readings.codes.astype(float), of_layer.factors.astype(float)) + of_layer.bias
    np.testing.assert_array_equal(readings.accumulators.reshape(exact.shape), exact)


def test_networks_that_cannot_be_frozen_are_refused() -> None:
    stack = nn.Sequential(
        [nn.vmap(cimjax.CIMDense, variable_axes={"params": 0}, split_rngs={"params": True})(3, spec=SMALL)]
    )
    network = nn.Sequential([cimjax.CIMDense(3, spec=SMALL)])
    variables = network.init(KEY, IMAGES)
    layers = cimjax.freeze(network, variables, IMAGES)
    for refused, words in (
        (lambda: cimjax.freeze(stack, stack.init(KEY, IMAGES), IMAGES), "is 3 layers that .* stack; freeze them"),
        (lambda: cimjax.freeze(nn.Dense(3), {"params": {}}, IMAGES), "no layer in arrays"),
        (lambda: cimjax.freeze(network, variables, IMAGES, factor_bits=1), "`factor_bits` is 1; give 2 to 24"),
        (lambda: apply_on_chip(network, variables, {"a": layers["layers_0"]}, IMAGES), "layers_0 is not among"),
        (
            lambda: jax.jit(lambda x: apply_on_chip(network, variables, layers, x))(IMAGES),
            "layers_0 is called in a traced",
        ),
        (
            lambda: engine.run(layers["layers_0"], np.zeros((2, 5))),
            r"codes of shape \(2, 5\); it takes 2 axes, the last",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            refused()


def test_a_run_is_exported_by_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cimjax.train(config(epochs=1.0), workdir=tmp_path / "run", display=quiet())
    chip = tmp_path / "a" / "chip"
    main(["export", str(tmp_path / "run"), "--save", str(chip), "--vectors", "2", "--images", "30"])
    printed = capsys.readouterr().out
    _, variables, spec = cimjax.load(tmp_path / "run")
    read = export.read(chip)
    assert {each.spec for each in read.values()} == {spec}
    for name, each in read.items():
        below, beside, rows, columns = each.cells.shape
        count = np.load(chip / f"{name}.vectors.npz")["codes"].size
        assert f"{name}: {below * beside} arrays of {rows} x {columns}; {count:,} conversions compared" in printed
        assert cimjax.layer_cost(variables["params"][name]["kernel"].shape, (1, 1), spec).arrays == below * beside
    *_, code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    exec(code, {"folder": chip})
    assert capsys.readouterr().out == "True\n"
    assert "\n30 test images: " in printed and " in integers from the first codes on, " in printed
    network, integers = network_files.read(chip, read), np.load(chip / network_files.VECTORS)
    entries = [integers[str(n)] for n, step in enumerate(network.steps) if isinstance(step.operation, Entry)]
    np.testing.assert_array_equal(network.run(entries)[-1], integers[str(len(network.steps) - 1)])
    assert max(map(len, printed.replace(str(chip), "chip").splitlines())) <= 80
    for arguments, words in (
        (["--save", str(chip)], "is not empty; give another folder"),
        (["--save", str(tmp_path / "b"), "--images", "0"], "`images` is 0; give at least 1"),
        (["--save", str(tmp_path / "b"), "--factor_bits", "40"], "`factor_bits` is 40; give 2 to 24"),
    ):
        assert main(["export", str(tmp_path / "run"), *arguments]) != 0
        assert words in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_groups_of_rows_are_those_of_the_tiling() -> None:
    spec = dataclasses.replace(SMALL, array=cimjax.ArraySpec(rows=20, columns=32, active_rows=7, tiling="im2col"))
    of_layer, tiling = layer(spec), tile((3, 3, 4, 5), spec)
    for group in range(tiling.groups):
        arrays, rows = np.nonzero(of_layer.reads == group)
        assert set(arrays) == {tiling.array_of_group[group]} and len(rows) == tiling.rows_of_group[group] <= 7
        np.testing.assert_array_equal(np.diff(rows), 1)
    np.testing.assert_array_equal(np.sort(of_layer.inputs[of_layer.inputs >= 0]), np.arange(36))
