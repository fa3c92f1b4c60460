"""Networks that are handed on as text: they compute the same, and what does not fit or is damaged is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, Case, draw
from test_training import config, quiet

import cimjax
from cimjax.cli import main
from cimjax.core import lsq
from cimjax.core.cells import quantize_weight
from cimjax.core.tiling import tile
from cimjax.nn.parameters import PARAMETERS
from cimjax.nn.weight_codes import has_codes, weight_codes, weight_steps
from cimjax.training.experiment import build
from cimjax.training.packing import to_network, to_state
from cimjax.training.restore import pack
from cimjax.training.run.files import RunFolderError
from cimjax.training.run.network_file import NETWORK, Network, read, write

CODED = [case for case in CASES if has_codes(case.spec)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    cimjax.train(config(epochs=1.0, validation=0.1, ema=0.9), workdir=folder, display=quiet())
    return folder


@pytest.fixture(scope="module")
def packed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(trained, tmp_path_factory.mktemp("packed") / "a" / "network").parent


def test_a_packed_network_computes_the_same_numbers(trained: Path, packed: Path) -> None:
    before, after = cimjax.load(trained), cimjax.load(packed)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    logits = [run.model.apply(run.variables, run.normalise(pixels), train=False) for run in (before, after)]
    np.testing.assert_array_equal(*logits)
    there, here = cimjax.evaluate(trained), cimjax.evaluate(packed)
    assert here == {key: value for key, value in there.items() if key != "average_accuracy"}
    # All is as it was, but for the weights between two codes.
    flat, again = (flax.traverse_util.flatten_dict(run.variables, sep="/") for run in (before, after))
    kernel, spec = "params/conv3/kernel", before.specs["conv3"]
    assert flat.keys() == again.keys() and before.specs == after.specs
    chex.assert_trees_all_equal({**flat, kernel: 0}, {**again, kernel: 0})
    step = weight_steps(flat[f"params/conv3/{PARAMETERS.weight}"], flat[kernel].shape, spec)
    codes = again[kernel] / step
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-5)
    assert np.abs(flat[kernel] - again[kernel]).max() > 0.1 * float(step.min())


def test_the_averaged_parameters_are_evaluated_and_handed_on(trained: Path, tmp_path: Path) -> None:
    last, averaged = cimjax.evaluate(trained), cimjax.evaluate(trained, which="average")
    assert averaged["accuracy"] == last["average_accuracy"] != last["accuracy"] and "average_accuracy" not in averaged
    chex.assert_trees_all_equal(cimjax.load(trained, which="average").variables, cimjax.load(trained).average)
    assert main(["pack", str(trained), "--which", "average", "--save", str(tmp_path / "packed")]) == 0
    packed = cimjax.evaluate(tmp_path / "packed")
    assert packed == {**averaged, "which": "last"}
    without = Path(shutil.copytree(trained, tmp_path / "without"))
    options = json.loads((without / "config.json").read_text())
    (without / "config.json").write_text(json.dumps({**options, "ema": 0.0}))
    with pytest.raises(RunFolderError, match=r"has no average of its parameters, as --config.ema=0.999 keeps"):
        cimjax.evaluate(without, which="average")


def test_what_is_handed_on_is_text_of_its_weight_bits(trained: Path, packed: Path) -> None:
    assert sorted(path.name for path in packed.iterdir()) == ["config.json", "metrics.jsonl", NETWORK]
    assert (packed / "metrics.jsonl").read_bytes() == (trained / "metrics.jsonl").read_bytes()
    options = [json.loads((folder / "config.json").read_text()) for folder in (trained, packed)]
    assert options[1] == {name: value for name, value in options[0].items() if name in options[1]}
    assert not options[1].keys() & {"data_dir", "execution", "writers"} and "spec" in options[1]
    assert (packed / NETWORK).read_bytes().isascii()
    network = read(packed)
    assert network is not None and network.codes == ["params/conv3/kernel"]
    codes = network.arrays["params/conv3/kernel"]
    assert codes.dtype == np.int8 and set(np.unique(codes)) <= {*range(-4, 4)}
    text = json.loads((packed / NETWORK).read_text())["arrays"]["params/conv3/kernel"]["data"]
    assert len(text) < 0.8 * codes.size  # as floats, 5 letters each


@pytest.mark.parametrize("case", CODED[::16], ids=lambda case: case.name)
def test_codes_times_steps_have_the_same_codes(case: Case) -> None:
    _, kernel, steps = draw(case)
    log_step, tiling = lsq.log_from_step(steps.weight), tile(kernel.shape, case.spec)

    def both(kernel: Any) -> Any:
        codes = weight_codes({"a": {"kernel": kernel, PARAMETERS.weight: log_step}}, {"a": case.spec})["a"]
        return codes, codes * weight_steps(log_step, kernel.shape, case.spec)

    codes, again = jax.jit(both)(kernel)
    chex.assert_shape([codes, again], kernel.shape)
    wanted = [quantize_weight(jnp.asarray(w), lsq.step_from_log(log_step), tiling, case.spec) for w in (kernel, again)]
    np.testing.assert_array_equal(*wanted)
    assert len(np.unique(codes)) > 1


def test_arrays_come_back_bit_for_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {
        "a": np.array([np.nan, np.inf, -0.0, 1e-45, 3.1], np.float32),
        "b/c": random.normal(size=(3, 1, 4)).astype(np.float64),
        "scalar": np.float32(2.5).reshape(()),
        "half": np.asarray(jnp.arange(6.0, dtype=jnp.bfloat16).reshape(2, 3)),
        "codes": random.integers(-128, 128, (7, 5), dtype=np.int8),
        "flag": np.array([True, False]),
    }
    extra = {"data": {"mean": [0.1 + 0.2], "name": "ümlaut"}}
    write(tmp_path, Network(7, extra, arrays, ["codes"]))
    network = read(tmp_path)
    assert network is not None and (network.step, network.extra, network.codes) == (7, extra, ["codes"])
    assert network.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        got = network.arrays[name]
        assert (got.dtype, got.shape, got.tobytes()) == (array.dtype, array.shape, array.tobytes()), name


def test_all_that_takes_a_run_takes_a_packed_network(
    trained: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started = cimjax.train(
        config("smoke,adc_bits=2", epochs=0.1),
        workdir=tmp_path / "from",
        variables=cimjax.load(packed),
        display=quiet(),
    )
    assert started.steps
    taught = config(epochs=0.1, teacher=str(packed))
    assert cimjax.train(taught, workdir=tmp_path / "taught", display=quiet()).steps
    assert main(["report", str(packed), "--save", str(tmp_path / "report.md")]) == 0
    assert "conv3" in (tmp_path / "report.md").read_text()
    again = pack(packed, tmp_path / "again")
    assert again.read_bytes() == (packed / NETWORK).read_bytes()
    capsys.readouterr()
    assert main(["pack", str(trained), "--which", "best", "--save", str(tmp_path / "best")]) == 0
    assert f"{tmp_path / 'best'}" in capsys.readouterr().out
    assert cimjax.evaluate(tmp_path / "best")["accuracy"] == cimjax.evaluate(trained, "best")["accuracy"]


class Body(nn.Module):
    """A layer as `nn.scan` takes it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return nn.relu(cimjax.CIMDense(12, name="dense")(x)), None


