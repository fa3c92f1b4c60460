"""What is saved beside the arrays of a state, so that damage to any of it is found: checksums, and one over them.

    {"extra": ..., "step": ..., "options": ..., "leaves": {name: [kind, SHA-256 of the bytes]}, "seal": SHA-256}

`extra` is the caller's, `options` are those of the run that decide what it computes. Saves of older versions have
`extra` alone.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils


class Content(NamedTuple):
    """What was found beside a state; `digests` is None where an older version has saved none."""

    extra: dict[str, Any]
    options: dict[str, Any] | None
    digests: dict[str, str] | None

    def verify(self, leaves: dict[str, Any]) -> None:
        """Compare the arrays that were read with those that were saved.

        Raises:
          ValueError: names the first one that differs.
        """
        for name, digest in (self.digests or {}).items():
            if _digest_of(leaves[name]) != digest:
                raise ValueError(f"{name} is not what was saved")


def sealed(step: int, leaves: dict[str, Any], extra: dict[str, Any], options: dict[str, Any] | None) -> dict[str, Any]:
    """What to save beside a state."""
    named = {name: [kind(leaf), _digest_of(leaf)] for name, leaf in leaves.items()}
    # As JSON gives it back.
    content = json.loads(json.dumps({"extra": extra, "step": step, "options": options, "leaves": named}))
    return {**content, "seal": seal_of(content)}


def verified(found: Any, step: int, stored: dict[str, str]) -> Content:
    """Take apart what was saved beside a state.

    Args:
      found: what stands there now.
      step: the step by the name of the save.
      stored: the kinds of the arrays that stand there now, by name.

    Raises:
      ValueError: where any of it is not what was saved.
    """
    if not isinstance(found, dict):
        raise ValueError("nothing is saved beside its arrays")
    if found.keys() == {"extra"} and isinstance(found["extra"], dict):
        return Content(found["extra"], None, None)
    content = {name: value for name, value in found.items() if name != "seal"}
    if found.get("seal") != seal_of(content):
        raise ValueError("what is saved beside its arrays was changed")
    if content["step"] != step:
        raise ValueError(f"it was saved after step {content['step']}")
    if {name: of for name, (of, _) in content["leaves"].items()} != stored:
        raise ValueError("its arrays have other names, shapes or dtypes than were saved")
    return Content(content["extra"], content["options"], {name: of[1] for name, of in content["leaves"].items()})


def kind(leaf: Any) -> str:
    """The dtype and the shape of an array, in one word for messages."""
    return f"{leaf.dtype} {tuple(leaf.shape)}"


def seal_of(content: dict[str, Any]) -> str:
    """The checksum over all of a JSON-able dictionary."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest_of(leaf: Any) -> str:
    """Of the bytes of a whole array, wherever its parts are."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = leaf.addressable_data(0) if leaf.is_fully_replicated else multihost_utils.process_allgather(leaf, True)
    return hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
