"""The commands `cimjax study ...`: their arguments; each imports its study when it runs, jax not before."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterable
from pathlib import Path

from cimjax.command import Command, UsageError
from cimjax.spec.base import shown


def _variation(arguments: argparse.Namespace) -> None:
    from cimjax.analysis.studies.output import check_folder

    runs, sigmas = _runs(arguments.run), _numbers("--sigma", arguments.sigma)
    folder = check_folder(os.path.expanduser(arguments.save))
    from cimjax.analysis.progress import Progress
    from cimjax.analysis.studies.variation import save_variation, study_variation, table
    from cimjax.training.cache import keep_compiled_programs

    keep_compiled_programs()
    with Progress() as progress:
        study = study_variation(
            runs,
            sigmas=sigmas,
            chips=arguments.chips,
            on=arguments.on,
            chips_at_once=arguments.chips_at_once,
            say=progress.doing,
        )
    print(table(study))
    _print_files(save_variation(study, folder))


def _psums(arguments: argparse.Namespace) -> None:
    from cimjax.analysis.studies.output import check_folder

    (run,) = _runs([arguments.run])
    folder = check_folder(os.path.expanduser(arguments.save))
    from cimjax.analysis.progress import Progress
    from cimjax.analysis.studies.psum_output import save_psums, table
    from cimjax.analysis.studies.psums import study_psums
    from cimjax.training.cache import keep_compiled_programs

    keep_compiled_programs()
    layers = None if arguments.layers is None else [name.strip("/ ") for name in arguments.layers.split(",")]
    with Progress() as progress:
        study = study_psums(run, layers=layers, columns=arguments.columns, say=progress.doing)
        print(table(study))
        progress.doing("drawing")
        files = save_psums(study, folder)
    _print_files(files)


def _runs(words: Iterable[str]) -> list[Path]:
    """Run folders; what is wrong with them, or with drawing, is said before jax is imported."""
    from cimjax.analysis.figures import require_matplotlib
    from cimjax.training.run.folder import read_config

    require_matplotlib()
    runs = [Path(os.path.expanduser(word)) for word in words]
    for run in runs:
        read_config(run)
    return runs


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} is {shown(text)}; give numbers with commas between them, as in 0,0.1.") from None


def _print_files(files: Iterable[Path]) -> None:
    print("\n" + "\n".join(shlex.quote(str(file)) for file in files))


STUDIES: dict[str, Command] = {
    "study variation": Command(
        "measure runs on chips whose stored weights vary: accuracy over sigma, as the paper's Fig. 10",
        "cimjax study variation runs/a/weight=layer runs/a/weight=column --chips 50",
        {
            "run": {"nargs": "+", "metavar": "RUN", "help": "the folder of a run"},
            "--sigma": {
                "default": "0,0.05,0.1,0.2,0.3",
                "metavar": "A,B",
                "help": "standard deviations of the logarithm of what a stored weight is multiplied by, 0 to 2; "
                "0,0.05,0.1,0.2,0.3 if not given",
            },
            "--chips": {"type": int, "default": 20, "metavar": "N", "help": "chips for each sigma; 20 if not given"},
            "--on": {
                "choices": ("weights", "cells"),
                "default": "weights",
                "help": "what varies by itself: each weight (the paper), or each of its cells",
            },
            "--chips-at-once": {
                "type": int,
                "metavar": "N",
                "help": "chips in one program; fewer need less memory; 10 if not given, on CPUs 1, which is quicker",
            },
            "--save": {
                "default": "studies/variation",
                "metavar": "FOLDER",
                "help": "for table, figure and JSON, which are replaced; studies/variation if not given",
            },
        },
        _variation,
    ),
    "study psums": Command(
        "show the partial sums of a run's layers and how its ADCs fit them, as the paper's Fig. 6",
        "cimjax study psums runs/a/weight=column --layers conv2,conv3",
        {
            "run": {"metavar": "RUN", "help": "the folder of a run"},
            "--layers": {"metavar": "NAME,...", "help": "array layers by their paths; all if not given"},
            "--columns": {
                "type": int,
                "default": 3,
                "metavar": "N",
                "help": "columns of each layer whose distribution is drawn, from that of the narrowest psums to that "
                "of the widest; 3 if not given",
            },
            "--save": {
                "default": "studies/psums",
                "metavar": "FOLDER",
                "help": "for table, figures and JSON, which are replaced; studies/psums if not given",
            },
        },
        _psums,
    ),
}
