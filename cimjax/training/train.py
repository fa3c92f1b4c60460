"""`cimjax.train`: what a run may be given."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from ml_collections import ConfigDict

from cimjax.data import Dataset, StreamedDataset
from cimjax.data.dataset import Description
from cimjax.data.image_folder import is_folder, path_of
from cimjax.data.npz import file_of, is_npz
from cimjax.training.batch_norm import check_statistics
from cimjax.training.config.fields import completed
from cimjax.training.distillation import check_teacher, taught_by
from cimjax.training.experiment import Experiment, build
from cimjax.training.loop import Run
from cimjax.training.processes.alike import require_same_config, require_same_data
from cimjax.training.processes.group import Group, group
from cimjax.training.processes.shared_failure import together
from cimjax.training.restore import Loaded, load
from cimjax.training.result import Callback, Result
from cimjax.training.run import network_file
from cimjax.training.run.address import is_remote
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.folder import RunFolder, RunFolderError
from cimjax.training.run.remote import Mirror, local_copy
from cimjax.training.run.secondary_folder import SecondaryFolder, require_shared
from cimjax.training.run.stop import stop_requests
from cimjax.training.run.writers import Writer
from cimjax.training.show.display import Display
from cimjax.training.show.reporter import Reporter
from cimjax.training.train_step import LossFunction


def train(
    config: ConfigDict,
    *,
    workdir: str | Path | None = None,
    model: nn.Module | None = None,
    dataset: Dataset | StreamedDataset | None = None,
    variables: Mapping[str, Any] | Loaded | None = None,
    fork: str | Path | None = None,
    loss_fn: LossFunction | None = None,
    optimizer: optax.GradientTransformation | None = None,
    writers: Sequence[Writer] = (),
    callbacks: Sequence[Callback] = (),
    display: Display | None = None,
) -> Result:
    """Train a network, or go on with the run that the folder holds.

    Where `jax.distributed` was initialised, all processes call this with the same arguments; an error of one ends them
    all, after process 0 has printed it. Callbacks are called on every process.

    Ctrl-C and SIGTERM save the state and raise KeyboardInterrupt or SystemExit; the same call goes on from there, and
    ends with the same numbers as a run that was never stopped.

    Args:
      config: as the files in `configs/` give it.
      workdir: the run folder, also one in a bucket, `gs://BUCKET/RUN`; `runs/DATASET-MODEL` if not given.
      model: a network of your own, called as `model(images, train=...)` or `model(images)`; else `config.model`.
      dataset: images of your own; else `config.dataset` names some.
      variables: what to start from, instead of random weights: what fits is taken, steps that it lacks are calibrated.
        Of a `Loaded` run, a step is taken where what it quantizes is built alike in both.
      fork: a run whose first epochs, with ideal ADCs, a new one takes over instead of training them again: it differs
        in its ADCs alone (their bits, granularity, steps ...), or has none, and keeps its state of that epoch.
      loss_fn: `loss_fn(logits, batch)`, () or (N,) float32; else cross entropy, or what `config.teacher` says. See
        `training.state.Batch`.
      optimizer: else `config.optimizer` describes one.
      writers: your own further places for the records of `metrics.jsonl`, beside `config.writers`.
      callbacks: called after every epoch.
      display: where to print; the terminal if not given.

    Raises:
      ValueError: for what cannot be trained: a field of the configuration, missing data, a folder in use or of another
        run (`RunFolderError`), a loss that is not finite.
    """
    if fork is not None and variables is not None:
        raise ValueError("a run starts from given weights, or from where another one is; give one of them.")
    with together() as agreement, contextlib.ExitStack() as stack:
        processes = group()
        require_same_config(config, processes)
        teacher = None
        if config.get("teacher"):
            if loss_fn is not None:
                raise ValueError("`config.teacher` is a run, and there is a `loss_fn`; give one of them.")
            teacher = load(config.teacher)
            loss_fn = taught_by(teacher, config.teacher_weight, config.teacher_temperature)
        experiment = build(config, model=model, dataset=dataset, loss_fn=loss_fn, optimizer=optimizer)
        check_statistics(experiment)
        require_same_data(experiment.dataset, processes)
        if teacher is not None:
            check_teacher(teacher, experiment)
        folder: Path | Mirror = Path(workdir or default_workdir(config))
        if workdir is not None and is_remote(workdir):
            if jax.process_count() > 1:
                raise ValueError("several processes train in a folder that all see, not in a bucket; give one.")
            folder = stack.enter_context(Mirror(workdir))
            callbacks = [*callbacks, folder.after_epoch]
        if config.start == "run" and variables is None and Checkpoints(folder).latest_step() is None:
            raise ValueError(
                "`config.start` is 'run', as training=post_training has it; give a trained run, as one of weight=none, "
                "by --from RUN (`variables=`)."
            )
        run = _opened(folder, config, processes)
        stack.callback(run.close)
        require_shared(run, processes)
        experiment = _going_on(experiment, run)
        if not processes.first:
            display, writers = Display(stream=stack.enter_context(open(os.devnull, "w"))), ()
        screen = stack.enter_context(display or Display())
        stop = stack.enter_context(stop_requests(screen.warn, agreement))
        for writer in writers:
            stack.callback(writer.close)
        reporter = Reporter(experiment, run, screen, writers, own=model is not None or dataset is not None)
        job = stack.enter_context(contextlib.closing(Run(experiment, run, reporter, stop, callbacks)))
        return job.run(variables, None if fork is None else local_copy(fork))


def _opened(folder: Path | Mirror, config: ConfigDict, processes: Group) -> RunFolder:
    """The run folder, in which process 0 alone writes."""
    network_file.refuse(Path(folder))
    if not processes.first:
        return SecondaryFolder(Path(folder))
    plain = json.loads(config.to_json_best_effort())
    return RunFolder(folder, plain, completed=_as_today, formats=config.writers)


def _going_on(experiment: Experiment, run: RunFolder) -> Experiment:
    """The experiment that goes on from what the folder holds.

    Raises:
      RunFolderError: where that was trained on other images, or no epoch is left for its ADCs.
    """
    checkpoints = Checkpoints(run.path)
    step, saved = checkpoints.latest_step(), checkpoints.beside()
    if step is None:
        return experiment
    if known := saved.get("data"):
        there = Description.from_dict(known)
        if what := there.differs_from(Description.of(experiment.dataset)):
            raise RunFolderError(
                f"{run.address} was trained on other images of {there.name} ({what}); give those, or another --workdir "
                "for a new run."
            )
    going_on, planned = experiment.going_on(step, saved), experiment.ideal_epochs
    epochs = experiment.config.epochs
    if planned < epochs <= going_on.ideal_epochs:
        raise RunFolderError(
            f"{run.address} has trained {going_on.ideal_epochs} epochs with ideal ADCs, and {epochs:g} `config.epochs` "
            "leave none for its own; give more, or another --workdir for a new run."
        )
    return going_on


def default_workdir(config: ConfigDict) -> Path:
    """Where a run goes when no folder is given."""
    data, folder = config.dataset, config.data_dir or None
    if is_folder(data):
        data = path_of(data, folder).name
    elif is_npz(data):
        data = file_of(data, folder).stem
    return Path("runs", f"{data}-{config.model.name}")


def _as_today(plain: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that an older version may have begun."""
    return json.loads(completed(plain).to_json_best_effort())
