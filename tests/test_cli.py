"""The command line: what each command calls, and the one line that every mistake ends in."""

from __future__ import annotations

import json
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
from ml_collections import ConfigDict

import cimjax
import cimjax.data
from cimjax.cli import main
from cimjax.data import DataError
from cimjax.training.config.fields import FIELDS
from cimjax.training.config.file import Override, load_config, take_overrides
from cimjax.training.run.folder import RunFolderError

ROOT = pathlib.Path(__file__).parents[1]
DIGITS = "configs/digits.py"
TRAIN = ("train", "--config", DIGITS)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[ConfigDict, pathlib.Path]]:
    """What the training room is called with."""
    seen: list[tuple[ConfigDict, pathlib.Path]] = []
    replace_train(monkeypatch, lambda config, workdir, **_: seen.append((config, workdir)))
    return seen


def replace_train(monkeypatch: pytest.MonkeyPatch, train: Callable[..., Any]) -> None:
    loop = types.ModuleType("cimjax.training.train")
    loop.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cimjax.training.train", loop)


def line_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr that a refused command line ends in."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("cimjax: ") and err.count("\n") == 1 and err.endswith("\n")
    return err.removeprefix("cimjax: ").rstrip("\n")


MISUSES: list[tuple[str, str]] = [
    (
        "",
        "give a command: train, launch, evaluate, pack, export, config show, config resolve, data prepare, data list, "
        "sweep, plot, report, bench, tune, study ",
    ),
    ("trian", "unknown command 'trian' (did you mean 'train'?); see cimjax --help."),
    ("--verson", "unknown command '--verson'"),
    ("data", "give a command: data prepare, data list; see cimjax data --help."),
    ("config", "give a command: config show, config resolve; see cimjax config --help."),
    ("config shwo x", "unknown command 'config shwo' (did you mean 'config show'?)"),
    ("config show", "required: FILE[:OPTIONS]; for example: cimjax config show configs/digits.py"),
    ("config show configs/digit.py", "there is no config file 'configs/digit.py' (did you mean configs/digits.py?)."),
    ("config show configs/digits.py --epochs=2", "a field of the config is set by --config.epochs=2"),
    ("config show configs/digits.py --rows=2", "unknown flag --rows: options follow the file, FILE:rows=2"),
    ("config resolve configs/digits.py --config.ema=1", "`config.ema` is 1; give a number from 0 to below 1."),
    ("config resolve LICENSE", "LICENSE:"),
    ("data prepar digits", "unknown command 'data prepar' (did you mean 'data prepare'?)"),
    ("data prepare", "required: NAME; for example: cimjax data prepare cifar100 --data_dir"),
    ("data prepare digist", "unknown dataset 'digist' (did you mean 'digits'?): known are cifar10,"),
    ("data list all", "unexpected argument 'all'"),
    ("evaluate", "required: RUN; for example: cimjax evaluate runs/"),
    ("evaluate nowhere", "nowhere is no run folder: it has no config.json"),
    ("evaluate nowhere twice", "unexpected argument 'twice'"),
    ("evaluate nowhere --jsn", "unknown flag --jsn (did you mean '--json'?); see cimjax evaluate --help."),
    ("evaluate nowhere --which bset", "argument --which: invalid choice: 'bset' (choose from "),
    ("evaluate nowhere --config.seed=3", "unknown flag --config.seed"),
    ("train", "required: --config; for example: cimjax train --config configs/digits.py:"),
    ("train configs/digits.py", "unexpected argument 'configs/digits.py'; did you mean --config configs/digits.py?"),
    ("train --config", "argument --config: expected one argument"),
    ("train --cofig=configs/digits.py", "unknown flag --cofig (did you mean '--config'?)"),
    (
        "train --config configs/digit.py",
        "there is no config file 'configs/digit.py' (did you mean configs/digits.py?).",
    ),
    ("train --config digits", "there is no config file 'digits' (did you mean configs/digits.py?)."),
    ("train --config configs", "there is no config file 'configs' (known: configs/digits.py"),
    ("train --config configs/digits.py/x", "there is no config file 'configs/digits.py/x'"),
    (
        "train --config configs/digits.py:wieght=layer",
        "unknown option 'wieght' (did you mean 'weight'?); known: scheme",
    ),
    ("train --config configs/digits.py:weight=colum", "weight is 'colum' (did you mean 'column'?); allowed: layer, "),
    ("train --config configs/digits.py:adc_bits=99", "`adc_bits` is 99; give a whole number of bits from 1 to 16"),
    (
        "train --config configs/digits.py:scheme=kim2022,psum=array",
        "scheme=kim2022 means weight=layer,psum=layer,training=post_training, not psum=array; leave one of them out.",
    ),
]

