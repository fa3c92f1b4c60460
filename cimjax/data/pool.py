"""The processes, or threads, that decode images: what they are asked for, what they give, and that they end.

These are not Grain's own processes (`mp_prefetch`). Each of those imports jax, which takes seconds and 200 MB; they
hand over through shared memory, of which a container has 64 MB and in which a killed run leaves what it had there; and
they are ended one after the other, each in its own half second. Nothing here imports Grain or jax.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cimjax.data.decoding import Decoded, UndecodableError, centre_crop, random_crop
from cimjax.data.folder import DataError
from cimjax.data.streams import StreamedSplit, undecodable

# Threads that decode when there are no workers.
THREADS = 8


class Wanted(NamedTuple):
    """Images to decode.

    indices: their numbers in the split.
    crops: the seed of each image's random crop; empty for the middle of every image.
    """

    indices: list[int]
    crops: list[tuple[int, int]] = []  # noqa: RUF012  # never changed


class Part(NamedTuple):
    """Decoded images.

    pixels: (N, H, W, 3) uint8.
    labels: (N,) int32.
    truncated: numbers of those of which a part is missing.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int32]
    truncated: list[int]


class Pool:
    """Decodes images of one split."""

    def __init__(self, split: StreamedSplit, workers: int) -> None:
        """Nothing is started before the first image is wanted.

        Args:
          workers: processes; 0: threads of this one.
        """
        self.size = workers or THREADS
        self._decode: Callable[[Wanted], Part] = _decoded_by_worker if workers else Decoder(split)
        self._pool: Executor = (
            ProcessPoolExecutor(workers, _Spawning(), _begin_worker, (split,))
            if workers
            else ThreadPoolExecutor(THREADS)
        )
        # Processes are started by this thread, and with its mask of signals.
        self._starter = ThreadPoolExecutor(1, initializer=_hear_no_signals)
        # Also where nobody closes it: at the end of the program, or when it is no longer used.
        self._end = weakref.finalize(self, _shut_down, self._pool, self._starter)

    def submit(self, wanted: Wanted) -> Future[Part]:
        """Ask for images; what comes of it is to be read by `result_of`."""
        return self._starter.submit(self._pool.submit, self._decode, wanted).result()

    def close(self) -> None:
        """End processes and threads, when each is done with the image at hand."""
        self._end()


def result_of(part: Future[Part]) -> Part:
    """The images asked for.

    Raises:
      DataError: for an image that cannot be read or decoded, with its name, or a process that has gone.
    """
    try:
        return part.result()
    except DataError as error:
        # Raised anew: what comes out of another process has not the traceback of an error of ours.
        raise DataError(str(error)) from error
    except BrokenProcessPool as error:
        raise DataError(
            "a process that decodes images has ended by itself, as when memory is short; give fewer `workers`"
        ) from error


class Decoder:
    """Images of a split, by their numbers."""

    def __init__(self, split: StreamedSplit) -> None:
        self.split = split

    def __call__(self, wanted: Wanted) -> Part:
        view, count = self.split.view, len(wanted.indices)
        pixels, labels = np.empty((count, *view.shape), np.uint8), np.empty(count, np.int32)
        truncated = []
        for place, index in enumerate(wanted.indices):
            encoded = self.split[index]
            try:
                decoded: Decoded
                if wanted.crops:
                    decoded = random_crop(encoded.image, view, _generator(*wanted.crops[place]))
                else:
                    decoded = centre_crop(encoded.image, view)
            except UndecodableError as error:
                raise undecodable(self.split, index, error) from error
            pixels[place], labels[place] = decoded.pixels, encoded.label
            if not decoded.whole:
                truncated.append(index)
        return Part(pixels, labels, truncated)


def _shut_down(*pools: Executor) -> None:
    for pool in pools:
        pool.shutdown(cancel_futures=True)


def _generator(seed: int, position: int) -> np.random.Generator:
    """A generator for each position of a run, which may be asked for in any order."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))


def _hear_no_signals() -> None:
    """Ctrl-C and SIGTERM reach every process of a group: the run decides when it stops, and then ends its workers."""
    resource_tracker.ensure_running()  # which lets its thread hear them again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})


class _Worker(SpawnProcess):
    """A new process that does not run the user's program again, which `multiprocessing` does up to its `if __name__ ==
    "__main__"`: many programs have none, and workers need nothing of it."""

    def start(self) -> None:
        users = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = users


class _Spawning(SpawnContext):
    Process = _Worker


# Within a worker: what decodes.
_decoder: Decoder | None = None


def _begin_worker(split: StreamedSplit) -> None:
    """Called first in every worker: it ends when its parent does, however that ends, and prints nothing."""
    global _decoder
    warnings.simplefilter("ignore")  # of pillow, about odd images
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _decoder = Decoder(split)


def _decoded_by_worker(wanted: Wanted) -> Part:
    assert _decoder is not None
    return _decoder(wanted)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(0)
