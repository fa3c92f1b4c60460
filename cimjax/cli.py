"""The command line, `cimjax COMMAND`: reads what was typed, calls the room that does it, prints what comes back.

A command imports its room when it runs, so that help and mistakes are answered at once. What a user can get wrong ends
in one line and exit code 2; a mistake of cimjax itself keeps its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import cimjax
from cimjax.analysis.studies.commands import STUDIES
from cimjax.command import A_CONFIG, Command, UsageError
from cimjax.spec.base import closest, nearest, shortened, shown
from cimjax.training.config.options import CIM_OPTIONS, describe_options


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for a mistake in what was asked for, 130 when interrupted, or 141 when
    nobody reads what is printed any more."""
    try:
        _dispatch(sys.argv[1:] if argv is None else list(argv))
        print(end="", flush=True)
        return 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still prints at its end
        return 141
    except ValueError as error:
        if not _is_for_the_user(error):
            raise
        print("cimjax:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("cimjax:", str(stop) or "interrupted", file=sys.stderr)
        return 130


def start(argv: list[str] | None = None) -> int:
    """`main` as a process of its own, which may replace itself to have its memory in large pages."""
    from cimjax.training.memory import start_again_with_large_pages
    from cimjax.training.run.files import show_in_one_line

    words = sys.argv[1:] if argv is None else argv
    show_in_one_line()
    if words and words[0] in ("train", "evaluate", "bench"):
        start_again_with_large_pages()
    code = main(words)
    # All is done; what libraries do at the end is not to be interrupted with a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Let Ctrl-C end the process as it ends others: within an import libraries make other errors of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _train(arguments: argparse.Namespace) -> None:
    from cimjax.training.config.file import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.workdir is not None:
        _check_folder(arguments.workdir)
    with _ended_by_ctrl_c():
        from cimjax.training.cache import keep_compiled_programs
        from cimjax.training.evaluate import load
        from cimjax.training.train import train

    keep_compiled_programs()
    given = None if arguments.start is None else load(Path(os.path.expanduser(arguments.start)))
    own = arguments.workdir is not None
    workdir = Path(os.path.expanduser(arguments.workdir)) if own else _new_folder(arguments.config)
    try:
        print(f"run folder: {shlex.quote(str(workdir))}", flush=True)
        train(config, workdir=workdir, variables=given)
    finally:
        if not own:
            with contextlib.suppress(OSError):
                workdir.rmdir()  # only where nothing was written


def _evaluate(arguments: argparse.Namespace) -> None:
    from cimjax.training.run.folder import read_config

    run = Path(os.path.expanduser(arguments.run))
    read_config(run)  # says what is wrong with the folder before jax is imported
    with _ended_by_ctrl_c():
        from cimjax.training.evaluate import evaluate

    result = evaluate(run, which=arguments.which)
    if arguments.json:
        print(json.dumps(result))
    else:
        values = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in result.values())
        print("  ".join(f"{name} {value}" for name, value in zip(result, values, strict=True)))


def _sweep(arguments: argparse.Namespace) -> None:
    from cimjax.analysis.sweep import Stopped, sweep
    from cimjax.analysis.sweep_plan import parse_axes
    from cimjax.analysis.sweep_table import save, show, table

    axes = parse_axes(arguments.over)
    _check_folder(arguments.workdir)
    workdir, fields = Path(os.path.expanduser(arguments.workdir)), [str(override) for override in arguments.overrides]
    stop = None
    try:
        rows = sweep(arguments.config, axes, workdir, jobs=arguments.jobs, fields=fields, retry=arguments.retry)
    except Stopped as stopped:
        rows, stop = stopped.rows, stopped
    print(show(table(rows, axes), axes))
    print(f"all runs: {shlex.quote(str(save(rows, workdir)))}", flush=True)
    if stop:
        raise stop
    if failed := sum("failed" in row for row in rows):
        raise UsageError(f"{failed} of {len(rows)} runs failed; the same command with --retry tries them again.")


def _plot(arguments: argparse.Namespace) -> None:
    from cimjax.analysis.plot import plot

    file = Path(os.path.expanduser(arguments.save))
    plot([os.path.expanduser(run) for run in arguments.run], file, over=arguments.over.split(","))
    print(shlex.quote(str(file)))


