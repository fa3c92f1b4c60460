"""Setting steps from data: one pass through a network, each layer on what the calibrated layers before it give.

How a layer's steps follow from its kernel and its input is in `cimjax.core.calibration`; here is the order, the sign by
which layers know that they are being calibrated, and what is said of data from which no good steps follow. The sign is
a context of JAX, a part of what every trace depends on; what layers say goes where their steps go. Unlike a collection
of its own, neither can be lost in a lifted transform.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from cimjax.core.calibration.report import CalibrationReport
from cimjax.core.calibration.steps import KINDS
from cimjax.spec.base import shown

# What a layer leaves among its parameters while a network is calibrated: a `CalibrationReport`.
_RECORD = "calibration_record"
# The parameters by which layers with steps are found: of an array layer, and the only one of a `Quantize`.
_OF_ARRAYS, _OF_QUANTIZE = "weight_log_step", "log_step"
# The name under which a scope counts its passes, beside its random numbers.
_PASSES = "cimjax_passes"


class _Request(NamedTuple):
    """What layers shall do.

    kinds: of steps, to set.
    record: whether to leave a report among the parameters.
    """

    kinds: tuple[str, ...]
    record: bool


# None: `init` sets all kinds and says at once what is wrong; `apply` sets none.
_requested = jax.make_user_context(None)


class CalibrationWarning(UserWarning):
    """Steps were set from data from which no good steps follow."""


def calibrate(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, kinds: Collection[str] = KINDS, **kwargs: Any
) -> dict[str, Any]:
    """Set a network's steps from data, layer by layer in network order, every ADC on before the next layer is measured.

    The only place that sets steps from data: `init` calls the same code on its input. It draws nothing at random, and
    can be traced. A layer that is called several times gets the mean of what each call would set (of logarithms, and of
    the middles of ladders), in lifted transforms too.

    Args:
      model: any Flax module that contains cimjax layers.
      variables: what `model.init` returned, or a trained network's; not changed.
      *args, **kwargs: what `model.apply` takes after the variables: the images, and switches such as `train=True` for
        batch normalisation in batch mode.
      kinds: which steps to set, of "activation", "weight" and "psum" (which includes offsets).

    Returns:
      Variables with new steps; everything else, batch statistics too, as it was.

    Raises:
      ValueError: for an unknown kind, or a layer that iterations of a loop share (see `refuse_unknown`).

    Warns:
      CalibrationWarning: for each layer whose steps cannot be good: much of the input lost, an input that is the same
        everywhere, ADC steps or weights of which nothing was seen; or whose steps were not set at all.
    """
    variables, reports = calibrate_and_report(model, variables, *args, kinds=kinds, **kwargs)
    for name, report in reports.items():
        tell(name, report)
    return variables


def calibrate_and_report(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, kinds: Collection[str] = KINDS, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, CalibrationReport]]:
    """As `calibrate`, which says nothing but returns what there is to say, by layer: for traced programs."""
    if isinstance(kinds, str) or not kinds or any(kind not in KINDS for kind in kinds):
        unknown = kinds if isinstance(kinds, str) else next((kind for kind in kinds if kind not in KINDS), kinds)
        raise ValueError(f"`kinds` names {shown(unknown)}; give a tuple of {', '.join(KINDS)}.")
    given: Any = {**variables, "params": _with_records(variables.get("params", {}))}
    with _requested(_Request(tuple(kinds), record=True)):
        _, updated = model.apply(given, *args, mutable=list(given), **kwargs)
    params, reports = _without_records(updated["params"])
    return {**variables, "params": params}, reports


def init_and_report(
    model: nn.Module, rngs: Any, *args: Any, **kwargs: Any
) -> tuple[dict[str, Any], dict[str, CalibrationReport]]:
    """As `model.init`, which says nothing but returns what there is to say, by layer: for traced programs."""
    # As they are inside `without_calibration`.
    kinds = KINDS if _requested.value is None else _requested.value.kinds
    with _requested(_Request(kinds, record=bool(kinds))):
        variables = model.init(rngs, *args, **kwargs)
    params, reports = _without_records(variables.get("params", {}))
    return {**variables, "params": params}, reports


def without_calibration() -> contextlib.AbstractContextManager[None]:
    """Inside, `init` leaves steps at 1: quick, where only shapes are wanted, or where steps are set later.

    >>> with without_calibration():
    ...     variables = model.init(jax.random.key(0), x)  # doctest: +SKIP
    """
    return _requested(_Request((), record=False))


def kinds_to_set(module: nn.Module) -> tuple[str, ...]:
    """Which kinds of steps a layer shall set from its input now: what `calibrate` asks for, or else all in `init`.

    None where its parameters cannot be changed, as inside `nn.while_loop`: what is set nowhere else is reported.
    """
    if module.scope is None or not module.is_mutable_collection("params"):
        return ()
    requested: _Request | None = _requested.value
    if requested is not None:
        return requested.kinds
    return KINDS if module.is_initializing() else ()


def set_steps(module: nn.Module, values: Mapping[str, Any], report: CalibrationReport, *, first: bool) -> None:
    """Store a layer's steps, from its second call on the mean of what all calls give; and what is to be said of them.

    Args:
      values: by parameter name; None is left out.
      report: of this call.
      first: whether the layer had no steps before this call.
    """
    given = {name: value for name, value in values.items() if value is not None}
    given, report = _of_all_copies(module, given, report)
    requested: _Request | None = _requested.value
    records = requested is not None and requested.record
    record = _record(module) if records else None
    calls = _passes_before(module, first) if record is None else jnp.max(record.calls)
    for name, value in given.items():
        before: Any = module.get_variable("params", name)
        mean = before + (value - before) / (calls + 1)
        module.put_variable("params", name, jnp.where(calls == 0, value, mean))
    if record is None:
        tell(name_of(module), report)
    else:
        module.put_variable("params", _RECORD, record.joined(report))


def refuse_unknown(module: nn.Module, x: Any) -> None:
    """Refuse to set steps where an input is not known before its parameters: inside a loop whose iterations share the
    layer's parameters, as recurrent cells do, and in Flax's `lazy_init`.

    Raises:
      ValueError: naming the layer, and how to set its steps.
    """
    # Flax asks what is the same in all iterations by tracing the body with all else unknown.
    assert module.scope is not None
    if type(x).__name__ != "JaxprTracer" or any(isinstance(value, type(x)) for value in jax.tree.leaves(_own(module))):
        return
    if not any("scan(" in part for part in module.scope.debug_path):
        raise ValueError(
            f"`{name_of(module)}` sets its steps from data, which lazy_init has not: call it inside "
            "cimjax.without_calibration(), then cimjax.calibrate(model, variables, data)."
        )
    raise ValueError(
        f"`{name_of(module)}` is shared by the iterations of a loop (nn.RNN, or nn.scan with variable_broadcast), "
        "inside which no steps can be set from data: initialise the network inside cimjax.without_calibration(), "
        "then calibrate the body by itself on the input of one iteration, and put its parameters in their place."
    )


def tell(name: str, report: CalibrationReport) -> None:
    """Warn of what a report says of a layer, now or, in a traced program, when it runs: of each matter once."""
    if any(isinstance(value, jax.core.Tracer) for value in report):
        jax.debug.callback(functools.partial(_warn, name, set()), report)
    else:
        _warn(name, set(), report)


def messages(reports: Mapping[str, CalibrationReport]) -> Iterable[tuple[str, str]]:
    """A layer's name and a line for each thing that is wrong, of reports that are no longer traced."""
    for name, report in reports.items():
        for _, message in report.messages(name):
            yield name, message


