"""Setting steps from data: one pass through a network, each layer on what the calibrated layers before it give.

How a layer's steps follow from its kernel and its input is in `cimjax.core.start`; here is the order, and the sign by
which layers know that they are being calibrated: a mutable collection of the kind's name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import flax.linen as nn
from flax.core import DenyList

from cimjax.core.start import KINDS


def _collection(kind: str) -> str:
    return f"calibrate_{kind}"


# `init(..., mutable=NO_CALIBRATION)` leaves steps at 1: quick, where only shapes are wanted.
NO_CALIBRATION = DenyList(("intermediates", *(_collection(kind) for kind in KINDS)))


def calibrate(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, kinds: Collection[str] = KINDS, **kwargs: Any
) -> dict[str, Any]:
    """Set a network's steps from data, layer by layer in network order, every ADC on before the next layer is measured.

    The only place that sets steps from data: `init` calls the same code on its input. It draws nothing at random, and
    can be traced.

    Args:
      model: any Flax module that contains cimjax layers.
      variables: what `model.init` returned, or a trained network's; not changed.
      *args, **kwargs: what `model.apply` takes after the variables: the images, and switches such as `train=True` for
        batch normalisation in batch mode.
      kinds: which steps to set, of "activation", "weight" and "psum" (which includes offsets).

    Returns:
      Variables with new steps; everything else, batch statistics too, as it was.

    Raises:
      ValueError: for an unknown kind.
    """
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if isinstance(kinds, str) or kind not in KINDS:
            raise ValueError(f"`kinds` names {kind!r}; give a tuple of {', '.join(KINDS)}.")
    mutable = [*variables, *(_collection(kind) for kind in kinds)]
    _, updated = model.apply(variables, *args, mutable=mutable, **kwargs)
    return {**variables, "params": updated["params"]}


def kinds_to_set(module: nn.Module) -> tuple[str, ...]:
    """Which kinds of steps a layer shall set from its input now: what `calibrate` asks for, or `init`.

    `init` opens every collection, and so asks for all kinds, unless it is given `mutable=NO_CALIBRATION`.
    """
    if module.scope is None or module.scope.mutable is True:
        # `apply(..., mutable=True)` opens every collection too, but does not ask for calibration.
        return KINDS if module.is_initializing() else ()
    return tuple(kind for kind in KINDS if module.is_mutable_collection(_collection(kind)))