# Each follows `train --config configs/digits.py`.
MISUSES_OF_TRAIN = [
    ("stray", "unexpected argument 'stray'"),
    ("--wrokdir x", "unknown flag --wrokdir (did you mean '--workdir'?); see cimjax train --help."),
    ("--epochs=5", "unknown flag --epochs: a field of the config is set by --config.epochs=5"),
    ("--adc_bits=2", "unknown flag --adc_bits: options follow the file, --config FILE:adc_bits=2"),
    ("--workdir", "argument --workdir: expected one argument"),
    ("--workdir=", "--workdir is empty; give a folder, or leave it out for a new one in runs/."),
    ("--workdir LICENSE", "--workdir LICENSE: {root}/LICENSE is a file, not a folder; give another --workdir."),
    ("--workdir LICENSE/run", "--workdir LICENSE/run: {root}/LICENSE is a file, not a folder"),
    ("--config.epoch=5", "unknown field config.epoch (did you mean config.epochs?)."),
    (
        "--config.learning_rate=5",
        "unknown field config.learning_rate (did you mean config.optimizer.learning_rate?)",
    ),
    ("--config.xyz=1", "unknown field config.xyz (known: dataset, data_dir, "),
    ("--config.seed.x=1", "unknown field config.seed.x"),
    ("--config.=1", "unknown field config. "),
    ("--config.optimizer=adamw", "`config.optimizer` is a group of fields (name, learning_rate, momentum, "),
    ("--config.seed=abc", "`config.seed` is 'abc'; give a whole number from -2147483647 to 2147483647."),
    ("--config.seed=1.0", "`config.seed` is 1.0; give a whole number"),
    ("--config.seed=true", "`config.seed` is True; give a whole number"),
    ("--config.seed", "--config.seed: give a value, as in --config.seed=VALUE."),
    ("--config.spec", "--config.spec: give a value, as in --config.spec=VALUE."),
    ("--config.seed=12345678901234567890", "`config.seed` is 12345678901234567890; give a whole number"),
    ("--config.epochs=nan", "`config.epochs` is 'nan'; give a number from 0 to 2147483647."),
    ("--config.epochs=1e999", "`config.epochs` is inf; give a number"),
    ("--config.epochs=1e308", "`config.epochs` is 1e+308; give a number"),
    ("--config.epochs=-1", "`config.epochs` is -1; give a number from 0"),
    ("--config.augment.flip=maybe", "`config.augment.flip` is 'maybe'; give True or False."),
    ("--config.eval_batch_size=-5", "`config.eval_batch_size` is -5; give a whole number from 1 to 2147483647."),
    ("--config.eval_batch_size=0", "`config.eval_batch_size` is 0; give a whole number from 1"),
    ("--config.calibration_images=0", "`config.calibration_images` is 0; give a whole number from 1"),
    ("--config.calibration_images=-5", "`config.calibration_images` is -5; give a whole number from 1"),
    ("--config.label_smoothing=7", "`config.label_smoothing` is 7; give a number from 0 to below 1."),
    ("--config.optimizer.learning_rate=-1", "`config.optimizer.learning_rate` is -1; give a number from 0 to 1e+30."),
    ("--config.optimizer.name=adam", "`config.optimizer.name` is 'adam'; allowed: sgd, adamw."),
    ("--config.steps_per_dispatch=-1", "`config.steps_per_dispatch` is -1; give a whole number from 0"),
    ("--config.validation=1", "`config.validation` is 1; give a number from 0 to below 1."),
    ("--config.optimizer.accumulate=0", "`config.optimizer.accumulate` is 0; give a whole number from 1"),
    ("--config.optimizer.schedule=cos", "`config.optimizer.schedule` is 'cos'; allowed: cosine, constant, linear, "),
    ("--config.writers=('cvs',)", "`config.writers` is ('cvs',); give a tuple of csv, tensorboard."),
    ("--config.variation_draw=run", "`config.variation_draw` is 'run'; allowed: chip, step."),
    ("--config.execution.program=x", "`config.execution.program` is 'x'; allowed: auto, reference, joined, pallas."),
    ("--config.model.width=0", "`config.model.width` is 0; give a number above 0 up to 4096."),
    ("--config.model.width=2.5", "`config.model.width` is 2.5; give a whole number from 1 to 4096."),
    ("--config.model.blocks=(1,0)", "`config.model.blocks` is (1, 0); give a tuple of whole numbers"),
    ("--config.model.odd={'a':1}", "`config.model.odd` is {{'a': 1}}; give a number, a text, "),
    ("--config.model.classes=3", "unknown field config.model.classes (did you mean config.subset.classes?)"),
    ("--config.rules=(1,)", "`config.rules`: `rules` has 1; give pairs of a path pattern and a specification or None."),
    (
        "--config.recalibrate_epochs=(1,-2)",
        "`config.recalibrate_epochs` is (1, -2); give a tuple of whole numbers from",
    ),
    ("--config.epochs=1" + "0" * 400, "`config.epochs` is 10000"),
    ("--config.epochs=1" + "0" * 5000, "; give a number from 0 to 2147483647."),
    ("--config.seed=2147483648", "`config.seed` is 2147483648; give a whole number"),
    (
        "--config.rules=" + 10_000 * "(",
        "; give a tuple of pairs (pattern of paths, specification or None), as in (('conv1', None),).",
    ),
    ("--config.rules=" + 10_000 * "-" + "1", "; give a tuple of pairs"),
    ("--config." + 10_000 * "a." + "=1", "unknown field config.a.a."),
    ("--config.rules=3", "`config.rules` is 3; give a tuple of pairs"),
    ("--config.spec.adc.bit=2", "unknown field config.spec.adc.bit (did you mean 'bits'?)."),
    ("--config.spec.adc.bits=99", "`config.spec.adc.bits` is 99; give a whole number of bits from 1 to 16"),
    ("--config.spec.adc.bits=two", "`config.spec.adc.bits` is 'two'; give a whole number"),
    ("--config.spec.weight.granularity=colum", "`config.spec.weight.granularity` is 'colum' (did you mean 'column'?)"),
    ("--config.spec.array.rows=32 --config.spec.adc.bits=0", "`config.spec.adc.bits` is 0"),
    ("--config.spec.adc=none --config.spec.adc.bits=2", "config.spec.adc is None here, so nothing in it can be set"),
    ("--config.spec.variation.sigm=1", "unknown field config.spec.variation.sigm (did you mean 'sigma'?)."),
    ("--config.spec.variation.on=cells", "`config.spec.variation.sigma` is None; give a number from 0 to 2."),
    ("--config.spec.variation={}", "`VariationSpec` is given without `config.spec.variation.sigma`"),
    ("--config.spec.variation={'sigma':100}", "`config.spec.variation.sigma` is 100; give a number from 0 to 2."),
    ("--config.spec.adc.bits=1" + "0" * 400, "`config.spec.adc.bits` is 10000"),
    ("--config.spec.adc.full_scale=1" + "0" * 400, "`config.spec.adc.full_scale` is 10000"),
    ("--config.spec.array.rows=1" + "0" * 400, "give a whole number of at least 1 and at most 2147483647."),
    ("--config.spec.adc.bits=" + 10_000 * "[", "`config.spec.adc.bits` is '[[[["),
    ("--config.spec.adc.bits=" + 100 * "[" + 100 * "]", "`config.spec.adc.bits` is [[[[[...]]]]]; give a whole number"),
    ("--config.spec.adc=" + 100 * "{1:" + "2" + 100 * "}", "`ADCSpec` has no field 1"),
    ("--config.spec=column", "`config.spec` is 'column'; give a group of fields or None."),
]


