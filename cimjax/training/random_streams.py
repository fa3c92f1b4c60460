"""The random numbers of a run: a stream of keys for each purpose, so that no two purposes share a key.

Within a stream a key is a function of the run's seed and of what it counts, such as optimizer steps.
"""

from __future__ import annotations

import enum

import jax
from jax import Array


@enum.unique
class Stream(enum.IntEnum):
    """What random numbers are drawn for; a value is part of what a seed means, and is not given anew.

    What each counts is in parentheses.
    """

    # First weights, and dropout while they are made and steps are set.
    WEIGHTS = 0
    FIRST_DROPOUT = 11
    # The cells of the run's own chip; those of chips drawn in training (step), and of chips to evaluate on (chip).
    CHIP = 1
    CHIP_OF_STEP = 2
    OTHER_CHIP = 3
    # Training images: their order (epoch), how each is augmented (step; split over the batch), how they mix (step).
    ORDER = 4
    AUGMENTATION = 5
    MIXUP = 6
    # Images from which steps are set, and on which sensitivities are measured.
    CALIBRATION = 7
    SENSITIVITY = 8
    # Dropout, and what else a network draws in training (step, part of the batch).
    DROPOUT = 9
    NETWORK = 10


def stream_key(seed: int | Array, stream: Stream, *counted: int | Array) -> Array:
    """The key of a stream where it has counted so far; streams that count are not used without.

    Args:
      seed: the run's, `TrainState.seed`.
    """
    key = jax.random.fold_in(jax.random.key(seed), stream)
    for number in counted:
        key = jax.random.fold_in(key, number)
    return key


def chip_key(seed: int | Array) -> Array:
    """The random key of a run's chip: with `variation`, the same cells wherever the run is trained or looked at.

    Args:
      seed: the run's, `TrainState.seed`.
    """
    return stream_key(seed, Stream.CHIP)
