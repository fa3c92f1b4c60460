"""Damage to the files of a run: each is refused by name, or recovered from with a warning, and never changes a result.

A tiny run is trained once. Then one file at a time is damaged in a copy of its folder, which is taken up again as
training does, and read as evaluation does. `python tests/test_damage.py` prints the table of what came of all damages.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import cimjax
from cimjax.data import Dataset
from cimjax.training.config.fields import completed
from cimjax.training.config.file import load_config
from cimjax.training.experiment import build
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.folder import LOCK, RunFolder, RunFolderError, RunFolderWarning, read_config, read_records
from cimjax.training.show.display import Display

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py:smoke")
QUICK, ALL = 25, 90
# What the loop saves beside a state.
HOLDING = {"best": float, "seen": dict}


class Net(nn.Module):
    """The smallest network with an array layer."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        spec = cimjax.CIMSpec(array=cimjax.ArraySpec(rows=16, tiling="im2col"))
        return nn.Dense(3)(nn.relu(cimjax.CIMConv(2, (3, 3), strides=(4, 4), spec=spec)(x)).reshape(len(x), -1))


@dataclasses.dataclass(frozen=True)
class Run:
    """A whole run: its folder, what it is trained with, its leaves by step, and its records."""

    folder: Path
    config: dict[str, Any]
    state: Any
    leaves: dict[int, list[bytes]]
    best: int
    records: list[dict[str, Any]]


def data() -> Dataset:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 60)
    images = (rng.integers(0, 60, (60, 6, 6, 1)) + 60 * labels[:, None, None, None]).astype(np.uint8)
    return Dataset.from_arrays("tiny", images[:48], labels[:48], images[48:], labels[48:])


@functools.cache
def whole(place: Path) -> Run:
    config = load_config(CONFIG, [])
    with config.unlocked():
        config.epochs, config.batch_size, config.eval_batch_size, config.calibration_images = 3.0, 12, 12, 12
        config.validation = 0.25
    folder = place / "run"
    train(config, folder)
    shutil.copytree(folder, place / "as trained")
    state = build(config, model=Net(), dataset=data()).abstract_state()
    plain = json.loads(config.to_json_best_effort())
    # A state that is neither the best nor the one before it, and the mark of the records.
    last, extra = Checkpoints(folder).restore(state)
    last = last.replace(step=last.step + 4, params=jax.tree.map(lambda value: value * 1.5, last.params))
    with RunFolder(folder, plain) as run:
        run.log({"step": int(last.step), "split": "test"})
        Checkpoints(folder).save(int(last.step), last, {**extra, "metrics": run.records.mark()})
    leaves = {}
    for path in sorted((folder / "checkpoints").iterdir()):
        alone = place / "alone" / path.name
        shutil.copytree(path, alone / "checkpoints" / path.name)
        found, _ = Checkpoints(alone).restore(state)
        leaves[int(found.step)] = bits(found)
    best, _ = Checkpoints(folder).restore(state, which="best")
    return Run(folder, plain, state, leaves, int(best.step), untimed(read_records(folder)))


def train(config: Any, folder: Path) -> None:
    with open(os.devnull, "w") as stream:
        cimjax.train(config, workdir=folder, model=Net(), dataset=data(), display=Display(stream=stream))


def bits(state: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if "second" not in name} for record in records]


# ---- what is done to a file


def truncate(path: Path, chance: random.Random) -> None:
    os.truncate(path, chance.randrange(path.stat().st_size + 1))


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


