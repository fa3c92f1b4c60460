"""Run folders in a bucket: what is copied when, what is taken up, and what is refused.

The bucket is fsspec's own in the memory of this process, which can refuse to take anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import jax
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cimjax.cli import main
from cimjax.training.config.file import load_config, take_overrides
from cimjax.training.restore import load
from cimjax.training.run import remote
from cimjax.training.run.address import is_remote
from cimjax.training.run.checkpoint import Checkpoints
from cimjax.training.run.files import RunFolderError, RunFolderWarning
from cimjax.training.run.folder import read_records
from cimjax.training.run.remote import Mirror, local_copy
from cimjax.training.train import train

CONFIG = str(Path(__file__).parents[1] / "configs" / "digits.py")
URL = "s3://bucket/runs/a"


class Bucket(MemoryFileSystem):
    """A bucket that refuses what is to be written, or some of it, when asked to."""

    protocol = "s3"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    refuses = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        if self.refuses and self.refuses in path:
            raise OSError("the bucket is on fire")
        super().pipe_file(path, value, **options)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Bucket]]:
    before = fsspec.registry.get("s3")
    fsspec.register_implementation("s3", Bucket, clobber=True)
    monkeypatch.setattr(remote, "_PAUSE", 0.0)
    Bucket.store, Bucket.refuses = {}, ""
    yield Bucket
    Bucket.store, Bucket.refuses = {}, ""
    if before is not None:
        fsspec.register_implementation("s3", before, clobber=True)


def names(bucket: type[Bucket]) -> list[str]:
    return sorted(name.removeprefix("/bucket/runs/a/") for name in bucket.store)


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        file = folder / {"config": "config.json", "metrics": "metrics.jsonl"}.get(name, f"checkpoints/{name[1:]}/data")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_a_folder_is_copied_with_whole_saves_only_and_taken_up(bucket: type[Bucket]) -> None:
    with Mirror(URL) as mirror:
        assert str(mirror) == URL and names(bucket) == [".lock"]
        write(mirror.folder, config="{}", metrics="one\n", _000001_step_4="x")
        (mirror.folder / "checkpoints" / "000002_step_8.orbax-checkpoint-tmp").mkdir()
        (mirror.folder / ".lock").touch()
        mirror.after_epoch()
        files = [".lock", "checkpoints/000001_step_4/data", "checkpoints/whole.json", "config.json", "metrics.jsonl"]
        assert names(bucket) == files
        write(mirror.folder, metrics="one\ntwo\n", _000002_step_8="y")
        (mirror.folder / "checkpoints" / "000001_step_4" / "data").unlink()
        (mirror.folder / "checkpoints" / "000001_step_4").rmdir()
    assert names(bucket) == ["checkpoints/000002_step_8/data", "checkpoints/whole.json", "config.json", "metrics.jsonl"]
    assert not mirror.folder.exists()
    with Mirror(URL) as again:
        assert (again.folder / "metrics.jsonl").read_text() == "one\ntwo\n"
        assert [path.name for path in (again.folder / "checkpoints").iterdir()] == ["000002_step_8"]
    copy = local_copy(URL + "/")
    assert copy.name == "a" and (copy / "checkpoints" / "000002_step_8" / "data").read_text() == "y"
    assert local_copy("runs/a") == Path("runs/a") and not is_remote("runs/a") and is_remote(Path(URL))
    assert local_copy("~/runs/a") == Path.home() / "runs" / "a"


def test_a_save_that_is_half_there_does_not_count(bucket: type[Bucket]) -> None:
    mirror = Mirror(URL).__enter__()
    write(mirror.folder, config="{}", _000001_step_4="x")
    mirror.after_epoch()
    write(mirror.folder, _000002_step_8="y")
    (mirror.folder / "checkpoints" / "000002_step_8" / "more").write_text("z")
    bucket.refuses = "more"
    with pytest.warns(RunFolderWarning, match="on fire; the run goes on, and this is tried again after the"):
        mirror.after_epoch()
    with pytest.raises(RunFolderError, match=r"cannot write s3://.*on fire; what is missing there is in /") as failed:
        mirror.__exit__(None, None, None)
    assert "checkpoints/000002_step_8/data" in names(bucket)
    assert str(mirror.folder) in str(failed.value) and mirror.folder.exists()
    with Mirror(URL) as again:
        assert [path.name for path in (again.folder / "checkpoints").iterdir()] == ["000001_step_4"]


def test_a_run_that_lives_keeps_others_out_and_one_that_was_killed_does_not_for_long(
    bucket: type[Bucket], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Mirror(URL) as mirror:
        write(mirror.folder, config="{}")
        with pytest.raises(RunFolderError, match=r"is in use by process PID \d+ on .*if it was killed, (99|100) s"):
            Mirror(URL).__enter__()
        # As if this one had given no sign for two minutes.
        lock = json.loads(bucket.store["/bucket/runs/a/.lock"].getvalue())
        older = json.dumps(lock | {"time": lock["time"] - 120})
        fsspec.filesystem("s3").pipe_file("/bucket/runs/a/.lock", older.encode())
        with (
            Mirror(URL),
            pytest.raises(RunFolderError, match=r"was taken up by process PID .*: this run was taken for"),
        ):
            write(mirror.folder, metrics="lost")
            mirror.after_epoch()
    assert names(bucket) == []


def test_what_cannot_be_is_refused_in_one_line(
    bucket: type[Bucket], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, message in (
        (
            ["train", "--config", f"{CONFIG}:smoke", "--workdir", "gs://b/r"],
            "gs:// needs a package; install it with: pip",
        ),
        (["evaluate", "az://b/r"], "az:// needs a package; install it with: pip install adlfs"),
        (["evaluate", "ftp://b/r"], "or in a bucket (gs://, s3://, az://), not at 'ftp://b/r'"),
        (["report", URL, "--save", str(tmp_path / "a.html")], "s3://bucket/runs/a is no run folder"),
        (["sweep", "--config", CONFIG, "--over", "seed=0", "--workdir", URL], "only single runs train in a bucket"),
    ):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_several_processes_need_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="a folder that all see, not in a bucket"):
        train(load_config(f"{CONFIG}:smoke", []), workdir=URL)


@pytest.mark.full
def test_a_run_in_a_bucket_has_the_records_of_one_in_a_folder(
    bucket: type[Bucket], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fields = ["--config.epochs=3", "--config.model.width=2", "--config.subset.images=260", "--config.writers=('csv',)"]
    config = load_config(f"{CONFIG}:smoke", take_overrides(fields)[0])
    train(config, workdir=tmp_path / "here")

    class Killed(BaseException):
        pass

    def killed(epoch: int, state: Any, records: Any) -> None:
        raise Killed

    # Killed behind the first epoch: what was copied by then is all that there is.
    with pytest.raises(Killed):
        mirror = Mirror(URL)
        mirror.__enter__()
        train(config, workdir=mirror, callbacks=[mirror.after_epoch, killed])
    command = ["train", "--config", f"{CONFIG}:smoke", *fields, "--workdir", URL]
    assert main(command) == 2 and "is in use by process PID" in capsys.readouterr().err
    mirror._life.end()
    assert main(command) == 0
    out = capsys.readouterr().out
    assert f"cimjax evaluate {URL}" in out and str(mirror.folder) not in out
    times = ("seconds", "images_per_second", "compile_seconds")

    def records(run: Path) -> list[dict[str, Any]]:
        return [{name: value for name, value in each.items() if name not in times} for each in read_records(run)]

    copy = local_copy(URL)
    assert records(copy) == records(tmp_path / "here") and (copy / "metrics.csv").exists()
    assert Checkpoints(copy).latest_step() == Checkpoints(tmp_path / "here").latest_step()
    assert load(URL).config.epochs == 3
    for command in (["evaluate", URL], ["report", URL, "--save", str(tmp_path / "a.md")]):
        assert main(command) == 0
