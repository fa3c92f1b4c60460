"""What of a trained network is handed on: the weight codes that its cells hold, and all other parameters as they are.

The kernels that come back are code times step. They quantize to the same codes, so that the network computes the same
numbers; how far a weight was from its code is lost, and with it the point from which training would go on.
"""

from __future__ import annotations

from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cimjax.nn.parameters import PARAMETERS, stored_steps
from cimjax.nn.weight_codes import has_codes, weight_codes, weight_steps
from cimjax.spec import CIMSpec
from cimjax.training.experiment import Experiment
from cimjax.training.run.files import RunFolderError
from cimjax.training.run.network_file import Network
from cimjax.training.state import TrainState


def to_network(experiment: Experiment, state: TrainState, extra: dict[str, Any]) -> Network:
    """What is handed on of a state.

    Args:
      extra: what was saved beside it; of that, what the network must know of the images.
    """
    specs = _coded(experiment)
    codes = {_kernel(name): array for name, array in weight_codes(state.params, specs).items()}
    arrays = jax.device_get({**flax.traverse_util.flatten_dict(state.variables, sep="/"), **codes})
    return Network(int(state.step), {"data": extra.get("data")}, jax.tree.map(np.asarray, arrays), list(codes))


def to_state(network: Network, experiment: Experiment) -> TrainState:
    """The state of a network that was handed on, without the optimizer's, averages, and steps before training.

    Raises:
      RunFolderError: where the network is another than the configuration describes.
    """
    wanted = experiment.abstract_state()
    there = flax.traverse_util.flatten_dict(wanted.variables, sep="/")
    specs = {_kernel(name): spec for name, spec in _coded(experiment).items()}
    arrays: dict[str, Any] = {**network.arrays}
    for path in [path for path in there if path not in arrays] + [path for path in arrays if path not in there]:
        raise RunFolderError(f"the packed network and its config.json differ in {path}; fetch both again.")
    for path, leaf in there.items():
        if arrays[path].shape != leaf.shape or (path in network.codes and path not in specs):
            raise RunFolderError(f"the packed {path} is not what config.json describes; fetch both again.")

    def decoded(arrays: dict[str, Array]) -> dict[str, Array]:
        def kernel(path: str) -> Array:
            log_step = arrays[path.removesuffix("kernel") + PARAMETERS.weight]
            return arrays[path] * weight_steps(log_step, arrays[path].shape, specs[path])

        found = {**arrays, **{path: kernel(path) for path in network.codes}}
        return {path: found[path].astype(leaf.dtype) for path, leaf in there.items()}

    variables = flax.traverse_util.unflatten_dict(jax.jit(decoded)(arrays), sep="/")
    params = variables.pop("params")
    return TrainState(
        seed=jnp.int32(experiment.config.seed),
        step=jnp.int32(network.step),
        failed_at=jnp.int32(-1),
        params=params,
        collections=variables,
        opt_state=None,
        average=None,
        first_steps=stored_steps(params),
    )


def _coded(experiment: Experiment) -> dict[str, CIMSpec]:
    """The layers whose weights are handed on as codes: those of `nn.scan` and `nn.vmap` lie in one kernel."""
    layers = experiment.layers
    return {x.name: x.spec for x in layers if x.spec is not None and x.copies == 1 and has_codes(x.spec)}


def _kernel(layer: str) -> str:
    return f"params/{layer}/kernel"
