"""What a run carries from step to step, and what a step learns from."""

from __future__ import annotations

from typing import Any

import flax.struct
from jax import Array


class TrainState(flax.struct.PyTreeNode):
    """Everything that a step changes, and that a checkpoint holds.

    seed: () int32, of all randomness; an argument, so that programs are the same for every seed.
    step: () int32, optimizer steps done.
    failed_at: () int32, the step whose loss or gradient was not finite, -1 while there is none; from then on the state
      no longer changes, so that the failure can be looked at.
    params, opt_state: the network's and the optimizer's.
    collections: all others of the network, such as `batch_stats`, by name.
    average: the running average of `params`; None without one.
    first_steps: the stored steps and offsets as calibrated, by path.
    """

    seed: Array
    step: Array
    failed_at: Array
    params: Any
    collections: Any
    opt_state: Any
    average: Any
    first_steps: dict[str, Array]

    @property
    def variables(self) -> dict[str, Any]:
        """What the network is applied with."""
        return {"params": self.params, **self.collections}


class Batch(flax.struct.PyTreeNode):
    """What a step learns from.

    images: (N, H, W, C) float32, of zero mean and unit variance per channel.
    labels: (N,) int32.
    targets: (N, classes) float32, probabilities: labels, smoothed and mixed if so configured.
    """

    images: Array
    labels: Array
    targets: Array
