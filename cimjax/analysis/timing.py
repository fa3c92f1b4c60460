"""How programs are timed side by side in one process, and how the figures are shown.

Programs are compiled first, without the cache; then they run in turns, so that whatever else the machine does meets
all of them. Figures are medians. What is timed is in `cimjax.analysis.bench`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cimjax.analysis.plot import check_figure
from cimjax.analysis.studies.output import markdown
from cimjax.core.programs.cpu import compiler_options

# Called with what is being done from now on.
Say = Callable[[str], None]


def silent(text: str) -> None:
    """Says nothing."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one program took.

    name: what it computes.
    milliseconds: a step, median of the program's runs; `fastest` and `slowest` of them too.
    compile_seconds: tracing and compilation, without any cache.
    temporary_mb, whole_mb: what XLA allocates for a run beside arguments and results, and together with these, in MB
      of 10^6 bytes; -1 where it says nothing.
    images: images that a step processes; 0 where there are none.
    """

    name: str
    milliseconds: float
    fastest: float
    slowest: float
    compile_seconds: float
    temporary_mb: float
    whole_mb: float
    images: int

    @property
    def images_per_second(self) -> float:
        """Images processed in a second, by the median."""
        return 1e3 * self.images / self.milliseconds


class Compiled:
    """A compiled program and the arguments it runs on.

    images: images of a step.
    carry: whether it gives back first what its first argument is when it runs next.
    times: how many steps it does.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *arguments: Any,
        images: int = 0,
        carry: bool = False,
        times: int = 1,
    ) -> None:
        self.name, self.images, self.carry, self.times = name, images, carry, times
        self.arguments = list(arguments)
        start = time.perf_counter()
        donated = (0,) if carry else ()
        jitted = jax.jit(function, donate_argnums=donated, compiler_options=compiler_options())
        self.run = jitted.lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        memory = self.run.memory_analysis()
        self.temporary_mb = self.whole_mb = -1.0
        if memory is not None:
            aliased = memory.alias_size_in_bytes
            both = memory.argument_size_in_bytes + memory.output_size_in_bytes - aliased
            self.temporary_mb = memory.temp_size_in_bytes / 1e6
            self.whole_mb = self.temporary_mb + both / 1e6

    def once(self) -> float:
        """Run it; the seconds that each of its steps took."""
        start = time.perf_counter()
        result = jax.block_until_ready(self.run(*self.arguments))
        seconds = time.perf_counter() - start
        if self.carry:
            self.arguments[0] = result[0]
        return seconds / self.times


def measured(programs: Sequence[Compiled], runs: int, say: Say = silent) -> list[Timing]:
    """All programs in turns, after one run of each to warm up."""
    say(f"warming up {len(programs)} programs")
    for program in programs:
        program.once()
    seconds = np.empty((runs, len(programs)))
    for run in range(runs):
        say(f"timing {len(programs)} programs, run {run + 1} of {runs}")
        seconds[run] = [program.once() for program in programs]
    return [
        Timing(
            name=program.name,
            milliseconds=1e3 * float(np.median(column)),
            fastest=1e3 * float(column.min()),
            slowest=1e3 * float(column.max()),
            compile_seconds=program.compile_seconds,
            temporary_mb=program.temporary_mb,
            whole_mb=program.whole_mb,
            images=program.images,
        )
        for program, column in zip(programs, seconds.T, strict=True)
    ]


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Compile anew: the time of compilation is one of the figures."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def show(timings: Sequence[Timing]) -> str:
    """The table as text (Markdown); ratios are to the first row of the same kind (the words after the last comma)."""
    head = ["program", "ms", "fastest-slowest", "ratio", "images/s", "compile s", "temporary MB", "whole MB"]
    first: dict[str, float] = {}
    rows = []
    for timing in timings:
        *what, kind = timing.name.split(", ")
        group = kind if len(what) < 2 else f"{what[0]} {kind}"
        ratio = timing.milliseconds / first.setdefault(group, timing.milliseconds)
        spread = f"{timing.fastest:,.1f}-{timing.slowest:,.1f}"
        rows.append(
            [
                timing.name,
                f"{timing.milliseconds:,.1f}",
                spread,
                f"{ratio:.2f}",
                f"{timing.images_per_second:,.0f}",
                f"{timing.compile_seconds:.1f}",
                f"{timing.temporary_mb:,.0f}",
                f"{timing.whole_mb:,.0f}",
            ]
        )
    return markdown(head, rows)


def machine() -> dict[str, Any]:
    """What the figures belong to: hardware and versions."""
    device = jax.devices()[0]
    return {
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "processor": _processor(),
        "cores": _cores(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def save(timings: Sequence[Timing], path: str | Path) -> None:
    """Write machine and figures as JSON."""
    rows = [dataclasses.asdict(timing) | {"images_per_second": timing.images_per_second} for timing in timings]
    Path(path).write_text(json.dumps({**machine(), "timings": rows}, indent=1) + "\n")


def plot(timings: Sequence[Timing], path: str | Path) -> None:
    """Draw the medians as bars, with their spread, into a PNG or SVG file.

    Raises:
      ValueError: as `check_figure` does, which is to be asked before anything is timed.
    """
    check_figure(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.32 * len(timings)), layout="constrained")
    axes = figure.subplots()
    names = [timing.name for timing in timings]
    median = np.array([timing.milliseconds for timing in timings])
    low = median - [timing.fastest for timing in timings]
    high = np.array([timing.slowest for timing in timings]) - median
    kinds = [name.rpartition(", ")[2] for name in names]
    colours = {kind: f"C{index}" for index, kind in enumerate(dict.fromkeys(kinds))}
    bars = axes.barh(names, median, xerr=(low, high), color=[colours[kind] for kind in kinds], ecolor="0.4", capsize=2)
    axes.bar_label(bars, labels=[f" {value:,.0f}" for value in median], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("milliseconds, median and range")
    axes.set_title(f"{machine()['processor']}, {_cores()} cores, jax {jax.__version__}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