def _report(arguments: argparse.Namespace) -> None:
    from cimjax.training.run.folder import read_config

    runs = [Path(os.path.expanduser(run)) for run in arguments.run]
    for run in runs:
        read_config(run)  # says what is wrong with a folder before jax is imported
    with _ended_by_ctrl_c():
        from cimjax.analysis.progress import Progress
        from cimjax.analysis.report.page import report

    file = Path(os.path.expanduser(arguments.save))
    with Progress() as progress:
        report(runs, file, say=progress.doing)
    print(shlex.quote(str(file)))


def _bench(arguments: argparse.Namespace) -> None:
    from cimjax.analysis.plot import check_figure, check_writable
    from cimjax.training.config.file import load_config

    saved, figure = (Path(os.path.expanduser(name)) if name else None for name in (arguments.save, arguments.plot))
    if figure:
        check_figure(figure)
    if saved:
        check_writable(saved)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.of == "data":
        _bench_data(arguments, config, saved)
        return
    if config.spec is None or arguments.runs < 1:
        raise ValueError(
            "`bench` compares with full precision: give a configuration with arrays, and at least one run."
        )
    from cimjax.analysis import bench, timing
    from cimjax.analysis.progress import Progress
    from cimjax.data.loading import shape_and_classes
    from cimjax.training.experiment import view_of

    spec, runs = cimjax.CIMSpec.from_dict(config.spec.to_dict()), arguments.runs
    with Progress() as progress:
        if arguments.of in ("layers", "growth"):
            bench_layer = bench.bench_layers if arguments.of == "layers" else bench.bench_growth
            timings = bench_layer(spec, batch=config.batch_size, runs=runs, say=progress.doing)
        else:
            image, classes = shape_and_classes(config.dataset, config.data_dir or None, view=view_of(config))
            programs = bench.variants(spec) if arguments.of == "steps" else bench.programs_of(spec)
            timings = bench.bench_steps(config, programs, image=image, classes=classes, runs=runs, say=progress.doing)
    about = timing.machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(f"{arguments.config}, batch {config.batch_size}, medians of {arguments.runs} runs\n")
    print(timing.show(timings))
    if saved:
        timing.save(timings, saved)
    if figure:
        timing.plot(timings, figure)


def _bench_data(arguments: argparse.Namespace, config: Any, saved: Path | None) -> None:
    if arguments.plot:
        raise UsageError("--plot draws programs; of data give --save FILE for the figures as JSON.")
    for flag, value in (("--runs", arguments.runs), ("--feed", arguments.feed)):
        if value < 1:
            raise UsageError(f"{flag} is {value}; give at least 1.")
    from cimjax.analysis import bench_data, timing
    from cimjax.analysis.progress import Progress

    about = timing.machine()
    with Progress() as progress:
        rates = bench_data.bench_data(config, batches=arguments.runs, cores=about["cores"], say=progress.doing)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    size = config.image_size
    print(f"{arguments.config}, {size} x {size} pixels, {arguments.runs} batches of {config.batch_size}\n")
    print(bench_data.show(rates))
    print(f"\n{bench_data.cores_for(rates, arguments.feed)}")
    if saved:
        bench_data.save(rates, saved)


def _data_prepare(arguments: argparse.Namespace) -> None:
    from cimjax.data import prepare

    print(prepare(arguments.name, arguments.data_dir, progress=sys.stderr.isatty()))


def _data_list(arguments: argparse.Namespace) -> None:
    from cimjax.data import names

    print("\n".join(names()))


def _config_show(arguments: argparse.Namespace) -> None:
    from cimjax.training.config.fields import describe_config
    from cimjax.training.config.file import load_config

    print(describe_config(load_config(arguments.config, arguments.overrides)))


def _config_resolve(arguments: argparse.Namespace) -> None:
    from cimjax.training.config.file import load_config

    print(json.dumps(load_config(arguments.config, arguments.overrides).to_dict(), indent=2))


