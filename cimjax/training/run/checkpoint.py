"""Saving and restoring a training state; the only file of the project that imports orbax.

Every save is a folder of its own, `checkpoints/<number>_step_<step>[_best]` in the run folder. Orbax writes it under
another name and renames it when it is complete, so that a process may be killed at any moment: the highest number is
the last state, the highest number that is marked is the best one. The last few and the best are kept, all others are
removed afterwards. Which states are worth keeping, and what is in them, is decided elsewhere.

Of several processes all save and restore, on one file system; what there is is told by process 0, which alone removes.

Within the save, `cimjax.training.run.seal` keeps what must be found again when it is read: a save that was damaged
since is never taken for a whole one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from cimjax.training.processes.group import group
from cimjax.training.run import seal
from cimjax.training.run.files import RunFolderError, first_line, warn
from cimjax.training.run.folder import CHECKPOINTS, CONFIG, SAVE_NAME, read_config
from cimjax.training.run.options import MAY_CHANGE, differences, in_a_line, those_in

PyTree = Any
Which = Literal["last", "best"]

# What the loop keeps beside a state: the best accuracy so far, and the metrics of the epoch so far.
BESIDE: dict[str, type] = {"best": float, "seen": dict}
# What orbax calls a save that is not complete.
_UNFINISHED = re.compile(SAVE_NAME.pattern + r"\.orbax-checkpoint-tmp(-\d+)?")


class DamagedCheckpointError(RunFolderError):
    """A save that cannot be read whole, or is not what was saved."""


class _Save(NamedTuple):
    """One complete save; a later save has a greater number, whatever its step is."""

    number: int
    step: int
    best: bool
    path: Path


class Checkpoints:
    """The last states of a run, and the best.

    Nothing is written or removed before the first save, so that a run can be read while another process trains it.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        """Nothing is read yet.

        Args:
          folder: the run folder; the checkpoints are in its folder `checkpoints`.
          keep: how many of the last states are kept, at least 1. With one alone, nothing takes the place of a damaged
            one.
        """
        self._run = Path(folder).absolute()
        self._folder = self._run / CHECKPOINTS
        self._keep, self._number = keep, 0
        # The save that is being written in the background, by one thread at a time.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cimjax-save")
        self._writing: tuple[_Save, Future[None]] | None = None

    def save(self, step: int, state: PyTree, extra: dict[str, Any], *, best: bool = False) -> None:
        """Save a state as the last one, and then remove what it replaces; all is done when this returns.

        Arguments and errors as of `save_in_background`.
        """
        self.save_in_background(step, state, extra, best=best)
        self.wait()

    def save_in_background(self, step: int, state: PyTree, extra: dict[str, Any], *, best: bool = False) -> None:
        """Save a state as the last one, and then remove what it replaces, while the caller goes on.

        When this returns, the state was copied and may be given up. It is on the disk when `wait` returns; until then
        a process that is killed leaves the states before it. A save waits for the one before it.

        Args:
          step: training steps done, >= 0; need not grow from save to save.
          state: arrays in any pytree, at least one, none of size zero; no typed random keys.
          extra: a JSON-able dictionary that is saved with the state, both or neither.
          best: the state is the best one, too.

        Raises:
          RunFolderError: where it, or the one before it, cannot be written (a full disk); the saves before it stay.
          ValueError: for a negative step.
        """
        if step < 0:
            raise ValueError(f"`step` is {step}; give the number of training steps done, at least 0.")
        self.wait()
        if not self._number:
            self._sweep()  # what killed processes left may have the name of what is written now
        # The count in memory: no number is given twice, whatever was removed meanwhile.
        self._number = max([self._number, *(save.number for save in self._saves())]) + 1
        path = self._folder / f"{self._number:06d}_step_{int(step)}{'_best' if best else ''}"
        leaves = named_leaves(state)
        sealed = seal.sealed(int(step), leaves, extra, self._options())
        with self._writing_in_one_line(path), _quiet():
            response = ocp.save_async(path, leaves, custom_metadata=sealed)
        save = _Save(self._number, int(step), best, path)
        self._writing = save, self._thread.submit(self._complete, path, response)

    def wait(self) -> None:
        """Wait until the save in the background, if there is one, is on the disk.

        Raises:
          RunFolderError: where it cannot be written; said once.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing[1].result()

    def latest_step(self) -> int | None:
        """The step of the last state; None before the first save."""
        last = self._newest("last")
        return None if last is None else last.step

    def steps(self) -> list[int]:
        """The steps of all states that there are, in order."""
        return sorted({save.step for save in self._saves()})

    def has(self, which: Which) -> bool:
        """Whether there is such a state, whole or not."""
        return self._newest(which) is not None

    def restore(
        self,
        abstract_state: PyTree,
        *,
        which: Which = "last",
        step: int | None = None,
        holding: Mapping[str, type] | None = None,
        passes_over: Callable[[str], bool] = lambda name: False,
    ) -> tuple[PyTree, dict[str, Any]]:
        """Restore a state exactly, on whatever devices `abstract_state` names.

        In the place of a damaged last state comes the latest one that is whole: what follows from it is the same. A
        `RunFolderWarning` names both. Nothing takes the place of the best.

        Args:
          abstract_state: the pytree of the state, with arrays or `jax.ShapeDtypeStruct`s as leaves. An array is
            restored to the devices of its leaf, or to one device where the leaf has no sharding.
          which: `"last"` or `"best"`.
          step: training steps done, of the state that is wanted; None for any.
          holding: entries that the dictionary beside the state must have, and their types.
          passes_over: whether a leaf, by its name, may be in the save and is not wanted.

        Returns:
          The state, of the structure of `abstract_state`, and the dictionary that was saved with it.

        Raises:
          RunFolderError (a ValueError): where there is no such state, where it is damaged, where the name, the shape or
            the dtype of a leaf differs (then the first one is named), and where `config.json` has other options.
        """
        self.wait()
        damaged: dict[_Save, DamagedCheckpointError] = {}
        while (save := next((save for save in self._candidates(which, step) if save not in damaged), None)) is not None:
            try:
                state, extra = self._read(save, abstract_state, holding or {}, passes_over)
            except DamagedCheckpointError as error:
                damaged[save] = error
                continue
            for before, reason in damaged.items():
                if before in self._kept():  # else the process that trains here has replaced it meanwhile
                    warn(f"{reason}; {save.path.name} takes its place, which was saved after step {save.step}.")
            return state, extra
        for save, reason in damaged.items():
            if save in self._kept():
                other = "take the last state instead, or " if set(self._saves()) - {*damaged} else ""
                raise RunFolderError(f"{reason}; {other}train anew in another --workdir.") from reason
        other = "take the last state instead" if self.has("last") else "train first"
        raise RunFolderError(f"{self._folder} has no {which} checkpoint; {other}, or give another --workdir.")

    def beside(self, which: Which = "last") -> dict[str, Any]:
        """What was saved beside a state, without a look at its arrays; empty where no save tells."""
        for save in self._candidates(which):
            with contextlib.suppress(DamagedCheckpointError):  # said where the state is restored
                return self._about(save)[1].extra
        return {}

    def _complete(self, path: Path, response: Any) -> None:
        """Wait for what is being written, and remove what it replaces."""
        with self._writing_in_one_line(path), _quiet_loggers():
            response.result()
        self._sweep()

    @contextlib.contextmanager
    def _writing_in_one_line(self, path: Path) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._sweep()
            raise RunFolderError(
                f"cannot save {path}: {_what_happened(error)}; the checkpoint before it stays."
            ) from error

    def _saves(self) -> list[_Save]:
        """The complete saves, oldest first, the same on all processes: one may not yet see what another has written."""
        here = ""
        if group().first and self._folder.is_dir():
            here = "/".join(os.listdir(self._folder))
        return self._saves_in(group().of_first("the checkpoints", here).split("/"))

    def _saves_in(self, names: list[str]) -> list[_Save]:
        matches = [match for match in map(SAVE_NAME.fullmatch, names) if match]
        return sorted(_Save(int(m[1]), int(m[2]), m[3] is not None, self._folder / m[0]) for m in matches)

    def _newest(self, which: Which) -> _Save | None:
        if self._writing and (which == "last" or self._writing[0].best):
            return self._writing[0]
        return next(iter(self._candidates(which)), None)

    def _candidates(self, which: Which, step: int | None = None) -> list[_Save]:
        """The saves that may be taken, the first of them first."""
        saves = [save for save in self._saves()[::-1] if step in (None, save.step)]
        return saves if which == "last" else [save for save in saves if save.best][:1]

    def _kept(self) -> set[_Save]:
        return self._kept_of(self._saves())

    def _kept_of(self, saves: list[_Save]) -> set[_Save]:
        return {*saves[-self._keep :], *[save for save in saves if save.best][-1:]}

    def _sweep(self) -> None:
        """Remove the saves that are replaced, and what killed processes left; nothing that has another name.

        A removal that is cut short does no harm: what is removed is never the newest of its kind.
        """
        if not group().first or not self._folder.is_dir():
            return
        kept = {save.path for save in self._kept_of(self._saves_in(os.listdir(self._folder)))}
        for path in self._folder.iterdir():
            if (SAVE_NAME.fullmatch(path.name) and path not in kept) or _UNFINISHED.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

    def _options(self) -> dict[str, Any] | None:
        """The options of the run, without those that may change; None where the folder has none."""
        with contextlib.suppress(RunFolderError):
            return {name: value for name, value in read_config(self._run).items() if name not in MAY_CHANGE}
        return None

    def _about(self, save: _Save) -> tuple[Mapping[str, Any], seal.Content]:
        """What tells of the arrays of a save, and what is beside them."""
        with _damage_in_one_line(save.path):
            about = ocp.metadata(save.path)
            if not isinstance(about.metadata, Mapping):
                raise ValueError("what tells of its arrays is missing")
            stored = {name: seal.kind(leaf) for name, leaf in about.metadata.items()}
            return about.metadata, seal.verified(about.custom_metadata, save.step, stored)

    def _read(
        self, save: _Save, abstract_state: PyTree, holding: Mapping[str, type], passes_over: Callable[[str], bool]
    ) -> tuple[PyTree, dict[str, Any]]:
        wanted = {name: _abstract(leaf) for name, leaf in named_leaves(abstract_state).items()}
        about, content = self._about(save)
        stored = {name: seal.kind(leaf) for name, leaf in about.items()}
        with _damage_in_one_line(save.path):
            for name, kind in holding.items():
                if not isinstance(content.extra.get(name), kind):
                    raise ValueError(f"it holds no `{name}` of type {kind.__name__}")
        passed_over = {*filter(passes_over, stored)}
        compared = {name: of for name, of in stored.items() if name not in passed_over}
        _require_same(save.path, compared, {name: seal.kind(leaf) for name, leaf in wanted.items()})
        self._require_same_options(save.path, content.options)
        with _damage_in_one_line(save.path):
            # Not to the devices that they were saved from, which may not be here.
            passed = {name: jax.ShapeDtypeStruct(about[name].shape, about[name].dtype) for name in passed_over}
            read = wanted | {name: _abstract(leaf) for name, leaf in passed.items()}
            leaves = ocp.load(save.path, read)
            content.verify(leaves)
        if content.digests is None:
            warn(f"{save.path} was saved by an older version, without checksums: damage to it would not be found.")
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [leaves[name] for name in wanted]), content.extra

    def _require_same_options(self, path: Path, saved: dict[str, Any] | None) -> None:
        now = self._options()
        if saved is None or now is None:
            return
        found = list(differences(saved, those_in(saved, now)))
        if found:
            raise RunFolderError(
                f"{self._run / CONFIG} holds other options than {path.name} was trained with ({in_a_line(found)}); put "
                "them back, or give another --workdir."
            )


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves by path, such as `params/stem/kernel`, in the tree's order.

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


def _require_same(path: Path, saved: dict[str, str], wanted: dict[str, str]) -> None:
    for name in [*wanted, *saved]:
        there, here = saved.get(name, "absent"), wanted.get(name, "absent")
        if there != here:
            raise RunFolderError(
                f"{path} is of another model or other options: {name} is {there} there and {here} here; give the "
                "options of that run, or another --workdir."
            )


@contextlib.contextmanager
def _damage_in_one_line(path: Path) -> Iterator[None]:
    # Orbax and TensorStore raise errors of many types for files that are missing or cut off.
    hook = sys.unraisablehook
    sys.unraisablehook = functools.partial(_pass_over_late_readers, hook)
    with _quiet():
        try:
            yield
        except Exception as error:
            # Orbax reads many arrays at once: what else has failed is told when it is collected, so here, or by a
            # thread of TensorStore's whenever it ends: the hook stays.
            traceback.clear_frames(error.__traceback__)
            gc.collect()
            raise DamagedCheckpointError(f"the checkpoint {path} is damaged ({_what_happened(error)})") from error
    sys.unraisablehook = hook


def _pass_over_late_readers(otherwise: Callable[[Any], Any], unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        otherwise(unraisable)


def _what_happened(error: Exception) -> str:
    """What happened, without the specification of the array that TensorStore adds."""
    return first_line(error).partition(" [")[0].rstrip(".")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what orbax tells its developers off the terminal; what matters is raised."""
    with _quiet_loggers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _quiet_loggers() -> Iterator[None]:
    """The same without warnings, which are set for all threads at once; may be entered in several."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]

    def nothing(record: logging.LogRecord) -> bool:
        del record
        return False

    for logger in loggers:
        logger.addFilter(nothing)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(nothing)
