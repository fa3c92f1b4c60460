"""`cimjax tune`: real layers by all their programs, the table that is written, and who reads it how."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, draw, spec
from compare import assert_equals_oracle

import cimjax
from cimjax import user_folders
from cimjax.analysis.tune import measure, problem, table
from cimjax.cli import main
from cimjax.core import conv
from cimjax.core.programs import contract, products, tuning
from cimjax.core.tiling import tile
from cimjax.core.window import resolve
from cimjax.hardware.survey import layers_of
from cimjax.nn.calibrate import without_calibration
from cimjax.spec import Execution, Product, Program
from cimjax.training.config.file import load_config
from cimjax.training.experiment import build
from cimjax.training.train_step import train_step

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.py")
CASE = next(case for case in CASES if case.name.startswith("window") and case.spec.adc is not None)
FASTEST = {"program": "joined", "product": "patches", "operands": "bfloat16"}
KIND = jax.devices()[0].device_kind


def seam(case: Case, **execution: str) -> contract.Layer:
    window = resolve(case.x_shape[1:-1], case.kernel_shape[:-2], **case.window)
    return contract.Layer(tile(case.kernel_shape, case.spec), window, case.spec, Execution(**execution))


def tuned(case: Case = CASE, **execution: str) -> Execution:
    return contract.tuned(seam(case, **execution), case.x_shape)


def content(entry: Any = FASTEST, case: Case = CASE, **changes: Any) -> dict[str, Any]:
    layer = seam(case)
    key = tuning.key(layer.tiling, layer.window, layer.spec, case.x_shape)
    about = {"format": tuning.FORMAT, "device": KIND, "jax": jax.__version__, "date": "2026-01-31"}
    return about | {"layers": {key: entry}} | changes


@pytest.fixture(autouse=True)
def user_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The user's folder of tables, an empty one."""
    monkeypatch.delenv(tuning.SETTING, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    folder = user_folders.user_tables()
    assert folder == tmp_path / "caches" / "cimjax" / "tuning"
    folder.mkdir(parents=True)
    tuning.forget()
    yield folder
    tuning.forget()


@pytest.fixture
def write(user_tables: Path) -> Callable[..., Path]:
    def written(value: Any, name: str = tuning.file_name(KIND)) -> Path:
        (user_tables / name).write_text(value if isinstance(value, str) else json.dumps(value))
        tuning.forget()
        return user_tables / name

    return written


# Who reads a table.


def test_a_table_fills_what_the_user_left_open_and_nothing_else(write: Callable[..., Path]) -> None:
    assert tuned() == Execution()
    write(content())
    assert tuned() == Execution(**FASTEST)
    assert tuned(operands="float32", residuals="inputs") == Execution(
        program="joined", product="patches", operands="float32", residuals="inputs"
    )
    assert tuned(product="grouped_conv") == Execution(**FASTEST | {"product": "grouped_conv"})
    for program in ("reference", "pallas"):
        assert tuned(program=program) == Execution(program=program)
    # Another shape, batch, window or specification is another layer.
    for other in ({"x_shape": (16, *CASE.x_shape[1:])}, {"dilation": 2}, {"spec": spec(activation={"bits": 7})}):
        assert tuned(dataclasses.replace(CASE, **other)) == Execution()


def test_a_kernel_is_not_chosen_for_who_asks_for_a_product_or_for_residuals(write: Callable[..., Path]) -> None:
    write(content({"program": "pallas", "operands": "int8"}))
    assert tuned() == Execution(program="pallas", operands="int8")
    for asked in ({"product": "patches"}, {"residuals": "psums"}, {"program": "joined"}):
        assert tuned(**asked) == Execution(**asked)


def test_operands_that_do_not_hold_the_integers_of_a_layer_are_not_taken(write: Callable[..., Path]) -> None:
    wide = dataclasses.replace(CASE, spec=spec(activation={"bits": 12}))
    write(content(FASTEST | {"operands": "int8"}, wide))
    assert tuned(wide) == Execution()


def test_layers_of_one_cost_share_an_entry(write: Callable[..., Path]) -> None:
    """Granularities, bits of the ADC and a batch of about the same size make no other program."""
    large, size = dataclasses.replace(CASE, x_shape=(64, *CASE.x_shape[1:])), CASE.x_shape[1:]
    write(content(case=large))
    adc = dataclasses.replace(CASE.spec.adc, granularity="layer", bits=2)
    alike = dataclasses.replace(large, spec=dataclasses.replace(CASE.spec, adc=adc))
    for images, same in ((45, False), (46, True), (64, True), (90, True), (91, False)):
        found = tuned(dataclasses.replace(alike, x_shape=(images, *size)))
        assert (found == Execution(**FASTEST)) is same, images


def test_values_and_gradients_are_the_same_with_a_table(write: Callable[..., Path]) -> None:
    def operands() -> bool:
        layer = conv.cim_conv
        text = jax.jit(lambda *args: layer(*args, CASE.spec, **CASE.window)).lower(*draw(CASE)).as_text()
        return "xbf16>" in text

    assert not operands()
    write(content())
    assert operands()
    assert_equals_oracle(CASE)


DAMAGED = {
    "cut": (json.dumps(content())[:-20], "it is no JSON"),
    "a list": ([1, 2], "it holds no layers"),
    "layers of a wrong type": (content(layers=[FASTEST]), "it holds no layers"),
    "entries of a wrong type": (content("patches"), "`Execution` is built from a dictionary of its fields, got 'pa"),
    "an unknown program": (content(FASTEST | {"program": "jonied"}), r"did you mean 'joined'\?"),
    "a program of a wrong type": (content(FASTEST | {"program": 3}), "`program` is 3"),
    "an unknown field": (content(FASTEST | {"color": "red"}), "`Execution` has no field 'color'"),
    "another format": (content(format=2), "its format is 2, and 1 is read here"),
    "no format": (content(format=None), "its format is None"),
    "another jax": (content(jax="0.1.75"), "it was measured with jax '0.1.75', and this is"),
    "another device": (content(device="NVIDIA H100 80GB HBM3"), "it was measured on 'NVIDIA H100 80GB HBM3', and this"),
}


@pytest.mark.parametrize("value,reason", DAMAGED.values(), ids=DAMAGED)
def test_a_table_that_cannot_be_used_is_one_warning(write: Callable[..., Path], value: Any, reason: str) -> None:
    file = write(value)
    with pytest.warns(tuning.TuningWarning, match=reason) as caught:
        assert tuned() == Execution()
    (warning,) = caught
    assert str(warning.message).startswith(f"the tuning table {file} is not used: ")
    assert "\n" not in str(warning.message)
    assert tuned() == Execution()


def test_the_setting_names_a_table_or_none(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    own = write(content(FASTEST | {"product": "grouped_conv"}), "mine.json")
    write(content())
    monkeypatch.setenv(tuning.SETTING, str(own))
    assert tuned().product == Product.GROUPED_CONV
    monkeypatch.setenv(tuning.SETTING, "off")
    assert tuned() == Execution()
    monkeypatch.setenv(tuning.SETTING, str(own.with_name("absent.json")))
    with pytest.warns(tuning.TuningWarning, match="absent.json is not used: No such file or directory; measure anew"):
        assert tuned() == Execution()


def test_tables_of_other_devices_lie_beside_and_are_not_looked_at(write: Callable[..., Path]) -> None:
    write("no table", "NVIDIA_H100_80GB_HBM3.json")
    assert tuned() == Execution()
    assert tuning.file_name("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3.json"
    assert tuning.file_name("../TPU v5/lite") == ".._TPU_v5_lite.json"


def test_the_table_of_the_package_is_read_where_the_user_has_none(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    (tmp_path / tuning.file_name(KIND)).write_text(json.dumps(content()))
    assert tuned() == Execution(**FASTEST)
    write(content(FASTEST | {"product": "grouped_conv"}))
    assert tuned().product == Product.GROUPED_CONV


# What is measured.


def small(options: str = "smoke", **fields: Any) -> Any:
    config = load_config(f"{DIGITS}:{options}", [])
    with config.unlocked():
        config.update({"batch_size": 4} | fields)
        config.model.width = 4
    return config


@pytest.mark.full
def test_the_layers_of_a_network_are_found_with_what_the_contract_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its training step; and with ideal ADCs where it trains with these."""
    found = problem.find_problems(small())
    one = next(iter(found.values()))
    experiment = build(small())

    def step(state: Any, pixels: Any, labels: Any) -> Any:
        return train_step(experiment.setup_on_one_device(), state, experiment.preparation.plain(pixels, labels))

    pixels, labels = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4)
    assert keys_of(monkeypatch, step, experiment.abstract_state(), pixels, labels) == list(found)
    assert [names for one in found.values() for names in one.names] == ["conv1", "conv2", "conv3"]
    assert one.title == "3x3 4-4, 8x8" and one.input == (4, 8, 8, 4)
    halves = problem.find_problems(small(ideal_share=0.5), batch=32)
    assert len(halves) == 6 and {key.replace("4 images", "32 images") for key in found} < set(halves)
    assert [one.title for one in halves.values()][1] == "3x3 4-4, 8x8, ideal"


def keys_of(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *args: Any) -> list[str]:
    """The keys under which layers are looked up, each once, while a function is traced."""
    seen: list[str] = []

    def record(layer: contract.Layer, shape: tuple[int, ...]) -> Execution:
        seen.append(tuning.key(layer.tiling, layer.window, layer.spec, shape))
        return layer.execution

    with monkeypatch.context() as patch:
        patch.setattr(contract, "tuned", record)
        jax.eval_shape(function, *args)
    return list(dict.fromkeys(seen))


@pytest.mark.parametrize(
    "model,shape",
    [(cimjax.CIMDense(5), (6, 3, 16)), (cimjax.CIMConv(5, (3,), strides=2), (6, 2, 9, 16))],
    ids=["dense", "convolution"],
)
def test_axes_in_front_count_as_images(model: Any, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.zeros(shape)
    (surveyed,) = layers_of(model, jax.ShapeDtypeStruct((7, *shape[1:]), jnp.float32))
    layer, images = surveyed.behind_seam(6)
    with without_calibration():
        variables = model.init(jax.random.key(0), x)
    key = tuning.key(layer.tiling, layer.window, layer.spec, images)
    assert keys_of(monkeypatch, model.apply, variables, x) == [key]


def test_what_may_compute_a_layer_is_legal_there() -> None:
    every = problem.executions(seam(CASE), everything=True)
    assert every[0] == contract.built_in(CASE.spec, cpu=True) and len(every) == len(set(every)) == 13
    assert {one.program for one in every} == {Program.JOINED, Program.REFERENCE}
    wide = dataclasses.replace(CASE, spec=spec(activation={"bits": 10}))
    assert {str(one.operands) for one in problem.executions(seam(wide))} == {"float32", "float16"}
    macro = spec(array={"rows": 64, "tiling": "im2col", "active_rows": 4})
    loop = Case("", macro, x_shape=(2, 6, 6, 16), kernel_shape=(3, 3, 16, 8))
    assert {one.product for one in problem.executions(seam(loop))} == {Product.CONV_PER_TILE}


def one_problem() -> problem.Problem:
    return problem.Problem(("conv1",), CASE.kernel_shape, CASE.x_shape, seam(CASE))


def test_results_that_differ_are_told() -> None:
    one = one_problem()
    arguments = problem.draw(one)
    run = measure._compile(one, contract.built_in(CASE.spec, cpu=True))
    waits, want = jax.device_get(run(jnp.float32(0), *arguments))
    assert waits == want[3].activation and problem.difference(want, want, arguments) == ""
    for place, name in enumerate(("the output", "the gradient to the input", "the gradient to the kernel")):
        wrong = [part * (1.01 if place == index else 1) for index, part in enumerate(want[:3])]
        assert problem.difference((*wrong, want[3]), want, arguments).startswith(f"{name} differs by ")
    for field in ("activation", "weight", "psum"):
        for factor in (1.05, np.nan):
            wrong = want[3]._replace(**{field: factor * getattr(want[3], field)})
            found = problem.difference((*want[:3], wrong), want, arguments)
            assert found.startswith(f"the gradient to `{field}` differs by "), (field, factor, found)


def test_what_differs_or_fails_is_a_row_and_never_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any) -> Any:
        return tuple(part + 1 for part in products.patches(*args))

    def failing(*args: Any) -> Any:
        raise NotImplementedError("no such\nkernel")

    monkeypatch.setitem(products.PRODUCTS, Product.PATCHES, wrong)
    monkeypatch.setitem(products.PRODUCTS, Product.GROUPED_CONV, failing)
    built_in = contract.built_in(CASE.spec, cpu=True)
    every = [dataclasses.replace(built_in, product=product) for product in ("conv_per_tile", "patches", "grouped_conv")]
    candidates = [measure.Candidate(one) for one in every]
    found = measure._measured(one_problem(), candidates, 2, lambda text: None)
    assert found.best is found.before is candidates[0] and len(candidates[0].seconds) == 2
    assert "differs by" in candidates[1].trouble and candidates[2].trouble == "failed: no such kernel"
    assert not candidates[1].seconds and not candidates[2].seconds
    shown = table.show([found])
    assert "patches float32         the output differs by" in shown and "failed: no such kernel" in shown
    assert max(map(len, shown.splitlines())) <= 80


def with_seconds(*seconds: tuple[float, ...]) -> list[measure.Candidate]:
    every = problem.executions(seam(CASE))
    return [measure.Candidate(one, list(times)) for one, times in zip(every, seconds, strict=False)]


def test_the_fastest_is_chosen_only_beyond_the_spread_of_what_was(write: Callable[..., Path]) -> None:
    candidates = with_seconds((3.0, 2.0, 3.0), (2.5, 2.4, 2.3), (1.9, 9.0, 1.8))
    found = measure._decided(one_problem(), candidates)
    assert found.before is candidates[0] and found.best is candidates[2]
    candidates = with_seconds((3.0, 2.0, 3.0), (2.5, 2.1, 2.1))
    assert measure._decided(one_problem(), candidates).best is candidates[0]
    # `auto` is what an earlier table made of it.
    write(content(candidates[1].execution.to_dict()))
    assert measure._decided(one_problem(), candidates).before is candidates[1]
    failed = with_seconds((), ())
    failed[0].trouble = "out of memory"
    found = measure._decided(one_problem(), failed)
    assert found.best is failed[0] and "out of memory" in table.show([found])


def test_a_table_that_was_written_is_read_and_grows(user_tables: Path) -> None:
    file = user_tables / tuning.file_name(KIND)
    candidates = with_seconds((3.0,), (2.0,))
    found = measure._decided(one_problem(), candidates)
    file.write_text("damaged")
    table.save([found], file)
    assert tuned() == candidates[1].execution
    other = found.problem._replace(input=(64, *CASE.x_shape[1:]))
    failed = found._replace(problem=found.problem._replace(input=(512, *CASE.x_shape[1:])), best=with_seconds(())[0])
    table.save([found._replace(problem=other), failed], file)
    assert len(json.loads(file.read_text())["layers"]) == 2 and tuned() == candidates[1].execution


@pytest.mark.full
def test_a_network_is_tuned_in_this_process_where_others_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process ends at its start: a folder is no number."""
    monkeypatch.setattr(measure, "_start_worker", int)
    monkeypatch.setattr(measure, "executions", lambda layer, everything: problem.executions(layer)[:1])
    notes: list[str] = []
    found = measure.tune(small(), runs=1, note=notes.append)
    assert len(notes) == 1 and notes[0].startswith("compiling in this process what is left: ")
    assert [len(one.candidates[0].seconds) for one in found] == [1, 1, 1]


@pytest.mark.parametrize(
    "words,reason",
    [
        (f"--config {DIGITS}:weight=none", "`tune` times layers in arrays, and this configuration has none."),
        (f"--config {DIGITS} --runs 0", "`tune` takes at least one run"),
        (f"--config {DIGITS} --save /absent/a.json", "there is no folder /absent to write a.json in"),
    ],
)
def test_mistakes_are_one_line(words: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"cimjax: {reason}")


# From the command line.


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | environment
    done = subprocess.run([sys.executable, "-m", "cimjax", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.full
def test_a_device_is_tuned_and_trained_on(tmp_path: Path, user_tables: Path) -> None:
    """A run says so, and goes on without the table, which is none of the things it is made of."""
    rules = (("conv[12]", None),)
    fields = ["--config", f"{DIGITS}:smoke", "--config.batch_size=8", "--config.model.width=4"]
    fields.append(f"--config.rules={rules}")
    done = command("tune", *fields, "--runs", "1", "--all")
    *shown, last = done.stdout.splitlines()
    file = user_tables / tuning.file_name(KIND)
    assert last == str(file) and max(map(len, shown)) <= 80 and "compiling 13 programs in" in done.stderr
    layers = json.loads(file.read_text())["layers"]
    assert list(layers) == list(problem.find_problems(small(batch_size=8, rules=rules))) and len(layers) == 1
    for name in ("conv_per_tile float32", "patches int8", "grouped_conv bfloat16", "reference"):
        assert f"  {name} " in done.stdout, name
    assert not {"differs", "failed"} & set(done.stdout.replace(":", " ").split())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.read(file, KIND).layers.keys() == layers.keys()
    run = ["train", *fields, "--workdir", str(tmp_path / "run"), "--config.subset.images=80"]
    assert f"tuned for {KIND}, 1 of 1 array layers" in command(*run, "--config.epochs=1").stdout
    again = command(*run, "--config.epochs=2", **{tuning.SETTING: "off"})
    assert "tuned for" not in again.stdout and "resumed after step 10" in again.stdout
