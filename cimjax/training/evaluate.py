"""Accuracy on a split, counting every image once, and how ADCs are used."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from cimjax.core.programs.cpu import compiler_options
from cimjax.data import Dataset, Split, StreamedDataset, StreamedSplit
from cimjax.nn.layers import ADC_STATISTICS
from cimjax.training.batches import workers_of
from cimjax.training.experiment import Experiment
from cimjax.training.metrics import adc_usage_by_layer
from cimjax.training.parallel import AXIS, Devices
from cimjax.training.random_streams import Stream, chip_key, stream_key
from cimjax.training.restore import Which, lacks_adcs, restore
from cimjax.training.state import TrainState
from cimjax.training.train_step import eval_step


class Evaluator:
    """Evaluates states of one run on one split, in whole batches of which the last is padded.

    batches: an iterable of pixels, labels, and which of them are real, split over the devices; images of arrays lie
      there from the start, those of files are decoded anew each time, by each process its share.
    """

    def __init__(self, experiment: Experiment, split: Split | StreamedSplit) -> None:
        devices, wanted = experiment.devices.count, min(experiment.config.eval_batch_size, len(split))
        size = -(-wanted // devices) * devices
        self.count, self.experiment = len(split), experiment
        self.batches: Iterable[tuple[Any, Any, Any]]
        if isinstance(split, StreamedSplit):
            self.batches = _Decoded(split, size, experiment)
        else:
            share = experiment.devices.share.range_of(size)
            parts = [slice(start + share.start, start + share.stop) for start in range(0, self.count, size)]
            self.batches = [
                _on_devices(split.images[part], split.labels[part], size, experiment.devices) for part in parts
            ]
        self.steps = {ideal: self._step(ideal) for ideal in (False, True)}

    def _step(self, ideal_adcs: bool) -> Any:
        setup = dataclasses.replace(self.experiment.setup, ideal_adcs=ideal_adcs)

        def step(state: TrainState, chip: Array, pixels: Array, labels: Array, real: Array) -> dict[str, Array]:
            batch = self.experiment.preparation.plain(pixels, labels)
            return eval_step(setup, state, batch, real, jax.random.wrap_key_data(chip))

        return self.experiment.devices.spread(step, PartitionSpec(), *[PartitionSpec(AXIS)] * 3, add=True)

    def __call__(self, state: TrainState, *, ideal_adcs: bool = False, chip: Array | None = None) -> dict[str, float]:
        """`accuracy` (0 to 1) and mean `loss` over all images of the split.

        Args:
          chip: the random key of another chip than the run's.
        """
        # On the host, whose arrays every device may be given.
        chip = chip_key(self.experiment.devices.here(state.seed)) if chip is None else chip
        key = np.asarray(jax.random.key_data(chip))
        sums: list[dict[str, Array]] = []
        for batch in self.batches:
            sums.append(self.steps[ideal_adcs](state, key, *batch))
            # Two batches at a time: images that are decoded faster than devices compute would fill their memory.
            if len(sums) > 1:
                jax.block_until_ready(sums[-2])
        correct, loss = (sum(np.asarray(each[name], np.float64) for each in sums) for name in ("correct", "loss"))
        return {"loss": float(loss) / self.count, "accuracy": float(correct) / self.count}

    def record(self, state: TrainState, *, ideal_adcs: bool = False) -> dict[str, Any]:
        """What is recorded of a state: as a call, with `average_accuracy` of averaged parameters where there are any,
        and with `ideal_adcs` where it was measured so."""
        found: dict[str, Any] = self(state, ideal_adcs=ideal_adcs)
        if state.average is not None:
            averaged = self(state.replace(params=state.average), ideal_adcs=ideal_adcs)
            found["average_accuracy"] = averaged["accuracy"]
        return {**found, "ideal_adcs": True} if ideal_adcs else found

    def on_fresh_chips(self, state: TrainState) -> dict[str, float]:
        """Mean and standard deviation of the accuracy on chips that the run has never seen, each of its own random
        cells: on `config.fresh_chips` of them; empty for none."""
        seed, count = self.experiment.devices.here(state.seed), self.experiment.config.fresh_chips
        chips = [stream_key(seed, Stream.OTHER_CHIP, number) for number in range(count)]
        found = [self(state, chip=chip)["accuracy"] for chip in chips]
        return {"fresh_chips": float(np.mean(found)), "fresh_chips_spread": float(np.std(found))} if found else {}

    def close(self) -> None:
        """End what reads images."""
        if isinstance(self.batches, _Decoded):
            self.batches.stream.close()


class _Decoded:
    """Batches of a stream, all of one size."""

    def __init__(self, split: StreamedSplit, size: int, experiment: Experiment) -> None:
        from cimjax.data.reading import EvaluationStream

        self.size, self.devices = size, experiment.devices
        workers = workers_of(experiment.config)
        self.stream = EvaluationStream(split, batch_size=size, workers=workers, share=self.devices.share)

    def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
        for images in self.stream:
            yield _on_devices(*images, self.size, self.devices)


def _on_devices(pixels: Any, labels: Any, size: int, devices: Devices) -> tuple[Any, Any, Any]:
    """A batch of `size` images, labels, and which of them are real, on the devices.

    Args:
      pixels, labels: this process's share, or what there is of it in the last batch.
    """
    count, share = len(labels), size // devices.share.out_of
    real = np.arange(share) < count
    if count < share:
        pixels = np.concatenate([pixels, np.zeros((share - count, *pixels.shape[1:]), np.uint8)])
        labels = np.concatenate([labels, np.zeros(share - count, np.int32)])
    return devices.split((pixels, np.asarray(labels, np.int32), real), PartitionSpec(AXIS))


class ADCUsage:
    """How every layer's ADCs are used on the calibration images, in evaluation mode and on the run's own chip."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment

        def measure(state: TrainState, images: Array) -> Any:
            setup, chip = experiment.setup_on_one_device(), chip_key(state.seed)
            rngs, wanted = {"variation": chip, "params": chip}, [ADC_STATISTICS]
            return setup.apply(state.variables, images, train=False, mutable=wanted, rngs=rngs)[1]

        self.measure = jax.jit(measure, compiler_options=compiler_options())

    def __call__(self, state: TrainState) -> dict[str, dict[str, float]]:
        """{"conv1": {"saturated": ..., "codes_used": ...}}."""
        found = self.measure(self.experiment.devices.here(state), self.experiment.calibration_images())
        return adc_usage_by_layer(found.get(ADC_STATISTICS, {}))


