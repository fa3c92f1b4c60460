"""How accuracy falls when the stored weights vary: many chips of several trained runs, all on the same test images.

A chip is a random key. Chip number n is the same key for every run and every sigma, so that all of them are compared in
pairs. Training on varied cells is configured by `CIMSpec.variation`; what a chip does to a layer is in
`cimjax.core.variation`.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

import cimjax
from cimjax.analysis import figures
from cimjax.analysis.plot import labels_of
from cimjax.analysis.studies.output import create_folder, markdown, write_text
from cimjax.core.programs.platforms import runs_on
from cimjax.data import Split
from cimjax.spec import CIMSpec, VariationSpec
from cimjax.spec.base import LARGEST_COUNT, shown
from cimjax.spec.rules import check_rules
from cimjax.training.evaluate import Evaluator
from cimjax.training.experiment import Experiment, build
from cimjax.training.parallel import AXIS
from cimjax.training.random_streams import Stream, stream_key
from cimjax.training.restore import restore
from cimjax.training.run.files import write_json
from cimjax.training.state import TrainState
from cimjax.training.train_step import eval_step

# What `study_variation` measures at if nothing else is asked for; the paper's Fig. 10 has about this range.
SIGMAS = (0.0, 0.05, 0.1, 0.2, 0.3)
CHIPS = 20
# XLA's CPU backend computes several kernels at once as a grouped convolution, which is slow: a chip of ResNet-20 takes
# twice as long among ten as alone (200 images, 2 cores, jaxlib 0.10.2, one run), and three times the memory.
CHIPS_AT_ONCE, ON_CPU = 10, 1
# The part of the chips below each line of the table and each end of the figure's band.
QUANTILES = (0.05, 0.5, 0.95)
# Told apart in grey, beside their markers.
_LINES = ("-", "--", "-.", ":")


@dataclasses.dataclass(frozen=True)
class VariedRun:
    """The accuracies of one run.

    run: its folder.
    label: as much of its path as tells it from the others.
    images: test images on which each accuracy was measured.
    accuracies: by sigma, of each chip, 0 to 1.
    """

    run: Path
    label: str
    images: int
    accuracies: dict[float, list[float]]


@dataclasses.dataclass(frozen=True)
class VariationStudy:
    """What `study_variation` measured.

    on: what one variation factor multiplies, "weights" or "cells".
    chips: how many there were; `seed`: what they were drawn from.
    """

    on: str
    chips: int
    seed: int
    runs: list[VariedRun]


def study_variation(
    runs: Sequence[str | Path],
    *,
    sigmas: Sequence[float] = SIGMAS,
    chips: int = CHIPS,
    on: str = "weights",
    seed: int = 0,
    chips_at_once: int | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> VariationStudy:
    """Accuracy of trained runs on chips whose stored weights vary: `w_var = w exp(theta)`, `theta ~ N(0, sigma^2)`.

    Every array layer of a run's network is built with `VariationSpec(sigma, on)`, whatever it was trained with; at
    sigma 0 without variation, so that a run without any has its own accuracy there, exactly. Its last state is taken.
    Source: the paper's eq. 5 and Fig. 10.

    Args:
      runs: run folders of networks that `config.model` names; each is measured once.
      sigmas: standard deviations of `theta`, 0 to 2.
      chips: how many, at least 1; chip n has the same key for every run and sigma.
      on: "weights" (one theta per weight, the paper) or "cells" (one per stored cell).
      seed: of the chips.
      chips_at_once: chips of one vmapped evaluation, which needs so many times the memory of a plain one; None: 10, but
        1 on CPUs, where that is quicker.
      say: is told what is being done.

    Returns:
      All accuracies, and what they were measured with.

    Raises:
      ValueError: in one line, before anything is measured: for numbers out of range, and for a run without array
        layers; `RunFolderError` for a folder without a run, or whose checkpoint is damaged.
    """
    specs = [VariationSpec(sigma=sigma, on=on) for sigma in sigmas]  # type: ignore[arg-type]
    varied = {spec.sigma: spec for spec in sorted(specs, key=lambda spec: spec.sigma)}
    if chips_at_once is None:
        chips_at_once = ON_CPU if runs_on("cpu") else CHIPS_AT_ONCE
    _check_counts(varied, chips=chips, chips_at_once=chips_at_once)
    folders = list({Path(run).absolute().resolve(): Path(run) for run in runs}.values())
    if not folders:
        raise ValueError("no run is given; name the folder of at least one.")
    labels = labels_of([folder.absolute() for folder in folders])
    restored = [_with_arrays(folder) for folder in folders]
    keys = jax.vmap(lambda number: stream_key(seed, Stream.OTHER_CHIP, number))(np.arange(chips))
    measured = []
    for folder, label, (experiment, state) in zip(folders, labels, restored, strict=True):
        say(f"{label}: reading its test images")
        split = build(experiment.config, to_train=False).dataset.test
        state, found = experiment.devices.put(state), {}
        for sigma, variation in varied.items():
            say(f"{label}: sigma {sigma:g}, {chips} chips" if sigma else f"{label}: sigma 0")
            chip = with_variation(experiment, variation if sigma else None)
            evaluator = ChipEvaluator(chip, split, chips_at_once)
            found[sigma] = evaluator(state, keys) if sigma else [evaluator.without_variation(state)] * chips
        measured.append(VariedRun(folder, label, len(split), found))
    return VariationStudy(str(specs[0].on), chips, seed, measured)


class ChipEvaluator:
    """Evaluates a state of one run on one split, on many chips in one program."""

    def __init__(self, experiment: Experiment, split: Split, chips_at_once: int) -> None:
        """As for `Evaluator`, with how many chips are computed together."""
        self.one, self.chips_at_once = Evaluator(experiment, split), chips_at_once
        setup, preparation = experiment.setup, experiment.preparation

        def step(state: TrainState, chips: Array, pixels: Array, labels: Array, real: Array) -> Array:
            batch = preparation.plain(pixels, labels)

            def on(chip: Array) -> Array:
                return eval_step(setup, state, batch, real, jax.random.wrap_key_data(chip))["correct"]

            return jax.vmap(on)(chips)

        self.step = experiment.devices.spread(step, PartitionSpec(), *[PartitionSpec(AXIS)] * 3, add=True)

    def __call__(self, state: TrainState, chips: Array) -> list[float]:
        """The accuracy on each chip, 0 to 1.

        Args:
          chips: (n,) random keys.
        """
        data, count = np.asarray(jax.random.key_data(chips)), len(chips)
        size = min(self.chips_at_once, count)
        correct: list[int] = []
        for start in range(0, count, size):
            # The last group is filled up, so that there is one program.
            group = data[np.minimum(np.arange(start, start + size), count - 1)]
            of_batches = [np.asarray(self.step(state, group, *batch), np.int64) for batch in self.one.batches]
            correct += np.sum(of_batches, axis=0).tolist()
        return [n / self.one.count for n in correct[:count]]

    def without_variation(self, state: TrainState) -> float:
        """The accuracy of the network itself, by the same program as that of `cimjax evaluate`."""
        return self.one(state)["accuracy"]


def with_variation(experiment: Experiment, variation: VariationSpec | None) -> Experiment:
    """The experiment of a run with other variation in every array layer, and the same data set.

    Args:
      experiment: as `restore` gives it, of a network that its configuration names.
    """

    def varied(spec: CIMSpec) -> dict[str, Any]:
        return dataclasses.replace(spec, variation=variation).to_dict()

    config = experiment.config.copy_and_resolve_references()
    with config.unlocked():
        if config.spec is not None:
            config.spec = ConfigDict(varied(CIMSpec.from_dict(config.spec.to_dict())))
        rules = check_rules(config.rules)
        config.rules = tuple((pattern, None if spec is None else varied(spec)) for pattern, spec in rules)
        # Of training alone, and refused where nothing varies.
        config.fresh_chips, config.variation_draw = 0, "chip"
    return build(config, dataset=experiment.dataset, to_train=False)


def _check_counts(sigmas: Iterable[float], **counts: int) -> None:
    if not list(sigmas):
        raise ValueError("`sigmas` is empty; give at least one, as in 0,0.1.")
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST_COUNT:
            raise ValueError(f"`{name}` is {shown(value)}; give a whole number of at least 1.")


def _with_arrays(folder: Path) -> tuple[Experiment, TrainState]:
    experiment, state, _ = restore(folder)
    if not experiment.specs:
        raise ValueError(f"{folder} has no array layers whose cells could vary: it is a run of full precision.")
    return experiment, state


def summary(accuracies: Sequence[float]) -> dict[str, float | None]:
    """`mean`, `std` (of a sample; None for a single chip) and `QUANTILES` of accuracies: {"mean": ..., "5%": ...}."""
    quantiles = np.quantile(accuracies, QUANTILES)
    return {
        "mean": statistics.fmean(accuracies),
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        **{f"{part:.0%}": float(value) for part, value in zip(QUANTILES, quantiles, strict=True)},
    }


def table(study: VariationStudy) -> str:
    """Mean, standard deviation and quantiles over chips in percent, as Markdown: a line for each sigma and run."""
    rows = [["sigma", "mean", "std", *(f"{part:.0%}" for part in QUANTILES), "run"]]
    for sigma in study.runs[0].accuracies:
        for run in study.runs:
            values = summary(run.accuracies[sigma]).values()
            cells = ("-" if value is None else f"{100 * value:.2f}" for value in values)
            rows.append([f"{sigma:g}", *cells, run.label.replace("|", "/")])
    chips = "1 chip" if study.chips == 1 else f"{study.chips} chips"
    images = "/".join(f"{count:,}" for count in sorted({run.images for run in study.runs}))
    head = f"Test accuracy, percent, with variation of {study.on}: {chips}, {images} images"
    return f"{head}\n\n{markdown(rows[0], rows[1:])}"


def as_dict(study: VariationStudy) -> dict[str, Any]:
    """Everything that was measured, as JSON takes it."""
    runs = [
        {
            "run": str(run.run),
            "label": run.label,
            "images": run.images,
            "sigmas": [
                {"sigma": sigma, **summary(accuracies), "accuracies": accuracies}
                for sigma, accuracies in run.accuracies.items()
            ],
        }
        for run in study.runs
    ]
    fields = {"on": study.on, "chips": study.chips, "seed": study.seed}
    return {"cimjax": cimjax.__version__, **fields, "runs": runs}


def save_variation(study: VariationStudy, folder: str | Path) -> list[Path]:
    """Write `variation.md`, `.json`, `.svg` and `.png`, which are replaced.

    Raises:
      ValueError: in one line, where the folder cannot be written or matplotlib is missing.
    """
    figures.require_matplotlib()
    folder = create_folder(folder)
    text = write_text(folder / "variation.md", table(study))
    write_json(folder / "variation.json", as_dict(study))
    return [text, folder / "variation.json", *figures.save(draw(study), folder, "variation")]


def draw(study: VariationStudy) -> Any:
    """Accuracy over sigma: the mean over chips, and a band from the lowest to the highest of `QUANTILES`."""
    figure, (axes,) = figures.panels()
    figure.set_size_inches(6.0, 3.9 + 0.22 * len(study.runs))
    for index, run in enumerate(study.runs):
        look, sigmas = figures.look(index), list(run.accuracies)
        each = [100 * np.asarray(run.accuracies[sigma]) for sigma in sigmas]
        low, high = np.quantile(each, [QUANTILES[0], QUANTILES[-1]], axis=1)
        line, colour = _LINES[index % len(_LINES)], look["color"]
        axes.fill_between(sigmas, low, high, color=colour, alpha=0.12, linewidth=0)
        for edge in (low, high):
            axes.plot(sigmas, edge, line, color=colour, linewidth=0.6)
        axes.plot(sigmas, np.mean(each, axis=1), line, label=run.label, **look)
    axes.set_xlabel(rf"standard deviation $\sigma$ of the variation of {study.on}")
    axes.set_ylabel("test accuracy, %")
    if study.chips > 1:
        axes.set_title(
            f"mean of {study.chips} chips; band: {QUANTILES[0]:.0%} to {QUANTILES[-1]:.0%} of them", fontsize=10
        )
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    return figure
