"""Starting from weights: what a network takes from another, what is calibrated, and what is new."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.nn.parameters import kind_of_step, trained_as
from cimjax.spec import CIMSpec, StartRule


class Given(NamedTuple):
    """Values for a network, by path ("params/conv1/kernel").

    values: weights, biases, statistics.
    steps: stored steps and offsets, which take the place of calibrated ones.
    """

    values: dict[str, Array]
    steps: dict[str, Array]

    @property
    def kept(self) -> set[tuple[str, str]]:
        """Whose steps need not be set: (layer, kind), as `calibrate` takes them."""
        return {(_layer(path), trained_as(path)) for path in self.steps}


def choose(
    given: Mapping[str, Any], wanted: Mapping[str, Any], takes_step: Callable[[str], bool] = lambda path: True
) -> tuple[Given, dict[str, str]]:
    """What of some variables fits a network.

    Args:
      given: variables of another network, {"params": ..., ...}; of full precision, or of arrays.
      wanted: those of this network, or their shapes.
      takes_step: whether a stored step ("params/conv1/weight_log_step") is taken over; otherwise it is calibrated.

    Returns:
      What is taken, and lines to show: how much was taken, is calibrated, is new, and was left over.

    Raises:
      ValueError: where nothing fits.
    """
    there, here = (flax.traverse_util.flatten_dict(dict(tree), sep="/") for tree in (given, wanted))
    fitting = {path: jnp.asarray(value) for path, value in there.items() if path in here}
    fitting = {path: value for path, value in fitting.items() if value.shape == here[path].shape}
    steps = {path: value for path, value in fitting.items() if kind_of_step(path) and takes_step(path)}
    values = {path: value for path, value in fitting.items() if not kind_of_step(path)}
    if not values:
        raise ValueError(f"nothing of the given variables fits: they have {_some(there)}, the network {_some(here)}.")
    missing = [path for path in here if path not in values and path not in steps]
    facts = {
        "taken": f"{len(values) + len(steps)} of {len(here)} tensors, {sum(map(np.size, values.values())):,} numbers",
        "calibrated": _some([path for path in missing if kind_of_step(path)]),
        "new": _some([path for path in missing if not kind_of_step(path)]),
        "left over": _some([path for path in there if path not in values and path not in steps]),
    }
    return Given(values, steps), facts


def fits(there: Mapping[str, CIMSpec], here: Mapping[str, CIMSpec]) -> Callable[[str], bool]:
    """Whether a stored step of one network means the same in another: what it quantizes is built alike in both.

    Args:
      there, here: the specifications of all array layers by path; of the network that steps are of, and of the other.
    """

    def built(spec: CIMSpec, kind: str | None) -> Any:
        if kind == "activation":
            return dataclasses.replace(spec.activation, start=StartRule.MAGNITUDE, gradient_factor=1.0)
        weight = dataclasses.replace(spec.weight, start=StartRule.MAGNITUDE, gradient_factor=1.0)
        return (weight, spec.array) if kind == "weight" else spec

    def takes(path: str) -> bool:
        layer, kind = _layer(path), kind_of_step(path)
        if layer in here and layer in there:
            return bool(built(here[layer], kind) == built(there[layer], kind))
        # A tensor that several layers read is quantized by itself, as all their inputs are.
        inputs = [{built(spec, "activation") for spec in specs.values()} for specs in (there, here)]
        return layer not in here and inputs[0] == inputs[1]

    return takes


def put_in(variables: Mapping[str, Any], values: Mapping[str, Array]) -> dict[str, Any]:
    """Variables with some values replaced; dtypes stay."""
    flat = flax.traverse_util.flatten_dict(dict(variables), sep="/")
    flat |= {path: value.astype(flat[path].dtype) for path, value in values.items()}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _layer(path: str) -> str:
    return path.partition("/")[2].rpartition("/")[0]


def _some(paths: Any) -> str:
    names = [path.removeprefix("params/") for path in paths]
    return f"{len(names)}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "none"
