"""The memory of a training step, by the parts that its batch is computed in and by what is kept for its gradients.

Programs are compiled for this machine's device and not run, so that a batch which does not fit is counted too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from cimjax.analysis.bench import on_one_batch, random_images, training_step
from cimjax.analysis.studies.output import markdown
from cimjax.analysis.timing import Say, machine, silent, without_cache
from cimjax.spec import Residuals

# Parts of a batch that are tried, as far as they divide it.
PARTS = (1, 2, 4, 8, 16)


class Need(NamedTuple):
    """What one training step needs.

    parts: `config.optimizer.accumulate`.
    residuals: `config.execution.residuals`; None in full precision, which has none to choose.
    images: images that are computed at a time.
    temporary_mb: what XLA allocates beside arguments and results, in MB of 10^6 bytes.
    whole_mb: together with these: weights, optimizer, one batch of pixels.
    compile_seconds: seconds to compile it.
    """

    parts: int
    residuals: Residuals | None
    images: int
    temporary_mb: float
    whole_mb: float
    compile_seconds: float


def bench_memory(
    config: ConfigDict, *, image: tuple[int, int, int], classes: int, parts: Sequence[int] = PARTS, say: Say = silent
) -> list[Need]:
    """Compile the training step of a configuration for each number of parts, and each way to keep residuals.

    Args:
      config: its network, batch size and optimizer; its data set is not read.
      image: (H, W, C) of an image.
      classes: their classes.
      parts: into how many a batch is split; those that do not divide it are left out.
      say: called with what is compiled from then on.
    """
    dataset = random_images(config.batch_size, image, classes)
    residuals = [None] if config.spec is None else [Residuals.AUTO, Residuals.INPUTS]
    needs = []
    with without_cache():
        for count in (count for count in parts if config.batch_size % count == 0):
            for kept in residuals:
                changed = on_one_batch(config)
                changed.optimizer.accumulate = count
                if kept is not None:
                    changed.execution.residuals = str(kept)
                say(f"compiling a step in {count} parts" + (f", residuals {kept}" if kept else ""))
                step = training_step("train", changed, dataset)
                size = config.batch_size // count
                needs.append(Need(count, kept, size, step.temporary_mb, step.whole_mb, step.compile_seconds))
    return needs


def show(needs: Sequence[Need]) -> str:
    """The table as text (Markdown)."""
    head = ["parts", "residuals", "images at a time", "temporary MB", "whole MB", "compile s"]
    rows = [
        [
            str(need.parts),
            str(need.residuals or "-"),
            str(need.images),
            f"{need.temporary_mb:,.0f}",
            f"{need.whole_mb:,.0f}",
            f"{need.compile_seconds:.1f}",
        ]
        for need in needs
    ]
    return markdown(head, rows)


def save(needs: Sequence[Need], file: Path) -> None:
    """Write machine and figures as JSON."""
    rows = [need._asdict() for need in needs]
    file.write_text(json.dumps({**machine(), "needs": rows}, indent=1) + "\n")
