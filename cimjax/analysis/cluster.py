"""Runs of a sweep as jobs of a cluster, through submitit: SLURM, or submitit's own jobs on this machine.

A job trains its run in a process of its own. When the cluster warns of a preemption or of the end of a job's time, the
run saves its state and the job is queued again; it goes on from there. Files of submitit are in `.jobs` in the folder
of the sweep, what a run printed is in its own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cimjax.analysis.executors import OUTPUT, End, Job, command_of, last_words, of_process, start_process
from cimjax.analysis.sweep_plan import JOB, PlannedRun
from cimjax.command import UsageError
from cimjax.spec.base import nearest, shortened
from cimjax.training.run.files import in_one_line, parsed, write_json

if TYPE_CHECKING:
    import submitit

CLUSTERS = ("slurm", "local")
# In the folder of a sweep: the files of submitit.
JOBS = ".jobs"
# In the folder of a run: there once a job that was told to end has saved its state, until it goes on.
SAVED = "job.saved"
# Options of submitit that all clusters share, by its names.
_SHARED: dict[str, type] = {
    "timeout_min": int,
    "mem_gb": float,
    "gpus_per_node": int,
    "cpus_per_task": int,
    "name": str,
    "stderr_to_stdout": bool,
}
# Those of SLURM alone, by the names of `sbatch`; a list is typed as its only entry.
_SLURM: dict[str, type] = {
    **dict.fromkeys(("partition", "account", "qos", "constraint", "nodelist", "exclude", "gres", "dependency"), str),
    **dict.fromkeys(("mem_per_cpu", "mem_per_gpu", "comment", "wckey", "mail_type", "mail_user"), str),
    **dict.fromkeys(("setup", "teardown", "srun_args"), list),
    "signal_delay_s": int,
    "exclusive": bool,
    "use_srun": bool,
}
# What users of `sbatch` know by another name.
_ELSEWHERE = {"time": "timeout_min", "mem": "mem_gb", "job_name": "name", "gpus": "gpus_per_node"}
# What must be there to submit jobs.
_COMMANDS = ("sbatch", "srun", "scancel")
# Minutes of a local job unless told otherwise: a month.
_LONG = 43_200
# Seconds before the end of a job's time in which the run is to save its state: at most this part of its time, and
# below ten minutes, from which on submitit takes the signal for the end of the time and not for a preemption.
_TO_SAVE, _PART_TO_SAVE = 300, 0.2
# States of a job of SLURM that has not ended, as `sacct` tells them.
_ALIVE = ("PENDING", "RUNNING", "REQUEUED", "COMPLETING", "CONFIGURING", "SUSPENDED", "PREEMPTED", "RESIZING")
# How often a job may reach the end of its time and be queued again.
_TIMEOUTS = 1000
# Seconds that a job which was told to end waits for what the cluster does next.
_WAIT_FOR_CLUSTER = 600
# Seconds that a cancelled job has at most to save: `KillWait` of SLURM, 30 unless set otherwise, and some more.
_KILL_WAIT = 40


def parse_options(words: Sequence[str], cluster: str) -> dict[str, Any]:
    """Options of jobs as typed, `KEY=VALUE`, as submitit's `update_parameters` takes them.

    Those of SLURM alone are accepted for local jobs too, where they have no effect: a command can be tried first.

    Raises:
      UsageError: for one that there is not, a value of another type, and for SLURM without a time.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, _, value = word.partition("=")
        key = key.removeprefix("slurm_")
        if key in _ELSEWHERE:
            raise UsageError(f"--cluster-options {shortened(word)}: give {_ELSEWHERE[key]}=VALUE instead.")
        if key not in _SHARED and key not in _SLURM:
            near = nearest(key, [*_SHARED, *_SLURM])
            raise UsageError(f"--cluster-options has no {shortened(key)!r}{near}; {_example(cluster)}")
        name = key if key in _SHARED else f"slurm_{key}"
        if not value or name in options:
            raise UsageError(f"--cluster-options {shortened(word)}: give each option once, as KEY=VALUE.")
        options[name] = _value(key, value, (_SHARED | _SLURM)[key])
    if cluster == "slurm" and "timeout_min" not in options:
        raise UsageError(f"--cluster slurm needs the minutes that a job may take; {_example(cluster)}")
    return {"timeout_min": _LONG, "name": "cimjax"} | options


