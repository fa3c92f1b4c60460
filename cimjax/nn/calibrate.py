"""Setting steps from data: one pass through a network, each layer on what the calibrated layers before it give.

How a layer's steps follow from its kernel and its input is in `cimjax.core.calibration`; here is the order, the sign by
which layers know that they are being calibrated, and what is said of data from which no good steps follow. The sign is
a context of JAX, a part of what every trace depends on: unlike a mutable collection it reaches into lifted transforms.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np

from cimjax.core.calibration.report import CalibrationReport
from cimjax.core.calibration.steps import KINDS

# The kinds of steps that layers set now; None: `init` sets all, `apply` none.
_requested = jax.make_user_context(None)
# The collection in which layers leave a `CalibrationReport` when it is mutable and steps are set.
REPORTS = "calibration_reports"


class CalibrationWarning(UserWarning):
    """Steps were set from data from which no good steps follow."""


def calibrate(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, kinds: Collection[str] = KINDS, **kwargs: Any
) -> dict[str, Any]:
    """Set a network's steps from data, layer by layer in network order, every ADC on before the next layer is measured.

    The only place that sets steps from data: `init` calls the same code on its input. It draws nothing at random, and
    can be traced. A layer that is called several times gets the mean of what each call would set.

    Args:
      model: any Flax module that contains cimjax layers.
      variables: what `model.init` returned, or a trained network's; not changed.
      *args, **kwargs: what `model.apply` takes after the variables: the images, and switches such as `train=True` for
        batch normalisation in batch mode.
      kinds: which steps to set, of "activation", "weight" and "psum" (which includes offsets).

    Returns:
      Variables with new steps; everything else, batch statistics too, as it was.

    Raises:
      ValueError: for an unknown kind, or a layer that iterations of a loop share (see `refuse_shared`).

    Warns:
      CalibrationWarning: for each layer whose steps cannot be good: much of the input lost, an input that is the same
        everywhere, ADC steps or weights of which nothing was seen.
    """
    variables, reports = calibrate_and_report(model, variables, *args, kinds=kinds, **kwargs)
    for path, report in reports.items():
        tell(path, report)
    return variables


def calibrate_and_report(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, kinds: Collection[str] = KINDS, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, CalibrationReport]]:
    """As `calibrate`, which says nothing but returns what there is to say, by layer: for traced programs."""
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if isinstance(kinds, str) or kind not in KINDS:
            raise ValueError(f"`kinds` names {kind!r}; give a tuple of {', '.join(KINDS)}.")
    with _requested(tuple(kinds)):
        _, updated = model.apply(variables, *args, mutable=[*variables, REPORTS], **kwargs)
    return {**variables, "params": updated["params"]}, reports_of(updated)


def reports_of(variables: Mapping[str, Any]) -> dict[str, CalibrationReport]:
    """What layers left in the collection of reports, by path."""
    flat = flax.traverse_util.flatten_dict(dict(variables.get(REPORTS, {})), sep="/")
    return {path.rpartition("/")[0]: report for path, report in flat.items()}


def without_calibration() -> contextlib.AbstractContextManager[None]:
    """Inside, `init` leaves steps at 1: quick, where only shapes are wanted, or where steps are set later.

    >>> with without_calibration():
    ...     variables = model.init(jax.random.key(0), x)  # doctest: +SKIP
    """
    return _requested(())


def kinds_to_set(module: nn.Module) -> tuple[str, ...]:
    """Which kinds of steps a layer shall set from its input now: what `calibrate` asks for, or else all in `init`."""
    requested: tuple[str, ...] | None = _requested.value
    if requested is not None:
        return requested
    return KINDS if module.scope is not None and module.is_initializing() else ()


def put_steps(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Store a layer's steps; from its second call on, the mean of what all calls give.

    Args:
      values: by parameter name; None is left out.
    """
    assert module.scope is not None
    # A scope stands for one pass of one layer, also within lifted transforms.
    calls = getattr(module.scope, "_cimjax_calls", 0) + 1
    module.scope._cimjax_calls = calls  # type: ignore[attr-defined]
    for name, value in values.items():
        if value is not None:
            if calls > 1:
                before: Any = module.get_variable("params", name)
                value = before + (value - before) / calls
            module.put_variable("params", name, value)


def refuse_shared(module: nn.Module, x: Any, parameter: Any) -> None:
    """Refuse to set steps inside a loop whose iterations share the layer's parameters, as recurrent cells do.

    Raises:
      ValueError: naming the layer, and how to set its steps.
    """
    # Flax asks what is the same in all iterations by tracing the body with all else unknown.
    unknown = type(x).__name__ == "JaxprTracer"
    if unknown and not isinstance(parameter, type(x)):
        raise ValueError(
            f"`{name_of(module)}` is shared by the iterations of a loop (nn.RNN, or nn.scan with variable_broadcast), "
            "inside which no steps can be set from data: initialise the network inside cimjax.without_calibration(), "
            "then calibrate the body by itself on the input of one iteration, and put its parameters in their place."
        )


def hand_in(module: nn.Module, report: CalibrationReport) -> None:
    """Leave a layer's report with `calibrate`; where that does not reach, and in `init`, say it at once."""
    if _requested.value is not None and module.is_mutable_collection(REPORTS):
        module.sow(REPORTS, "report", report, init_fn=lambda: report, reduce_fn=CalibrationReport.worse)
    else:
        tell(name_of(module), report)


def tell(name: str, report: CalibrationReport) -> None:
    """Warn of what a report says of a layer, now or, in a traced program, when it runs."""
    if any(isinstance(value, jax.core.Tracer) for value in report):
        jax.debug.callback(lambda report: _warn(report.messages(name)), report)
    else:
        _warn(CalibrationReport(*map(np.asarray, report)).messages(name))


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        warnings.warn(message, CalibrationWarning, stacklevel=2)


def name_of(module: nn.Module) -> str:
    """A layer's path in its network; its class where it is the network."""
    return "/".join(module.path) or type(module).__name__
