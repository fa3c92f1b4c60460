"""Random numbers of a run: no key is used for two purposes."""

from __future__ import annotations

import jax
import numpy as np

from cimjax.training.random_streams import Stream, chip_key, stream_key

STEPS, BATCH = 40, 8


def test_no_two_purposes_share_a_key() -> None:
    """Of whole streams, of what they count, and of the keys into which that of a step is split."""
    used = [chip_key(3), *(stream_key(3, stream) for stream in Stream if stream != Stream.CHIP)]
    for stream in Stream:
        for number in range(STEPS):
            key = stream_key(3, stream, number)
            used += [key, stream_key(3, stream, number, 0), stream_key(3, stream, number, 1, 2)]
            if stream == Stream.AUGMENTATION:
                # `split(key, N)[i]` is `fold_in(key, i)`: what is split is not counted on.
                used = [*used[:-2], *jax.random.split(key, BATCH)]
    found = np.array([jax.random.key_data(key) for key in used])
    assert len(np.unique(found, axis=0)) == len(found)


def test_another_seed_is_another_run() -> None:
    keys = [jax.random.key_data(stream_key(seed, stream)) for seed in range(20) for stream in Stream]
    assert len(np.unique(np.array(keys), axis=0)) == len(keys)
