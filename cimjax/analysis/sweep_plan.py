"""The combinations of a sweep: their folders and configs, all checked before the first run starts.

How they are trained is in `cimjax.analysis.sweep`. jax is not imported here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cimjax.training.config.fields import check_config, completed
from cimjax.training.config.file import load_config, take_overrides
from cimjax.training.run.address import is_remote
from cimjax.training.run.folder import CONFIG, LOCK, read_config
from cimjax.training.run.lock import give_back, take_lock
from cimjax.training.run.options import MAY_CHANGE, differences, in_a_line
from cimjax.training.run.records import METRICS, Records
from cimjax.training.run.remote import local_copy

# In the folder of a run: the job of a cluster that trains it, while it waits or runs.
JOB = "job.json"
# Bytes of a folder's name; file systems take 255.
_LONGEST = 200


class PlannedRun(NamedTuple):
    """One combination: its values as typed, the config and fields of its run, its epochs, its folder, the folders of
    the runs that it starts and learns from, which must have ended before, and that of one to fork."""

    values: dict[str, str]
    config: str
    fields: list[str]
    epochs: float
    folder: Path
    start: Path | None = None
    teacher: Path | None = None
    fork: Path | None = None

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.values.items()) or self.config


def parse_axes(words: Sequence[str]) -> dict[str, list[str]]:
    """Axes of a sweep as typed, `NAME=VALUE,VALUE,...`; commas inside brackets belong to a value.

    >>> parse_axes(["psum=layer,column", "config.recalibrate_epochs=(),(1,2)"])
    {'psum': ['layer', 'column'], 'config.recalibrate_epochs': ['()', '(1,2)']}

    Raises:
      ValueError: for a word without a name or values, or a name or a value given twice.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        chosen = [value for value in _split(values) if value]
        if not (name and equals and chosen) or name in axes or len(set(chosen)) < len(chosen):
            raise ValueError(
                f"--over {word}: give each option once, with its values, each once, as in --over weight=layer,column."
            )
        axes[name] = chosen
    return axes


def _split(values: str) -> list[str]:
    """Parts between commas that stand in no brackets."""
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def plan(
    config: str,
    axes: Mapping[str, Sequence[str]],
    workdir: str | Path,
    fields: Sequence[str] = (),
    fork: str | Path | None = None,
) -> list[PlannedRun]:
    """Every combination of a sweep, each checked as far as it can be without data and devices.

    Args: those of `sweep`.

    Raises:
      ValueError: one line that names all combinations that cannot be trained, and why.
    """
    runs: list[PlannedRun] = []
    wrong: dict[str, list[str]] = {}
    for chosen in itertools.product(*axes.values()):
        run = _planned(config, dict(zip(axes, chosen, strict=True)), Path(workdir), fields)
        run = run._replace(fork=None if fork is None else Path(fork))
        try:
            runs.append(checked(run, {other.folder for other in runs}))
        except ValueError as error:
            wrong.setdefault(str(error), []).append(str(run))
    bad, total = sum(map(len, wrong.values())), math.prod(map(len, axes.values()))
    if len(wrong) == 1 and bad == total:
        raise ValueError(f"none of the {total} combinations can be trained: {next(iter(wrong))}")
    if wrong:
        reasons = " ".join(f"{', '.join(names)}: {reason}" for reason, names in wrong.items())
        raise ValueError(f"{bad} of {total} combinations cannot be trained, so none was started. {reasons}")
    return runs


def _planned(config: str, values: dict[str, str], workdir: Path, fields: Sequence[str]) -> PlannedRun:
    path, _, given = config.partition(":")
    options = [f"{name}={value}" for name, value in values.items() if not name.startswith("config.")]
    own = [f"--{name}={value}" for name, value in values.items() if name.startswith("config.")]
    argument = f"{path}:{','.join([*filter(None, [given]), *options])}".rstrip(":")
    # Whole names: two fields may end alike, and a folder stands for one set of options only.
    text = "-".join(f"{name.removeprefix('config.')}={value}" for name, value in values.items())
    name = re.sub(r"[^\w.=,+-]", "_", text) or "run"
    if len(name.encode()) > _LONGEST:
        name = f"{name[: _LONGEST // 5]}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return PlannedRun(values, argument, [*fields, *own], 0.0, workdir / name)


def checked(run: PlannedRun, taken: set[Path]) -> PlannedRun:
    """The run with its epochs, where its config can be trained, and its folder is free and of this config. A new one
    also needs the runs that it forks and learns from, but for one that is trained before it.

    Args:
      taken: the folders of other runs.

    Raises:
      ValueError: in one line.
    """
    config = load_config(run.config, take_overrides(run.fields)[0])
    check_config(config)
    if run.folder in taken:
        raise ValueError(f"another combination has the same folder, {run.folder}; give one of them to another sweep.")
    if (run.folder / CONFIG).exists():
        done = Records(run.folder / METRICS).epochs_done()
        may_change = [name for name in MAY_CHANGE if name != "epochs" or done <= math.ceil(config.epochs)]
        old, new = (json.loads(one.to_json_best_effort()) for one in (completed(read_config(run.folder)), config))
        if found := list(differences(old, new, may_change)):
            raise ValueError(f"{run.folder} holds a run of other options ({in_a_line(found)}); give another --workdir.")
    else:
        for other in (run.fork, config.teacher if run.teacher is None else None):
            if other and not is_remote(other):
                read_config(local_copy(other))
    if (run.folder / LOCK).exists() and not (run.folder / JOB).exists():
        give_back(take_lock(run.folder / LOCK))
    return run._replace(epochs=config.epochs)
