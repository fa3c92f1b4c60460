"""Saving and restoring a training state; the only file of the project that imports orbax.

Every save is a folder of its own, `checkpoints/<number>_step_<step>[_best]` in the run folder. Orbax writes it under
another name and renames it when it is complete, so that a process may be killed at any moment: the highest number is
the last state, the highest number that is marked is the best one, and all others are removed afterwards. Which states
are worth keeping, and what is in them, is decided elsewhere.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from cimjax.training.run.folder import CHECKPOINTS, RunFolderError

PyTree = Any
Which = Literal["last", "best"]

_NAME = re.compile(r"(\d+)_step_(\d+)(_best)?")


class _Save(NamedTuple):
    """One complete save; a later save has a greater number, whatever its step is."""

    number: int
    step: int
    best: bool
    path: Path


class Checkpoints:
    """The last and the best state of a run.

    Nothing is written or removed before the first `save`, so that a run can be read while another process trains it.
    Saves are synchronous: when `save` returns, the state is on the disk, and there is nothing to wait for or to close.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """`folder` is the run folder; the checkpoints are in its folder `checkpoints`."""
        self._folder = Path(folder).absolute() / CHECKPOINTS
        self._number = 0

    def save(self, step: int, state: PyTree, extra: dict[str, Any], *, best: bool = False) -> None:
        """Save a state as the last one, and then remove what it replaces.

        With several processes all call this, on one file system; only the primary one removes.

        Args:
          step: training steps done, >= 0; need not grow from save to save.
          state: arrays in any pytree, at least one, none of size zero; no typed random keys.
          extra: a JSON-able dictionary that is saved with the state, both or neither.
          best: the state is the best one, too.

        Raises:
          RunFolderError: where it cannot be written (a full disk); the saves before it stay.
          ValueError: for a negative step.
        """
        if step < 0:
            raise ValueError(f"`step` is {step}; give the number of training steps done, at least 0.")
        # The count in memory: another process of this run may not yet see the newest folder on a network file system.
        self._number = max([self._number, *(save.number for save in self._saves())]) + 1
        path = self._folder / f"{self._number:06d}_step_{int(step)}{'_best' if best else ''}"
        leaves = _named_leaves(state)
        try:
            with _quiet():
                ocp.save(path, leaves, custom_metadata={"extra": extra})
        except Exception as error:
            self._sweep()
            raise RunFolderError(
                f"cannot save {path}: {_first_line(error)}; the checkpoint before it stays."
            ) from error
        self._sweep()

    def latest_step(self) -> int | None:
        """The step of the last state; None before the first save."""
        last = self._newest("last")
        return None if last is None else last.step

    def restore(self, abstract_state: PyTree, *, which: Which = "last") -> tuple[PyTree, dict[str, Any]]:
        """Restore a state exactly, on whatever devices `abstract_state` names.

        Args:
          abstract_state: the pytree of the state, with arrays or `jax.ShapeDtypeStruct`s as leaves. An array is
            restored to the devices of its leaf, or to one device where the leaf has no sharding.
          which: `"last"` or `"best"`.

        Returns:
          The state, of the structure of `abstract_state`, and the dictionary that was saved with it.

        Raises:
          RunFolderError (a ValueError): where there is no such state, where it is damaged, and where the name, the
            shape or the dtype of a leaf differs: then the first one is named.
        """
        save = self._newest(which)
        while save is not None:
            try:
                return _read(save.path, abstract_state)
            except RunFolderError:
                newer = self._newest(which)
                if newer == save:
                    raise
                save = newer  # the process that trains here has replaced it meanwhile
        raise RunFolderError(f"{self._folder} has no {which} checkpoint; train first, or give another --workdir.")

    def _saves(self) -> list[_Save]:
        """The complete saves, oldest first."""
        names = os.listdir(self._folder) if self._folder.is_dir() else []
        matches = [match for match in map(_NAME.fullmatch, names) if match]
        return sorted(_Save(int(m[1]), int(m[2]), m[3] is not None, self._folder / m[0]) for m in matches)

    def _newest(self, which: Which) -> _Save | None:
        return next((save for save in reversed(self._saves()) if save.best or which == "last"), None)

    def _sweep(self) -> None:
        """Remove the saves that are neither last nor best, and what killed processes left.

        A removal that is cut short does no harm: what is removed is never the newest of its kind.
        """
        if jax.process_index() != 0 or not self._folder.is_dir():
            return
        keep = {save.path for save in (self._newest("last"), self._newest("best")) if save is not None}
        for path in self._folder.iterdir():
            if _NAME.match(path.name) and path not in keep:
                shutil.rmtree(path, ignore_errors=True)


def _read(path: Path, abstract_state: PyTree) -> tuple[PyTree, dict[str, Any]]:
    wanted = {name: _abstract(leaf) for name, leaf in _named_leaves(abstract_state).items()}
    with _damage_in_one_line(path), _quiet():
        about = ocp.metadata(path)
        saved = dict(about.metadata)
        extra = about.custom_metadata["extra"]
    _require_same(path, saved, wanted)
    with _damage_in_one_line(path), _quiet():
        leaves = ocp.load(path, wanted)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[name] for name in wanted]), extra


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, such as `params/stem/kernel`.

    States are saved in this form: containers without arrays (of optimizers, mostly) cannot then keep a state of the
    same arrays from being restored, and every difference has a name.
    """
    pairs = jax.tree_util.tree_flatten_with_path(tree)[0]
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError("two leaves of the state have the same path; use no '/' in its keys.")
    return leaves


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _require_same(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in [*wanted, *saved]:
        there, here = _kind(saved.get(name)), _kind(wanted.get(name))
        if there != here:
            raise RunFolderError(
                f"{path} is of another model or other options: {name} is {there} there and {here} here; give the "
                "options of that run, or another --workdir."
            )


def _kind(leaf: Any) -> str:
    return "absent" if leaf is None else f"{leaf.dtype} {tuple(leaf.shape)}"


@contextlib.contextmanager
def _damage_in_one_line(path: Path) -> Iterator[None]:
    # Orbax and TensorStore raise errors of many types for files that are missing or cut off.
    try:
        yield
    except Exception as error:
        raise RunFolderError(
            f"the checkpoint {path} is damaged ({_first_line(error)}); remove it, or give another --workdir."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what orbax tells its developers off the terminal; what matters is raised."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
