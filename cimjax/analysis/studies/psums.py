"""The partial sums that come to the ADCs of a trained run, column by column, and how their ladders fit them.

They are taken on the run's calibration images, in evaluation mode and on its own chip, as the numbers of
`training.evaluate.Health` are. Layers hand them out themselves (`nn.layers.PARTIAL_SUMS`). What is made of them for
people is in `psum_output`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.core.adc import beyond_ladder, codes_given
from cimjax.core.programs.cpu import compiler_options
from cimjax.core.step_sizes import StepSizes, expand_outputs
from cimjax.core.tiling import Tiling, tile
from cimjax.nn.layers import PARTIAL_SUMS
from cimjax.spec import CIMSpec
from cimjax.spec.base import nearest, shown
from cimjax.training.evaluate import restore
from cimjax.training.experiment import Experiment
from cimjax.training.random_streams import chip_key
from cimjax.training.state import TrainState

# Images of one call: their partial sums of all layers are in memory at once.
_IMAGES = 32
# Output positions whose partial sums are kept for quantiles and distributions, about; they are spread over images and
# pixels. Ranges, saturation and codes are of all positions.
SAMPLES = 2048
QUANTILES = (0.01, 0.5, 0.99)
# Columns of a layer that are drawn one by one, if nothing else is asked for.
COLUMNS = 3


@dataclasses.dataclass(frozen=True)
class LayerPsums:
    """The partial sums of one layer. `T` slices, `R` read groups, `K` planes, `O` outputs: a column is (r, k, o).

    name: its path.
    positions: output positions that were looked at, so many conversions of each column and slice.
    lowest, highest: (T, R, K, O) float32, of all positions.
    sample: (T, S, R, K, O) float32, at some of the positions.
    step, offset: (R, K, O) float32, of each column's ladder; None with ideal ADCs.
    beyond: (T, R, K, O) int, conversions whose psum lies more than half a step beyond the ladder; None with ideal ADCs.
    used: (R, K, O) int, how many codes a column gives; None with ideal ADCs.
    """

    name: str
    spec: CIMSpec
    positions: int
    lowest: np.ndarray
    highest: np.ndarray
    sample: np.ndarray
    step: np.ndarray | None = None
    offset: np.ndarray | None = None
    beyond: np.ndarray | None = None
    used: np.ndarray | None = None

    @property
    def saturated(self) -> np.ndarray:
        """(R, K, O), the part of each column's conversions beyond the ladder, 0 to 1; with an ADC."""
        assert self.beyond is not None
        return self.beyond.mean(axis=0) / self.positions

    @property
    def unused(self) -> np.ndarray:
        """(R, K, O) int, how many of its codes a column never gives; with an ADC."""
        assert self.used is not None
        return self.codes[:, None] - self.used

    @property
    def codes(self) -> np.ndarray:
        """(K,) int, how many codes the columns of each plane have, in any slice; with an ADC."""
        planes = range(len(self.spec.weight.planes))
        slices = range(len(self.spec.activation.slices))
        return np.asarray([len({p for t in slices for p in self._codes(t, k)}) for k in planes])

    def levels(self, t: int, r: int, k: int, o: int) -> np.ndarray:
        """The levels of a column's ladder in slice `t`, in psum units, ascending; none with an ideal ADC."""
        if self.step is None or self.offset is None:
            return np.zeros(0)
        return self.step[r, k, o] * np.asarray(self._codes(t, k), np.float32) + self.offset[r, k, o]

    def _codes(self, t: int, k: int) -> list[int]:
        codes = self.spec.adc_ranges[t][k]
        return [-1, 1] if codes.binary else list(range(int(codes.q_min), int(codes.q_max) + 1))


@dataclasses.dataclass(frozen=True)
class PsumStudy:
    """What `study_psums` found.

    images: calibration images that were looked at.
    columns: how many columns' distributions are to be drawn for each layer.
    """

    run: Path
    images: int
    columns: int
    layers: list[LayerPsums]


def study_psums(
    run: str | Path,
    *,
    layers: Sequence[str] | None = None,
    columns: int = COLUMNS,
    say: Callable[[str], None] = lambda _: None,
) -> PsumStudy:
    """Ranges and distributions of the partial sums of a run's array layers, and how its ADCs are used.

    Source: the paper's Fig. 6, of any layer and with the ladders of its ADCs.

    Args:
      run: a run folder; its last state is taken.
      layers: paths of array layers, as in "block1/conv2"; None for all, in the network's order.
      columns: how many columns of each layer are to be drawn one by one, at least 1.
      say: is told what is being done.

    Returns:
      For each layer what `LayerPsums` holds. Layers with ideal ADCs have partial sums, but no levels.

    Raises:
      ValueError: in one line: for a run without array layers, a layer that there is not, and fewer than 1 column;
        `RunFolderError` for a folder without a run, or whose checkpoint is damaged.
    """
    if isinstance(columns, bool) or not isinstance(columns, int) or columns < 1:
        raise ValueError(f"`columns` is {shown(columns)}; give a whole number of at least 1.")
    run = Path(run)
    say("reading the run and its calibration images")
    experiment, state, _ = restore(run, images=True)
    if not experiment.specs:
        raise ValueError(f"{run} has no array layers, and so no partial sums: it is a run of full precision.")
    chosen = list(experiment.specs) if layers is None else list(dict.fromkeys(layers))
    for name in chosen:
        if name not in experiment.specs:
            raise ValueError(f"{run} has no array layer {shown(name)}{nearest(name, experiment.specs)}.")
    images = experiment.calibration_images()
    found = {name: experiment.specs[name] for name in chosen}
    return PsumStudy(run, len(images), columns, _look(experiment, state, images, found, say))