def flip(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def empty(path: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def other_json(path: Path, chance: random.Random) -> None:
    deep = 900 * '{"a":' + "1" + 900 * "}"
    path.write_text(chance.choice(["{}\n", "[]\n", "null\n", '{"step": "22"}\n', "[[]]\n", "9" * 5000, deep]))


def other_value(path: Path, chance: random.Random) -> None:
    """One value of a JSON text becomes another, of any type."""
    lines = path.read_text(errors="surrogateescape").splitlines(keepends=True)
    colons = [(row, place) for row, line in enumerate(lines) for place, letter in enumerate(line) if letter == ":"]
    if colons:
        row, place = chance.choice(colons)
        end = min((i for i in (lines[row].find(mark, place) for mark in ",}\n") if i > 0), default=len(lines[row]))
        value = chance.choice(["null", '"22"', "1e400", "-1", "{}", "[]"])
        lines[row] = lines[row][:place] + ": " + value + lines[row][end:]
    path.write_text("".join(lines), errors="surrogateescape")


KINDS: list[Callable[[Path, random.Random], None]] = [truncate, delete, flip, flip, empty, other_json, other_value]


def damage(number: int, folder: Path) -> str:
    """Do the damage of a number to a folder; returns its words."""
    chance = random.Random(number)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    # Every file of the folder itself has its turn among the quick ones.
    near = [path for path in files if path.parent == folder]
    path = near[number // 3 % len(near)] if number % 3 == 0 else chance.choice(files)
    kind = KINDS[number % len(KINDS)]
    before = path.read_bytes()
    kind(path, chance)
    same = path.exists() and path.read_bytes() == before
    return f"{kind.__name__} {path.relative_to(folder)}{' (no change)' if same else ''}"


# ---- what is made of it


def as_plain(options: dict[str, Any]) -> dict[str, Any]:
    return json.loads(completed(options).to_json_best_effort())


def take_up(run: Run, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """As training goes on."""
    with RunFolder(folder, run.config, completed=as_plain) as opened:
        state, extra = Checkpoints(folder).restore(run.state, holding=HOLDING)
        opened.forget_after(int(state.step), extra.get("metrics"))
        return state, untimed(opened.records.read())


def evaluate(run: Run, folder: Path) -> tuple[Any, list[dict[str, Any]]]:
    """As a trained run is looked at."""
    read_config(folder, completed)
    return Checkpoints(folder).restore(run.state, which="best", holding=HOLDING)[0], []


def outcome(run: Run, folder: Path, use: Callable[[Run, Path], Any], words: str) -> str:
    """`refused`, `recovered` or `unharmed`; an assertion fails for anything else."""
    save = next((part for part in Path(words.split(" ")[1]).parts if "_step_" in part), None)
    name = save or Path(words.split(" ")[1]).name
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            state, records = use(run, folder)
        except RunFolderError as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            assert name in str(error) or "a run of other options" in str(error), f"{words}: {error}"
            return "refused"
    told = [str(warning.message) for warning in caught if warning.category is RunFolderWarning]
    step = int(state.step)
    assert bits(state) == run.leaves[step], f"{words}: other numbers"
    if use is evaluate:
        assert step == run.best, f"{words}: another state than the best"
    else:
        expected = [record for record in run.records if record["step"] <= step]
        assert told or (step == max(run.leaves) and records == expected), f"{words}: changed in silence"
    assert not told or any(name in text for text in told), f"{words}: {told}"
    assert not any("\n" in text for text in told), f"{words}: {told}"
    return "recovered" if told else "unharmed"


def outcomes(number: int, run: Run, place: Path) -> tuple[str, str, str]:
    """The words of a damage, what training makes of it, and what evaluation does."""
    results = []
    for use in (take_up, evaluate):
        folder = place / f"{number}-{use.__name__}"
        shutil.copytree(run.folder, folder)
        words = damage(number, folder)
        results.append(outcome(run, folder, use, words))
        shutil.rmtree(folder)
    return words, results[0], results[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return whole(tmp_path_factory.mktemp("damage"))


@pytest.mark.parametrize(
    "number", [*range(QUICK), *(pytest.param(number, marks=pytest.mark.full) for number in range(QUICK, ALL))]
)
def test_damage_is_refused_or_recovered_from_and_never_changes_a_result(
    number: int, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    outcomes(number, run, tmp_path)
    assert capfd.readouterr() == ("", "")


def test_what_is_whole_is_taken_as_it_is(run: Run, tmp_path: Path) -> None:
    for use in (take_up, evaluate):
        shutil.copytree(run.folder, tmp_path / use.__name__)
        assert outcome(run, tmp_path / use.__name__, use, "nothing config.json") == "unharmed"


def test_files_that_are_exchanged_between_saves_are_found(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path / "run")
    *_, before, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for part in ("state", "_CHECKPOINT_METADATA"):
        copy = tmp_path / part
        shutil.copytree(run.folder, copy)
        for name in (before.name, last.name):
            target = copy / "checkpoints" / name / part
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        for name, other in ((before.name, last.name), (last.name, before.name)):
            source, target = run.folder / "checkpoints" / other / part, copy / "checkpoints" / name / part
            shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        assert outcome(run, copy, take_up, f"exchange checkpoints/{last.name}/{part}") in ("recovered", "refused")


@pytest.mark.full
def test_training_goes_on_from_the_state_before_a_damaged_one_to_the_same_end(run: Run, tmp_path: Path) -> None:
    trained = run.folder.parent / "as trained"
    folder = shutil.copytree(trained, tmp_path / "run")
    _, last = sorted((folder / "checkpoints").iterdir())[-2:]
    shutil.rmtree(last / "state" / "d")
    with pytest.warns(RunFolderWarning, match=f"{last.name} is damaged .* takes its place"):
        train(ConfigDict(run.config), folder)
    assert untimed(read_records(folder)) == untimed(read_records(trained))
    ends = [Checkpoints(at).restore(run.state)[0] for at in (folder, trained)]
    assert bits(ends[0]) == bits(ends[1])


if __name__ == "__main__":
    table: collections.Counter[tuple[str, ...]] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        tiny = whole(Path(place))
        for number in range(int(sys.argv[1]) if len(sys.argv) > 1 else ALL):
            words, training, evaluation = outcomes(number, tiny, Path(place))
            print(f"{number:4} {words}: {training}, {evaluation}", flush=True)
            kind, _, file = words.partition(" ")
            part = "a save" if "_step_" in file else file.split(" ")[0]
            table[kind + (" nothing" if "(no change)" in file else ""), part, training, evaluation] += 1
    print(f"\n{'damage':20} {'file':16} {'training':10} {'evaluation':10} count")
    for key, count in sorted(table.items()):
        print(f"{key[0]:20} {key[1]:16} {key[2]:10} {key[3]:10} {count}")
