"""Starting from weights: what a network takes from another, what is calibrated, and what is new."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.training.optimizer import STEP_SUFFIXES


class Given(NamedTuple):
    """Values for a network, by path ("params/conv1/kernel").

    values: weights, biases, statistics.
    steps: stored steps and offsets, which take the place of calibrated ones.
    """

    values: dict[str, Array]
    steps: dict[str, Array]


def choose(
    given: Mapping[str, Any], wanted: Mapping[str, Any], takes_steps: Callable[[str], bool] = lambda layer: True
) -> tuple[Given, dict[str, str]]:
    """What of some variables fits a network.

    Args:
      given: variables of another network, {"params": ..., ...}; of full precision, or of arrays.
      wanted: those of this network, or their shapes.
      takes_steps: whether a layer ("block1/conv1") takes steps over; otherwise these are calibrated.

    Returns:
      What is taken, and lines to show: how much was taken, is calibrated, is new, and was left over.

    Raises:
      ValueError: where nothing fits.
    """
    there, here = (flax.traverse_util.flatten_dict(dict(tree), sep="/") for tree in (given, wanted))
    fitting = {path: jnp.asarray(value) for path, value in there.items() if path in here}
    fitting = {path: value for path, value in fitting.items() if value.shape == here[path].shape}
    steps = {path: value for path, value in fitting.items() if is_step(path) and takes_steps(_layer(path))}
    values = {path: value for path, value in fitting.items() if not is_step(path)}
    if not values:
        raise ValueError(f"nothing of the given variables fits: they have {_some(there)}, the network {_some(here)}.")
    missing = [path for path in here if path not in values and path not in steps]
    facts = {
        "taken": f"{len(values) + len(steps)} of {len(here)} tensors, {sum(map(np.size, values.values())):,} numbers",
        "calibrated": _some([path for path in missing if is_step(path)]),
        "new": _some([path for path in missing if not is_step(path)]),
        "left over": _some([path for path in there if path not in values and path not in steps]),
    }
    return Given(values, steps), facts


def is_step(path: str) -> bool:
    """Whether a path ends at a stored step or offset."""
    return path.endswith(STEP_SUFFIXES)


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
