"""Accuracy on a split, counting every image once, and trained runs as functions."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cimjax.core.programs.cpu import compiler_options
from cimjax.data import Dataset, Split
from cimjax.nn.layers import ADC_STATISTICS
from cimjax.spec import CIMSpec
from cimjax.training.experiment import Experiment, build
from cimjax.training.metrics import health_by_layer
from cimjax.training.run.folder import read_config
from cimjax.training.train_step import Images, TrainState, chip_key


class Evaluator:
    """Evaluates states of one run on one split, which is padded to whole batches once."""

    def __init__(self, experiment: Experiment, split: Split) -> None:
        size = experiment.config.eval_batch_size
        self.count = len(split)
        padding = -self.count % size
        real = np.arange(self.count + padding) < self.count
        images = np.concatenate([split.images, np.zeros((padding, *split.images.shape[1:]), np.uint8)])
        labels = np.concatenate([split.labels, np.zeros(padding, np.int32)]).astype(np.int32)
        self.batches = [
            (
                Images(jnp.asarray(images[i : i + size]), jnp.asarray(labels[i : i + size])),
                jnp.asarray(real[i : i + size]),
            )
            for i in range(0, len(images), size)
        ]
        self.steps = {
            ideal: experiment.devices.spread_batch(dataclasses.replace(experiment.stepper, ideal_adcs=ideal).evaluate)
            for ideal in (False, True)
        }

    def __call__(self, state: TrainState, *, ideal_adcs: bool = False) -> dict[str, float]:
        """`accuracy` (0 to 1) and mean `loss` over all images of the split."""
        sums = [self.steps[ideal_adcs](state, *batch) for batch in self.batches]
        correct, loss = (sum(np.asarray(each[name], np.float64) for each in sums) for name in ("correct", "loss"))
        return {"loss": float(loss) / self.count, "accuracy": float(correct) / self.count}


def health(experiment: Experiment, state: TrainState) -> dict[str, dict[str, float]]:
    """How every layer's ADCs are used on the calibration images, in evaluation mode and on the run's own chip."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    measure = _measure_health(experiment.model)
    return health_by_layer(measure(variables, experiment.calibration_images(), state.seed))


@functools.lru_cache(maxsize=4)
def _measure_health(model: nn.Module) -> Any:
    def measure(variables: Any, images: jax.Array, seed: jax.Array) -> Any:
        rngs = {"variation": chip_key(seed)}
        return model.apply(variables, images, mutable=[ADC_STATISTICS], rngs=rngs)[1].get(ADC_STATISTICS, {})

    return jax.jit(measure, compiler_options=compiler_options())


def restore(
    run: str | Path,
    *,
    which: Literal["last", "best"] = "best",
    model: nn.Module | None = None,
    dataset: Dataset | None = None,
) -> tuple[Experiment, TrainState, dict[str, Any]]:
    """The experiment of a run folder, one of its states, and what was saved beside that state.

    Args:
      run: the run folder.
      which: the state of the best test accuracy, or the last.
      model, dataset: the network and images of the run when they were the caller's own.

    Raises:
      RunFolderError: when the folder holds no run, or its checkpoint is damaged or of another network.
    """
    from cimjax.training.run.checkpoint import Checkpoints

    experiment = build(ConfigDict(read_config(run)), model=model, dataset=dataset)
    state, extra = Checkpoints(Path(run)).restore(experiment.abstract_state(), which=which)
    return experiment, state, extra


def load(
    run: str | Path,
    *,
    which: Literal["last", "best"] = "best",
    model: nn.Module | None = None,
    dataset: Dataset | None = None,
) -> tuple[nn.Module, dict[str, Any], CIMSpec | dict[str, CIMSpec] | None]:
    """A trained run as a function: its network, its variables and its specification.

    The specification is that of the network's own array layers, whoever built it: one where all layers agree, a
    dictionary by path ("block1/conv2") where they differ, None where there are none. Images go in normalised, as
    `experiment.stepper.normalise` makes them; with `variation`, the run's chip is `apply(...,
    rngs={"variation": cimjax.training.train_step.chip_key(config.seed)})`. Arguments and errors as for `restore`.

    >>> model, variables, spec = load("runs/digits")  # doctest: +SKIP
    >>> logits = model.apply(variables, images)  # doctest: +SKIP
    """
    experiment, state, _ = restore(run, which=which, model=model, dataset=dataset)
    return experiment.model, {"params": state.params, "batch_stats": state.batch_stats}, experiment.spec


def evaluate(
    run: str | Path,
    which: Literal["last", "best"] = "best",
    *,
    model: nn.Module | None = None,
    dataset: Dataset | None = None,
) -> dict[str, Any]:
    """Test accuracy and loss of a run: {"step", "split", "which", "images", "loss", "accuracy"}."""
    experiment, state, _ = restore(run, which=which, model=model, dataset=dataset)
    evaluator = Evaluator(experiment, experiment.dataset.test)
    found = evaluator(experiment.devices.put(state))
    return {"step": int(state.step), "split": "test", "which": which, "images": evaluator.count, **found}