def _warn(name: str, said: set[str], report: CalibrationReport) -> None:
    for matter, message in report.messages(name):
        if matter not in said:
            said.add(matter)
            warnings.warn(message, CalibrationWarning, stacklevel=level_of_caller())


def level_of_caller() -> int:
    """How far up the stack the user's own line is, as `warnings.warn` counts for its caller."""
    ours = tuple(str(Path(package.__file__).parent) for package in (sys.modules["cimjax"], flax, jax))  # type: ignore[arg-type]
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*ours, contextlib.__file__)):
        level, frame = level + 1, frame.f_back
    return level


def name_of(module: nn.Module) -> str:
    """A layer's path in its network; its class where it is the network."""
    return "/".join(module.path) or type(module).__name__


def _record(module: nn.Module) -> CalibrationReport:
    """What is known of a layer before this call; the shape of its entries is that of one of its parameters."""
    if module.has_variable("params", _RECORD):
        record: CalibrationReport = module.get_variable("params", _RECORD)
        return record
    like = module.get_variable("params", _OF_ARRAYS) if module.has_variable("params", _OF_ARRAYS) else jnp.zeros(())
    return CalibrationReport.nothing(like)


def _passes_before(module: nn.Module, first: bool) -> int:
    """How often a layer set its steps before, in this `init`."""
    assert module.scope is not None
    # Counted where Flax counts random numbers: in lifted transforms, and in their compiled programs, that stays right.
    counts: dict[str, Any] = module.scope.rng_counters
    before: int = 0 if first else counts.get(_PASSES, 0)
    counts[_PASSES] = before + 1
    return before


