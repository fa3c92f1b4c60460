"""Streams of decoded images: in which order, by how many processes, from which step on. Grain does the work.

The batch of a step is a function of (seed, step) alone: Grain's shuffle is a permutation that can be asked for any
position, and each image's random crop has a generator of its own, seeded by its position in the run. So a run begins at
any step without reading what came before, and neither the number of worker processes nor that of machines changes it.

Importing this module imports Grain, and by it jax, which takes a second; `cimjax.data` does so only for a stream.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import grain
import numpy as np
import numpy.typing as npt
from absl import flags

from cimjax.data.decoding import Decoded, UndecodableError, centre_crop, random_crop
from cimjax.data.folder import DataError, one_line
from cimjax.data.streams import StreamedSplit, undecodable

# Images that are decoded and handed over together, at most.
_PART = 16
# Parts that each worker keeps ready.
_READY = 2
# Threads of this process that decode when there are no workers; within a worker, to read one file during another.
_THREADS, _WORKER_THREADS = 8, 2
# More positions than any run has, and more bytes than any part.
_FOREVER = 2**60


class Share(NamedTuple):
    """Which part of every batch a process reads: one of `out_of` equal ones, `number` counted from 0."""

    number: int = 0
    out_of: int = 1


WHOLE = Share()


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
        self._part = _part_of(self.mine)
        self._positions = _Positions(batch_size, share, self._part)
        self._images = _in_training_order(split, seed, batch_size).batch(self._part)
        self._running: _Running | None = None
        self._next = -1

    def read(self, step: int, count: int = 1) -> Images:
        """This process's share of the batches of `count` steps from `step` on, (count, share, H, W, 3) and (count,
        share). The next steps are read ahead; for any other step reading starts anew there.

        Raises:
          DataError: for an image that cannot be read or decoded, with its name.
        """
        if self._running is None or step != self._next:
            self.close()
            first = step * (self.mine // self._part)
            parts = grain.MapDataset.range(_FOREVER).map(_Chosen(self._images, self._positions))
            self._running = _Running(parts.slice(slice(first, None)), self.workers)
        self._next = -1  # until all of it is read
        pixels = np.empty((count * self.mine, *self.split.view.shape), np.uint8)
        labels = np.empty(count * self.mine, np.int32)
        for start in range(0, len(labels), self._part):
            part = next(self._running)
            pixels[start : start + self._part], labels[start : start + self._part] = part.pixels, part.labels
            self._look_at(part)
        self._next = step + count
        return Images(pixels.reshape(count, self.mine, *pixels.shape[1:]), labels.reshape(count, self.mine))

    def close(self) -> None:
        """Ends the workers; `read` starts them again."""
        running, self._running = self._running, None
        if running:
            running.close()

    def _look_at(self, part: _Part) -> None:
        for index in part.indices[~part.whole]:
            if (name := self.split.name(index)) not in self.truncated:
                self.truncated.append(name)


class EvaluationStream:
    """The images of a split in its order, the middle of each: an iterable of batches, of which the last may be smaller.

    Workers stay between passes, with the first images of the next one ready.
    """

    def __init__(self, split: StreamedSplit, *, batch_size: int, workers: int) -> None:
        """Nothing is started yet; arguments as of `TrainingStream`."""
        part = _part_of(batch_size)
        self.workers, self._together = workers, batch_size // part
        self._images = grain.MapDataset.range(len(split)).map(_Centred(split)).batch(part)
        self._running: _Running | None = None

    def __iter__(self) -> Iterator[Images]:
        """One pass.

        Raises:
          DataError: for an image that cannot be read or decoded, with its name.
        """
        # What a pass that was broken off has left is not where the next one begins.
        running, self._running = self._running or _Running(self._images.repeat(), self.workers), None
        left = len(self._images)
        try:
            while left:
                parts = [next(running) for _ in range(min(left, self._together))]
                left -= len(parts)
                labels = np.concatenate([part.labels for part in parts])
                yield Images(np.concatenate([part.pixels for part in parts]), labels.astype(np.int32))
        finally:
            if left:
                running.close()
        self._running = running

    def close(self) -> None:
        """Ends the workers."""
        running, self._running = self._running, None
        if running:
            running.close()


def _part_of(size: int) -> int:
    """How many images are handed over together: a divisor of `size`, so that parts make up whole batches."""
    largest = max(part for part in range(1, _PART + 1) if size % part == 0)
    return largest if largest >= _PART // 4 else size


class _Part(NamedTuple):
    """Some decoded images, stacked; `indices` are their numbers in the split."""

    pixels: Any
    labels: Any
    indices: Any
    whole: Any


def _in_training_order(split: StreamedSplit, seed: int, batch_size: int) -> Any:
    """Every image of a run by its position in it; asked for beyond an epoch, those of the next one."""
    for_order, for_crops = np.random.SeedSequence(seed % 2**64).generate_state(2)
    order = grain.MapDataset.range(len(split)).shuffle(seed=int(for_order))
    in_whole_batches = order.slice(slice(0, len(split) // batch_size * batch_size))
    return in_whole_batches.random_map(_Cropped(split), seed=int(for_crops))


@dataclasses.dataclass(frozen=True)
class _Cropped(grain.transforms.RandomMap):
    """The random view of an image by its number."""

    split: StreamedSplit

    def random_map(self, element: int, rng: np.random.Generator) -> _Part:
        label, decoded = _read(self.split, element, lambda encoded: random_crop(encoded, self.split.view, rng))
        return _Part(decoded.pixels, label, element, decoded.whole)


@dataclasses.dataclass(frozen=True)
class _Centred(grain.transforms.Map):
    """The view of an image in evaluation, by its number."""

    split: StreamedSplit

    def map(self, element: int) -> _Part:
        label, decoded = _read(self.split, element, lambda encoded: centre_crop(encoded, self.split.view))
        return _Part(decoded.pixels, label, element, decoded.whole)


def _read(split: StreamedSplit, index: int, decode: Any) -> tuple[int, Decoded]:
    encoded = split[index]
    try:
        return encoded.label, decode(encoded.image)
    except UndecodableError as error:
        raise undecodable(split, index, error) from error


@dataclasses.dataclass(frozen=True)
class _Positions:
    """Which parts of the run a process reads: its share of each batch is whole parts, one after the other."""

    batch_size: int
    share: Share
    part: int

    def __getitem__(self, number: int) -> int:
        """Of its own `number`-th part, the place among those of all processes."""
        mine = self.batch_size // self.share.out_of // self.part
        step, within = divmod(number, mine)
        return (step * self.share.out_of + self.share.number) * mine + within


@dataclasses.dataclass(frozen=True)
class _Chosen(grain.transforms.Map):
    """The parts that a process reads, by their number."""

    parts: Any
    positions: _Positions

    def map(self, element: int) -> _Part:
        return self.parts[self.positions[element]]


class _Running:
    """An endless pipeline in progress: its parts by `next`, and the processes that decode them."""

    def __init__(self, parts: Any, workers: int) -> None:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain asks for flags of its own, also in a program that has none
        threads = _WORKER_THREADS if workers else _THREADS
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=_READY)
        # Through pipes: of shared memory a container has 64 MB, and what a killed process leaves there stays.
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=_FOREVER)
        images = grain.experimental.WithOptionsIterDataset(parts.to_iter_dataset(read), through_pipes)
        self._iterator = iter(images.mp_prefetch(options, worker_init_fn=_begin_worker))
        # All that Grain starts, it starts from this thread, and with its mask of signals.
        self._thread = ThreadPoolExecutor(1, initializer=_hear_no_signals)
        self._started = False

    def __next__(self) -> _Part:
        return self._thread.submit(self._one).result()

    def close(self) -> None:
        """Ends workers and threads."""
        self._thread.submit(self._iterator.close).result()
        self._thread.shutdown()

    def _one(self) -> _Part:
        starting = contextlib.nullcontext() if self._started else _without_the_users_program()
        self._started = True
        try:
            with starting:
                return next(self._iterator)
        except DataError as error:
            # Raised anew: what comes out of another process has not the traceback of an error of ours.
            raise DataError(str(error)) from error
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise DataError(
                f"a process that decodes images has ended by itself ({one_line(error, 90)}), as when memory is short; "
                "give fewer `workers`"
            ) from error


def _hear_no_signals() -> None:
    """Ctrl-C and SIGTERM reach every process of a group: the run decides when it stops, and then ends its workers."""
    resource_tracker.ensure_running()  # which lets its thread hear them again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


@contextlib.contextmanager
def _without_the_users_program() -> Iterator[None]:
    """While workers are started: new processes of `multiprocessing` run the user's program again, up to its `if
    __name__ == "__main__"`, which many do not have. Workers need nothing of it."""
    users = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = users


def _begin_worker(index: int, count: int) -> None:
    """Called in every new worker: it ends when its parent does, however that ends, and prints nothing."""
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # of pillow, about odd images
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
