"""SLURM on one machine as far as submitit sees it: `sbatch`, `srun`, `sacct`, `scancel` and `scontrol requeue`.

`install` puts them into a folder for PATH. Jobs start at once. Their states are files in the folder `FAKE_SLURM`, and a
minute of their time takes `FAKE_MINUTE` seconds. Signals and states are those of SLURM's manual: a signal goes to the
group of the step's process only; a cancelled job gets SIGTERM and, some seconds later, SIGKILL for all its processes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("sbatch", "srun", "sacct", "scancel", "scontrol")
# Seconds between SIGTERM and SIGKILL; 30 in SLURM unless an administrator has set others.
KILL_WAIT = 8.0


def install(folder: Path) -> Path:
    """Put the commands into a folder for PATH, and return the folder of the states for `FAKE_SLURM`."""
    folder.mkdir()
    for name in NAMES:
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, __file__, name])} "$@"\n')
        command.chmod(0o755)
    states = folder / "states"
    states.mkdir()
    return states


def states() -> Path:
    return Path(os.environ["FAKE_SLURM"])


def state_of(job: str) -> str:
    return (states() / job / "state").read_text()


def set_state(job: str, state: str) -> None:
    unfinished = states() / job / ".state"
    unfinished.write_text(state)
    unfinished.replace(states() / job / "state")


def parameters_of(script: str) -> dict[str, str]:
    lines = [shlex.split(line)[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (line.removeprefix("--").partition("=") for line in lines)}


def sbatch(file: str) -> None:
    script = Path(file).read_text()
    if parameters_of(script).get("partition") == "none":
        sys.exit("sbatch: error: invalid partition specified: none\nsbatch: error: Batch job submission failed")
    job = str(time.time_ns() // 10**6)  # submitit remembers the states of earlier numbers
    (states() / job).mkdir()
    (states() / job / "script").write_text(script)
    set_state(job, "PENDING")
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([sys.executable, __file__, "node", job], start_new_session=True, **quiet)
    print(f"Submitted batch job {job}")


def node(job: str) -> None:
    """The machine of a job: starts its script, again where it was queued again."""
    parameters = parameters_of((states() / job / "script").read_text())
    minutes, warned = float(parameters["time"]), float(parameters["signal"].partition("@")[2]) / 60
    minute = float(os.environ.get("FAKE_MINUTE", "60"))
    environment = os.environ | {"SLURM_JOB_ID": job, "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1"}
    environment |= {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    while state_of(job) in ("PENDING", "REQUEUED"):
        set_state(job, "RUNNING")
        (states() / job / "step").unlink(missing_ok=True)
        script = ["bash", str(states() / job / "script")]
        process = subprocess.Popen(script, env=environment, start_new_session=True)
        start, ending, told = time.monotonic(), None, False
        while process.poll() is None:
            time.sleep(0.05)
            passed = (time.monotonic() - start) / minute
            if passed > minutes - warned and not told:
                told = True
                to_step(job, signal.SIGUSR2)
            if passed > minutes and state_of(job) == "RUNNING":
                set_state(job, "TIMEOUT")
            if state_of(job) != "RUNNING" and ending is None:
                ending = time.monotonic()
                time.sleep(0.5)  # whoever asked for it has his answer first
                to_step(job, signal.SIGTERM)
            if ending is not None and time.monotonic() - ending > KILL_WAIT:
                kill_all(job)
        kill_all(job)
        if state_of(job) == "RUNNING":
            set_state(job, "COMPLETED" if process.returncode == 0 else "FAILED")


def kill_all(job: str) -> None:
    """End every process of a job."""
    marks = {f"SLURM_JOB_ID={job}".encode(), f"FAKE_SLURM={states()}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if marks <= set((process / "environ").read_bytes().split(b"\0")) and int(process.name) != os.getpid():
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def to_step(job: str, number: int) -> None:
    step = states() / job / "step"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.killpg(int(step.read_text()), number)


def srun(*words: str) -> None:
    job, rest = os.environ["SLURM_JOB_ID"], list(words)
    rest.remove("--unbuffered")
    for stream, flag in ((1, "--output"), (2, "--error")):
        place = rest.index(flag)
        file = rest[place + 1].replace("%j", job).replace("%t", "0")
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
        del rest[place : place + 2]
    os.setpgid(0, 0)
    (states() / job / "step").write_text(str(os.getpid()))
    os.execvp(rest[0], rest)


def sacct(*words: str) -> None:
    print("JobID|State|NodeList")
    for flag, job in itertools.pairwise(words):
        if flag == "-j" and (states() / job).exists():
            state = state_of(job)
            print(f"{job}|{state + ' by 1000' if state == 'CANCELLED' else state}|here")


def scancel(job: str, *words: str) -> None:
    if words:
        return to_step(job, getattr(signal, f"SIG{re.sub('^SIG', '', words[-1])}"))
    if state_of(job) in ("PENDING", "RUNNING", "REQUEUED"):
        set_state(job, "CANCELLED")


def scontrol(what: str, job: str) -> None:
    assert what == "requeue"
    set_state(job, "REQUEUED")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
