"""Which options of a run may differ when it goes on, and a text for every other one that does."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any

from cimjax.spec.base import shortened

# Fields of the configuration that may differ when a run goes on, each with the reason; all others must be the same.
MAY_CHANGE = {
    "epochs": "a run may be made longer: the learning rate then follows the new length from there on",
    "data_dir": "where the same images lie",
    "images_on": "where the same images lie",
    "workers": "how many processes read images, not which or in what order",
    "eval_batch_size": "how many images are evaluated at once, not which",
    "execution": "how layers are computed: no result depends on it",
    "steps_per_dispatch": "how many steps one program does: no result depends on it",
    "checkpoint_epochs": "how often a state is saved",
    "checkpoint_keep": "how many states are kept",
    "writers": "where the records go besides `metrics.jsonl`",
}

_ABSENT = object()


def differences(old: Any, new: Any, allow: Collection[str] = MAY_CHANGE, name: str = "") -> Iterator[str]:
    """A text for every option that is not the same in both and is not allowed to differ.

    Args:
      old, new: options as JSON gives them.
      allow: dotted names; `"schedule"` includes `"schedule.epochs"`.
      name: the dotted name of these options in a greater dictionary.

    >>> list(differences({"seed": 0, "adc": {"bits": 3}}, {"seed": 1, "adc": {"bits": 3}}))
    ['seed: 0 -> 1']
    """
    if name in allow:
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            dotted = f"{name}.{key}" if name else key
            yield from differences(old.get(key, _ABSENT), new.get(key, _ABSENT), allow, dotted)
    elif old != new:
        yield f"{shortened(name)}: {_text(old)} -> {_text(new)}"


def those_in(old: Any, new: Any) -> Any:
    """The options of `new` that `old` has too: a later version may have added others."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return {key: those_in(old[key], value) for key, value in new.items() if key in old}


def in_a_line(texts: list[str]) -> str:
    """The first differences, and how many more there are."""
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return ", ".join(texts[:3]) + more


def _text(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    try:
        return shortened(json.dumps(value))
    except RecursionError:
        return "what is nested too deeply"
