"""The processes of a run: how they come together, and the words that they exchange on the host.

Arrays never go this way: devices exchange them within programs (`cimjax.training.parallel`). Words go by the service
with which JAX itself keeps processes together; JAX gives no public name to it. This is the only file that knows it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cimjax.spec.base import Notice

# Seconds without a sign of life after which JAX's service takes a process for dead; the rest then end, within 15.
_HEARTBEAT = 10
# Seconds between two lines about a process for which the others wait.
_PATIENCE = 30
# Seconds in which gloo has printed what it prints when it connects.
_PRINTED = 0.3


class ProcessesWarning(Notice):
    """What a run of several processes goes on in spite of: one line."""


class ProcessesError(ValueError):
    """What keeps processes from working together: one line that says what, and how to mend it."""


def join(address: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Come together with the other processes; must be called before anything else of jax.

    Args:
      address: HOST:PORT of process 0; None, as for the others: what SLURM, Open MPI, GKE or a TPU tells.
      count: how many processes there are.
      index: which of them this one is, from 0.

    Raises:
      ProcessesError: where nothing tells of other processes, or they do not come.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=_HEARTBEAT)
    except ValueError as error:
        raise ProcessesError(
            "--distributed found no SLURM, Open MPI, GKE or TPU that tells of processes; give --coordinator_address, "
            "--num_processes and --process_id, or start them by `cimjax launch`."
        ) from error
    except RuntimeError as error:
        raise ProcessesError(
            f"the processes did not come together ({str(error).splitlines()[0]}); see that --coordinator_address "
            "is the machine of process 0 and a free port, and that all others were started."
        ) from error
    if jax.default_backend() == "cpu":
        _connect_by_gloo()


class Group:
    """The processes of a run, all of which must call each method, in the same order.

    index: which of them this one is; 0 is the first.
    count: how many there are.
    """

    def __init__(self, index: int, count: int, client: Any = None) -> None:
        self.index, self.count, self._client = index, count, client
        self._exchanges = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes the run folder."""
        return self.index == 0

    def gather(self, what: str, word: str) -> list[str]:
        """The words that all give, in the order of processes.

        Args:
          what: what they are about: in the line that names a process for which the others wait.
        """
        if self.count == 1:
            return [word]
        self._exchanges += 1
        place = f"cimjax/exchange/{self._exchanges} {what}"
        self.tell(f"{place}/{self.index}", word)
        return [self._wait_for(f"{place}/{other}", what, other) for other in range(self.count)]

    def of_first(self, what: str, word: str) -> str:
        """The word of process 0, whatever the others give."""
        return self.gather(what, word)[0]

    def require_same(self, what: str, content: bytes, mend: str) -> None:
        """Refuse what differs between processes.

        Args:
          what: how to call it in the message.
          content: of which the same bytes are wanted everywhere.
          mend: what to do about it.

        Raises:
          ProcessesError: on all processes, naming those that differ from process 0.
        """
        digests = self.gather(what, hashlib.sha256(content).hexdigest())
        others = [str(index) for index, digest in enumerate(digests) if digest != digests[0]]
        if others:
            one = len(others) == 1
            named = f"process {others[0]} has" if one else f"processes {', '.join(others[:8])} have"
            raise ProcessesError(f"{named} another {what} than process 0; {mend}.")

    def tell(self, name: str, word: str) -> None:
        """Leave a word under a name, for whoever looks; a later one takes its place. For one process by itself."""
        self._client.key_value_set(name, word, allow_overwrite=True)

    def told(self, name: str) -> dict[int, str]:
        """What was left under NAME/INDEX so far, by index. For one process by itself."""
        return {int(key.rpartition("/")[2]): word for key, word in self._client.key_value_dir_get(name)}

    def _wait_for(self, name: str, what: str, other: int) -> str:
        began = time.monotonic()
        while True:
            try:
                return self._client.blocking_key_value_get(name, 1000 * _PATIENCE)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if self.first:
                waited = time.monotonic() - began
                warnings.warn(
                    f"process {other} has kept the others waiting for {waited:.0f} s ({what})",
                    ProcessesWarning,
                    stacklevel=2,
                )


def _connect_by_gloo() -> None:
    """Make the connections of gloo, which prints a line of each: between all devices, and between processes."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    mesh = Mesh(devices, ("all",))
    split, whole = PartitionSpec("all"), PartitionSpec()
    added = jax.shard_map(lambda ones: jax.lax.psum(ones, "all"), mesh=mesh, in_specs=split, out_specs=whole)
    ones = np.ones(jax.local_device_count(), np.float32)
    with _without_output():
        total = jax.jit(added)(jax.make_array_from_process_local_data(NamedSharding(mesh, split), ones))
        jax.block_until_ready(total)
        multihost_utils.sync_global_devices("cimjax")
        # Threads of gloo print, some of them a little later, into a buffer of C's.
        time.sleep(_PRINTED)
        ctypes.CDLL(None).fflush(None)


@contextlib.contextmanager
def _without_output() -> Iterator[None]:
    """Nothing that libraries write to standard output is seen."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@functools.cache
def group() -> Group:
    """The processes of this run; just this one unless they were joined."""
    return Group(jax.process_index(), jax.process_count(), distributed.global_state.client)
