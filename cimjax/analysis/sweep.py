"""Runs over all combinations of options, and the table of their accuracies: mean and spread over seeds.

Every run is a run folder of its own, trained in a process of its own; runs that are finished are not repeated, so a
sweep that was stopped goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np


def parse_axes(words: Sequence[str]) -> dict[str, list[str]]:
    """Axes of a sweep as typed, `NAME=VALUE,VALUE,...`; commas inside brackets belong to a value.

    Raises:
      ValueError: for a word without a name or values, or a name given twice.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        chosen = [value for value in re.split(r",(?![^(]*\))", values) if value]
        if not (name and equals and chosen) or name in axes:
            raise ValueError(
                f"--over {word}: give each option once, with its values, as in --over weight=layer,column."
            )
        axes[name] = chosen
    return axes


def sweep(
    config: str, axes: Mapping[str, Sequence[str]], workdir: str | Path, *, jobs: int = 1, fields: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Train every combination of options and fields.

    Args:
      config: a config file with its options, `configs/digits.py:adc_bits=2`.
      axes: options of the config file, or fields of the config as `config.optimizer.name`, and the values of each.
      workdir: a folder for all runs; one inside for each.
      jobs: runs at a time.
      fields: further arguments of every run, such as `--config.epochs=5`.

    Returns:
      A row for each run, in order: its options, `accuracy` and `best_accuracy` of the test images (0 to 1), `moved`
      (mean |log(s/s0)| by kind of step) and `workdir`.

    Raises:
      ValueError: when a run fails, with what it printed last.
    """
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(lambda options: _run(config, options, Path(workdir), fields), combinations))


def _run(config: str, options: dict[str, str], workdir: Path, fields: Sequence[str]) -> dict[str, Any]:
    path, _, given = config.partition(":")
    chosen = [f"{name}={value}" for name, value in options.items() if not name.startswith("config.")]
    fields = [*fields, *(f"--{name}={value}" for name, value in options.items() if name.startswith("config."))]
    # Whole names: two fields may end alike, and a folder stands for one set of options only.
    names = [f"{name.removeprefix('config.')}={value}" for name, value in options.items()]
    folder = workdir / (re.sub(r"[^\w.=,+-]", "_", "-".join(names)) or "run")
    argument = f"{path}:{','.join([*filter(None, [given]), *chosen])}".rstrip(":")
    if not _finished(folder):
        command = [sys.executable, "-m", "cimjax", "train", "--config", argument, "--workdir", str(folder), *fields]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "nothing was printed").splitlines()[-1]
            raise ValueError(f"The run {argument} failed: {last}")
    return {**options, **_summary(folder), "workdir": str(folder)}


def _records(folder: Path) -> list[dict[str, Any]]:
    from cimjax.training.run.folder import read_records

    return read_records(folder)


def _finished(folder: Path) -> bool:
    if not (folder / "metrics.jsonl").exists():
        return False
    return any(record["split"] == "result" for record in _records(folder))


def _summary(folder: Path) -> dict[str, Any]:
    result = next(record for record in reversed(_records(folder)) if record["split"] == "result")
    return {name: result[name] for name in ("accuracy", "best_accuracy", "moved")}


def table(
    rows: Sequence[dict[str, Any]], axes: Mapping[str, Sequence[str]], over: str = "seed"
) -> list[dict[str, Any]]:
    """Rows of a sweep gathered over one axis: `accuracies`, their `mean`, `lowest` and `highest`, and `moved`."""
    names = [name for name in axes if name != over]
    gathered: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        gathered.setdefault(tuple(row[name] for name in names), []).append(row)
    lines = []
    for key, members in gathered.items():
        accuracies = [row["accuracy"] for row in members]
        kinds = sorted({kind for row in members for kind in row["moved"]})
        moved = {kind: float(np.mean([row["moved"][kind] for row in members])) for kind in kinds}
        lines.append(
            {
                **dict(zip(names, key, strict=True)),
                "runs": len(members),
                "accuracies": accuracies,
                "mean": float(np.mean(accuracies)),
                "lowest": min(accuracies),
                "highest": max(accuracies),
                "moved": moved,
            }
        )
    return lines


def show(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """The table as text (Markdown): test accuracy of the last state in percent, mean and range."""
    head = [*names, "test accuracy", "lowest", "highest", "runs", "steps moved"]
    body = [
        [
            *(str(line[name]) for name in names),
            f"{line['mean']:.2%}",
            f"{line['lowest']:.2%}",
            f"{line['highest']:.2%}",
            str(line["runs"]),
            ", ".join(f"{kind.removesuffix('_moved')} {value:.2g}" for kind, value in line["moved"].items()),
        ]
        for line in lines
    ]
    widths = [max(len(row[index]) for row in [head, *body]) for index in range(len(head))]
    rows = [head, ["-" * width for width in widths], *body]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in rows
    )


def save(rows: Sequence[dict[str, Any]], workdir: str | Path) -> Path:
    """Write all rows as JSON beside the runs."""
    path = Path(workdir) / "sweep.json"
    path.write_text(json.dumps(list(rows), indent=1) + "\n")
    return path