class Scanned(nn.Module):
    """Two layers of one kernel, and one before them."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(cimjax.CIMDense(12, name="first")(x.reshape(len(x), -1)))
        loop = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = loop(name="loop")(x, None)
        return nn.Dense(10)(x)


def test_layers_of_one_kernel_are_handed_on_as_they_are() -> None:
    images = np.zeros((2, 8, 8, 1), np.uint8), np.zeros(2, np.int32)
    own = cimjax.data.Dataset.from_arrays("own", *images, *images, classes=10)
    experiment = build(config(batch_size=2), model=Scanned(), dataset=own)
    state = experiment.uncalibrated_state()
    network = to_network(experiment, state, {})
    assert network.codes == ["params/first/kernel"]
    again = to_state(network, experiment).params
    chex.assert_trees_all_equal(again["loop"], state.params["loop"])
    assert np.array_equal(again["first"]["kernel"], network.arrays["params/first/kernel"])  # of a step of 1


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    return lambda file: file.write_text(json.dumps([content := json.loads(file.read_text()), change(content)][0]))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a bit": (NETWORK, lambda file: file.write_text(file.read_text().replace('"step": ', '"step": 1')), "not what was"),
    "the end": (NETWORK, lambda file: file.write_bytes(file.read_bytes()[:-40]), "it holds no JSON dict"),
    "no object": (NETWORK, lambda file: file.write_text("[]"), "it holds no JSON dict"),
    "an array": (NETWORK, edited(lambda content: content["arrays"].popitem()), "it is not what was written"),
    "no seal": (NETWORK, edited(lambda content: content.pop("seal")), "it is not what was written"),
    "other bits": ("config.json", edited(lambda config: config["spec"]["weight"].update(cell_bits=2)), "packed"),
    "no cells": ("config.json", edited(lambda config: config.update(rules=[[".*", None]])), "differ in params/conv3"),
    "wider": (
        "config.json",
        edited(lambda config: config["model"].update(width=5)),
        "is not what config.json describes",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_is_refused_in_one_line(packed: Path, tmp_path: Path, what: str) -> None:
    file, damage, message = DAMAGE[what]
    shutil.copytree(packed, tmp_path / "copy")
    damage(tmp_path / "copy" / file)
    with pytest.raises(RunFolderError, match=message) as refused:
        cimjax.evaluate(tmp_path / "copy")
    assert "\n" not in str(refused.value)


def test_what_a_packed_network_cannot_do_is_said(
    trained: Path, packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    with pytest.raises(RunFolderError, match=r"holds a packed network, .*; start from it by --from"):
        cimjax.train(config(epochs=2.0, validation=0.1, ema=0.9), workdir=packed, display=quiet())
    with pytest.raises(RunFolderError, match="of one state; leave out --which"):
        cimjax.evaluate(packed, "best")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(RunFolderError, match=r"full is not empty; give another folder\.$"):
        pack(trained, tmp_path / "full")
    with pytest.raises(RunFolderError, match="cannot write"):
        pack(trained, tmp_path / "full" / "mine" / "deeper")
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before
    for words, message in {
        ("pack", "nowhere", "--save", "x"): "nowhere is no run folder",
        ("pack", str(trained)): "required: --save; for example: cimjax pack",
        ("pack", str(trained), "--save", str(trained)): "is not empty",
    }.items():
        assert main([*words]) == 2
        assert message in capsys.readouterr().err
