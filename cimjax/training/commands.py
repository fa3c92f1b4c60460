"""The commands that train, and that look at runs, configs and data sets; each imports its room when it runs, so that
help and mistakes are answered at once."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cimjax.command import A_CONFIG, RUN, Command, UsageError, checked_folder, ended_by_ctrl_c, path

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def _train(arguments: argparse.Namespace) -> None:
    where = arguments.coordinator_address, arguments.num_processes, arguments.process_id
    asked = None
    if arguments.start is not None and arguments.fork is not None:
        raise UsageError("--from starts from a run's weights, --fork goes on from where it is; give one of them.")
    if arguments.distributed:
        _come_together(*where)
    elif any(value is not None for value in where):
        raise UsageError("--coordinator_address, --num_processes and --process_id are of --distributed; give it too.")
    else:
        asked = _asked_for(arguments)  # mistakes are said before jax is imported
    with ended_by_ctrl_c():
        from cimjax.compilation_cache import keep_compiled_programs
        from cimjax.training.processes.group import group
        from cimjax.training.processes.shared_failure import together
        from cimjax.training.restore import load
        from cimjax.training.train import train

    keep_compiled_programs()
    with together():
        config, given = asked or _asked_for(arguments)
        variables = None if arguments.start is None else load(arguments.start)
        first = group().first
        workdir = given or Path(group().of_first("the run folder", str(_new_folder(arguments.config)) if first else ""))
        try:
            if first:
                line = f"run folder: {shlex.quote(str(workdir))}"
                known = sys.stdout.encoding or "utf-8"  # of a terminal that may not know all letters
                print(line.encode(known, "backslashreplace").decode(known), flush=True)
            train(config, workdir=workdir, variables=variables, fork=arguments.fork)
        finally:
            if first and not given:
                with contextlib.suppress(OSError):
                    os.rmdir(workdir)  # only where nothing was written


def _asked_for(arguments: argparse.Namespace) -> tuple[ConfigDict, str | Path | None]:
    """The config, and the run folder, or its address in a bucket, if one was given."""
    from cimjax.training.config.file import load_config
    from cimjax.training.run.address import is_remote

    config, given = load_config(arguments.config, arguments.overrides), arguments.workdir
    return config, given if given is None or is_remote(given) else checked_folder(given)


def _come_together(address: str | None, count: int | None, index: int | None) -> None:
    """Join the other processes; before that this process starts itself again, to watch it from outside."""
    from cimjax.training.processes.launch import number_here, supervise, watched

    if not watched():
        again = [sys.executable, *sys.orig_argv[1:]]
        raise SystemExit(supervise({number_here() if index is None else index: (again, {})}))
    with ended_by_ctrl_c():
        from cimjax.training.processes.group import join

    join(address, count, index)


def _launch(arguments: argparse.Namespace) -> None:
    from cimjax.training.processes.launch import launch

    if arguments.num_processes < 1:
        raise UsageError(f"--num_processes is {arguments.num_processes}; give at least 1.")
    raise SystemExit(launch(arguments.rest, arguments.num_processes))


def _new_folder(config: str, number: int = 1) -> Path:
    """A new folder in `runs/`, named by config, options and time; a second start gets another one."""
    file, _, options = config.partition(":")
    name = "-".join(filter(None, [Path(file).stem, options[:100], time.strftime("%Y%m%d-%H%M%S")]))
    name = re.sub(r"[^\w.=,+-]", "_", name)
    folder = Path("runs", name if number == 1 else f"{name}-{number}")
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return _new_folder(config, number + 1)
    except OSError as error:
        raise UsageError(f"cannot create {folder}: {error.strerror}; give another folder by --workdir.") from error
    return folder


def _evaluate(arguments: argparse.Namespace) -> None:
    from cimjax.training.run.folder import read_config

    read_config(arguments.run)  # says what is wrong with the folder before jax is imported
    with ended_by_ctrl_c():
        from cimjax.training.evaluate import evaluate

    result = evaluate(arguments.run, which=arguments.which)
    if arguments.json:
        print(json.dumps(result))
    else:
        values = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in result.values())
        print("  ".join(f"{name} {value}" for name, value in zip(result, values, strict=True)))


def _pack(arguments: argparse.Namespace) -> None:
    from cimjax.training.run.folder import read_config

    read_config(arguments.run)
    with ended_by_ctrl_c():
        from cimjax.training.restore import pack

    file = pack(arguments.run, arguments.save, which=arguments.which)
    print(f"{shlex.quote(str(file))}: {file.stat().st_size / 1000:,.0f} kB; to measure it: ", end="")
    print(f"cimjax evaluate {shlex.quote(str(file.parent))}")


def _export(arguments: argparse.Namespace) -> None:
    from cimjax.training.run.folder import read_config

    read_config(arguments.run)
    with ended_by_ctrl_c():
        from cimjax.training.exporting import export

    options = {name: getattr(arguments, name) for name in ("which", "vectors", "images", "factor_bits")}
    found = export(arguments.run, arguments.save, **options)
    for name, layer in found.layers.items():
        below, beside, rows, columns = layer.cells.shape
        print(
            f"{name}: {below * beside} arrays of {rows} x {columns}; {found.conversions[name]:,} conversions compared"
        )
    if found.network is None:
        print(f"in float32 is what stands between the array layers: {found.in_float32}")
    integers = "by the arrays' integers" if found.network is None else "in integers from the first codes on"
    print(f"{found.images} test images: {found.accuracy:.2%} {integers}, {found.accuracy_as_trained:.2%} as trained")
    print(f"of these in another class than as trained: {found.other_class}")
    index = "layers.json" if found.network is None else "layers.json and network.json"
    print(f"{shlex.quote(str(arguments.save))}: what is in its files is said in {index}")


def _config_show(arguments: argparse.Namespace) -> None:
    from cimjax.training.config.describe import describe_config
    from cimjax.training.config.file import load_config

    print(describe_config(load_config(arguments.config, arguments.overrides)))


def _config_resolve(arguments: argparse.Namespace) -> None:
    from cimjax.training.config.file import load_config

    print(json.dumps(load_config(arguments.config, arguments.overrides).to_dict(), indent=2))


def _data_prepare(arguments: argparse.Namespace) -> None:
    from cimjax.data import prepare

    print(prepare(arguments.name, arguments.data_dir, progress=sys.stderr.isatty()))


def _data_list(arguments: argparse.Namespace) -> None:
    from cimjax.data import names

    print("\n".join(names()))


_WHICH = {
    "choices": ("average", "best", "last"),
    "default": "last",
    "help": "the last state, if not given; the best one; or the last one's averaged parameters",
}

COMMANDS: dict[str, Command] = {
    "train": Command(
        "train a network through the arrays, or go on with a run; `python train.py` is the same",
        "cimjax train --config configs/digits.py:adc_bits=2 --config.epochs=60",
        {
            "--config": {
                "required": True,
                "metavar": A_CONFIG,
                "help": "what to train: Python, or JSON of `cimjax config resolve`",
            },
            "--workdir": {"metavar": "DIR", "help": "the run folder, also gs://BUCKET/RUN; new in runs/ if not given"},
            "--from": {**RUN, "dest": "start", "help": "a trained run whose weights to start from"},
            "--fork": {**RUN, "help": "a run of other ADCs, or none, whose epochs with ideal ADCs to take over"},
            "--distributed": {
                "action": "store_true",
                "help": "one of several processes, as SLURM, Open MPI, GKE or a TPU tells, or the next three",
            },
            "--coordinator_address": {"metavar": "HOST:PORT", "help": "of process 0, for --distributed"},
            "--num_processes": {"metavar": "N", "type": int, "help": "how many processes there are"},
            "--process_id": {"metavar": "I", "type": int, "help": "which one this is, from 0"},
        },
        _train,
    ),
    "launch": Command(
        "train in several processes on this machine, and end them together; what follows -- is for `cimjax train`",
        "cimjax launch --num_processes 2 -- --config configs/digits.py",
        {"--num_processes": {"metavar": "N", "type": int, "required": True, "help": "how many processes"}},
        _launch,
        takes_rest=True,
    ),
    "evaluate": Command(
        "measure a trained run on its test images",
        "cimjax evaluate runs/digits-20250131-120000 --json",
        {
            "run": RUN,
            "--which": _WHICH,
            "--json": {"action": "store_true", "help": "print one JSON object"},
        },
        _evaluate,
    ),
    "pack": Command(
        "write a trained network as text small enough to be handed on, with its weights as the codes of the cells",
        "cimjax pack runs/digits-20250131-120000 --save digits",
        {
            "run": RUN,
            "--save": {"metavar": "DIR", "type": path, "required": True, "help": "a new folder"},
            "--which": _WHICH,
        },
        _pack,
    ),
    "export": Command(
        "write what goes into the chip: cells, ADC thresholds and factors as integers, and test vectors",
        "cimjax export runs/digits-20250131-120000 --save chip",
        {
            "run": RUN,
            "--save": {"metavar": "DIR", "type": path, "required": True, "help": "a new folder"},
            "--which": _WHICH,
            "--vectors": {"metavar": "N", "type": int, "default": 1, "help": "test images to write, 1 if not given"},
            "--images": {
                "metavar": "N",
                "type": int,
                "default": 100,
                "help": "test images to compute by these integers, 100 if not given",
            },
            "--factor_bits": {"metavar": "B", "type": int, "help": "bits of a factor; 24, or what fits, if not given"},
        },
        _export,
    ),
    "config show": Command(
        "print all fields of a config, their values and what they mean",
        "cimjax config show configs/digits.py:psum=layer",
        {"config": {"metavar": A_CONFIG, "help": "what to look at"}},
        _config_show,
    ),
    "config resolve": Command(
        "print all fields of a config as JSON, which `--config` takes too",
        "cimjax config resolve configs/digits.py:psum=layer > mine.json",
        {"config": {"metavar": A_CONFIG, "help": "what to print"}},
        _config_resolve,
    ),
    "data prepare": Command(
        "download or make a data set, or mend it; prints its folder",
        "cimjax data prepare cifar100 --data_dir ~/tensorflow_datasets",
        {
            "name": {"metavar": "NAME", "help": "one of `cimjax data list`"},
            "--data_dir": {"metavar": "DIR", "help": "$TFDS_DATA_DIR or ~/tensorflow_datasets if not given"},
        },
        _data_prepare,
    ),
    "data list": Command("list the data sets", "cimjax data list", {}, _data_list),
}
