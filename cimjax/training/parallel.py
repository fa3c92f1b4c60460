"""The devices: where arrays lie and how a step is spread over them. No other part of the project knows of devices.

A batch is split over all devices; parameters and data sets are on each. Steps are `jit(shard_map(step))` with one
explicit mean of the gradients, because XLA gathers a sharded batch before a grouped convolution when left to itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from cimjax.core.programs.cpu import compiler_options

AXIS = "batch"


class Devices:
    """The devices of a run.

    mesh: None on a single device.
    """

    def __init__(self) -> None:
        devices = jax.devices()
        self.count = len(devices)
        self.mesh = Mesh(devices, (AXIS,)) if self.count > 1 else None
        self.platform = devices[0].platform
        self.kind = devices[0].device_kind

    @property
    def axis_name(self) -> str | None:
        """The axis over which a batch is spread; None on a single device."""
        return None if self.mesh is None else AXIS

    def check_batch(self, size: int, name: str) -> None:
        """Refuse a batch that is empty, or that cannot be split evenly.

        Raises:
          ValueError: naming the nearest sizes.
        """
        if size < 1:
            raise ValueError(f"`{name}` is {size}; give at least {self.count}.")
        if size % self.count:
            low = size - size % self.count
            near = f"{low} or {low + self.count}" if low else str(self.count)
            raise ValueError(f"`{name}` is {size}, which {self.count} devices cannot share evenly; give {near}.")

    def put(self, tree: Any) -> Any:
        """Copy a tree of arrays to every device."""
        if self.mesh is None:
            return jax.device_put(tree, jax.devices()[0])
        return jax.device_put(tree, NamedSharding(self.mesh, P()))

    def described(self, tree: Any) -> Any:
        """Shapes, dtypes and places of a tree of arrays as `put` would copy it."""
        place = SingleDeviceSharding(jax.devices()[0]) if self.mesh is None else NamedSharding(self.mesh, P())
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

    def spread(self, step: Callable[..., Any], *, donate: bool = False) -> Callable[..., Any]:
        """Compile a step whose arguments are whole on every device and which takes its own share of the batch."""
        donated = (0,) if donate else ()
        if self.mesh is None:
            return jax.jit(step, donate_argnums=donated, compiler_options=compiler_options())
        mapped = jax.shard_map(step, mesh=self.mesh, in_specs=P(), out_specs=P(), check_vma=False)
        return jax.jit(mapped, donate_argnums=donated, compiler_options=compiler_options())

    def spread_batch(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Compile `step(state, *batch)`: the batch is split over devices, the results are summed."""
        if self.mesh is None:
            return jax.jit(step, compiler_options=compiler_options())

        def summed(state: Any, *batch: Any) -> Any:
            return jax.lax.psum(step(state, *batch), AXIS)

        def call(state: Any, *batch: Any) -> Any:
            specs = (P(), *(P(AXIS) for _ in batch))
            mapped = jax.shard_map(summed, mesh=self.mesh, in_specs=specs, out_specs=P(), check_vma=False)
            return mapped(state, *batch)

        return jax.jit(call, compiler_options=compiler_options())