@pytest.mark.parametrize("command,message", MISUSES, ids=[command or "nothing" for command, _ in MISUSES])
def test_a_misuse_ends_in_one_helpful_line(capsys: pytest.CaptureFixture[str], command: str, message: str) -> None:
    assert message in line_of(capsys, *command.split())


@pytest.mark.parametrize("more,message", MISUSES_OF_TRAIN, ids=[more[:60] for more, _ in MISUSES_OF_TRAIN])
def test_a_misuse_of_train_ends_in_one_helpful_line(
    capsys: pytest.CaptureFixture[str], calls: list[Any], more: str, message: str
) -> None:
    line = line_of(capsys, *TRAIN, *more.split())
    assert message.format(root=ROOT) in line and len(line) < 600
    assert not calls


BROKEN_FILES = [
    ("def get_config(options=None)\n    pass", "broken.py:1: SyntaxError: expected ':'"),
    ("\ndef get_config(options=None):\n    return missing", "broken.py:3: NameError: name 'missing' is not defined"),
    ("import no_such_package", "broken.py:1: ModuleNotFoundError: No module named 'no_such_package'"),
    ("import json\n\nx = json.loads('{')\n", "broken.py:3: JSONDecodeError: Expecting property name"),
    ("x = 1", "broken.py has no function get_config(options), which returns a ConfigDict."),
    (
        "def get_config(options=None):\n    return {'seed': 1}",
        "broken.py: get_config() returned a dict; return a Config",
    ),
    (
        "def get_config():\n    return 1",
        "broken.py: TypeError: get_config() takes 0 positional arguments but 1 was given",
    ),
    (
        "from ml_collections import ConfigDict\nfrom cimjax.training.config.options import parse_options\n"
        "def get_config(options=None):\n    parse_options(options, rwos=64)",
        "broken.py:4: ValueError: rwos=64 is no default",
    ),
    (
        "from ml_collections import ConfigDict\ndef get_config(options=None):\n"
        "    return ConfigDict({'spec': {'adc': {'bits': 40}}})",
        "`config.spec.adc.bits` is 40; give a whole number of bits",
    ),
    ("raise RuntimeError('two\\nlines')", "broken.py:1: RuntimeError: two lines"),
]


