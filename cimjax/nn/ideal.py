"""The same network with ideal ADCs: the first stage of training in two."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from cimjax.nn.layers import ArrayLayer


def ideal_adcs() -> contextlib.AbstractContextManager[None]:
    """Inside, every array layer computes as with `adc=None`, on the parameters that it has.

    The steps of its ADCs get gradients of 0. For calls of `apply`, while they are traced; not for `init`.

    >>> with ideal_adcs():
    ...     y = model.apply(variables, x)  # doctest: +SKIP
    """
    return nn.intercept_methods(_without_adc)


def _without_adc(method: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any], context: Any) -> Any:
    if isinstance(context.module, ArrayLayer) and context.method_name == ArrayLayer.through_arrays.__name__:
        keywords = keywords | {"spec": dataclasses.replace(keywords["spec"], adc=None)}
    return method(*arguments, **keywords)