def _example(cluster: str) -> str:
    partition = "partition=gpu " if cluster == "slurm" else ""
    return f"for example: --cluster-options {partition}timeout_min=240 gpus_per_node=1 mem_gb=16 cpus_per_task=4"


def _value(key: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return [text] if kind is list else kind(text)
    except (KeyError, ValueError):
        what = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise UsageError(f"--cluster-options {shortened(f'{key}={text}')}: give {what}.") from None


class Cluster:
    """Trains each run in a job of a cluster."""

    look_every = 1.0
    stopping = "cancelling all jobs, whose states are saved first; the same once more leaves at once."

    def __init__(self, cluster: str, workdir: str | Path, options: Mapping[str, Any], jobs: int | None = None) -> None:
        """Nothing is submitted yet.

        Args:
          cluster: one of `CLUSTERS`.
          workdir: the folder of the sweep, which all machines of the cluster see.
          options: as `parse_options` gives them.
          jobs: how many at a time; if not given, all on SLURM, and one on this machine.

        Raises:
          ValueError: in one line, where there is no such cluster here.
        """
        require_submitit()
        import submitit

        if cluster == "slurm" and (missing := [name for name in _COMMANDS if shutil.which(name) is None]):
            raise UsageError(f"--cluster slurm: this machine has no {missing[0]}; type it where jobs are submitted.")
        self.jobs = jobs or (None if cluster == "slurm" else 1)
        self._cluster = cluster
        delay = min(_TO_SAVE, int(60 * _PART_TO_SAVE * options["timeout_min"]))
        several = {f"{cluster}_max_num_timeout": _TIMEOUTS}
        try:
            self._submitit = submitit.AutoExecutor(Path(workdir) / JOBS, cluster=cluster, **several)
            self._submitit.update_parameters(**{"slurm_signal_delay_s": delay, **options})
        except (RuntimeError, NameError, AssertionError, OSError) as error:
            raise UsageError(f"--cluster {cluster}: {' '.join(str(error).split())}") from error

    def start(self, run: PlannedRun) -> Job:
        """Submit a job for a run, or take up the one that an earlier command has submitted and that goes on."""
        if (earlier := self._earlier(run)) is not None:
            return earlier
        with in_one_line("write", run.folder):
            (run.folder / OUTPUT).unlink(missing_ok=True)
        try:
            with contextlib.redirect_stderr(None):  # submitit prints there what it raises
                job = self._submitit.submit(Training(command_of(run), run.folder / OUTPUT))
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            raise UsageError(f"{self._cluster} takes no job: {'; '.join(str(error).splitlines())}") from error
        write_json(run.folder / JOB, {"cluster": self._cluster, "job": job.job_id, "folder": str(job.paths.folder)})
        return self._shown(job, run)

    def _earlier(self, run: PlannedRun) -> Job | None:
        """The job of an earlier command, where it waits or runs."""
        file = run.folder / JOB
        about = parsed(file.read_bytes()) if file.exists() else None
        if self._cluster != "slurm" or not isinstance(about, dict) or about.get("cluster") != "slurm":
            return None
        from submitit import SlurmJob

        job: SlurmJob[int] = SlurmJob(about["folder"], about["job"])
        waits_or_runs = not job.done(force_check=True) and job.state.split()[0] in _ALIVE
        return self._shown(job, run) if waits_or_runs else None

    def _shown(self, job: submitit.Job[int], run: PlannedRun) -> Job:
        return (_SlurmJob if self._cluster == "slurm" else _LocalJob)(job, run)


class _Job:
    """A job of submitit."""

    def __init__(self, job: submitit.Job[int], run: PlannedRun) -> None:
        self._job, self._run, self._asked = job, run, 0
        self.name = f"job {job.job_id} for"

    def ended(self) -> End | None:
        """How it has ended."""
        if not self._job.done():
            return None
        for name in (JOB, SAVED):
            (self._run.folder / name).unlink(missing_ok=True)
        if not self._job.paths.result_pickle.exists():
            state = self._job.state.split()[0]
            return End(None, f"job {self._job.job_id} has ended as {state}, see {self._job.paths.stderr}")
        if (error := self._job.exception()) is not None:
            return End(None, f"job {self._job.job_id}, see {self._job.paths.stderr}: {last_words(str(error))}")
        return of_process(self._job.result())


class _SlurmJob(_Job):
    _cancelled = 0.0

    def ended(self) -> End | None:
        if self._asked > 1:
            return End(None, "left alone")
        return None if self._asked and self._saves() else super().ended()

    def _saves(self) -> bool:
        """Whether the run of a cancelled job may still be saving its state: SLURM calls a job cancelled from the moment
        on when it asks for that."""
        began = (self._run.folder / OUTPUT).exists() and not self._job.paths.result_pickle.exists()
        return began and not (self._run.folder / SAVED).exists() and time.monotonic() - self._cancelled < _KILL_WAIT

    def stop(self) -> None:
        self._asked += 1
        if self._asked == 1:
            self._cancelled = time.monotonic()
            self._job.cancel(check=False)
            self._job.watcher.clear()  # asks for states every few seconds from here on, instead of minutes


class _LocalJob(_Job):
    def stop(self) -> None:
        # Not `cancel`, which leaves a job one second. Its number is that of the process which watches over it, and
        # which passes this signal on.
        self._asked += 1
        os.kill(int(self._job.job_id), signal.SIGTERM)


class Training:
    """What a job does: it trains a run in a process of its own, and returns the code with which that has ended.

    Of the machine that trains, submitit calls `checkpoint` at SIGUSR2, by which the cluster warns of a preemption or of
    the end of the job's time. SIGTERM is passed on, so that the state of a cancelled run is saved.
    """

    def __init__(self, command: list[str], output: Path) -> None:
        self.command, self.output = command, output
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False

    def __call__(self) -> int:
        """Train."""
        signal.signal(signal.SIGTERM, self._pass_on)
        (self.output.parent / SAVED).unlink(missing_ok=True)
        self._process = start_process(self.command, self.output, dict(os.environ))
        if self._asked:
            self._process.terminate()
        self._wait()
        code = self._process.wait()
        if self._asked and _on_slurm():
            (self.output.parent / SAVED).touch()
            # SLURM ends a cancelled job next. It also ends one that it takes the machine from, and queues it again;
            # but not one that has ended by itself. Or SIGUSR2 follows.
            time.sleep(_WAIT_FOR_CLUSTER)
        return code

    def checkpoint(self) -> Any:
        """Have the run save its state and end; what goes on with it."""
        from submitit.helpers import DelayedSubmission

        self._end(once=True)
        if self._process is not None:
            self._wait()
        return DelayedSubmission(Training(self.command, self.output))

    def _pass_on(self, number: int, frame: Any) -> None:
        del number, frame
        self._end(once=_on_slurm())

    def _end(self, *, once: bool) -> None:
        """Ask the run to save its state and to end. At a second time it would end at once and lose it, and SLURM sends
        SIGTERM before or after SIGUSR2."""
        if self._process is not None and self._process.returncode is None and not (once and self._asked):
            os.kill(self._process.pid, signal.SIGTERM)
        self._asked = True

    def _wait(self) -> None:
        """Wait without taking the exit code: a signal's handler may do so while the program below does."""
        assert self._process is not None
        if self._process.returncode is None:
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)


def _on_slurm() -> bool:
    return os.environ.get("SUBMITIT_EXECUTOR") == "slurm"


def require_submitit() -> None:
    """Refuse a cluster where the package for it is missing.

    Raises:
      UsageError: with the command that installs it.
    """
    if importlib.util.find_spec("submitit") is None:
        raise UsageError("--cluster needs a package; install it with: pip install submitit")
