"""Runs over all combinations of options, each in a run folder and a process of its own, here or in a cluster.

A run that is finished is not repeated, nor is one that failed unless asked for, so a sweep that was stopped goes on
where it was. Combinations are planned by `cimjax.analysis.sweep_plan` and trained by one of
`cimjax.analysis.executors`, and what they came to is tabulated by `cimjax.analysis.sweep_table`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cimjax.analysis.executors import OUTPUT, End, Executor, Job, Processes, last_words
from cimjax.analysis.sweep_plan import PlannedRun, plan
from cimjax.training.run.files import in_one_line, parsed, write_json
from cimjax.training.run.folder import LOCK, read_records
from cimjax.training.run.lock import give_back, take_lock
from cimjax.training.run.records import METRICS, Records

if TYPE_CHECKING:
    from cimjax.analysis.progress import Progress

# In the folder of a run, beside its own files: why it failed.
FAILED = "failed.json"


class Stopped(KeyboardInterrupt):
    """A sweep was asked to stop, by Ctrl-C or SIGTERM; every state was saved, and `rows` is what `sweep` returns."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        done = sum("accuracy" in row for row in rows)
        super().__init__(f"stopped with {done} of {len(rows)} runs finished; the same command goes on.")
        self.rows = rows


def sweep(
    config: str,
    axes: Mapping[str, Sequence[str]],
    workdir: str | Path,
    *,
    executor: Executor | None = None,
    fields: Sequence[str] = (),
    retry: bool = False,
    fork: str | Path | None = None,
) -> list[dict[str, Any]]:
    """Train every combination of options and fields; progress goes to standard error.

    Args:
      config: a config file with its options, `configs/digits.py:adc_bits=2`.
      axes: options of the config file, or fields of the config as `config.optimizer.name`, and the values of each.
      workdir: a folder for all runs; one inside for each.
      executor: what trains the runs; processes on this machine, one at a time, if not given.
      fields: further arguments of every run, such as `--config.epochs=5`.
      retry: whether runs that failed are tried again.
      fork: a run whose epochs with ideal ADCs all of them take over.

    Returns:
      A row for each run, in order: its options, `workdir`, and `accuracy` of the last state on the test images (0 to
      1), `moved` (mean |log(s/s0)| by kind of step), `seconds` of training and what else its `result` record has; or
      `failed`, the last line that it printed.

    Raises:
      ValueError: before any run starts, where a combination cannot be trained or a folder cannot be used.
      Stopped: after Ctrl-C or SIGTERM, when all runs have saved their states and ended.
    """
    return train_all(plan(config, axes, workdir, fields, fork), workdir, executor=executor, retry=retry)


def train_all(
    runs: Sequence[PlannedRun], workdir: str | Path, *, executor: Executor | None = None, retry: bool = False
) -> list[dict[str, Any]]:
    """Train planned runs, each once the run that it starts from has ended; all else as of `sweep`."""
    workdir = Path(workdir)
    from cimjax.analysis.progress import Progress  # imports jax, which nobody waits for before a refusal

    with in_one_line("create", workdir):
        workdir.mkdir(parents=True, exist_ok=True)
    lock = take_lock(workdir / LOCK)
    try:
        with Progress() as progress, _requests_to_stop() as asked:
            rows = [_known(run, retry) for run in runs]
            return _train(runs, rows, executor or Processes(), progress, asked)
    finally:
        give_back(lock)


def _known(run: PlannedRun, retry: bool) -> dict[str, Any] | None:
    """The row of a run that is not to be trained."""
    if (result := _result(run)) is not None:
        return _row(run, **result)
    file = run.folder / FAILED
    failure = parsed(file.read_bytes()) if file.exists() and not retry else None
    # What failed with other fields may succeed now.
    if isinstance(failure, dict) and [failure.get("config"), failure.get("fields")] == [run.config, run.fields]:
        return _row(run, failed=failure.get("failed"))
    return None


def _row(run: PlannedRun, **found: Any) -> dict[str, Any]:
    return {**run.values, **found, "workdir": str(run.folder)}


def _result(run: PlannedRun) -> dict[str, Any] | None:
    """The last state's figures where the run is finished."""
    results = [record for record in read_records(run.folder) if record.get("split") == "result"]
    if not results or Records(run.folder / METRICS).epochs_done() < run.epochs:
        return None
    return {name: value for name, value in results[-1].items() if name not in ("step", "split")}