@pytest.mark.parametrize("text,message", BROKEN_FILES, ids=[message[:40] for _, message in BROKEN_FILES])
def test_a_mistake_in_a_config_file_is_shown_with_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, text: str, message: str
) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    assert message in line_of(capsys, "train", "--config", f"{file}:smoke")


def test_a_bug_of_cimjax_under_a_config_file_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr("cimjax.training.config.options.re", None)
    with pytest.raises(AttributeError):
        main([*TRAIN[:-1], f"{DIGITS}:rows=64"])


def test_options_and_overrides_reach_training_typed(calls: list[Any], tmp_path: pathlib.Path) -> None:
    overrides = {
        "epochs": "5",
        "optimizer.learning_rate": ".05",
        "optimizer.name": "adamw",
        "optimizer.nesterov": "false",
        "data_dir": "none",
        "rules": "(('stem', None),)",
        "spec.adc.bits": "2",
        "spec.weight.subtract": "analog",
        "spec.weight.encoding": "differential",
        "spec.weight.bits": "1.5",
        "spec.array.active_rows": "16",
        "spec.variation.on": "cells",
        "spec.variation.sigma": "0.1",
    }
    words = [f"--config.{field}={text}" for field, text in overrides.items()]
    words += ["--config.augment.flip", "--config.batch_size", "8"]
    workdir = tmp_path / "run"
    assert main(["train", *words, "--config", f"{DIGITS}:psum=layer,seed=3", "--workdir", str(workdir)]) == 0
    ((config, folder),) = calls
    assert folder == workdir and config.is_locked
    assert (config.epochs, config.optimizer.learning_rate, config.optimizer.name) == (5.0, 0.05, "adamw")
    assert type(config.epochs) is float
    assert (config.augment.flip, config.optimizer.nesterov, config.data_dir) == (True, False, "none")
    assert (config.rules, config.batch_size, config.seed) == ((("stem", None),), 8, 3)
    spec = cimjax.CIMSpec.from_dict(config.spec.to_dict())
    assert spec.to_dict() == config.spec.to_dict()
    assert spec.adc == cimjax.ADCSpec(bits=2, granularity="layer", offset=True)
    assert (spec.weight.bits, spec.weight.subtract, spec.array.active_rows) == (1.5, "analog", 16)
    assert spec.variation == cimjax.VariationSpec(sigma=0.1, on="cells")


