"""What `cimjax bench --of data` times: images from files, decoded alone and through the whole pipeline of training.

How many cores a GPU needs beside it follows: the rate at which it trains over the rate of a core.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from ml_collections import ConfigDict

from cimjax.analysis.studies.output import markdown
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
    images_per_second: by the clock, so of what the machine has left beside whatever else it does.
    core_milliseconds: of a processor core for an image, whatever else the machine does; of a pipeline all processes
      together, with what they take to start.
    start_seconds: until the first batch was there.
    """

    name: str
    workers: int
    images_per_second: float
    core_milliseconds: float
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
    split[0]  # what reads records is imported now
    say(f"reading {len(chosen)} images")
    with _Clock() as reading:
        encoded = [split[index].image for index in chosen]
    say(f"decoding {len(chosen)} images")
    with _Clock() as decoding:
        for image in encoded:
            random_crop(image, split.view, rng)
    mean_kb = sum(map(len, encoded)) / len(encoded) / 1e3
    return [
        reading.rate(f"read alone, {mean_kb:.0f} kB an image", len(encoded)),
        decoding.rate("decoded and cropped alone", len(encoded)),
    ]


def _pipeline(split: StreamedSplit, config: ConfigDict, workers: int, batches: int, say: Say) -> Rate:
    from cimjax.data.reading import TrainingStream

    size = min(config.batch_size, len(split))
    say(f"reading {batches + 1} batches of {size} by {f'{workers} workers' if workers else 'threads'}")
    stream = TrainingStream(split, seed=config.seed, batch_size=size, workers=workers)
    with _Clock() as whole:
        start = time.perf_counter()
        try:
            stream.read(0)
            first = time.perf_counter()
            # What is ready before the clock starts is as much as what is ready at its end.
            for step in range(1, batches + 1):
                stream.read(step)
            seconds = time.perf_counter() - first
        finally:
            stream.close()
    name = f"whole pipeline, {workers} worker{'s' if workers > 1 else ''}" if workers else "whole pipeline, threads"
    return Rate(
        name=name,
        workers=workers,
        images_per_second=batches * size / seconds,
        core_milliseconds=1e3 * whole.core_seconds / ((batches + 1) * size),
        start_seconds=first - start,
    )


class _Clock:
    """Seconds by the clock, and of processor cores, this process's and those of processes that have ended."""

    def __enter__(self) -> Self:
        self._start, self._core_start = time.perf_counter(), _core_seconds()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds, self.core_seconds = time.perf_counter() - self._start, _core_seconds() - self._core_start

    def rate(self, name: str, images: int) -> Rate:
        return Rate(name, -1, images / self.seconds, 1e3 * self.core_seconds / images)


def _core_seconds() -> float:
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def show(rates: Sequence[Rate]) -> str:
    """The table as text (Markdown)."""
    head = ["", "images/s", "ms of a core an image", "first batch after, s"]
    rows = []
    for rate in rates:
        start = f"{rate.start_seconds:.1f}" if rate.workers >= 0 else "-"
        rows.append([rate.name, f"{rate.images_per_second:,.0f}", f"{rate.core_milliseconds:.2f}", start])
    return markdown(head, rows)


def cores_for(rates: Sequence[Rate], wanted: float) -> str:
    """One line: how many cores feed `wanted` images/s, by what one worker takes of a core."""
    milliseconds = next(rate.core_milliseconds for rate in rates if rate.workers == 1)
    cores = math.ceil(wanted * milliseconds / 1e3)
    of_one = f"{milliseconds:.1f} ms of a core an image, {1e3 / milliseconds:,.0f} images/s of each"
    return f"{wanted:,.0f} images/s need {cores:,} core{'' if cores == 1 else 's'} ({of_one})"


def save(rates: Sequence[Rate], path: str | Path) -> None:
    """Write machine and figures as JSON."""
    rows = [dataclasses.asdict(rate) for rate in rates]
    Path(path).write_text(json.dumps({**machine(), "rates": rows}, indent=1) + "\n")
