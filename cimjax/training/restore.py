"""Trained runs as states and as functions, and as folders to be handed on."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
from jax import Array
from ml_collections import ConfigDict

from cimjax.data import Dataset, StreamedDataset
from cimjax.data.dataset import Description
from cimjax.spec import CIMSpec
from cimjax.training.batches import Preparation
from cimjax.training.config.fields import completed
from cimjax.training.experiment import Experiment, build
from cimjax.training.packing import to_network, to_state
from cimjax.training.random_streams import chip_key
from cimjax.training.run import network_file
from cimjax.training.run.checkpoint import BESIDE, Checkpoints
from cimjax.training.run.files import RunFolderError, in_one_line, warn, write_json
from cimjax.training.run.folder import CONFIG, read_config
from cimjax.training.run.records import METRICS
from cimjax.training.run.remote import local_copy
from cimjax.training.state import TrainState

Which = Literal["last", "best", "average"]

# Fields of a configuration that say nothing of what is computed, and may not suit another machine.
_OF_A_MACHINE = ("data_dir", "images_on", "workers", "execution", "parallel", "writers")


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

    Args:
      run: the run folder, or one that `pack` made; a path, or the address of a bucket.
      which: the last state, the one of the best accuracy on the images that `config.validation` holds out, or the last
        with the averaged parameters of `config.ema` in place of its own.
      model, dataset: the network and images of the run when they were the caller's own.

    Raises:
      RunFolderError: when the folder holds no run, or its checkpoint is damaged or of another network.

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