@pytest.mark.parametrize("file", [*sorted(ROOT.glob("configs/*.py")), ROOT / "README.md"], ids=lambda file: file.stem)
def test_commands_in_documents_can_run(file: pathlib.Path, calls: list[Any], tmp_path: pathlib.Path) -> None:
    """As far as their configs go, and on data that this version reads."""
    text = file.read_text().replace("OPTIONS", "psum=layer").replace("\\\n", " ")
    for line in re.findall(r"^ *python train\.py (--config .*)$", text, re.MULTILINE):
        calls.clear()
        line = re.sub(r"--(from|workdir) \S+", "", line)  # runs that nobody has trained here
        assert main(["train", *shlex.split(line, comments=True), "--workdir", str(tmp_path)]) == 0
        assert calls[0][0].dataset in (*cimjax.data.names(), "folder:PATH")
    for line in re.findall(r"`cimjax (config show [^`]*)`", text):
        assert main(line.split()) == 0


def test_an_override_can_switch_the_adc_or_the_arrays_off_and_on() -> None:
    assert load_config(DIGITS, [Override("spec.adc", "none")]).spec.adc is None
    assert load_config(DIGITS, [Override("spec", "none")]).spec is None
    adc = load_config(f"{DIGITS}:psum=none", [Override("spec.adc", "{'bits': 2}")]).spec.adc
    assert adc.to_dict() == cimjax.ADCSpec(bits=2).to_dict()
    assert load_config(f"{DIGITS}:weight=none", [Override("spec", "{}")]).spec.to_dict() == cimjax.CIMSpec().to_dict()


@hypothesis.given(
    st.sampled_from(
        ["seed", "epochs", "optimizer.learning_rate", "augment.flip", "dataset", "rules", "spec.array.rows"]
    ),
    st.none() | st.text(max_size=12) | st.integers().map(str) | st.floats().map(repr) | st.booleans().map(str),
)
def test_any_override_keeps_the_type_or_is_refused_in_one_line(field: str, text: str | None) -> None:
    usual = load_config(str(ROOT / DIGITS))
    try:
        config = load_config(str(ROOT / DIGITS), [Override(field, text)])
    except ValueError as error:
        assert f"config.{field}" in str(error) and "\n" not in str(error)
        return
    *groups, name = field.split(".")
    for group in groups:
        usual, config = usual[group], config[group]
    assert type(config[name]) is type(usual[name])


@hypothesis.given(st.lists(st.sampled_from(["--config.a.b=1", "--config.a", "--config", "x", "--x", "-1"])))
def test_taking_overrides_loses_no_word(argv: list[str]) -> None:
    overrides, rest = take_overrides(argv)
    words = [word for override in overrides for word in str(override).replace("a=", "a ").split()]
    assert sorted(words + rest) == sorted(argv)


def test_a_run_without_a_workdir_gets_a_new_folder_each_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def train(config: ConfigDict, workdir: pathlib.Path, **_: Any) -> None:
        assert workdir.is_dir()
        (workdir / "config.json").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda form: "20250131-120000")
    replace_train(monkeypatch, train)
    for _ in range(3):
        assert main(["train", "--config", f"{ROOT / DIGITS}:weight=layer, adc_bits=2"]) == 0
    folders = sorted(folder.name for folder in (tmp_path / "runs").iterdir())
    usual = "digits-weight=layer,_adc_bits=2-20250131-120000"
    assert folders == [usual, f"{usual}-2", f"{usual}-3"]
    assert capsys.readouterr().out == "".join(f"run folder: runs/{name}\n" for name in folders)