def _train(
    runs: Sequence[PlannedRun],
    rows: list[dict[str, Any] | None],
    executor: Executor,
    progress: Progress,
    asked: list[int],
) -> list[dict[str, Any]]:
    """Train those runs that have no row."""
    waiting = [index for index, row in enumerate(rows) if row is None]
    before = sum("failed" in row for row in rows if row)
    failed = f", {before} failed before (--retry tries them again)" if before else ""
    finished = len(runs) - len(waiting) - before
    progress.note(f"{len(runs)} runs: {finished} finished{failed}, {len(waiting)} to train")
    running: dict[int, tuple[Job, float]] = {}
    at_once, sent = executor.jobs or len(runs), 0
    try:
        while running or (waiting and not asked):
            free = at_once - len(running) if not asked else 0
            ready = [index for index in waiting if not _missing(runs[index])][:free] if free else []
            if not (ready or running or asked):
                # What they start or learn from has failed.
                for index in waiting:
                    rows[index] = _row(runs[index], failed=_missing(runs[index]))
                break
            for index in ready:
                running[index] = _start(runs[index], executor), time.monotonic()
                waiting.remove(index)
            progress.doing(
                *(f"{job.name} {index + 1} of {len(runs)}: {runs[index]}" for index, (job, _) in running.items())
            )
            for index, (job, since) in list(running.items()):
                if (end := job.ended()) is not None:
                    del running[index]
                    seconds = time.monotonic() - since
                    rows[index] = _ended(runs[index], end, seconds, stopped=bool(asked))
                    progress.note(f"{index + 1} of {len(runs)}: {runs[index]}: {_outcome(rows[index])}")
            # Every request is passed on: a run saves its state at the first one, and ends at once at the second.
            while sent < len(asked):
                sent += 1
                progress.note(executor.stopping)
                _stop(running)
            time.sleep(executor.look_every if running else 0)
    finally:
        _stop(running)
        while any(job.ended() is None for job, _ in running.values()):
            time.sleep(executor.look_every)
    whole = [row or _row(run, stopped=True) for run, row in zip(runs, rows, strict=True)]
    if asked:
        raise Stopped(whole)
    return whole


def _missing(run: PlannedRun) -> str:
    """Which run has not ended that a run starts or learns from; empty where nothing is missing."""
    for before, use in ((run.start, "starts"), (run.teacher, "learns")):
        if before is not None and not any(record.get("split") == "result" for record in read_records(before)):
            return f"{before}, which it {use} from, has not ended"
    return ""


def _stop(running: Mapping[int, tuple[Job, float]]) -> None:
    for job, _ in running.values():
        job.stop()


def _start(run: PlannedRun, executor: Executor) -> Job:
    with in_one_line("write", run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / FAILED).unlink(missing_ok=True)
    return executor.start(run)


def _ended(run: PlannedRun, end: End, seconds: float, *, stopped: bool) -> dict[str, Any]:
    """The row of a run whose training has ended; a failure is kept in its folder."""
    if (result := _result(run)) is not None:
        return _row(run, **result)
    if stopped:
        return _row(run, stopped=True)
    output = run.folder / OUTPUT
    text = output.read_text(errors="replace") if output.exists() else ""
    failed = last_words(text) or f"nothing was printed in {output}"
    if end.reason:
        failed = f"{end.reason}; it printed last: {failed}"
    about = {"failed": failed, "config": run.config, "fields": run.fields, "returncode": end.code}
    write_json(run.folder / FAILED, about)
    return _row(run, failed=failed, seconds=round(seconds, 2))


def _outcome(row: Mapping[str, Any] | None) -> str:
    if row and "accuracy" in row:
        return f"{row['accuracy']:.2%}, {row['seconds']:.1f} s"
    return f"failed: {row['failed']}" if row and "failed" in row else "stopped"


@contextlib.contextmanager
def _requests_to_stop() -> Iterator[list[int]]:
    """The signals that came so far, in the main thread, where Python receives them; ignored ones stay so."""
    asked: list[int] = []
    main = threading.current_thread() is threading.main_thread()
    watched = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] if main else []
    before = {number: signal.getsignal(number) for number in watched}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
