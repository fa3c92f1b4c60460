"""Large pages: a command starts itself again at most once, with the same words, and only where that can help; and
compiled programs, which are kept where there is a place for them."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import types
from pathlib import Path

import pytest

from cimjax import compilation_cache, large_pages

ROOT = Path(__file__).parents[1]


def test_a_process_starts_itself_again_once_with_the_same_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(large_pages, "_on_request", lambda: True)
    monkeypatch.setattr(os, "execv", lambda program, words: started.append([program, *words]))
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "dev", "train.py", "--config", "a b.py"])
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=4")
    large_pages.start_again_with_large_pages()
    assert started == [[sys.executable, sys.executable, "-X", "dev", "train.py", "--config", "a b.py"]]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=4:glibc.malloc.hugetlb=1"
    large_pages.start_again_with_large_pages()
    assert len(started) == 1
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    large_pages.start_again_with_large_pages()
    assert len(started) == 1


def test_nothing_happens_where_pages_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("started again"))
    for text in ("always madvise [never]", "[always] madvise never"):
        pages = tmp_path / "enabled"
        pages.write_text(text)
        monkeypatch.setattr(large_pages, "_PAGES", pages)
        large_pages.start_again_with_large_pages()
    monkeypatch.setattr(large_pages, "_PAGES", tmp_path / "absent")
    large_pages.start_again_with_large_pages()
    assert "GLIBC_TUNABLES" not in os.environ


def test_a_command_with_large_pages_answers_as_without() -> None:
    without = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    for environment in (without, without | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}):
        command = [sys.executable, "train.py", "--config", "configs/digit.py"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 2 and "did you mean configs/digits.py?" in done.stderr


def test_programs_are_kept_where_there_is_a_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    chosen: list[str] = []

    def update(name: str, value: object) -> None:
        if name == "jax_compilation_cache_dir":
            chosen.append(str(value))

    values: dict[str, object] = {"jax_compilation_cache_dir": None}
    monkeypatch.setattr(
        compilation_cache, "jax", types.SimpleNamespace(config=types.SimpleNamespace(values=values, update=update))
    )
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # a user of no entry in the list, as in a container
    monkeypatch.delenv("JAX_ENABLE_COMPILATION_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()

    def kept(**settings: str) -> list[str]:
        for name in ("HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        chosen.clear()
        compilation_cache.keep_compiled_programs()
        return list(chosen)

    assert kept() == []
    assert kept(HOME="/proc") == kept(XDG_CACHE_HOME=f"{tmp_path}/file") == kept(XDG_CACHE_HOME="relative") == []
    assert kept(HOME=f"{tmp_path}/a") == kept(XDG_CACHE_HOME="relative", HOME=f"{tmp_path}/a")
    assert chosen == [f"{tmp_path}/a/.cache/cimjax"]
    assert kept(XDG_CACHE_HOME=f"{tmp_path}/b") == [f"{tmp_path}/b/cimjax"]
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert kept(XDG_CACHE_HOME=f"{tmp_path}/b") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "file"]
