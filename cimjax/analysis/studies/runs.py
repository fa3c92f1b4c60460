"""What studies share: cases that are trained once for each seed, their costs on the chip, and tables of both."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cimjax.analysis import figures
from cimjax.analysis.studies.output import create_folder, write_text
from cimjax.analysis.sweep_plan import PlannedRun, checked
from cimjax.spec.base import shortened
from cimjax.training.config.options import field_of
from cimjax.training.run.files import write_json

if TYPE_CHECKING:
    from cimjax.analysis.executors import Executor
    from cimjax.training.experiment import Experiment


class Case(NamedTuple):
    """One of the things that a study compares.

    name: as tables show it; also of its folder.
    options: of the config file, beside those of the study: "weight=layer,psum=none".
    start: the name of the case whose run of the same seed it starts from.
    fields: further arguments of its runs, such as `--config.epochs=5`, after those of the study.
    replaces: whether its options take the place of those that the config file is given; else both are an error.
    teacher: the name of the case whose run of the same seed it learns from.
    measure: which accuracy of its results counts; `average_accuracy` is that of averaged weights.
    """

    name: str
    options: str
    start: str | None = None
    fields: tuple[str, ...] = ()
    replaces: bool = False
    teacher: str | None = None
    measure: str = "accuracy"

    def of_config(self, config: str) -> str:
        """The config of a study with the options of this case."""
        if self.replaces:
            path, _, given = config.partition(":")
            own = {word.partition("=")[0] for word in self.options.split(",")}
            config = f"{path}:{','.join(word for word in given.split(',') if word.partition('=')[0] not in own)}"
        return with_options(config, self.options)


class Outcome(NamedTuple):
    """What a case came to.

    accuracies: of the last state on the test images, 0 to 1, one for each seed that has ended.
    failed: why a run failed, by seed.
    rows: the rows of `sweep`, one for each seed.
    """

    case: Case
    accuracies: list[float]
    failed: dict[int, str]
    rows: list[dict[str, Any]]

    @property
    def mean(self) -> float:
        """The mean accuracy; NaN where no run has ended."""
        return statistics.fmean(self.accuracies) if self.accuracies else float("nan")


class Runs(NamedTuple):
    """What a study trains: a run of every case for each seed.

    config: a config file with options that all runs share.
    workdir: a folder for the runs, `WORKDIR/CASE/seed=0`, and for what the study writes; finished runs are kept.
    seeds: a run of every case for each.
    fields: further arguments of every run, such as `--config.epochs=5`.
    executor: what trains them; processes on this machine, one at a time, if not given.
    retry: whether runs that failed are tried again.
    """

    config: str
    workdir: str | Path
    seeds: Sequence[int] = (0, 1, 2)
    fields: Sequence[str] = ()
    executor: Executor | None = None
    retry: bool = False

    def folder(self, case: str, seed: int) -> Path:
        """Where the run of a case is."""
        return Path(self.workdir) / re.sub(r"[^\w.=+-]+", "-", case) / f"seed={seed}"


class Study(NamedTuple):
    """What a study came to.

    table: as Markdown.
    files: the files that hold it, its data and its figures.
    failed: how many runs failed.
    """

    table: str
    files: list[Path]
    failed: int


def parse_seeds(text: str) -> list[int]:
    """Seeds as typed, `0,1,2`.

    Raises:
      ValueError: in one line.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len(set(words)) < len(words):
        raise ValueError(f"--seeds is {shortened(text)!r}; give different whole numbers, as in --seeds 0,1,2.")
    return [int(word) for word in words]


def with_options(config: str, *options: str) -> str:
    """A config with further options, without those of its own that then have no effect.

    >>> with_options("digits.py:smoke,adc_bits=2", "psum=none", "seed=1")
    'digits.py:smoke,psum=none,seed=1'
    """
    path, _, given = config.partition(":")
    more = [word for words in options for word in words.split(",") if word]
    idle = "adc." if "psum=none" in more else ""
    words = [word for word in given.split(",") if word]
    fields = {word: field_of(word.partition("=")[0]) for word in words}
    if "weight=none" in more:
        kept = [word for word in words if not fields[word]]
    else:
        kept = [word for word in words if not (idle and fields[word].startswith(idle))]
    return f"{path}:{','.join([*kept, *more])}".rstrip(":")


def train_cases(runs: Runs, cases: Sequence[Case]) -> list[Outcome]:
    """Train every case once for each seed; what is finished is not trained again.

    Args:
      cases: a case that others start from stands anywhere.

    Raises:
      ValueError: before any run starts, where a case cannot be trained.
      Stopped: as `sweep` does.
    """
    from cimjax.analysis.sweep import train_all

    planned: list[PlannedRun] = []
    for case in cases:
        for seed in runs.seeds:
            teacher = None if case.teacher is None else runs.folder(case.teacher, seed)
            run = PlannedRun(
                values={"case": case.name, "seed": str(seed)},
                config=with_options(case.of_config(runs.config), f"seed={seed}"),
                fields=[*runs.fields, *case.fields, *([] if teacher is None else [f"--config.teacher={teacher}"])],
                epochs=0.0,
                folder=runs.folder(case.name, seed),
                start=None if case.start is None else runs.folder(case.start, seed),
                teacher=teacher,
            )
            try:
                planned.append(checked(run, set()))
            except ValueError as error:
                raise ValueError(f"{case.name}: {error}") from error
    rows = train_all(planned, runs.workdir, executor=runs.executor, retry=runs.retry)
    return [_outcome(case, [row for row in rows if row["case"] == case.name]) for case in cases]


