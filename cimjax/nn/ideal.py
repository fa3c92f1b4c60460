"""The same network with ideal ADCs: the first stage of training in two."""

from __future__ import annotations

import contextlib
import dataclasses

import jax

from cimjax.spec import CIMSpec

# A context of JAX is a part of what every trace depends on: no compiled layer is taken for one of the other kind.
_ideal = jax.make_user_context(False)


def ideal_adcs() -> contextlib.AbstractContextManager[None]:
    """Inside, every array layer computes as with `adc=None`, on the parameters that it has.

    The steps of its ADCs get gradients of 0. For calls of `apply`, while they are traced; not for `init`.

    >>> with ideal_adcs():
    ...     y = model.apply(variables, x)  # doctest: +SKIP
    """
    return _ideal(True)


def as_asked(spec: CIMSpec) -> CIMSpec:
    """What a layer of a specification computes now: inside `ideal_adcs` without its ADCs."""
    return dataclasses.replace(spec, adc=None) if _ideal.value else spec
