"""How layers are timed on the device, by every execution that may compute them, and which one is chosen.

Programs are compiled in several processes at once, into JAX's cache of compiled programs, and then timed one after the
other in this one. What is timed is a layer forwards and all its gradients: a burst of calls is dispatched, each of
which waits for a number that the one before gives, and the clock stops when the last result is there. The device works
through such a queue without the host, so that the quotient is the device's own time for a call, as long as that is not
below the 50 us or so that a dispatch takes. (`jax.profiler` would need a reader of each platform's traces, and slows
CPU programs down; calls in a loop inside one program are not those of a training step: XLA's CPU backend computes
convolutions in a loop on one core.) Candidates run in turns, so that whatever else the machine does meets all of them;
figures are medians over the turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cimjax.analysis.timing import Say, machine, silent
from cimjax.analysis.tune.problem import Problem, difference, draw, executions, find_problems
from cimjax.core import conv
from cimjax.core.programs import contract
from cimjax.core.programs.cpu import compiler_options
from cimjax.spec import Execution, Program, Residuals

# A burst takes about this long, and is at most so many calls.
_BURST_SECONDS, _MOST_CALLS = 0.03, 100
# More processes that compile would need more of a GPU's memory than they save time.
_MOST_PROCESSES = 16

Compiled = Callable[..., Any]


@dataclasses.dataclass
class Candidate:
    """One execution of a layer: the seconds of a call in each turn, or what is wrong with it."""

    execution: Execution
    seconds: list[float] = dataclasses.field(default_factory=list)
    trouble: str = ""

    @property
    def name(self) -> str:
        """What tells it from others: "patches bfloat16", "pallas int8"."""
        execution = self.execution
        first = execution.product if execution.program == Program.JOINED else execution.program
        return " ".join(str(word) for word in (first, execution.operands) if word != "auto")

    @property
    def milliseconds(self) -> float:
        """The median; infinite where there is none."""
        return 1e3 * float(np.median(self.seconds)) if self.seconds and not self.trouble else math.inf


class Tuned(NamedTuple):
    """What came of a layer: `before` is what `auto` was, `best` what it is from now on."""

    problem: Problem
    candidates: list[Candidate]
    before: Candidate
    best: Candidate


def tune(
    config: ConfigDict,
    *,
    batch: int = 0,
    runs: int = 10,
    everything: bool = False,
    say: Say = silent,
    note: Say = silent,
) -> list[Tuned]:
    """Time all layers of the network that a configuration describes.

    Args:
      config, batch: as for `find_problems`.
      runs: turns.
      everything: whether the definition is timed, too.
      say, note: called with what is done from then on, and with lines that should stay.
    """
    problems = list(find_problems(config, batch).values())
    every = [[Candidate(one) for one in executions(problem.layer, everything=everything)] for problem in problems]
    tasks = [(problem, one.execution) for problem, found in zip(problems, every, strict=True) for one in found]
    _compile_ahead(tasks, say, note)
    return [_measured(problem, found, runs, say) for problem, found in zip(problems, every, strict=True)]


def _compile_ahead(tasks: Sequence[tuple[Problem, Execution]], say: Say, note: Say) -> None:
    """Fill the cache of compiled programs from several processes; what fails there is tried again in this one."""
    processes = min(machine()["cores"], len(tasks), _MOST_PROCESSES)
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not folder or not jax.config.values["jax_enable_compilation_cache"] or processes < 2:
        note(f"compiling {len(tasks)} programs in this process: {'one core' if folder else 'there is no cache'}")
        return
    say(f"compiling {len(tasks)} programs in {processes} processes")
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker, (folder,))
    try:
        list(pool.map(_try_to_compile, *zip(*tasks, strict=True)))
    except (BrokenProcessPool, OSError) as error:
        note(f"compiling in this process what is left: {' '.join(str(error).split())}")
    finally:
        # They hold some of a GPU's memory until they end.
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(folder: str) -> None:
    # Before its first program, so that the device's memory is there for all processes.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it ends it


def _try_to_compile(problem: Problem, execution: Execution) -> None:
    with contextlib.suppress(Exception):  # said by the process that times it
        _compile(problem, execution)


def _compile(problem: Problem, execution: Execution) -> Compiled:
    """A layer forwards and back: waits for a number, takes what `draw` gives, and gives the number that the next call
    waits for, the output and its gradients."""
    spec, window = problem.layer.spec, problem.layer.window._asdict()
    key = None if spec.variation is None else jax.random.key(0)

    def step(previous: Any, x: Any, kernel: Any, steps: Any, cotangent: Any) -> Any:
        del previous
        through = functools.partial(conv.cim_conv, spec=spec, variation_key=key, execution=execution, **window)
        y, pull = jax.vjp(through, x, kernel, steps)
        to_x, to_kernel, to_steps = pull(cotangent)
        return to_steps.activation, (y, to_x, to_kernel, to_steps)

    # What waits is an argument also where nothing reads it.
    jitted = jax.jit(step, keep_unused=True, compiler_options=compiler_options())
    return jitted.lower(jnp.float32(0), *jax.eval_shape(lambda: draw(problem))).compile()


def _measured(problem: Problem, candidates: list[Candidate], runs: int, say: Say) -> Tuned:
    """A layer by all candidates, the first of which has the results that the others must have."""
    say(f"timing {problem.title}")
    arguments, want = jax.device_put(draw(problem)), None
    ready: list[tuple[Candidate, Compiled, int]] = []
    for candidate in candidates:
        if candidate is not candidates[0] and want is None:
            candidate.trouble = "not compared, as the first one failed"
            continue
        with _told(candidate):
            program = _compile(problem, candidate.execution)
            got = jax.device_get(program(jnp.float32(0), *arguments)[1])
            want = got if want is None else want
            candidate.trouble = difference(got, want, arguments)
            calls = int(_BURST_SECONDS / _seconds(program, arguments, 1))
            ready.append((candidate, program, min(max(1, calls), _MOST_CALLS)))
    for _ in range(runs):
        for candidate, program, calls in ready:
            if not candidate.trouble:
                with _told(candidate):
                    candidate.seconds.append(_seconds(program, arguments, calls))
    return _decided(problem, candidates)


@contextlib.contextmanager
def _told(candidate: Candidate) -> Iterator[None]:
    """Keep what goes wrong with a candidate, in one line: compilers of all platforms have errors of their own."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        candidate.trouble = "out of memory" if "RESOURCE_EXHAUSTED" in text else f"failed: {text}"


def _seconds(program: Compiled, arguments: tuple[Any, ...], calls: int) -> float:
    """What a call of a burst takes."""
    previous, result = jnp.float32(0), None
    start = time.perf_counter()
    for _ in range(calls):
        previous, result = program(previous, *arguments)
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / calls


def _decided(problem: Problem, candidates: list[Candidate]) -> Tuned:
    """The fastest takes the place of what `auto` was where its median is below the shortest time of that."""
    layer = problem.layer._replace(execution=Execution())
    chosen = dataclasses.replace(contract.tuned(layer, problem.input), residuals=Residuals.AUTO)
    before = next((one for one in candidates if one.execution == chosen and one.seconds), candidates[0])
    best = min(candidates, key=lambda one: one.milliseconds)
    if not best.milliseconds < 1e3 * min(before.seconds, default=math.inf):
        best = before
    return Tuned(problem, candidates, before, best)
