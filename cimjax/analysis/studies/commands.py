"""The commands `cimjax study ...`: their arguments; each imports its study when it runs, jax not before."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cimjax.analysis.executor_flags import EXECUTOR_FLAGS, executor_of
from cimjax.command import A_CONFIG, RUN, Command, UsageError, path
from cimjax.spec.base import shown


def _variation(arguments: argparse.Namespace) -> None:
    from cimjax.analysis.studies.output import check_folder

    _check_runs(arguments.run)
    sigmas, folder = _numbers("--sigma", arguments.sigma), check_folder(arguments.save)
    from cimjax.analysis.progress import Progress
    from cimjax.analysis.studies.variation import save_variation, study_variation, table
    from cimjax.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    with Progress() as progress:
        study = study_variation(
            arguments.run,
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

    _check_runs([arguments.run])
    folder = check_folder(arguments.save)
    from cimjax.analysis.progress import Progress
    from cimjax.analysis.studies.psum_output import save_psums, table
    from cimjax.analysis.studies.psums import study_psums
    from cimjax.compilation_cache import keep_compiled_programs

    keep_compiled_programs()
    layers = None if arguments.layers is None else [name.strip("/ ") for name in arguments.layers.split(",")]
    with Progress() as progress:
        study = study_psums(arguments.run, layers=layers, columns=arguments.columns, say=progress.doing)
        print(table(study))
        progress.doing("drawing")
        files = save_psums(study, folder)
    _print_files(files)


def _check_runs(runs: Iterable[Path]) -> None:
    """What is wrong with run folders, or with drawing, is said before jax is imported."""
    from cimjax.analysis.figures import require_matplotlib
    from cimjax.training.run.folder import read_config

    require_matplotlib()
    for run in runs:
        read_config(run)


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise UsageError(f"{flag} is {shown(text)}; give numbers with commas between them, as in 0,0.1.") from None


def _print_files(files: Iterable[Path]) -> None:
    print("\n" + "\n".join(shlex.quote(str(file)) for file in files))


def _training(study: str, **arguments: Callable[[Any], Any]) -> Callable[[argparse.Namespace], None]:
    """What runs a study that trains: prints its table, and the files that it wrote.

    Args:
      study: "module:function" of `cimjax.analysis.studies`.
      **arguments: those of the function that come from further arguments of the command, each made from its text.
    """

    def run(given: argparse.Namespace) -> None:
        import importlib

        from cimjax.analysis.studies.runs import Runs, parse_seeds

        module, function = study.split(":")
        more = {name: read(getattr(given, name)) for name, read in arguments.items()}
        fields = [str(override) for override in given.overrides]
        executor = executor_of(given, given.workdir)
        runs = Runs(given.config, given.workdir, parse_seeds(given.seeds), fields, executor, given.retry)
        call = getattr(importlib.import_module(f"cimjax.analysis.studies.{module}"), function)
        found = call(runs, **more)
        print(found.table, flush=True)
        print("\n".join(["", *(shlex.quote(str(file)) for file in found.files)]), flush=True)
        if found.failed:
            raise UsageError(f"{found.failed} runs failed; the same command with --retry tries them again.")

    return run


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _questions(table: str) -> Callable[[str | None], list[str]]:
    """Names of questions as typed; all of a table of `studies.design` where none are."""

    def read(text: str | None) -> list[str]:
        from cimjax.analysis.studies import design

        return list(getattr(design, table)) if text is None else _words(text)

    return read


_RUNS: dict[str, dict[str, Any]] = {
    "--config": {"required": True, "metavar": A_CONFIG, "help": "what all runs have in common"},
    "--workdir": {
        "required": True,
        "metavar": "DIR",
        "type": path,
        "help": "a folder for runs, tables and figures; runs are kept",
    },
    "--seeds": {"default": "0,1,2", "metavar": "N,...", "help": "a run of everything for each; 0,1,2 if not given"},
    **EXECUTOR_FLAGS,
}

STUDIES: dict[str, Command] = {
    "study granularity": Command(
        "train every granularity pair and every scheme of the paper's Table I; draw its Fig. 7 and Fig. 8",
        "cimjax study granularity --config configs/digits.py --workdir runs/pairs",
        _RUNS,
        _training("granularity:study_granularity"),
    ),
    "study encodings": Command(
        "train encodings of weights with ADCs of several bits; draw accuracy over conversions and over energy",
        "cimjax study encodings --config configs/digits.py --workdir runs/encodings",
        _RUNS
        | {
            "--encodings": {
                "default": "twos_complement,differential,differential_analog",
                "metavar": "NAME,...",
                "help": "twos_complement, differential, differential_analog, offset, offset_adc, learned_scales; the "
                "first three if not given",
            },
            "--bits": {"default": "2,3,4", "metavar": "N,...", "help": "bits of the ADC; 2,3,4 if not given"},
            "--pairs": {
                "default": "column/column",
                "metavar": "W/P,...",
                "help": "granularities of weights and partial sums; column/column if not given",
            },
        },
        _training("encodings:study_encodings", encodings=_words, bits=_words, pairs=_words),
    ),
    "study training-cost": Command(
        "train in one stage and in two, with granularities that agree and that do not; draw the paper's Fig. 9",
        "cimjax study training-cost --config configs/digits.py --workdir runs/cost",
        _RUNS,
        _training("training_cost:study_training_cost"),
    ),
    "study design": Command(
        "change one choice of a design at a time and compare: encodings, offsets, steps, tilings, stages",
        "cimjax study design --config configs/digits.py:adc_bits=2 --workdir runs/d",
        _RUNS
        | {
            "--questions": {
                "metavar": "NAME,...",
                "help": "what to do otherwise, as 'encoding,tiling'; everything if not given",
            }
        },
        _training("design:study_design", questions=_questions("DESIGN")),
    ),
    "study recipe": Command(
        "change one thing of a training at a time and compare: teachers, stages, gradients of the ADC, rates",
        "cimjax study recipe --config configs/digits.py:adc_bits=2 --workdir runs/r",
        _RUNS
        | {
            "--questions": {
                "metavar": "NAME,...",
                "help": "what to do otherwise, as 'teacher,length'; everything if not given",
            }
        },
        _training("design:study_recipe", questions=_questions("RECIPE")),
    ),
    "study adc-range": Command(
        "set the ADCs of a trained network by every rule, without training and with it",
        "cimjax study adc-range --config configs/digits.py --workdir runs/range",
        _RUNS | {"--bits": {"default": "2,3,4", "metavar": "N,...", "help": "bits of the ADC; 2,3,4 if not given"}},
        _training("adc_range:study_adc_range", bits=_words),
    ),
    "study variation": Command(
        "measure runs on chips whose stored weights vary: accuracy over sigma, as the paper's Fig. 10",
        "cimjax study variation runs/a/weight=layer runs/a/weight=column --chips 50",
        {
            "run": {"nargs": "+", **RUN},
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
                "type": path,
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
            "run": RUN,
            "--layers": {"metavar": "NAME,...", "help": "array layers by their paths; all if not given"},
            "--columns": {
                "type": int,
                "default": 3,
                "metavar": "N",
                "help": "columns of each layer whose distribution is drawn, from that of the narrowest psums to that "
                "of the widest; 3 if not given",
            },
            "--save": {
                "type": path,
                "default": "studies/psums",
                "metavar": "FOLDER",
                "help": "for table, figures and JSON, which are replaced; studies/psums if not given",
            },
        },
        _psums,
    ),
    "study bits": Command(
        "measure what each layer loses at fewer ADC bits, choose bits under a budget of ADC energy, and fine-tune them",
        "cimjax study bits --config configs/digits.py --workdir runs/bits",
        _RUNS
        | {
            "--seeds": {"default": "0", "metavar": "N,...", "help": "a run of everything for each; 0 if not given"},
            "--bits": {
                "default": "1,2,3,4",
                "metavar": "N,...",
                "help": "bits that columns may have; 1,2,3,4 if not given",
            },
            "--by": {
                "choices": ("layer", "plane"),
                "default": "layer",
                "help": "what gets its bits together: all columns of a layer, or those that hold digits of one "
                "significance; layer if not given",
            },
            "--budget": {
                "default": "0.5",
                "metavar": "PART",
                "help": "of the energy of all ADCs (conversions x codes), beside the config's own bits; 0.5 if not "
                "given",
            },
        },
        _training("bits:study_bits", bits=_words, budget=str, by=str),
    ),
}
