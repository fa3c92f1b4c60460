"""Streams of decoded images: in which order, from which step on, and ahead of when they are wanted.

The batch of a step is a function of (seed, step) alone: Grain's shuffle is a permutation that can be asked for any
position without being kept, and each image's random crop has a generator of its own, seeded by its position in the run.
So a run begins at any step without reading what came before, and neither the number of worker processes nor that of
machines changes it.

Importing this module imports Grain, and by it jax, which takes a second; `cimjax.data` does so only for a stream.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import grain
import numpy as np
import numpy.typing as npt

from cimjax.data.pool import Part, Pool, Wanted, result_of
from cimjax.data.share import WHOLE, Share
from cimjax.data.streams import StreamedSplit

# Images that are decoded and handed over together, at most.
_PART = 16
# Parts that are asked for ahead, for each worker or thread.
_READY = 3


class Images(NamedTuple):
    """Some images of a split.

    pixels: (N, H, W, 3) uint8.
    labels: (N,) int32.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int32]


def usual_workers() -> int:
    """As many processes as there are cores for them beside this one's, 1 to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, max(1, cores - 1))


class TrainingStream:
    """The batches of a training split, randomly cropped.

    truncated: the names of the truncated images that were read so far, each once.
    """

    def __init__(self, split: StreamedSplit, *, seed: int, batch_size: int, workers: int, share: Share = WHOLE) -> None:
        """Nothing is started yet.

        Args:
          seed: of order and crops, any integer.
          batch_size: images of a whole batch; those that are left at the end of an epoch are left out of it.
          workers: processes that decode; 0: threads of this one.
          share: what of each batch is read here.

        Raises:
          ValueError: a batch that the split cannot fill, or that cannot be shared evenly.
        """
        if not 0 < batch_size <= len(split):
            raise ValueError(f"`batch_size` is {batch_size}; give 1 to {len(split)}, the number of images.")
        if batch_size % share.out_of:
            raise ValueError(f"`batch_size` is {batch_size}, which {share.out_of} processes cannot share evenly.")
        self.split, self.workers, self.mine = split, workers, batch_size // share.out_of
        self.truncated: list[str] = []
        self._order = _Order.of(len(split), seed, batch_size, share)
        self._reading: _Reading | None = None
        self._next = -1

    def read(self, step: int, count: int = 1) -> Images:
        """This process's share of the batches of `count` steps from `step` on, (count, share, H, W, 3) and (count,
        share). The next steps are read ahead; for any other step reading starts anew there.

        Raises:
          DataError: for an image that cannot be read or decoded, with its name.
        """
        if self._reading is None or step != self._next:
            self.close()
            self._reading = _Reading(Pool(self.split, self.workers), self._order.parts_from(step))
        self._next = -1  # until all of it is read
        pixels = np.empty((count * self.mine, *self.split.view.shape), np.uint8)
        labels = np.empty(count * self.mine, np.int32)
        start = 0
        while start < len(labels):
            part = next(self._reading)
            end = start + len(part.labels)
            pixels[start:end], labels[start:end], start = part.pixels, part.labels, end
            for name in map(self.split.name, part.truncated):
                if name not in self.truncated:
                    self.truncated.append(name)
        self._next = step + count
        return Images(pixels.reshape(count, self.mine, *pixels.shape[1:]), labels.reshape(count, self.mine))

    def close(self) -> None:
        """Ends the workers; `read` starts them again."""
        reading, self._reading = self._reading, None
        if reading:
            reading.close()


class EvaluationStream:
    """The images of a split in its order, the middle of each: an iterable of batches, or of a process's share of each.

    The last one may be smaller, or empty. Workers stay between passes, with the first images of the next one ready.
    """

    def __init__(self, split: StreamedSplit, *, batch_size: int, workers: int, share: Share = WHOLE) -> None:
        """Nothing is started yet; arguments as of `TrainingStream`."""
        self.split, self.workers = split, workers
        mine = share.range_of(batch_size)
        starts = range(mine.start, len(split), batch_size)
        self._batches = [_cut(start, min(start + mine.stop - mine.start, len(split))) for start in starts]
        # Of processes whose share of the last batch is empty.
        self._empty = -(-len(split) // batch_size) - len(self._batches)
        self._reading: _Reading | None = None

    def __iter__(self) -> Iterator[Images]:
        """One pass.

        Raises:
          DataError: for an image that cannot be read or decoded, with its name.
        """
        # What a pass that was broken off has left is not where the next one begins.
        reading, self._reading = self._reading, None
        if reading is None:
            reading = _Reading(Pool(self.split, self.workers), itertools.cycle(itertools.chain(*self._batches)))
        left = len(self._batches)
        try:
            for batch in self._batches:
                parts = [next(reading) for _ in batch]
                left -= 1
                pixels = np.concatenate([part.pixels for part in parts])
                yield Images(pixels, np.concatenate([part.labels for part in parts]))
        finally:
            if left:
                reading.close()
        self._reading = reading
        for _ in range(self._empty):
            yield Images(np.empty((0, *self.split.view.shape), np.uint8), np.empty(0, np.int32))

    def close(self) -> None:
        """Ends the workers."""
        reading, self._reading = self._reading, None
        if reading:
            reading.close()


class _Reading:
    """Parts in their order, of which some are asked for ahead."""

    def __init__(self, pool: Pool, wanted: Iterator[Wanted]) -> None:
        self._pool, self._wanted = pool, wanted
        self._asked = collections.deque[Future[Part]]()

    def __next__(self) -> Part:
        while len(self._asked) < _READY * self._pool.size:
            self._asked.append(self._pool.submit(next(self._wanted)))
        return result_of(self._asked.popleft())

    def close(self) -> None:
        """Ends workers and threads."""
        self._pool.close()


@dataclasses.dataclass(frozen=True)
class _Order:
    """Which images stand where in a run.

    images: by position, also beyond an epoch; a dataset of Grain.
    crops: the seed of random crops.
    """

    images: Any
    crops: int
    batch_size: int
    share: Share

    @classmethod
    def of(cls, images: int, seed: int, batch_size: int, share: Share) -> _Order:
        for_order, for_crops = np.random.SeedSequence(seed % 2**64).generate_state(2)
        order = grain.MapDataset.range(images).shuffle(seed=int(for_order))
        in_whole_batches = order.slice(slice(0, images // batch_size * batch_size))
        return cls(in_whole_batches, int(for_crops), batch_size, share)

    def parts_from(self, step: int) -> Iterator[Wanted]:
        """This process's share of the batches from `step` on, in parts."""
        mine = self.share.range_of(self.batch_size)
        part = part_of(mine.stop - mine.start)
        for number in itertools.count(step):
            first = number * self.batch_size
            for start in range(first + mine.start, first + mine.stop, part):
                positions = range(start, start + part)
                yield Wanted([int(self.images[at]) for at in positions], [(self.crops, at) for at in positions])


def _cut(start: int, end: int) -> list[Wanted]:
    """Images from `start` to below `end`, in parts."""
    part = part_of(end - start)
    return [Wanted(list(range(first, min(first + part, end)))) for first in range(start, end, part)]


def part_of(size: int) -> int:
    """How many images are handed over together: a divisor of `size`, so that parts make up whole batches."""
    largest = max(part for part in range(1, _PART + 1) if size % part == 0)
    return largest if largest >= _PART // 4 else size
