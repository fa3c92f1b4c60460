"""What `cimjax bench --of data` times: images from files, decoded alone and through the whole pipeline of training.

How many cores a GPU needs beside it follows: the rate at which it trains over the rate of a core.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from cimjax.analysis.timing import Say, machine, silent
from cimjax.data import StreamedDataset, StreamedSplit, load
from cimjax.data.decoding import random_crop
from cimjax.training.experiment import view_of

# Images that are decoded alone, from memory.
_ALONE = 500


@dataclasses.dataclass(frozen=True)
class Rate:
    """What one way of reading came to.

    name: what was done.
    workers: processes; -1 where there was no pipeline.
    images_per_second: the median over batches, or over images.
    start_seconds: until the first batch was there.
    """

    name: str
    workers: int
    images_per_second: float
    start_seconds: float = 0.0


def bench_data(config: ConfigDict, *, batches: int = 10, cores: int = 1, say: Say = silent) -> list[Rate]:
    """Time reading, decoding and the pipeline, by number of worker processes: 0, 1, 2, 4, ... `cores`.

    Args:
      config: its data set, image size, seed and batch size are used.
      batches: timed of the pipeline, after the first.
      cores: the most workers.
      say: called with what is timed from then on.

    Raises:
      ValueError: for a data set of arrays, which is not read from files.
      DataError: for one that is absent or damaged.
    """
    dataset = load(config.dataset, config.data_dir or None, view=view_of(config))
    if not isinstance(dataset, StreamedDataset):
        raise ValueError(
            f"`config.dataset` is {config.dataset!r}, whose images lie in memory; `--of data` times images from files: "
            "give imagenet2012 or folder:PATH."
        )
    rates = _alone(dataset.train, config.seed, say)
    doubled = itertools.takewhile(lambda workers: workers < cores, (2**power for power in itertools.count()))
    for workers in (0, *doubled, cores):
        rates.append(_pipeline(dataset.train, config, workers, batches, say))
    return rates


def _alone(split: StreamedSplit, seed: int, say: Say) -> list[Rate]:
    """Reading, then decoding and cropping what was read, image by image in one thread."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(split))[:_ALONE]
    say(f"reading {len(chosen)} images")
    start = time.perf_counter()
    encoded = [split[index].image for index in chosen]
    reading = time.perf_counter() - start
    say(f"decoding {len(chosen)} images")
    seconds = []
    for image in encoded:
        start = time.perf_counter()
        random_crop(image, split.view, rng)
        seconds.append(time.perf_counter() - start)
    mean_kb = sum(map(len, encoded)) / len(encoded) / 1e3
    return [
        Rate(f"read alone, {mean_kb:.0f} kB an image", -1, len(encoded) / reading),
        Rate("decoded and cropped alone", -1, len(encoded) / sum(seconds)),
    ]


def _pipeline(split: StreamedSplit, config: ConfigDict, workers: int, batches: int, say: Say) -> Rate:
    from cimjax.data.reading import TrainingStream

    size = min(config.batch_size, len(split))
    say(f"reading {batches + 1} batches of {size} by {workers} workers" if workers else "reading by threads")
    stream = TrainingStream(split, seed=config.seed, batch_size=size, workers=workers)
    start = time.perf_counter()
    try:
        stream.read(0)
        first = time.perf_counter()
        # What workers have ready before the clock starts is theirs to have ready at its end too.
        for step in range(1, batches + 1):
            stream.read(step)
        seconds = time.perf_counter() - first
    finally:
        stream.close()
    name = f"whole pipeline, {workers} worker{'s' if workers > 1 else ''}" if workers else "whole pipeline, threads"
    return Rate(name, workers, batches * size / seconds, first - start)


def show(rates: Sequence[Rate]) -> str:
    """The table as text (Markdown)."""
    rows = [["", "images/s", "ms an image", "first batch after, s"]]
    for rate in rates:
        start = f"{rate.start_seconds:.1f}" if rate.workers >= 0 else ""
        rows.append([rate.name, f"{rate.images_per_second:,.0f}", f"{1e3 / rate.images_per_second:.2f}", start])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    lines = (
        [
            text.ljust(width) if index == 0 else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cores_for(rates: Sequence[Rate], wanted: float) -> str:
    """One line: how many cores feed `wanted` images/s, by the rate of one worker."""
    of_one = next(rate.images_per_second for rate in rates if rate.workers == 1)
    cores = math.ceil(wanted / of_one)
    return f"{wanted:,.0f} images/s need {cores:,} core{'' if cores == 1 else 's'}, at {of_one:,.0f} images/s of one"


def save(rates: Sequence[Rate], path: str | Path) -> None:
    """Write machine and figures as JSON."""
    rows = [dataclasses.asdict(rate) for rate in rates]
    Path(path).write_text(json.dumps({**machine(), "rates": rows}, indent=1) + "\n")