def evaluate(
    run: str | Path,
    which: Which = "last",
    *,
    model: nn.Module | None = None,
    dataset: Dataset | StreamedDataset | None = None,
) -> dict[str, Any]:
    """The test accuracy and loss of a run.

    Args:
      run: the run folder, or one that `pack` made; a path, or the address of a bucket.
      which: "last", the last state; "best", the one of the best accuracy on the images that `config.validation` holds
        out; "average", the last with the averaged parameters of `config.ema` in place of its own.
      model, dataset: the network and images of the run when they were the caller's own.

    Returns:
      {"step", "split", "which", "images", "loss", "accuracy"}, accuracy from 0 to 1; with an average of the parameters
      also `average_accuracy`, and `ideal_adcs`, True, for a state of the epochs with ideal ADCs.

    Raises:
      RunFolderError: when the folder holds no run, or its checkpoint is damaged or of another network.
    """
    experiment, state, _ = restore(run, which=which, model=model, dataset=dataset, images=True)
    with contextlib.closing(Evaluator(experiment, experiment.dataset.test)) as evaluator:
        found = evaluator.record(experiment.devices.put(state), ideal_adcs=lacks_adcs(experiment, state))
    return {"step": int(state.step), "split": "test", "which": which, "images": evaluator.count, **found}
