"""The devices: where arrays lie and how a step is spread over them. No other part of the project knows of devices.

A batch is split over all devices, of all processes; parameters and data sets are on each. Steps are
`jit(shard_map(step))` with one explicit mean of the gradients, because XLA gathers a sharded batch before a grouped
convolution when left to itself.
"""

from __future__ import annotations

import collections
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from cimjax.core.programs.cpu import compiler_options
from cimjax.data.share import Share
from cimjax.training.processes.group import group

AXIS = "batch"


class Devices:
    """The devices of a run.

    mesh: None on a single device.
    way: "shard_map" or "pmap".
    share: which part of a batch lies on the devices of this process.
    """

    def __init__(self, way: str = "shard_map") -> None:
        """All devices that there are.

        Raises:
          ValueError: where several processes have different numbers of devices, or are to be used by `pmap`.
        """
        self.processes = group()
        # Those of a process stand together: they share what it reads.
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
        self.count, self.way = len(devices), way
        self._require_alike(devices)
        self.share = Share(self.processes.index, self.processes.count)
        self.mesh = Mesh(devices, (AXIS,)) if self.count > 1 else None
        # Where an array lies that is whole on every device.
        self._whole = NamedSharding(self.mesh, PartitionSpec()) if self.mesh else SingleDeviceSharding(devices[0])
        self._here = [device for device in devices if device.process_index == self.processes.index]
        self.platform = devices[0].platform
        self.kind = devices[0].device_kind

    @property
    def axis_name(self) -> str | None:
        """The axis over which a batch is spread; None on a single device."""
        return None if self.mesh is None else AXIS

    def check_batch(self, size: int) -> None:
        """Refuse a `config.batch_size` that cannot be split evenly.

        Raises:
          ValueError: naming the nearest sizes.
        """
        if size % self.count:
            low = size - size % self.count
            near = f"{low} or {low + self.count}" if low else str(self.count)
            raise ValueError(
                f"`config.batch_size` is {size}, which {self.count} devices cannot share evenly; give {near}."
            )

    def put(self, tree: Any) -> Any:
        """Copy a tree of arrays, the same on every process, to every device."""
        if self.processes.count == 1:
            return jax.device_put(tree, self._whole)

        def copied(leaf: Any) -> jax.Array:
            copies = [jax.device_put(leaf, device) for device in self._here]
            return jax.make_array_from_single_device_arrays(np.shape(leaf), self._whole, copies)

        return jax.tree.map(copied, tree)

    def split(self, tree: Any, spec: PartitionSpec) -> Any:
        """Copy a tree of the host's arrays, this process's share of each, to its devices, as a program takes it."""
        if self.mesh is None:
            return jax.device_put(tree, jax.devices()[0])
        if self.way == "pmap":
            return tree  # cut when the program is called
        sharding = NamedSharding(self.mesh, spec)
        return jax.tree.map(lambda leaf: jax.make_array_from_process_local_data(sharding, leaf), tree)

    def here(self, tree: Any) -> Any:
        """A tree of arrays that are whole on every device, as the first device of this process has it: for what each
        process computes by itself."""
        return jax.tree.map(lambda leaf: leaf.addressable_data(0) if isinstance(leaf, jax.Array) else leaf, tree)

    def require_same(self, what: str, tree: Any) -> None:
        """Refuse arrays that differ, in any bit, between processes.

        Raises:
          ValueError: naming the processes.
        """
        if self.processes.count == 1:
            return
        content = hashlib.sha256()
        for leaf in jax.tree.leaves(self.here(tree)):
            content.update(np.asarray(leaf).tobytes())
        mend = "all must have the same versions, devices and files; see which machine is unlike the others"
        self.processes.require_same(what, content.digest(), mend)

    def described(self, tree: Any) -> Any:
        """Shapes, dtypes and places of a tree of arrays as `put` would copy it."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._whole), tree)

    def spread(
        self, step: Callable[..., Any], *specs: PartitionSpec, donate: bool = False, add: bool = False
    ) -> Callable[..., Any]:
        """Compile `step(state, *arguments)`, which knows its place by `axis_name`; state and results are whole on
        every device.

        Args:
          specs: how each argument lies: whole on every device, or split along an axis.
          donate: whether the state is given up.
          add: whether the results of the devices are added up; otherwise each has the whole.
        """
        donated = (0,) if donate else ()
        if self.mesh is None:
            return jax.jit(step, donate_argnums=donated, compiler_options=compiler_options())

        def whole(*arguments: Any) -> Any:
            return jax.lax.psum(step(*arguments), AXIS) if add else step(*arguments)

        if self.way == "pmap":
            return self._pmap(whole, specs)
        mapped = jax.shard_map(
            whole, mesh=self.mesh, in_specs=(PartitionSpec(), *specs), out_specs=PartitionSpec(), check_vma=False
        )
        return jax.jit(mapped, donate_argnums=donated, compiler_options=compiler_options())

    def _require_alike(self, devices: list[Any]) -> None:
        if self.processes.count == 1:
            return
        if self.way == "pmap":
            raise ValueError("`config.parallel` is 'pmap', which knows one process only; give shard_map.")
        counts = collections.Counter(device.process_index for device in devices)
        if len(set(counts.values())) > 1:
            each = ", ".join(str(counts[index]) for index in sorted(counts))
            raise ValueError(f"the processes have different numbers of devices ({each}); give all the same number.")

    def _pmap(self, step: Callable[..., Any], specs: tuple[PartitionSpec, ...]) -> Callable[..., Any]:
        """Arguments that are split have their axis cut in two, and the devices in front."""
        axes = [next((axis for axis, name in enumerate(spec) if name == AXIS), None) for spec in specs]
        # It wants an argument that is split, which is the number of the device.
        mapped = jax.pmap(lambda _, *arguments: step(*arguments), AXIS, in_axes=(0, None, *axes), out_axes=None)

        def call(state: Any, *arguments: Any) -> Any:
            def cut(axis: int | None, values: Any) -> Any:
                if axis is None:
                    return values
                return values.reshape(*values.shape[:axis], self.count, -1, *values.shape[axis + 1 :])

            trees = [jax.tree.map(functools.partial(cut, axis), x) for axis, x in zip(axes, arguments, strict=True)]
            return mapped(np.arange(self.count), state, *trees)

        return call