def _outcome(case: Case, rows: list[dict[str, Any]]) -> Outcome:
    rows = [row | {"accuracy": row[case.measure]} if "accuracy" in row else row for row in rows]
    accuracies = [row["accuracy"] for row in rows if "accuracy" in row]
    failed = {int(row["seed"]): str(row["failed"]) for row in rows if "failed" in row}
    return Outcome(case, accuracies, failed, rows)


def described(config: str, fields: Sequence[str] = ()) -> Experiment:
    """The experiment of a config as far as it is known without images: its network, and what each layer costs.

    Raises:
      ValueError: in one line, for a config that cannot be built.
    """
    from cimjax.data.dataset import Description
    from cimjax.data.loading import shape_and_classes
    from cimjax.training.config.file import load_config, take_overrides
    from cimjax.training.experiment import build, view_of

    loaded = load_config(config, take_overrides(fields)[0])
    shape, classes = shape_and_classes(loaded.dataset, loaded.data_dir or None, view=view_of(loaded))
    zeros, ones = (0.0,) * shape[-1], (1.0,) * shape[-1]
    about = Description(
        name=loaded.dataset, classes=classes, image_shape=shape, mean=zeros, std=ones, images=loaded.batch_size
    )
    with loaded.unlocked():
        loaded.start = "random"
    return build(loaded, dataset=about)


def costs_of(runs: Runs, case: Case) -> dict[str, float]:
    """What the network of a case takes on the chip, per image where it is counted so; all 0 in full precision.

    Returns:
      `conversions` per image; `energy` of these in units of one code, conversions times the codes of their ADC
      (2^bits: Murmann's survey of converters, where energy doubles with each bit at low resolution); `multiplies`,
      multiplications by a scale factor per output pixel, summed over layers; `multiplies_of_paper`, as the paper's
      section III-B counts them.
    """
    experiment = described(case.of_config(runs.config), [*runs.fields, *case.fields])
    found = {"conversions": 0.0, "energy": 0.0, "multiplies": 0.0, "multiplies_of_paper": 0.0}
    for layer in experiment.layers:
        if layer.cost is not None:
            found["conversions"] += layer.cost.adc_conversions
            found["energy"] += layer.cost.adc_energy
            found["multiplies"] += layer.cost.dequantization_multiplications
            found["multiplies_of_paper"] += layer.cost.dequantization_multiplications_of_paper
    return found


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names of points (cost, accuracy) than which no other is as cheap and as accurate and better in one of both;
    by rising cost."""

    def beaten(name: str) -> bool:
        cost, accuracy = points[name]
        return any(c <= cost and a >= accuracy and (c, a) != (cost, accuracy) for c, a in points.values())

    return sorted((name for name in points if not beaten(name)), key=lambda name: points[name])


def percent(value: float) -> str:
    """An accuracy of 0 to 1 as tables show it."""
    return "-" if value != value else f"{100 * value:.2f}"


def accuracy_cells(outcome: Outcome, planned: int) -> list[str]:
    """Mean, lowest and highest accuracy in percent, and how many runs."""
    done = outcome.accuracies
    runs = str(len(done)) if len(done) == planned else f"{len(done)} of {planned}"
    return [percent(outcome.mean), *(percent(pick(done)) if done else "-" for pick in (min, max)), runs]


def failures(outcomes: Sequence[Outcome]) -> str:
    """A line for each run that failed; empty where none has."""
    return "".join(
        f"\n{outcome.case.name}, seed {seed}: failed: {shortened(' '.join(reason.split()))}"
        for outcome in outcomes
        for seed, reason in outcome.failed.items()
    )


def data_of(outcome: Outcome, **more: Any) -> dict[str, Any]:
    """What is kept of an outcome in a study's JSON."""
    return {"case": outcome.case.name, "accuracies": outcome.accuracies, "failed": outcome.failed, **more}


def finished(runs: Runs, name: str, text: str, data: Any, outcomes: Sequence[Outcome], **drawn: Any) -> Study:
    """A study of which all is known: its table with the failures below, its data and its figures are written.

    Args:
      name: of table and data.
      **drawn: matplotlib figures by name.
    """
    text += failures(outcomes)
    files = save(runs.workdir, name, text, data)
    for figure, one in drawn.items():
        files += figures.save(one, runs.workdir, figure)
    return Study(text, files, sum(len(outcome.failed) for outcome in outcomes))


def save(folder: str | Path, name: str, table: str, data: Any) -> list[Path]:
    """Write `NAME.md` and `NAME.json`."""
    folder = create_folder(folder)
    text, values = (folder / f"{name}.{kind}" for kind in ("md", "json"))
    write_text(text, table)
    write_json(values, data)
    return [text, values]