class _Seen(NamedTuple):
    """What is kept of the partial sums of one layer on some images; fields as of `LayerPsums`.

    given: (codes, R, K, O) bool, which codes a column gives; None with ideal ADCs, as are `step` and `offset`.
    """

    positions: Any
    lowest: Array
    highest: Array
    sample: Array
    step: Array | None = None
    offset: Array | None = None
    beyond: Array | None = None
    given: Array | None = None


def _look(
    experiment: Experiment, state: TrainState, images: Array, specs: dict[str, CIMSpec], say: Callable[[str], None]
) -> list[LayerPsums]:
    setup, chip = experiment.setup_on_one_device(), chip_key(state.seed)
    tilings = {layer.name: tile(layer.kernel, layer.spec) for layer in experiment.layers if layer.spec is not None}
    parts = [images[start : start + _IMAGES] for start in range(0, len(images), _IMAGES)]
    samples = -(-SAMPLES // len(parts))

    def run_through(state: TrainState, images: Array) -> dict[str, _Seen]:
        rngs = {"variation": chip, "params": chip}
        _, left = setup.apply(state.variables, images, train=False, mutable=[PARTIAL_SUMS], rngs=rngs)
        calls = flax.traverse_util.flatten_dict(left.get(PARTIAL_SUMS, {}), sep="/")
        by_layer = {path.rsplit("/", 1)[0]: of_layer for path, of_layer in calls.items()}
        return {
            name: _seen(by_layer[name], tilings[name], spec, samples)
            for name, spec in specs.items()
            if name in by_layer
        }

    compiled = jax.jit(run_through, compiler_options=compiler_options())
    seen: dict[str, list[_Seen]] = {name: [] for name in specs}
    say(f"partial sums of {len(specs)} {'layer' if len(specs) == 1 else 'layers'} on {len(images)} images")
    for part in parts:
        for name, found in jax.device_get(compiled(state, part)).items():
            seen[name].append(found)
    for name, of_layer in seen.items():
        if not of_layer:
            raise ValueError(f"The layer {name} is inside a transform of Flax that hands out no partial sums.")
    return [_together(name, specs[name], tilings[name], of_layer) for name, of_layer in seen.items()]


def _seen(calls: Sequence[tuple[Array, StepSizes]], tiling: Tiling, spec: CIMSpec, samples: int) -> _Seen:
    """What is kept of one layer; a layer that is called several times has all of them counted."""
    psums, steps = jnp.concatenate([call[0] for call in calls], axis=1), calls[0][1]
    positions = psums.shape[1]
    chosen = np.sort(np.random.default_rng(0).permutation(positions)[:samples])
    ranges = jnp.min(psums, axis=1), jnp.max(psums, axis=1), jnp.take(psums, chosen, axis=1)
    if spec.adc is None:
        return _Seen(positions, *ranges)
    step = expand_outputs(steps.psum, tiling)
    offset = jnp.zeros_like(step) if steps.offset is None else expand_outputs(steps.offset, tiling)
    beyond = jnp.sum(beyond_ladder(psums, steps, tiling, spec), axis=1)
    return _Seen(positions, *ranges, step, offset, beyond, codes_given(psums, steps, tiling, spec))


def _together(name: str, spec: CIMSpec, tiling: Tiling, parts: Sequence[_Seen]) -> LayerPsums:
    """The layer on the images of all parts."""
    first, shape = parts[0], (tiling.groups, len(spec.weight.planes), tiling.features)
    layer = LayerPsums(
        name=name,
        spec=spec,
        positions=int(sum(part.positions for part in parts)),
        lowest=np.min([part.lowest for part in parts], axis=0),
        highest=np.max([part.highest for part in parts], axis=0),
        sample=np.concatenate([part.sample for part in parts], axis=1),
    )
    if first.step is None or first.offset is None:
        return layer
    return dataclasses.replace(
        layer,
        step=np.broadcast_to(first.step, shape),
        offset=np.broadcast_to(first.offset, shape),
        beyond=np.sum(np.asarray([part.beyond for part in parts], np.int64), axis=0),
        used=np.sum(np.any(np.asarray([part.given for part in parts]), axis=0), axis=0),
    )
