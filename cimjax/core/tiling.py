"""Which row of which array stores which weight, and the layouts that follow.

A `Tiling` is computed once per layer shape, in NumPy, before tracing. *Rows* are the rows of the stretched kernel
(channel slowest, then the kernel's axes); an *array* is a row tile; a *read group* is the part of an array's rows that
one conversion reads (the whole array unless `ArraySpec.active_rows` is smaller).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Shaped

from cimjax.spec import ArraySpec, CIMSpec, TilingRule

# float32 counts exactly up to here.
EXACT_INTEGERS = 2**24


@dataclasses.dataclass(frozen=True, eq=False)
class Tiling:
    """Where every weight of a layer lies. `R` read groups, `A` row tiles, `Ct` column tiles, `O` outputs.

    kernel_size: the kernel's spatial shape `(kh, kw)`, any number of axes.
    in_channels, features: `C` and `O`.
    arrays: `A`.
    array_of_group: (R,) int, the row tile that each read group lies in.
    channels: (R, c) int, the input channels of each read group; `C` marks an undriven place.
    stored: (kh, kw, R, c) bool, True where the group stores a weight; elsewhere the digit is 0.
    outputs_per_array: outputs whose columns share one array.
    """

    kernel_size: tuple[int, ...]
    in_channels: int
    features: int
    arrays: int
    array_of_group: np.ndarray
    channels: np.ndarray
    stored: np.ndarray
    outputs_per_array: int

    @property
    def groups(self) -> int:
        """`R`, the number of read groups."""
        return len(self.array_of_group)

    @property
    def column_tiles(self) -> int:
        """`Ct`, the number of arrays side by side."""
        return -(-self.features // self.outputs_per_array)

    @property
    def column_tile_of_output(self) -> np.ndarray:
        """(O,) int, the column tile of each output."""
        return np.arange(self.features) // self.outputs_per_array

    @functools.cached_property
    def rows_of_group(self) -> np.ndarray:
        """(R,) int, how many weights each read group stores per output."""
        axes = tuple(range(len(self.kernel_size)))
        return self.stored.sum(axis=(*axes, -1))

    @functools.cached_property
    def rows_of_array(self) -> np.ndarray:
        """(A,) int, how many rows of each row tile are used."""
        return np.bincount(self.array_of_group, weights=self.rows_of_group, minlength=self.arrays).astype(int)

    @functools.cached_property
    def of_one_group(self) -> Tiling:
        """A single read group, as large as the largest one here, all of whose places store weights."""
        return self._one_group(self.channels.shape[1])

    @functools.cached_property
    def undivided(self) -> Tiling:
        """A single read group of all channels, as if arrays had rows without end."""
        return self._one_group(self.in_channels)

    def _one_group(self, channels: int) -> Tiling:
        return dataclasses.replace(
            self,
            in_channels=channels,
            arrays=1,
            array_of_group=np.zeros(1, int),
            channels=np.arange(channels)[None],
            stored=np.ones((*self.kernel_size, 1, channels), bool),
        )

    def largest_psum(self, spec: CIMSpec) -> int:
        """The largest magnitude that a partial sum can have in the integer path: rows x input x digit."""
        inputs = max(s.magnitude for s in spec.activation.slices)
        return int(self.rows_of_group.max()) * inputs * max(p.magnitude for p in spec.weight.planes)


@functools.lru_cache(maxsize=1024)
def tile(kernel_shape: tuple[int, ...], spec: CIMSpec) -> Tiling:
    """Cut a kernel into arrays and read groups.

    Args:
      kernel_shape: (kh, kw, C, O), with any number of spatial axes.
      spec: its `array` rule and the columns that one output needs.

    Raises:
      ValueError: when a kernel does not fit the rows of an array or of one read (`packed`, `balanced`), or when float32
        could not hold the partial sums exactly.
    """
    *kernel_size, in_channels, features = kernel_shape
    if 0 in kernel_shape:
        raise ValueError(f"The kernel has shape {kernel_shape}; every size must be at least 1.")
    area = math.prod(kernel_size)
    array_of_group: list[int] = []
    rows_of_group: list[np.ndarray] = []
    arrays = _cut(range(area * in_channels), spec.array.rows, area, spec.array)
    for index, array in enumerate(arrays):
        for group in _cut(array, spec.array.rows_per_read, area, spec.array):
            array_of_group.append(index)
            rows_of_group.append(np.asarray(group))
    channels_of_group = [np.unique(rows // area) for rows in rows_of_group]
    width = max(len(channels) for channels in channels_of_group)
    channels = np.full((len(rows_of_group), width), in_channels)
    stored = np.zeros((area, len(rows_of_group), width), bool)
    for index, (rows, of_group) in enumerate(zip(rows_of_group, channels_of_group, strict=True)):
        channels[index, : len(of_group)] = of_group
        stored[rows % area, index, np.searchsorted(of_group, rows // area)] = True
    tiling = Tiling(
        kernel_size=tuple(kernel_size),
        in_channels=in_channels,
        features=features,
        arrays=len(arrays),
        array_of_group=np.asarray(array_of_group),
        channels=channels,
        stored=stored.reshape(*kernel_size, *stored.shape[1:]),
        outputs_per_array=spec.outputs_per_array,
    )
    _require_exact(tiling, spec)
    return tiling


def _cut(rows: range, size: int, area: int, array: ArraySpec) -> list[range]:
    """Consecutive parts of `rows`, none larger than `size`, by the tiling rule of 3.4."""
    if array.tiling == TilingRule.IM2COL:
        bounds = [*range(0, len(rows), size), len(rows)]
    else:
        if area > size:
            raise ValueError(
                f"A kernel of {area} rows does not fit in {size} rows (`rows` of an array, or `active_rows` of a read) "
                f"with tiling '{array.tiling!s}', which keeps kernels whole; use tiling='im2col' or larger arrays."
            )
        channels, fit = len(rows) // area, size // area
        if array.tiling == TilingRule.PACKED:
            bounds = [area * c for c in (*range(0, channels, fit), channels)]
        else:
            tiles = -(-channels // fit)
            sizes = [channels // tiles + (index < channels % tiles) for index in range(tiles)]
            bounds = [area * c for c in itertools.accumulate(sizes, initial=0)]
    return [rows[start:stop] for start, stop in itertools.pairwise(bounds)]


def _require_exact(tiling: Tiling, spec: CIMSpec) -> None:
    """Refuse what float32 cannot hold: partial sums and, with an ideal ADC, the recombined sum of a tile."""
    slices, planes = spec.activation.slices, spec.weight.planes
    rows, psum = int(tiling.rows_of_group.max()), tiling.largest_psum(spec)
    activation = sum(abs(s.significance) * s.magnitude for s in slices)
    weight = sum(abs(p.significance) * p.magnitude for p in planes) + abs(spec.weight.constant)
    largest = max(psum, rows * activation * weight) if spec.adc is None else psum
    if largest > EXACT_INTEGERS:
        what = "Partial sums" if psum > EXACT_INTEGERS else "Recombined sums behind an ideal ADC"
        raise ValueError(
            f"{what} reach {largest}, beyond the {EXACT_INTEGERS} that float32 counts exactly; "
            "use smaller `active_rows`, `rows` or bits, or `slice_bits`."
        )


def tile_inputs(x: Shaped[Array, "*space C"], tiling: Tiling) -> Shaped[Array, "*space places"]:
    """The channels that drive each read group, side by side: (..., C) -> (..., R * c); undriven places are 0."""
    return _by_group(x, tiling, x.ndim - 1)


def tile_kernel(kernel: Shaped[Array, "*kernel C O"], tiling: Tiling) -> Shaped[Array, "*kernel R c O"]:
    """The weights of each read group: (kh, kw, C, O) -> (kh, kw, R, c, O); places that store nothing are 0."""
    tiled = _by_group(kernel, tiling, kernel.ndim - 2)
    tiled = tiled.reshape(*tiling.kernel_size, *tiling.channels.shape, kernel.shape[-1])
    return jnp.where(tiling.stored[..., None], tiled, 0)


def untile_kernel(tiled: Shaped[Array, "*kernel R c O"], tiling: Tiling) -> Shaped[Array, "*kernel C O"]:
    """The transpose of `tile_kernel`: each weight from the one place that stores it."""
    kernel = jax.ShapeDtypeStruct((*tiling.kernel_size, tiling.in_channels, tiled.shape[-1]), tiled.dtype)
    return jax.linear_transpose(lambda kernel: tile_kernel(kernel, tiling), kernel)(tiled)[0]


def _by_group(x: Array, tiling: Tiling, axis: int) -> Array:
    """An array whose `axis` are the `C` channels, with the `R * c` places of all groups instead."""
    index = tiling.channels.reshape(-1)
    consecutive = np.minimum(np.arange(len(index)), tiling.in_channels)
    padding = np.zeros((x.ndim, 2), int)
    if np.array_equal(index, consecutive):
        # Consecutive channels and a padded end, as `packed` gives: no gather.
        padding[axis, 1] = len(index) - tiling.in_channels
        return jnp.pad(x, padding)
    padding[axis, 1] = 1
    return jnp.take(jnp.pad(x, padding), index, axis=axis)
