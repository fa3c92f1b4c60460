"""`cimjax.train`: what a run may be given, and what it comes to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import optax
from ml_collections import ConfigDict

from cimjax.data import Dataset, StreamedDataset
from cimjax.training.config.fields import completed
from cimjax.training.evaluate import Loaded
from cimjax.training.experiment import build, default_workdir
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.folder import RunFolder
from cimjax.training.run.stop import stop_requests
from cimjax.training.run.writers import Writer
from cimjax.training.show.display import Display
from cimjax.training.show.teller import Teller
from cimjax.training.state import TrainState
from cimjax.training.train_step import LossFunction

# `callback(epoch, state, records)` after every epoch, with its records by split; True ends the run there.
Callback = Callable[[int, TrainState, dict[str, Any]], bool | None]


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run came to.

    accuracy, loss: on the test images, of the last state; the accuracy 0 to 1.
    steps: optimizer steps of the whole run.
    moved: how far each kind of step moved, mean `|log(s / s0)|`.
    workdir: the run folder.
    more: other accuracies by name, where the configuration asks for them: of the averaged parameters, of the state that
      was best on the held-out images, on fresh chips (their mean and standard deviation).
    """

    accuracy: float
    loss: float
    steps: int
    moved: dict[str, float]
    workdir: Path
    more: dict[str, float]


def train(
    config: ConfigDict,
    *,
    workdir: str | Path | None = None,
    model: nn.Module | None = None,
    dataset: Dataset | StreamedDataset | None = None,
    variables: Mapping[str, Any] | Loaded | None = None,
    loss_fn: LossFunction | None = None,
    optimizer: optax.GradientTransformation | None = None,
    writers: Sequence[Writer] = (),
    callbacks: Sequence[Callback] = (),
    display: Display | None = None,
) -> Result:
    """Train a network, or go on with the run that the folder holds.

    Ctrl-C and SIGTERM save the state and raise KeyboardInterrupt or SystemExit; the same call goes on from there, and
    ends with the same numbers as a run that was never stopped.

    Args:
      config: as the files in `configs/` give it.
      workdir: the run folder; `runs/DATASET-MODEL` if not given.
      model: a network of your own, called as `model(images, train=...)` or `model(images)`; else `config.model`.
      dataset: images of your own; else `config.dataset` names some.
      variables: what to start from, instead of random weights: what fits is taken, steps that it lacks are calibrated.
        Of a `Loaded` run, a step is taken where what it quantizes is built alike in both.
      loss_fn: `loss_fn(logits, batch)`, () or (N,) float32; else cross entropy. See `training.state.Batch`.
      optimizer: else `config.optimizer` describes one.
      writers: your own further places for the records of `metrics.jsonl`, beside `config.writers`.
      callbacks: called after every epoch.
      display: where to print; the terminal if not given.

    Raises:
      ValueError: for what cannot be trained: a field of the configuration, missing data, a folder in use or of another
        run (`RunFolderError`), a loss that is not finite.
    """
    experiment = build(config, model=model, dataset=dataset, loss_fn=loss_fn, optimizer=optimizer)
    folder = Path(workdir) if workdir is not None else default_workdir(config)
    if config.start == "run" and variables is None and Checkpoints(folder).latest_step() is None:
        raise ValueError(
            "`config.start` is 'run', as training=post_training has it; give a trained run, as one of weight=none, by "
            "--from RUN (`variables=`)."
        )
    plain = json.loads(config.to_json_best_effort())
    own = model is not None or dataset is not None
    with (
        RunFolder.open(folder, plain, completed=_as_today, formats=config.writers) as run,
        display or Display() as screen,
        stop_requests(screen.warn) as stop,
        contextlib.ExitStack() as stack,
    ):
        for writer in writers:
            stack.callback(writer.close)
        teller = Teller(experiment, run, screen, writers, own=own)
        from cimjax.training.loop import Run

        with contextlib.closing(Run(experiment, run, teller, stop, callbacks)) as job:
            return job.run(variables)


def _as_today(plain: dict[str, Any]) -> dict[str, Any]:
    """The options of a run that an older version may have begun."""
    return json.loads(completed(plain).to_json_best_effort())
