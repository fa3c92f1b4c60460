"""Accuracy on a split, counting every image once, and trained runs as functions."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from cimjax.core.programs.cpu import compiler_options
from cimjax.data import Dataset, Split, StreamedDataset, StreamedSplit
from cimjax.data.dataset import Description
from cimjax.nn.layers import ADC_STATISTICS
from cimjax.spec import CIMSpec
from cimjax.training.batches import Preparation, workers_of
from cimjax.training.config.fields import completed
from cimjax.training.experiment import Experiment, build
from cimjax.training.metrics import health_by_layer
from cimjax.training.packing import to_network, to_state
from cimjax.training.parallel import AXIS, Devices
from cimjax.training.random_streams import Stream, chip_key, stream_key
from cimjax.training.run import network_file
from cimjax.training.run.files import RunFolderError, in_one_line, warn, write_json
from cimjax.training.run.folder import CONFIG, read_config
from cimjax.training.run.records import METRICS
from cimjax.training.run.remote import local_copy
from cimjax.training.state import TrainState
from cimjax.training.train_step import eval_step

Which = Literal["last", "best", "average"]

# Fields of a configuration that say nothing of what is computed, and may not suit another machine.
_OF_A_MACHINE = ("data_dir", "images_on", "workers", "execution", "parallel", "writers")


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


class Health:
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
        return health_by_layer(found.get(ADC_STATISTICS, {}))


def restore(
    run: str | Path,
    *,
    which: Which = "last",
    model: nn.Module | None = None,
    dataset: Dataset | StreamedDataset | None = None,
    images: bool = False,
) -> tuple[Experiment, TrainState, dict[str, Any]]:
    """The experiment of a run folder, one of its states without the optimizer's, and what was saved beside it.

    Args:
      run: the run folder, or one that `pack` made.
      which: the last state, the one of the best accuracy on the images that `config.validation` holds out, or the last
        with the averaged parameters of `config.ema` in place of its own.
      model, dataset: the network and images of the run when they were the caller's own.
      images: whether the images themselves are wanted; what a network must know of them is saved with its state.

    Raises:
      RunFolderError: when the folder holds no run, or its checkpoint is damaged or of another network.
    """
    from cimjax.training.run.checkpoint import BESIDE, Checkpoints

    run = local_copy(run)
    checkpoints, network = Checkpoints(run), network_file.read(run)
    kept: Literal["last", "best"] = "last" if which == "average" else which
    known = (network.extra if network else checkpoints.beside(kept)).get("data")
    about: Any = Description.from_dict(known) if known and dataset is None and not images else dataset
    experiment = build(read_config(run, completed), model=model, dataset=about, to_train=False)
    if known:
        trained_on = Description.from_dict(known)
        if dataset is None and (what := trained_on.differs_from(Description.of(experiment.dataset))):
            raise RunFolderError(
                f"{run} was trained on other images of {trained_on.name} ({what}) than its config names; give them."
            )
        # Images of the caller's own are normalised as the network knows it.
        preparation = dataclasses.replace(experiment.preparation, mean=trained_on.mean, std=trained_on.std)
        experiment = dataclasses.replace(experiment, preparation=preparation)
    if network:
        if which != "last":
            raise RunFolderError(f"{run} holds a packed network, of one state; leave out --which.")
        return experiment, to_state(network, experiment), network.extra
    if which == "average" and not experiment.setup.ema:
        raise RunFolderError(f"{run} has no average of its parameters, as --config.ema=0.999 keeps; leave out --which.")
    # What the optimizer keeps may be of one of the caller's own.
    wanted = experiment.abstract_state().replace(opt_state=None)
    state, extra = checkpoints.restore(wanted, which=kept, holding=BESIDE, passes_over=_of_the_optimizer)
    if which == "average":
        state = state.replace(params=state.average, average=None)
    return experiment.going_on(int(state.step), extra), state, extra


def _of_the_optimizer(name: str) -> bool:
    return name.startswith("opt_state/")


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained run as a function; unpacks as `model, variables, spec`.

    spec: that of the network's own array layers, whoever built it: one where all layers agree, a dictionary by path
      ("block1/conv2") where they differ, None where there are none.
    specs: by path, always.
    average: the averaged parameters as variables; None for a run without.
    preparation: `preparation.normalise` makes of uint8 pixels what goes in.
    class_names: in the order of the labels; empty where the data set does not tell them.
    chip: the random key of the run's chip; with `variation`, `apply(..., rngs={"variation": chip})`.
    config: the run's.
    """

    model: nn.Module
    variables: dict[str, Any]
    spec: CIMSpec | dict[str, CIMSpec] | None
    specs: dict[str, CIMSpec]
    average: dict[str, Any] | None
    preparation: Preparation
    class_names: tuple[str, ...]
    chip: Array
    config: ConfigDict

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.variables, self.spec))

    @property
    def normalise(self) -> Any:
        """Real images of uint8 pixels, (N, H, W, C) float32, as the network was trained on."""
        return self.preparation.normalise


