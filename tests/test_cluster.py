"""Runs of sweeps and studies as jobs of a cluster: submitit's own on this machine, and SLURM as submitit sees it.

The runs are real (`full`), or processes of a few lines that know their command as `sys.argv`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_slurm
import pytest

from cimjax.analysis import cluster
from cimjax.analysis.cluster import JOBS, SAVED, Cluster, parse_options
from cimjax.analysis.executors import OUTPUT, Processes
from cimjax.analysis.studies.runs import Case, Runs, train_cases
from cimjax.analysis.sweep import FAILED, sweep
from cimjax.analysis.sweep_plan import JOB, PlannedRun
from cimjax.cli import main
from cimjax.training.run.folder import read_records
from cimjax.training.run.records import METRICS

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")
PLAIN = f"{CONFIG}:smoke,weight=none"
# Two runs that last long enough to be preempted.
AXES, FIELDS = {"weight": ["layer", "column"]}, ["--config.epochs=30", "--config.model.width=2"]

# Saves when asked to, is lost when asked twice, goes on when started again, and then ends with the figures of a run.
SAVES = """if 1:
    import json, os, signal, sys, time
    folder = sys.argv[sys.argv.index("--workdir") + 1]
    def save(*_):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
        time.sleep(0.5)
        sys.exit("saved")
    signal.signal(signal.SIGTERM, save)
    print("went on" if os.path.exists(folder + "/saved") else "began", flush=True)
    if not os.path.exists(folder + "/saved"):
        open(folder + "/saved", "w").close()
        time.sleep(60)
    result = dict(split="result", accuracy=0.5, seconds=1.0, moved={})
    with open(folder + "/metrics.jsonl", "w") as stream:
        print(json.dumps(dict(epoch=9)), json.dumps(result), sep=chr(10), file=stream)
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM of this test; the folder of its states."""
    states = fake_slurm.install(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SLURM", str(states))
    return states


def fake_runs(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    def command(run: PlannedRun) -> list[str]:
        return [sys.executable, "-c", code, "--workdir", str(run.folder), *run.fields]

    monkeypatch.setattr(cluster, "command_of", command)


def jobs_on(kind: str, workdir: Path, *words: str, jobs: int | None = None) -> Cluster:
    return Cluster(kind, workdir, parse_options(["timeout_min=9", *words], kind), jobs)


@contextlib.contextmanager
def meanwhile(happens: Callable[[], bool], then: Callable[[], None]) -> Iterator[None]:
    """Do something as soon as something else has happened."""

    def watch() -> None:
        for _ in range(1200):
            if happens():
                return then()
            time.sleep(0.05)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join()
    assert happens()


def printed(folder: Path) -> str:
    return (folder / OUTPUT).read_text() if (folder / OUTPUT).exists() else ""


def logged(folder: Path) -> bytes:
    """What a run has recorded, whose file may just be replaced."""
    with contextlib.suppress(FileNotFoundError):
        return (folder / METRICS).read_bytes()
    return b""


def warn_of_preemption(job: str) -> None:
    for name in ("TERM", "USR2"):
        subprocess.run(["scancel", job, "--signal", name], check=True)


def task_of(folder: Path) -> int:
    """The process of a local job that trains a run: the child of the one that watches over it."""
    watching = json.loads((folder / JOB).read_text())["job"]
    return int(Path(f"/proc/{watching}/task/{watching}/children").read_text().split()[0])


def test_options_of_jobs_are_read_and_what_there_is_not_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "timeout_min=240",
        "mem_gb=16",
        "partition=gpu",
        "slurm_qos=high",
        "exclusive=true",
        "setup=module load cuda",
    ]
    assert parse_options(words, "slurm") == {
        "timeout_min": 240,
        "mem_gb": 16.0,
        "name": "cimjax",
        "slurm_partition": "gpu",
        "slurm_qos": "high",
        "slurm_exclusive": True,
        "slurm_setup": ["module load cuda"],
    }
    command = ["sweep", "--config", PLAIN, "--over", "seed=0", "--workdir", str(tmp_path)]
    for wrong, message in (
        (["--cluster", "slurm"], "needs the minutes that a job may take; for example: --cluster-options partition=gpu"),
        (["--cluster", "local", "--cluster-options", "partitoin=a"], "no 'partitoin' (did you mean 'partition'?)"),
        (["--cluster", "local", "--cluster-options", "time=9"], "time=9: give timeout_min=VALUE instead."),
        (["--cluster", "local", "--cluster-options", "mem_gb=x"], "mem_gb=x: give a number."),
        (["--cluster", "local", "--cluster-options", "qos=a", "slurm_qos=b"], "give each option once, as KEY=VALUE."),
        (["--cluster-options", "qos=a"], "give --cluster slurm or --cluster local too."),
        (["--cluster", "local", "--jobs", "0"], "`jobs` is 0"),
        (["--cluster", "pbs"], "invalid choice: 'pbs'"),
    ):
        assert main([*command, *wrong]) == 2
        out, err = capsys.readouterr()
        assert message in err and err.count("\n") == 1 and not out


def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = ["study", "design", "--config", PLAIN, "--workdir", str(tmp_path), "--cluster", "slurm"]
    study += ["--cluster-options", "timeout_min=9"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(study) == 2
    assert capsys.readouterr().err == (
        "cimjax: --cluster slurm: this machine has no sbatch; type it where jobs are submitted.\n"
    )
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(study) == 2
    assert capsys.readouterr().err == "cimjax: --cluster needs a package; install it with: pip install submitit\n"


def test_whatever_ends_a_job_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """if 1:
        import os, sys
        print("last words")
        if "--config.seed=0" in sys.argv: os.kill(os.getpid(), 9)
        if "--config.seed=1" in sys.argv: raise MemoryError("no room for an array\\nof 3 x 3")
        if "--config.seed=2" in sys.argv: os.kill(os.getppid(), 9)
    """
    fake_runs(monkeypatch, code)
    rows = sweep(PLAIN, {"config.seed": ["0", "1", "2"]}, tmp_path, executor=jobs_on("local", tmp_path, jobs=3))
    assert rows[0]["failed"] == "killed by SIGKILL, as by a system without memory left; it printed last: last words"
    assert rows[1]["failed"] == "MemoryError: no room for an array"
    assert rows[2]["failed"].startswith("job ") and "_0_log.err; it printed last: last words" in rows[2]["failed"]
    assert json.loads((tmp_path / "seed=0" / FAILED).read_text())["returncode"] == -9
    assert not list(tmp_path.rglob(JOB)) and list((tmp_path / JOBS).glob("*_log.err"))


def test_a_preempted_local_job_saves_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_runs(monkeypatch, SAVES)
    folder = tmp_path / "seed=0"
    preempt = lambda: os.kill(task_of(folder), signal.SIGUSR2)  # noqa: E731
    with meanwhile(lambda: "began" in printed(folder), preempt):
        (row,) = sweep(PLAIN, {"seed": ["0"]}, tmp_path, executor=jobs_on("local", tmp_path))
    assert row["accuracy"] == 0.5 and printed(folder) == "began\nsaved\nwent on\n"
    assert "1 of 1: seed=0: 50.00%, 1.0 s\n" in capsys.readouterr().err


def test_a_study_submits_a_run_once_the_one_that_it_starts_from_has_ended(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_runs(monkeypatch, SAVES.replace('os.path.exists(folder + "/saved")', "True"))
    cases = [Case("second", "weight=none", start="first"), Case("first", "weight=none")]
    found = train_cases(Runs(f"{CONFIG}:smoke", tmp_path, [0], executor=jobs_on("slurm", tmp_path)), cases)
    assert [outcome.accuracies for outcome in found] == [[0.5], [0.5]]
    # Jobs have growing numbers.
    jobs = sorted(path.name for path in slurm.iterdir())
    pickled = [(tmp_path / JOBS / f"{job}_submitted.pkl").read_bytes() for job in jobs]
    assert [b"/first/seed=0" in text for text in pickled] == [True, False]


@pytest.mark.usefixtures("slurm")
def test_a_cancelled_job_has_ended_once_its_state_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM calls it cancelled from the moment on when it asks for that."""
    fake_runs(monkeypatch, SAVES.replace("time.sleep(0.5)", "time.sleep(2)"))
    job = jobs_on("slurm", tmp_path).start(PlannedRun({}, PLAIN, [], 0.0, tmp_path))
    with meanwhile(lambda: "began" in printed(tmp_path), job.stop):
        pass
    kept = []
    while job.ended() is None:
        kept += [(tmp_path / JOB).exists()]
        time.sleep(0.1)
    assert printed(tmp_path) == "began\nsaved\n" and all(kept)
    assert not (tmp_path / JOB).exists() and not (tmp_path / SAVED).exists()


