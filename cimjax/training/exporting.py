"""A trained run as what is written into a chip: its layers in integers, in files, held against the network."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from cimjax.core import adc
from cimjax.core.tiling import tile
from cimjax.data import Dataset, StreamedDataset, StreamedSplit
from cimjax.hardware import export as files
from cimjax.hardware.freeze import FrozenLayer, freeze
from cimjax.hardware.network import files as network_files
from cimjax.hardware.network.fold import integer_network
from cimjax.hardware.network.nodes import NotIntegersError
from cimjax.hardware.network.operations import IntegerNetwork
from cimjax.hardware.on_chip import Call, apply_on_chip
from cimjax.nn.layers import PARTIAL_SUMS
from cimjax.training.experiment import Experiment
from cimjax.training.restore import Which, lacks_adcs, restore
from cimjax.training.run.files import RunFolderError, in_one_line

# Pixels of images whose partial sums are in memory together.
_AT_ONCE = 20 * 32 * 32
# Images that say how large is what enters a network in integers.
_SEEN_BEFORE = 100


class Exported(NamedTuple):
    """What an export found.

    layers: as written.
    conversions: of each layer on the images of the test vectors, all of them equal to the network's.
    network: the whole in integers, as written; None where something between its array layers is no operation on these.
    in_float32: what that is, else empty.
    images: how many test images were then computed by the chip's integers.
    accuracy, accuracy_as_trained: on these, of integers and of the network, 0 to 1.
    other_class: how many of them integers put into another class than the network.
    """

    layers: dict[str, FrozenLayer]
    conversions: dict[str, int]
    network: IntegerNetwork | None
    in_float32: str
    images: int
    accuracy: float
    accuracy_as_trained: float
    other_class: int


def export(
    run: str | Path,
    folder: str | Path,
    *,
    which: Which = "last",
    vectors: int = 1,
    images: int = 100,
    factor_bits: int | None = None,
    model: nn.Module | None = None,
    dataset: Dataset | StreamedDataset | None = None,
) -> Exported:
    """Freeze a run's array layers, hold them against the network, and write them (`cimjax.hardware.export`); with them
    the network in integers from its first codes on (`cimjax.hardware.network.files`), where it is one.

    Args:
      run: the run folder, or one that `pack` made.
      folder: a new or empty one; its parents are created too.
      which, model, dataset: as for `restore`.
      vectors: test images whose conversions are compared one by one, and written.
      images: test images that are computed by the chip's integers, to measure accuracy.
      factor_bits: see `cimjax.freeze`.

    Raises:
      ValueError: for a network that is no table of integers, as `cimjax.freeze` says.
      RunFolderError: as `restore`; where the folder is not empty, or cannot be written.
      RuntimeError: where a conversion differs from the network's, which would be an error of this library.
    """
    for name, count in (("vectors", vectors), ("images", images)):
        if count < 1:
            raise ValueError(f"`{name}` is {count}; give at least 1.")
    folder = Path(folder)
    with in_one_line("write", folder):
        if folder.exists() and any(folder.iterdir()):
            raise RunFolderError(f"{folder} is not empty; give another folder.")
    experiment, state, _ = restore(run, which=which, model=model, dataset=dataset, images=True)
    if lacks_adcs(experiment, state):
        raise RunFolderError(f"{run} stands in its epochs with ideal ADCs, whose steps are not set yet; train it on.")
    pixels, labels = _first_of_test(experiment, max(vectors, images))
    setup = experiment.setup_on_one_device()
    x, mode = experiment.preparation.normalise(jnp.asarray(pixels)), setup.mode(train=False)
    layers = freeze(setup.model, state.variables, x[:1], factor_bits=factor_bits, **mode)
    calls, conversions = _compared(setup.model, state.variables, layers, x[:vectors], mode)
    seen, x, labels = x[:vectors], x[:images], labels[:images]
    at_once = max(1, _AT_ONCE // math.prod(x.shape[1:-1]))
    parts = [x[start : start + at_once] for start in range(0, len(x), at_once)]
    network, in_float32 = None, ""
    try:
        options = {"factor_bits": factor_bits, "frozen": layers, **mode}
        network = integer_network(setup.model, state.variables, x[:_SEEN_BEFORE], **options)
        on_chip = [network(part) for part in parts]
    except NotIntegersError as error:
        in_float32 = str(error)
        on_chip = [apply_on_chip(setup.model, state.variables, layers, part, **mode) for part in parts]
    in_network = [setup.apply(state.variables, part, train=False) for part in parts]
    classes, of_network = (np.concatenate(each).argmax(-1) for each in (on_chip, in_network))
    with in_one_line("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        files.write(layers, folder, calls)
        if network is not None:
            network_files.write(network, folder, network.enter(seen))
    return Exported(
        layers=layers,
        conversions=conversions,
        network=network,
        in_float32=in_float32,
        images=len(labels),
        accuracy=float(np.mean(classes == labels)),
        accuracy_as_trained=float(np.mean(of_network == labels)),
        other_class=int(np.sum(classes != of_network)),
    )


def _first_of_test(experiment: Experiment, count: int) -> tuple[np.ndarray, np.ndarray]:
    split = experiment.dataset.test
    if not isinstance(split, StreamedSplit):
        return np.asarray(split.images[:count]), np.asarray(split.labels[:count])
    from cimjax.data.reading import EvaluationStream

    with contextlib.closing(EvaluationStream(split, batch_size=min(count, len(split)), workers=0)) as stream:
        pixels, labels = next(iter(stream))
        return np.asarray(pixels), np.asarray(labels)


def _compared(
    model: nn.Module, variables: Any, layers: dict[str, FrozenLayer], x: Any, mode: dict[str, Any]
) -> tuple[list[Call], dict[str, int]]:
    """The calls of all layers on what the network gives them; and how many conversions they have, all compared."""
    calls: list[Call] = []
    _, sown = apply_on_chip(
        model, variables, layers, x, watch=calls.append, feeds_on=False, mutable=[PARTIAL_SUMS], **mode
    )
    conversions = dict.fromkeys(layers, 0)
    seen = dict.fromkeys(layers, 0)
    for call in calls:
        found = sown[PARTIAL_SUMS]
        for part in call.layer.split("/") if call.layer else ():
            found = found[part]
        psums, steps = found["adc"][seen[call.layer]]
        seen[call.layer] += 1
        layer = layers[call.layer]
        tiling = tile((*layer.kernel_size, layer.in_channels, layer.features), layer.spec)
        codes = psums if layer.spec.adc is None else adc.adc_codes(psums, steps, tiling, layer.spec)
        for what, mine, networks in (
            ("partial sums", call.readings.psums, psums),
            ("codes", call.readings.codes, codes),
        ):
            if not np.array_equal(mine, networks):
                differ = int(np.sum(mine != np.asarray(networks)))
                raise RuntimeError(
                    f"{call.layer}: {differ} of {mine.size} {what} are not the network's; please report it."
                )
        conversions[call.layer] += codes.size
    return calls, conversions