_COMMANDS = {
    "train": Command(
        "train a network through the arrays, or go on with a run; `python train.py` is the same",
        "cimjax train --config configs/digits.py:adc_bits=2 --config.epochs=60",
        {
            "--config": {
                "required": True,
                "metavar": A_CONFIG,
                "help": "what to train: Python, or JSON of `cimjax config resolve`",
            },
            "--workdir": {"metavar": "DIR", "help": "the run folder; a new one in runs/ if not given"},
            "--from": {"dest": "start", "metavar": "RUN", "help": "a trained run whose weights to start from"},
        },
        _train,
    ),
    "evaluate": Command(
        "measure a trained run on its test images",
        "cimjax evaluate runs/digits-20250131-120000 --json",
        {
            "run": {"metavar": "RUN", "help": "the folder of a run"},
            "--which": {"choices": ("best", "last"), "default": "last", "help": "which checkpoint; last if not given"},
            "--json": {"action": "store_true", "help": "print one JSON object"},
        },
        _evaluate,
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
    "sweep": Command(
        "train every combination of some options, and print the table of accuracies",
        "cimjax sweep --config configs/digits.py --over adc_bits=2,3 --workdir runs/a",
        {
            "--config": {"required": True, "metavar": A_CONFIG, "help": "what to train"},
            "--over": {
                "action": "append",
                "required": True,
                "metavar": "OPTION=A,B",
                "help": "an option, or a field as config.NAME, and its values",
            },
            "--workdir": {"required": True, "metavar": "DIR", "help": "a folder for all runs; finished ones are kept"},
            "--jobs": {"type": int, "default": 1, "metavar": "N", "help": "runs at a time; 1 if not given"},
            "--retry": {"action": "store_true", "help": "try runs again that failed before"},
        },
        _sweep,
    ),
    "plot": Command(
        "draw loss and accuracy of runs over their epochs",
        "cimjax plot runs/a/seed=0 runs/a/seed=1 --save a.png --over loss,accuracy",
        {
            "run": {"nargs": "+", "metavar": "RUN", "help": "the folder of a run"},
            "--save": {
                "default": "curves.png",
                "metavar": "FILE",
                "help": "a PNG or SVG file, which is replaced; curves.png if not given",
            },
            "--over": {
                "default": "loss,accuracy",
                "metavar": "NAME,...",
                "help": "what to draw: loss (of training), accuracy (on the test images, and dashed on those held "
                "out), or another number of metrics.jsonl, as learning_rate or test.loss",
            },
        },
        _plot,
    ),
    "report": Command(
        "write one page about runs: results, curves, layers, ADC ladders and codes",
        "cimjax report runs/a/seed=0 runs/a/seed=1 --save a.html",
        {
            "run": {"nargs": "+", "metavar": "RUN", "help": "the folder of a run"},
            "--save": {
                "default": "report.html",
                "metavar": "FILE",
                "help": "an HTML file that needs nothing else, or Markdown, whose name ends in .md, for the tables "
                "alone; it is replaced; report.html if not given",
            },
        },
        _report,
    ),
    "bench": Command(
        "time training and evaluation steps of a network beside full precision, or its layers",
        "cimjax bench --config configs/resnet20_c10.py --runs 5 --plot bench.png",
        {
            "--config": {"required": True, "metavar": A_CONFIG, "help": "the network and its batch size"},
            "--of": {
                "choices": ("steps", "programs", "layers", "growth", "data"),
                "default": "steps",
                "help": "steps of full precision and of every ADC; of every program; single layers; a layer of more "
                "and more planes, row tiles and read groups; images from files, by number of workers",
            },
            "--runs": {
                "type": int,
                "default": 10,
                "metavar": "N",
                "help": "runs of each program, or batches of images; 10 if not given",
            },
            "--feed": {
                "type": int,
                "default": 1000,
                "metavar": "N",
                "help": "of data: images/s for which to say how many cores are needed; 1000 if not given",
            },
            "--save": {"metavar": "FILE", "help": "write all figures as JSON"},
            "--plot": {"metavar": "FILE", "help": "draw them into a PNG or SVG file"},
        },
        _bench,
    ),
    "data list": Command("list the data sets", "cimjax data list", {}, _data_list),
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
    **STUDIES,
}

_ON_CONFIGS = """\
A config file is Python, and is executed: take it from those whom you trust. One
that ends in .json is only read.

options of every config, after a colon and separated by commas:
{}

fields of every config, set by --config.FIELD=VALUE, with what they usually are:

{}

"""
_SEE_TRAIN = "options and fields of configs: cimjax train --help\n\n"


class _Parser(argparse.ArgumentParser):
    """The arguments of one command; raises instead of printing and leaving."""

    def __init__(self, name: str) -> None:
        command = _COMMANDS[name]
        self.takes_config = any(settings.get("metavar") == A_CONFIG for settings in command.arguments.values())
        super().__init__(
            prog=f"cimjax {name}",
            description=textwrap.fill(f"{command.help[0].upper()}{command.help[1:]}.", 80),
            epilog=f"{_SEE_TRAIN if self.takes_config else ''}example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.example, self.flags = command.example, ["--help", "-h"]
        for argument, settings in command.arguments.items():
            self.add_argument(argument, **settings)
            self.flags += [argument] if argument.startswith("-") else []

    def format_help(self) -> str:
        """What `--help` prints; that of `train` explains configs."""
        if self.prog == "cimjax train":
            from cimjax.training.config.fields import describe_fields

            on_configs = _ON_CONFIGS.format(describe_options(), describe_fields())
            self.epilog = f"{on_configs}example:\n  {self.example}"
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; for example: {self.example}")

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """What was typed, or one line about the first thing that is wrong with it."""
        overrides: list[Any] = []
        if self.takes_config:
            from cimjax.training.config.file import take_overrides

            overrides, argv = take_overrides(argv)
            if "--config" in self.flags and argv and ".py" in argv[0] and not argv[0].startswith("-"):
                raise UsageError(f"unexpected argument {argv[0]!r}; did you mean --config {shlex.quote(argv[0])}?")
        for word in argv:
            if word.startswith("-") and word.partition("=")[0] not in self.flags:
                raise UsageError(f"{_about_flag(word, self.flags, self.takes_config)}; see {self.prog} --help.")
        arguments, unexpected = self.parse_known_args(argv)
        if unexpected:
            self.error(f"unexpected argument {shortened(unexpected[0])!r}")
        arguments.overrides = overrides
        return arguments


def _dispatch(argv: list[str]) -> None:
    if not argv:
        raise UsageError(f"give a command: {', '.join(_COMMANDS)}; see cimjax --help.")
    if argv[0] in ("-h", "--help"):
        return print(_help(""))
    if argv == ["--version"]:
        return print(f"cimjax {cimjax.__version__}")
    group = [name for name in _COMMANDS if name.startswith(f"{argv[0]} ")]
    if group and argv[1:2] in (["-h"], ["--help"]):
        return print(_help(f"{argv[0]} "))
    if group and len(argv) == 1:
        raise UsageError(f"give a command: {', '.join(group)}; see cimjax {argv[0]} --help.")
    words = 2 if group else 1
    name, rest = " ".join(argv[:words]), argv[words:]
    if name not in _COMMANDS:
        raise UsageError(f"unknown command {shown(name)}{nearest(name, _COMMANDS)}; see cimjax --help.")
    parser = _Parser(name)
    if {"-h", "--help"} & set(rest):
        return print(parser.format_help().rstrip())
    _COMMANDS[name].run(parser.parse(rest))


def _about_flag(word: str, flags: list[str], takes_config: bool) -> str:
    """What was meant by a flag that there is not."""
    name, _, value = shortened(word).lstrip("-").partition("=")
    typed = f"{name}={value or 'VALUE'}"
    if takes_config and name in {option.name for option in CIM_OPTIONS}:
        flag = "--config " if "--config" in flags else ""
        return f"unknown flag --{name}: options follow the file, {flag}FILE:{shlex.quote(typed)}"
    if takes_config and closest(f"--{name}", flags) is None:
        return f"unknown flag --{name}: a field of the config is set by --config.{shlex.quote(typed)}"
    return f"unknown flag --{name}{nearest(f'--{name}', flags)}"


def _check_folder(workdir: str) -> None:
    """Refuse at once what can never become a folder."""
    if not workdir:
        raise UsageError("--workdir is empty; give a folder, or leave it out for a new one in runs/.")
    path = Path(os.path.expanduser(workdir)).absolute()
    with contextlib.suppress(PermissionError):  # said by whoever opens the folder
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        if not there.is_dir():
            raise UsageError(f"--workdir {workdir}: {there} is a file, not a folder; give another --workdir.")


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


def _is_for_the_user(error: ValueError) -> bool:
    """Whether a `raise` statement of cimjax or of the user's own files made it.

    Everywhere in cimjax that is how a user's mistake is refused. A ValueError from a library beneath is a bug of ours.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(frame.filename).is_relative_to(Path(cimjax.__file__).parent)
    theirs = not {"site-packages", "dist-packages"} & set(Path(frame.filename).parts)
    return (ours or theirs) and (frame.line or "").startswith("raise ")


def _help(group: str) -> str:
    """What `--help` prints of all commands, or of those of a group."""
    lines = [] if group else ["Train networks for compute-in-memory chips.", ""]
    for name, command in _COMMANDS.items():
        if name.startswith(group):
            about = textwrap.fill(command.help, 80, initial_indent="    ", subsequent_indent="    ")
            lines += [f"cimjax {name}", about, f"    {command.example}", ""]
    return "\n".join([*lines, "cimjax COMMAND --help explains a command; cimjax --version prints the version."])