def test_a_job_that_is_queued_again_can_still_be_taken_up(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after SIGTERM, by which a preemption begins as a cancellation does."""
    fake_runs(monkeypatch, SAVES)
    run = PlannedRun({}, PLAIN, [], 0.0, tmp_path)
    jobs_on("slurm", tmp_path).start(run)
    (name,) = (path.name for path in slurm.iterdir())
    with meanwhile(lambda: "began" in printed(tmp_path), lambda: fake_slurm.to_step(name, signal.SIGTERM)):
        pass
    with meanwhile((tmp_path / SAVED).exists, lambda: fake_slurm.to_step(name, signal.SIGUSR2)):
        pass
    assert json.loads((tmp_path / JOB).read_text())["job"] == name
    job = jobs_on("slurm", tmp_path).start(run)
    while job.ended() is None:
        time.sleep(0.1)
    assert printed(tmp_path) == "began\nsaved\nwent on\n" and [path.name for path in slurm.iterdir()] == [name]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["local", "slurm"])
@pytest.mark.usefixtures("slurm")
def test_ctrl_c_cancels_the_jobs_whose_states_are_saved(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_runs(monkeypatch, SAVES)
    folders = [tmp_path / f"seed={seed}" for seed in range(2)]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    command = ["sweep", "--config", PLAIN, "--over", "seed=0,1,2", "--workdir", str(tmp_path), "--jobs", "2"]
    command += ["--cluster", kind, "--cluster-options", "timeout_min=9"]
    began = lambda: all("began" in printed(folder) for folder in folders)  # noqa: E731
    try:
        with meanwhile(began, lambda: os.kill(os.getpid(), signal.SIGINT)):
            assert main(command) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    err = capsys.readouterr().err
    assert "cancelling all jobs, whose states are saved first; the same once more leaves at once.\n" in err
    assert err.endswith("cimjax: stopped with 0 of 3 runs finished; the same command goes on.\n")
    assert [printed(folder) for folder in folders] == ["began\nsaved\n"] * 2
    assert not list(tmp_path.rglob(FAILED)) and not list(tmp_path.rglob(JOB))
    (tmp_path / "seed=2").mkdir()
    (tmp_path / "seed=2" / "saved").touch()
    assert main(command) == 0
    assert capsys.readouterr().err.count(": 50.00%, 1.0 s\n") == 3


def script_of_the_only_job(slurm: Path) -> str:
    (job,) = slurm.iterdir()
    return (job / "script").read_text()


def test_slurm_is_asked_for_what_was_typed(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(monkeypatch, "print('nothing')")
    words = ["partition=gpu", "gpus_per_node=1", "mem_gb=16", "cpus_per_task=4", "qos=high", "setup=module load cuda"]
    (row,) = sweep(PLAIN, {"seed": ["0"]}, tmp_path, executor=jobs_on("slurm", tmp_path, *words))
    assert row["failed"] == "nothing"
    script = script_of_the_only_job(slurm)
    typed = fake_slurm.parameters_of(script)
    wanted = {"partition": "gpu", "gpus-per-node": "1", "mem": "16GB", "cpus-per-task": "4", "qos": "high", "time": "9"}
    assert {name: typed[name] for name in wanted} == wanted
    assert typed["signal"] == "USR2@108" and typed["job-name"] == "cimjax" and "\nmodule load cuda\n" in script


def test_what_slurm_refuses_is_told_in_one_line(
    slurm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["sweep", "--config", PLAIN, "--over", "seed=0,1", "--workdir", str(tmp_path), "--cluster", "slurm"]
    assert main([*command, "--cluster-options", "timeout_min=9", "partition=none"]) == 2
    assert "cimjax: slurm takes no job: sbatch: error: invalid partition specified: none;" in capsys.readouterr().err
    assert not list(slurm.iterdir())


@pytest.mark.full
def test_a_job_at_the_end_of_its_time_is_queued_again_and_one_without_a_word_has_failed(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_MINUTE", "1.2")
    deaf = """if 1:
        import signal, sys, time
        if "--config.seed=1" in sys.argv:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("deaf", flush=True)
            time.sleep(99)
    """
    fake_runs(monkeypatch, deaf + "\n" + SAVES)
    rows = sweep(PLAIN, {"config.seed": ["0", "1"]}, tmp_path, executor=jobs_on("slurm", tmp_path))
    assert rows[0]["accuracy"] == 0.5 and printed(tmp_path / "seed=0") == "began\nsaved\nwent on\n"
    assert "has ended as TIMEOUT, see " in rows[1]["failed"] and rows[1]["failed"].endswith("printed last: deaf")


def test_a_job_that_outlives_its_sweep_is_taken_up(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_runs(monkeypatch, SAVES)
    folder = tmp_path / "seed=0"
    folder.mkdir()
    jobs_on("slurm", tmp_path).start(PlannedRun({}, PLAIN, [], 0.0, folder))
    (job,) = (path.name for path in slurm.iterdir())
    with meanwhile(lambda: "began" in printed(folder), lambda: warn_of_preemption(job)):
        (row,) = sweep(PLAIN, {"seed": ["0"]}, tmp_path, executor=jobs_on("slurm", tmp_path))
    assert row["accuracy"] == 0.5 and [path.name for path in slurm.iterdir()] == [job]
    assert printed(folder) == "began\nsaved\nwent on\n"


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("seconds", "images_per_second", "compile_seconds")
    return [{name: value for name, value in record.items() if name not in times} for record in records]


@pytest.fixture(scope="module")
def by_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The runs of `AXES` as processes of this machine."""
    return sweep(f"{CONFIG}:smoke", AXES, tmp_path_factory.mktemp("processes"), fields=FIELDS, executor=Processes(2))


@pytest.mark.full
@pytest.mark.parametrize("kind", ["local", "slurm"])
@pytest.mark.usefixtures("slurm")
def test_jobs_have_the_records_of_processes_also_when_one_is_preempted(
    kind: str, by_processes: list[dict[str, Any]], tmp_path: Path
) -> None:
    preempted = tmp_path / "weight=layer"

    def preempt() -> None:
        if kind == "local":
            return os.kill(task_of(preempted), signal.SIGUSR2)
        warn_of_preemption(json.loads((preempted / JOB).read_text())["job"])

    with meanwhile(lambda: logged(preempted).count(b"\n") > 4, preempt):
        found = sweep(f"{CONFIG}:smoke", AXES, tmp_path, fields=FIELDS, executor=jobs_on(kind, tmp_path, jobs=2))
    assert "stopped after step" in printed(preempted)
    for one, other in zip(by_processes, found, strict=True):
        assert one["accuracy"] == other["accuracy"] and one["moved"] == other["moved"]
        assert without_times(read_records(one["workdir"])) == without_times(read_records(other["workdir"]))
