"""What the runs of a sweep came to: gathered over seeds, as text and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cimjax.spec.base import shortened
from cimjax.training.run.files import write_json

# Axes over which runs are gathered.
SEEDS = ("seed", "config.seed")


def table(rows: Sequence[Mapping[str, Any]], axes: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of a sweep gathered over seeds.

    Args:
      rows: as `sweep` returns them.
      axes: names of the options of a row.

    Returns:
      For each combination of the other options a line with `accuracies` of its finished runs, their `mean`, `lowest`
      and `highest`, `runs` (how many), `planned` (how many there are to be), `seconds` (median) and `moved` (mean); and
      after it one for each run that failed: its options, and `failed`.
    """
    names, seeds = [name for name in axes if name not in SEEDS], [name for name in axes if name in SEEDS]
    gathered: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        gathered.setdefault(tuple(row[name] for name in names), []).append(row)
    lines: list[dict[str, Any]] = []
    for key, members in gathered.items():
        options = dict(zip(names, key, strict=True))
        if done := [row for row in members if "accuracy" in row]:
            lines.append({**options, "planned": len(members), **_gathered(done)})
        for row in members:
            if "failed" in row:
                lines.append({**options, **{name: row[name] for name in seeds}, "failed": row["failed"]})
    return lines


def _gathered(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    accuracies = [row["accuracy"] for row in rows]
    kinds = sorted({kind for row in rows for kind in row["moved"]})
    return {
        "runs": len(rows),
        "accuracies": accuracies,
        "mean": statistics.fmean(accuracies),
        "lowest": min(accuracies),
        "highest": max(accuracies),
        "seconds": statistics.median(row["seconds"] for row in rows),
        "moved": {kind: statistics.fmean(row["moved"][kind] for row in rows if kind in row["moved"]) for kind in kinds},
    }


def show(lines: Sequence[Mapping[str, Any]], axes: Iterable[str]) -> str:
    """The table as text (Markdown): test accuracy of the last state in percent, mean and range, and median seconds.

    Args:
      lines: as `table` returns them.
      axes: names of the options of a row.
    """
    names = [name for name in axes if name not in SEEDS]
    head = [*names, "test accuracy", "lowest", "highest", "runs", "seconds", "steps moved", "remarks"]
    cells = [head, *([*(str(line[name]) for name in names), *_figures(line)] for line in lines)]
    columns = [column for column in zip(*cells, strict=True) if any(column[1:]) or column[0] not in head[-2:]]
    widths = [max(map(len, column)) for column in columns]
    shown = list(zip(*columns, strict=True))
    shown.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in shown
    )


def _figures(line: Mapping[str, Any]) -> list[str]:
    """The cells of a line after its options."""
    if "failed" in line:
        seed = [f"{name}={line[name]}" for name in SEEDS if name in line]
        failed = shortened(" ".join(f"failed: {line['failed']}".replace("|", "/").split()))
        return ["-", "-", "-", " ".join(seed) or "0 of 1", "-", "", failed]
    runs = str(line["runs"]) if line["runs"] == line["planned"] else f"{line['runs']} of {line['planned']}"
    moved = ", ".join(f"{kind.removesuffix('_moved')} {value:.2g}" for kind, value in line["moved"].items())
    return [*(f"{line[name]:.2%}" for name in ("mean", "lowest", "highest")), runs, f"{line['seconds']:.1f}", moved, ""]


def save(rows: Sequence[Mapping[str, Any]], workdir: str | Path) -> Path:
    """Write all rows as JSON beside the runs."""
    path = Path(workdir) / "sweep.json"
    write_json(path, list(rows))
    return path
