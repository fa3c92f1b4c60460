"""What a report tells of: the records of runs, and what their last states hold; read here, as plain data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from cimjax.analysis.plot import Run, read_runs
from cimjax.core.adc import psum_ranges
from cimjax.core.cells import quantize_weight
from cimjax.core.step_sizes import StepSizes
from cimjax.core.tiling import tile
from cimjax.hardware.survey import Layer
from cimjax.hardware.table import TextTable, layer_table
from cimjax.nn.parameters import steps_of_layer
from cimjax.spec import CIMSpec
from cimjax.spec.words import describe_specs
from cimjax.training.restore import restore
from cimjax.training.run.files import RunFolderError, read_json, warn
from cimjax.training.run.folder import read_config, read_records
from cimjax.training.run.options import MAY_CHANGE
from cimjax.training.run.provenance import VERSIONS


class Ladders(NamedTuple):
    """The ADCs of a layer: an entry for each step that they have.

    shared_by: what has one step, "layer", "array" or "column".
    codes: how many codes an ADC has.
    step: (n,) in units of a partial sum.
    offset: (n,) the partial sum of code 0; None where that is always 0.
    q_min, q_max: (n,) the lowest and the highest code.
    """

    shared_by: str
    codes: int
    step: np.ndarray
    offset: np.ndarray | None
    q_min: np.ndarray
    q_max: np.ndarray


class ArrayState(NamedTuple):
    """What the arrays of a layer came to: its ladders (None: ideal ADCs), and its weight codes with their counts."""

    layer: str
    ladders: Ladders | None
    weight_codes: np.ndarray
    weight_counts: np.ndarray


class Facts(NamedTuple):
    """All that is told of a run.

    config: its options by dotted name.
    starts: as `versions.json` lists them.
    result: its last record; empty for a run that has not ended.
    health: how ADCs were used when that was last looked at, by layer; `health_step`: after so many steps.
    seconds: that it trained.
    about: its network, data and specifications in a line.
    layers, states: of its network; empty where the state could not be read.
    step: of that state.
    trouble: what is wrong with its last state, if anything is.
    """

    run: Run
    config: Mapping[str, Any]
    starts: Sequence[Any]
    result: Mapping[str, Any]
    health: Mapping[str, Mapping[str, float]]
    health_step: int
    seconds: float
    about: str
    layers: TextTable = layer_table([])
    states: Sequence[ArrayState] = ()
    step: int = 0
    trouble: str = ""


class Group(NamedTuple):
    """Runs that differ in their seeds alone, by their places in the report, under one name."""

    name: str
    members: Sequence[int]


def gather(runs: Sequence[str | Path], say: Callable[[str], None]) -> list[Facts]:
    """Read runs, each once; of a run whose state cannot be read only its records, with a warning.

    Args:
      runs: run folders.
      say: is told what is being done.

    Raises:
      ValueError: in one line, where a folder holds no run, or one without a finished epoch or a result.
    """
    found = [(run, read_records(run.folder)) for run in read_runs(runs)]
    for run, records in found:
        if not run.records["test"] and not _last(records, "result"):
            raise ValueError(f"{run.folder} has no finished epoch to report; wait for its first one, or leave it out.")
    facts = []
    for run, records in found:
        say(f"reading {run.folder}")
        facts.append(_with_state(_from_records(run, records)))
    return facts


def grouped(facts: Sequence[Facts]) -> list[Group]:
    """The runs by what they differ in besides their seeds and what changes no result."""
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(facts):
        irrelevant = {"seed", *MAY_CHANGE} - {"epochs"}
        said = {name: value for name, value in one.config.items() if name.partition(".")[0] not in irrelevant}
        groups.setdefault(json.dumps(said, sort_keys=True), []).append(index)
    return [Group(_common_name([facts[index].run.label for index in group]), group) for group in groups.values()]


def _common_name(labels: Sequence[str]) -> str:
    if len(labels) == 1:
        return labels[0]
    return os.path.commonpath(labels) or f"{labels[0]} and {len(labels) - 1} more"


def _from_records(run: Run, records: Sequence[Mapping[str, Any]]) -> Facts:
    config: dict[str, Any] = read_config(run.folder)
    try:
        starts = read_json(run.folder / VERSIONS, list)
    except RunFolderError:
        starts = []
    health_step = _last(records, "health").get("step", 0)
    return Facts(
        run=run,
        config=_flat(config),
        starts=[start for start in starts if isinstance(start, dict)],
        result=_last(records, "result"),
        health={
            str(record.get("layer")): record
            for record in records
            if record.get("split") == "health" and record.get("step") == health_step
        },
        health_step=health_step,
        seconds=max((record.get("seconds") or 0 for record in records), default=0),
        about=f"{_flat(config).get('model.name', 'a network')} on {config.get('dataset', 'data')}",
    )


def _last(records: Sequence[Mapping[str, Any]], split: str) -> Mapping[str, Any]:
    return next((record for record in reversed(records) if record.get("split") == split), {})


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    return flax.traverse_util.flatten_dict(dict(options), keep_empty_nodes=False, sep=".")


def _with_state(facts: Facts) -> Facts:
    try:
        experiment, state, _ = restore(facts.run.folder)
    except ValueError as error:
        trouble = " ".join(str(error).split())
        warn(f"{trouble} The report tells of {facts.run.folder} from its records alone.")
        return facts._replace(trouble=trouble)
    params = flax.traverse_util.flatten_dict(state.params, sep="/")
    return facts._replace(
        about=f"{type(experiment.model).__name__} on {experiment.dataset.name}, "
        f"{describe_specs(list(experiment.specs.values()))}",
        layers=layer_table(experiment.layers),
        # Those that a lifted transform stacks have one entry for all their copies, in an order that nobody knows.
        states=[_array_state(layer, params) for layer in experiment.layers if layer.spec and layer.copies == 1],
        step=int(state.step),
    )


def _array_state(layer: Layer, params: Mapping[str, Any]) -> ArrayState:
    spec = layer.spec
    assert spec is not None
    tiling = tile(layer.kernel, spec)
    steps = steps_of_layer(params, layer.name, layer.kernel, spec)
    codes = np.asarray(quantize_weight(params[f"{layer.name}/kernel"], steps.weight, tiling, spec))
    stores = np.broadcast_to(tiling.stored[..., None], codes.shape)
    values, counts = np.unique(codes[stores].astype(int), return_counts=True)
    return ArrayState(layer.name, _ladders(steps, spec), values, counts)


def _ladders(steps: StepSizes, spec: CIMSpec) -> Ladders | None:
    if spec.adc is None:
        return None
    ranges, offset = psum_ranges(spec), None if steps.offset is None else np.asarray(steps.offset)
    # A fixed step is one number, also where offsets are many.
    step = np.broadcast_to(steps.psum, np.shape(steps.psum) if offset is None else offset.shape)
    # (K, 1), the same in all slices but where one of them is signed.
    q_min, q_max = (np.asarray(end)[:, 0, 0] for end in (ranges.q_min, ranges.q_max))
    q_min, q_max = q_min.min(axis=0), q_max.max(axis=0)
    if step.shape[1] == 1:
        q_min, q_max = q_min.min(keepdims=True), q_max.max(keepdims=True)
    return Ladders(
        shared_by="layer" if step.size == 1 else str(spec.adc.granularity),
        codes=spec.adc_codes,
        step=step.ravel(),
        offset=None if offset is None else offset.ravel(),
        q_min=np.broadcast_to(q_min, step.shape).ravel(),
        q_max=np.broadcast_to(q_max, step.shape).ravel(),
    )
