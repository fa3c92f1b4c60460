"""The commands that compare runs and time steps; each imports what it needs when it runs, jax not before."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from cimjax.analysis.executor_flags import EXECUTOR_FLAGS, executor_of
from cimjax.analysis.studies.commands import STUDIES
from cimjax.analysis.tune.command import TUNE
from cimjax.command import A_CONFIG, RUN, Command, UsageError, checked_folder, ended_by_ctrl_c, path


def _sweep(arguments: argparse.Namespace) -> None:
    from cimjax.analysis.sweep import Stopped, sweep
    from cimjax.analysis.sweep_plan import parse_axes
    from cimjax.analysis.sweep_table import save, show, table

    axes = parse_axes(arguments.over)
    workdir, fields = checked_folder(arguments.workdir), [str(override) for override in arguments.overrides]
    executor, stop = executor_of(arguments, workdir), None
    try:
        how = {"executor": executor, "fields": fields, "retry": arguments.retry, "fork": arguments.fork}
        rows = sweep(arguments.config, axes, workdir, **how)
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

    plot(arguments.run, arguments.save, over=arguments.over.split(","))
    print(shlex.quote(str(arguments.save)))


def _report(arguments: argparse.Namespace) -> None:
    from cimjax.training.run.folder import read_config

    for run in arguments.run:
        read_config(run)  # says what is wrong with a folder before jax is imported
    with ended_by_ctrl_c():
        from cimjax.analysis.progress import Progress
        from cimjax.analysis.report.page import report

    with Progress() as progress:
        report(arguments.run, arguments.save, say=progress.doing)
    print(shlex.quote(str(arguments.save)))


def _bench(arguments: argparse.Namespace) -> None:
    from cimjax.analysis.plot import check_figure, check_writable
    from cimjax.training.config.file import load_config

    if arguments.plot:
        if arguments.of in _TABLES:
            raise UsageError(f"--plot draws programs; of {arguments.of} give --save FILE for the figures as JSON.")
        check_figure(arguments.plot)
    if arguments.save:
        check_writable(arguments.save)
    config = load_config(arguments.config, arguments.overrides)
    if arguments.of in _TABLES:
        _TABLES[arguments.of](arguments, config)
        return
    if config.spec is None or arguments.runs < 1:
        raise ValueError(
            "`bench` compares with full precision: give a configuration with arrays, and at least one run."
        )
    from cimjax.analysis import bench, timing
    from cimjax.analysis.progress import Progress
    from cimjax.data.loading import shape_and_classes
    from cimjax.spec import CIMSpec
    from cimjax.training.experiment import view_of

    spec, runs = CIMSpec.from_dict(config.spec.to_dict()), arguments.runs
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
    if arguments.save:
        timing.save(timings, arguments.save)
    if arguments.plot:
        timing.plot(timings, arguments.plot)


def _bench_data(arguments: argparse.Namespace, config: Any) -> None:
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
    if arguments.save:
        bench_data.save(rates, arguments.save)


def _bench_paper(arguments: argparse.Namespace, config: Any) -> None:
    from cimjax.analysis import bench_paper
    from cimjax.analysis.studies.runs import described, with_options
    from cimjax.data.loading import is_streamed

    fields = [str(override) for override in arguments.overrides]
    networks = {"full precision": with_options(arguments.config, "weight=none")}
    networks |= {} if config.spec is None else {"arrays": arguments.config}
    steps = [
        bench_paper.step_of(name, described(file, fields).layers, config.batch_size) for name, file in networks.items()
    ]
    print(f"{arguments.config}, {config.batch_size} images on each device, on paper: nothing is computed")
    print(f"{bench_paper.assumptions(bench_paper.H100)}\n")
    print(bench_paper.show_steps(steps, bench_paper.H100), end="\n\n")
    from_files = is_streamed(config.dataset)
    print(bench_paper.show_devices(steps, bench_paper.H100, (1, 8, 64), from_files=from_files))
    if arguments.save:
        bench_paper.save(steps, bench_paper.H100, arguments.save)


def _bench_memory(arguments: argparse.Namespace, config: Any) -> None:
    from cimjax.analysis import bench_memory, timing
    from cimjax.analysis.progress import Progress
    from cimjax.data.loading import shape_and_classes
    from cimjax.training.experiment import view_of

    image, classes = shape_and_classes(config.dataset, config.data_dir or None, view=view_of(config))
    with Progress() as progress:
        needs = bench_memory.bench_memory(config, image=image, classes=classes, say=progress.doing)
    print(", ".join(f"{name} {value}" for name, value in timing.machine().items()))
    print(f"{arguments.config}, batch {config.batch_size}: a training step on one device, compiled and not run,")
    print("by config.optimizer.accumulate (parts) and config.execution.residuals\n")
    print(bench_memory.show(needs))
    if arguments.save:
        bench_memory.save(needs, arguments.save)


# What `bench` makes of other things than times of programs, without a plot.
_TABLES = {"data": _bench_data, "memory": _bench_memory, "paper": _bench_paper}

COMMANDS: dict[str, Command] = {
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
            "--fork": {**RUN, "help": "a run of other ADCs, or none, whose epochs with ideal ADCs all runs take over"},
            **EXECUTOR_FLAGS,
        },
        _sweep,
    ),
    "plot": Command(
        "draw loss and accuracy of runs over their epochs",
        "cimjax plot runs/a/seed=0 runs/a/seed=1 --save a.png --over loss,accuracy",
        {
            "run": {"nargs": "+", **RUN},
            "--save": {
                "type": path,
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
            "run": {"nargs": "+", **RUN},
            "--save": {
                "type": path,
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
                "choices": ("steps", "programs", "layers", "growth", *_TABLES),
                "default": "steps",
                "help": "steps of full precision and of every ADC; of every program; single layers; a layer of more "
                "and more planes, row tiles and read groups; images from files, by number of workers; the memory of "
                "a training step, by parts of its batch; what one takes at least on 1, 8 and 64 H100, on paper",
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
            "--save": {"metavar": "FILE", "type": path, "help": "write all figures as JSON"},
            "--plot": {"metavar": "FILE", "type": path, "help": "draw them into a PNG or SVG file"},
        },
        _bench,
    ),
    "tune": TUNE,
    **STUDIES,
}