def load(
    run: str | Path,
    *,
    which: Which = "last",
    model: nn.Module | None = None,
    dataset: Dataset | StreamedDataset | None = None,
) -> Loaded:
    """A trained run as a function: its network, its variables and its specification, and how images go in.

    Arguments and errors as for `restore`.

    >>> model, variables, spec = load("runs/digits")  # doctest: +SKIP
    >>> run = load("runs/digits")  # doctest: +SKIP
    >>> logits = run.model.apply(run.variables, run.normalise(pixels))  # doctest: +SKIP
    """
    experiment, state, _ = restore(run, which=which, model=model, dataset=dataset)
    if lacks_adcs(experiment, state):
        warn(f"{run} stands in its epochs with ideal ADCs: their steps are not set yet, what they give means nothing.")
    average = None if state.average is None else {"params": state.average, **state.collections}
    return Loaded(
        model=experiment.model,
        variables=state.variables,
        spec=experiment.spec,
        specs=experiment.specs,
        average=average,
        preparation=experiment.preparation,
        class_names=getattr(experiment.dataset, "class_names", ()),
        chip=chip_key(state.seed),
        config=experiment.config,
    )


def lacks_adcs(experiment: Experiment, state: TrainState) -> bool:
    """Whether a state is of the epochs with ideal ADCs, after which their steps are set."""
    return experiment.ideal_epochs > 0 and int(state.step) <= experiment.ideal_epochs * experiment.steps_per_epoch


def evaluate(
    run: str | Path,
    which: Which = "last",
    *,
    model: nn.Module | None = None,
    dataset: Dataset | StreamedDataset | None = None,
) -> dict[str, Any]:
    """Test accuracy and loss of a run: {"step", "split", "which", "images", "loss", "accuracy"}; with an average of the
    parameters also `average_accuracy`, and `ideal_adcs` for a state of the epochs with ideal ADCs."""
    experiment, state, _ = restore(run, which=which, model=model, dataset=dataset, images=True)
    with contextlib.closing(Evaluator(experiment, experiment.dataset.test)) as evaluator:
        found = evaluator.record(experiment.devices.put(state), ideal_adcs=lacks_adcs(experiment, state))
    return {"step": int(state.step), "split": "test", "which": which, "images": evaluator.count, **found}


def pack(run: str | Path, folder: str | Path, *, which: Which = "last", model: nn.Module | None = None) -> Path:
    """Write a trained network into a folder to be handed on: the codes of its weights, all other parameters, the
    configuration and the records, as text.

    `load`, `evaluate`, `cimjax train --from` and all that looks at a run take such a folder for one; training cannot go
    on in it.

    Args:
      run: the run folder.
      folder: a new or empty one; its parents are created too.
      which, model: as for `restore`.

    Returns:
      The file of the network.

    Raises:
      RunFolderError: as `restore`; where the folder is not empty, or cannot be written.
    """
    run, folder = local_copy(run), Path(folder)
    experiment, state, extra = restore(run, which=which, model=model)
    with in_one_line("write", folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise RunFolderError(f"{folder} is not empty; give another folder.")
        options = {name: value for name, value in read_config(run).items() if name not in _OF_A_MACHINE}
        write_json(folder / CONFIG, options)
        if (run / METRICS).exists():
            shutil.copyfile(run / METRICS, folder / METRICS)
    return network_file.write(folder, to_network(experiment, state, extra))