@pytest.mark.parametrize("kind", [ValueError, DataError, RunFolderError])
def test_a_config_that_cannot_be_built_is_one_line_and_leaves_no_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, kind: type[ValueError]
) -> None:
    def train(config: ConfigDict, workdir: pathlib.Path, **_: Any) -> None:
        raise kind("`batch_size` is 0;\ngive at least 1.")

    monkeypatch.chdir(tmp_path)
    replace_train(monkeypatch, train)
    assert main(["train", "--config", str(ROOT / DIGITS)]) == 2
    assert capsys.readouterr().err == "cimjax: `batch_size` is 0; give at least 1.\n"
    assert list((tmp_path / "runs").iterdir()) == []


def test_runs_that_is_a_file_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, calls: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    assert "cannot create runs/digits-" in line_of(capsys, "train", "--config", str(ROOT / DIGITS))
    assert not calls


@pytest.mark.parametrize("bug", [lambda: int("x"), lambda: {}["x"], lambda: json.loads("{")])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, bug: Any) -> None:
    replace_train(monkeypatch, lambda config, workdir, **_: bug())
    with pytest.raises((ValueError, KeyError)):
        main([*TRAIN, "--workdir", str(tmp_path)])


def test_evaluate_prints_a_line_or_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "config.json").write_text(load_config(DIGITS).to_json())
    room = types.ModuleType("cimjax.training.evaluate")
    room.evaluate = lambda run, which: {"run": run.name, "which": which, "accuracy": 0.98765, "step": 690}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cimjax.training.evaluate", room)
    assert main(["evaluate", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"run {tmp_path.name}  which last  accuracy 0.9877  step 690\n"
    assert main(["evaluate", "--json", "--which=best", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["which"] == "best"


def test_data_commands_call_the_data_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(cimjax.data, "prepare", lambda name, data_dir, progress: f"{data_dir}/{name}")
    assert main(["data", "prepare", "cifar10", "--data_dir", str(tmp_path)]) == 0
    assert main(["data", "list"]) == 0
    assert capsys.readouterr().out.split() == [f"{tmp_path}/cifar10", *cimjax.data.names()]


COMMANDS = [
    "train",
    "launch",
    "evaluate",
    "pack",
    "data prepare",
    "data list",
    "sweep",
    "plot",
    "report",
    "bench",
    "tune",
    "config show",
    "config resolve",
]


@pytest.mark.parametrize("command", ["", "data", "config", *COMMANDS])
def test_help_has_an_example_and_fits_into_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"cimjax {command}" in out and max(map(len, out.splitlines())) <= 80
    for name in COMMANDS:
        example = next(line for line in out.splitlines() if f"  cimjax {name}" in line) if name == command else ""
        assert bool(example) == (name == command)
    if command in ("data", "config"):
        assert [line for line in out.splitlines() if line in [f"cimjax {name}" for name in COMMANDS]] == [
            f"cimjax {name}" for name in COMMANDS if name.startswith(command)
        ]


def test_the_help_of_train_lists_what_can_be_set_and_says_that_a_config_is_executed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "A config file is Python, and is executed" in out
    assert all(f"\n  {name}" in out for name in FIELDS)
    assert "scheme=kim2022|" in out


def test_a_config_is_shown_with_values_and_meanings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", f"{DIGITS}:psum=layer", "--config.epochs=3", "--config.model.width=4"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in (
        "epochs=3.0 passes over the training images; 0:",
        "spec.adc.granularity=layer what shares an ADC step",
        "spec.variation=None of cells: set its sigma, or None",
    ):
        assert line in lines
    assert any(line.startswith("model.width=4 ") for line in lines)
    assert main(["config", "show", f"{DIGITS}:weight=none"]) == 0
    assert "spec=None " in capsys.readouterr().out


def test_a_resolved_config_is_a_config(
    capsys: pytest.CaptureFixture[str], calls: list[Any], tmp_path: pathlib.Path
) -> None:
    words = [f"{ROOT / DIGITS}:psum=layer", "--config.rules=(('stem',None),('conv1',{}))", "--config.epochs=3"]
    assert main(["config", "resolve", *words]) == 0
    file = tmp_path / "resolved.json"
    file.write_text(capsys.readouterr().out)
    usual = load_config(words[0], [Override("rules", "(('stem',None),('conv1',{}))"), Override("epochs", "3")])
    assert load_config(str(file)).to_json() == usual.to_json()
    assert load_config(str(file)).rules == usual.rules == (("stem", None), ("conv1", cimjax.CIMSpec().to_dict()))
    assert main(["train", "--config", str(file), "--config.seed=5", "--workdir", str(tmp_path / "run")]) == 0
    assert (calls[0][0].seed, calls[0][0].spec.adc.granularity) == (5, "layer")
    capsys.readouterr()
    assert "has no options" in line_of(capsys, "train", "--config", f"{file}:smoke")


@pytest.mark.parametrize(
    "text,message",
    [
        ("{", "is no JSON: Expecting property name"),
        ("[" * 100_000, "is no JSON: "),
        ("1" * 5000, "is no JSON: "),
        ("\udc80", "is no JSON: "),
        ("[]", "[] is no config; that is a group of fields (dataset, data_dir, "),
        ("{}", "`config.dataset` is missing; `cimjax config resolve` prints all fields of a config."),
        ('{"epochs": null}', "`config.epochs` is None; give a number from 0"),
        ('{"seed": "22"}', "`config.seed` is '22'; give a whole number"),
        ('{"epochs": NaN}', "`config.epochs` is nan; give a number"),
        ('{"optimizer": 3}', "`config.optimizer` is 3; give a group of fields (name, learning_rate, "),
        ('{"optimiser": {}}', "unknown field config.optimiser (did you mean config.optimizer.name?)"),
        ('{"rules": [["stem", {"adc": {"bits": 99}}]]}', "`config.rules`: `bits` is 99"),
        ('{"model": {"name": "small", "odd": ' + 200 * "[" + 200 * "]" + "}}", "`config.model.odd` is [[[["),
        ('{"data_dir": "a\\u0000b"}', "`config.data_dir` is 'a\\x00b'; give a text of one line."),
    ],
)
def test_a_json_that_is_no_config_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path, text: str, message: str
) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert message in line_of(capsys, "train", "--config", str(file))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cimjax {cimjax.__version__}\n"


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, timeout=60, cwd=ROOT)


@pytest.mark.parametrize(
    "argv,message",
    [
        (("train.py",), "required: --config"),
        (("train.py", "--config", "configs/digit.py"), "did you mean configs/digits.py?"),
        (("train.py", "--config", DIGITS, "--config.spec.adc.bits=99"), "`config.spec.adc.bits` is 99"),
        (("-m", "cimjax", "evaluate", "nowhere"), "nowhere is no run folder"),
    ],
)
def test_a_process_ends_in_one_line(argv: tuple[str, ...], message: str) -> None:
    done = run(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("cimjax: ") and done.stderr.count("\n") == 1 and message in done.stderr


@pytest.mark.parametrize("command", [["sweep", "--help"], ["config", "show", DIGITS], ["data", "list"]])
def test_a_reader_that_leaves_early_is_no_error(command: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cimjax", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 141)


def test_mistakes_and_help_are_answered_without_importing_jax() -> None:
    """So that they come at once; one process for many."""
    commands = [
        ["--help"],
        ["train", "--help"],
        ["config", "show", DIGITS],
        [*TRAIN, "--config.eval_batch_size=-5"],
        [*TRAIN, "--config.epoch=5"],
        [*TRAIN, "--workdir", "LICENSE"],
        ["train", "--config", f"{DIGITS}:adc_bits=99"],
        ["evaluate", "nowhere"],
    ]
    code = f"""
import sys
from cimjax.cli import main
for command in {commands}:
    assert main(command) == (0 if {{'--help', 'show'}} & set(command) else 2), command
heavy = {{'jax', 'numpy', 'flax', 'orbax', 'rich', 'tensorflow_datasets'}} & set(sys.modules)
assert not heavy, heavy
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_control_c_ends_with_130_and_no_traceback(tmp_path: pathlib.Path) -> None:
    code = """
import signal, sys, time, types
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may be born deaf to it
from cimjax.cli import main
loop = types.ModuleType("cimjax.training.train")
loop.train = lambda config, workdir, **_: time.sleep(30)
sys.modules["cimjax.training.train"] = loop
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", code, "train", "--config", str(ROOT / DIGITS)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None and process.stdout.readline().startswith("run folder: runs/digits-")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "cimjax: interrupted\n")
    assert list((tmp_path / "runs").iterdir()) == []