def _of_all_copies(module: nn.Module, steps: Any, report: CalibrationReport) -> tuple[Any, CalibrationReport]:
    """Steps and report of a layer that `nn.vmap` copies: where the copies share parameters, of all of them together."""
    assert module.scope is not None
    if not any("vmap(" in part for part in module.scope.debug_path):
        return steps, report
    return _together(steps, report, _own(module))


def _own(module: nn.Module) -> list[Any]:
    """What copies of a layer with parameters of their own differ in.

    In `init` that is the random key alone: steps are made of nothing that differs.
    """
    assert module.scope is not None
    keys = module.scope.rngs.get("params")
    return [module.variables.get("params", {}), *([] if keys is None else [keys.as_jax_rng()])]


@jax.custom_batching.custom_vmap
def _together(steps: Any, report: CalibrationReport, own: Any) -> tuple[Any, CalibrationReport]:
    del own
    return steps, report


@_together.def_vmap
def _together_rule(size: int, batched: Any, steps: Any, report: CalibrationReport, own: Any) -> tuple[Any, Any]:
    del size
    *of_results, of_own = batched
    if not any(jax.tree.leaves(of_own)):
        steps, report = _joined_over(jnp.mean, steps, of_results[0]), _joined_over(jnp.max, report, of_results[1])
        of_results = jax.tree.map(lambda _: False, of_results)
    return _together(steps, report, own), tuple(of_results)


def _joined_over(join: Callable[..., Array], values: Any, batched: Any) -> Any:
    return jax.tree.map(lambda value, is_batched: join(value, axis=0) if is_batched else value, values, batched)


def _with_records(params: Any) -> Any:
    """Parameters with room for a report in every layer that has steps."""
    if not isinstance(params, Mapping):
        return params
    room = {name: _with_records(value) for name, value in params.items()}
    if _OF_ARRAYS in params or set(params) == {_OF_QUANTIZE}:
        room[_RECORD] = CalibrationReport.nothing(params.get(_OF_ARRAYS, params.get(_OF_QUANTIZE)))
    return room


def _without_records(params: Any) -> tuple[Any, dict[str, CalibrationReport]]:
    """Parameters as they were, and the reports of all layers by path: of those of a stack the worst."""
    reports: dict[str, CalibrationReport] = {}

    def visit(params: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(params, Mapping):
            return params
        if _RECORD in params:
            reports["/".join(path)] = params[_RECORD].worst()
        return {name: visit(value, (*path, name)) for name, value in params.items() if name != _RECORD}

    return visit(params, ()), reports
