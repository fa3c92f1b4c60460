"""The commands `cimjax study ...`: their arguments; each imports its study when it runs, jax not before."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cimjax.command import A_CONFIG, Command, UsageError


def _training(study: str, **arguments: Callable[[Any], Any]) -> Callable[[argparse.Namespace], None]:
    """What runs a study that trains: prints its table, and the files that it wrote.

    Args:
      study: "module:function" of `cimjax.analysis.studies`.
      **arguments: those of the function that come from further arguments of the command, each made from its text.
    """

    def run(given: argparse.Namespace) -> None:
        import importlib

        from cimjax.analysis.studies.runs import parse_seeds

        module, function = study.split(":")
        more = {name: read(getattr(given, name)) for name, read in arguments.items()}
        seeds, fields = parse_seeds(given.seeds), [str(override) for override in given.overrides]
        call = getattr(importlib.import_module(f"cimjax.analysis.studies.{module}"), function)
        workdir = Path(os.path.expanduser(given.workdir))
        found = call(given.config, workdir, seeds=seeds, fields=fields, jobs=given.jobs, retry=given.retry, **more)
        print(found.table, flush=True)
        print("\n".join(["", *(shlex.quote(str(file)) for file in found.files)]), flush=True)
        if found.failed:
            raise UsageError(f"{found.failed} runs failed; the same command with --retry tries them again.")

    return run


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


_RUNS: dict[str, dict[str, Any]] = {
    "--config": {"required": True, "metavar": A_CONFIG, "help": "what all runs have in common"},
    "--workdir": {"required": True, "metavar": "DIR", "help": "a folder for runs, tables and figures; runs are kept"},
    "--seeds": {"default": "0,1,2", "metavar": "N,...", "help": "a run of everything for each; 0,1,2 if not given"},
    "--jobs": {"type": int, "default": 1, "metavar": "N", "help": "runs at a time; 1 if not given"},
    "--retry": {"action": "store_true", "help": "try runs again that failed before"},
}

STUDIES: dict[str, Command] = {
    "study granularity": Command(
        "train every granularity pair and every scheme of the paper's Table I; draw its Fig. 7 and Fig. 8",
        "cimjax study granularity --config configs/digits.py --workdir runs/granularity",
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
                "help": "twos_complement, differential, differential_analog, offset, offset_adc; the first three if "
                "not given",
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
    "study adc-range": Command(
        "set the ADCs of a trained network by every rule, without training and with it",
        "cimjax study adc-range --config configs/digits.py --workdir runs/range",
        _RUNS | {"--bits": {"default": "2,3,4", "metavar": "N,...", "help": "bits of the ADC; 2,3,4 if not given"}},
        _training("adc_range:study_adc_range", bits=_words),
    ),
    "study bits": Command(
        "measure what each layer loses at fewer ADC bits, choose bits under a budget of ADC energy, and fine-tune them",
        "cimjax study bits --config configs/digits.py --workdir runs/bits --budget 0.5",
        _RUNS
        | {
            "--seeds": {"default": "0", "metavar": "N,...", "help": "a run of everything for each; 0 if not given"},
            "--bits": {
                "default": "1,2,3,4",
                "metavar": "N,...",
                "help": "bits that a layer may have; 1,2,3,4 if not given",
            },
            "--budget": {
                "default": "0.5",
                "metavar": "PART",
                "help": "of the energy of all ADCs (conversions x codes), beside the config's own bits; 0.5 if not "
                "given",
            },
        },
        _training("bits:study_bits", bits=_words, budget=str),
    ),
}
