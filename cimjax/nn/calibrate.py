"""Setting steps from data: one pass through a network, each layer on what the calibrated layers before it give.

How a layer's steps follow from its kernel and its input is in `cimjax.core.calibration`, what is said of data from
which no good steps follow in `cimjax.nn.calibration_warnings`; here is the order. Flax's lifted transforms
(`nn.scan`, `nn.vmap`, `nn.remat`, `nn.jit` ...) pass the collections that their caller names and drop others, so
nothing here has a collection of its own: what layers shall do is a context of JAX, a part of what every trace depends
on, and what they say stands for a while among their parameters, which every transform passes and stacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import flax.errors
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp

from cimjax.core.calibration.report import CalibrationReport
from cimjax.core.calibration.steps import KINDS
from cimjax.nn.calibration_warnings import name_of, tell, tell_rules
from cimjax.nn.flax_internals import is_copied, is_of, loop_that_is_asked
from cimjax.nn.parameters import stored_steps, trained_as
from cimjax.spec.base import shown

# What a layer leaves among its parameters while a network is calibrated: a `CalibrationReport`.
_RECORD = "calibration_record"
# The parameters by which layers with steps are found: of an array layer, and the only one of a `Quantize`.
_OF_ARRAYS, _OF_QUANTIZE = "weight_log_step", "log_step"
# Where a class that `convert_network` made has the rules by which it was made.
RULES_OF_ARRAYS = "rules_of_arrays"
# The name under which a scope counts its passes, beside its random numbers.
_PASSES = "cimjax_passes"


class _Request(NamedTuple):
    """What layers shall set, and leave a report: steps of some kinds, but for those of a layer and a kind that stay."""

    kinds: tuple[str, ...]
    kept: frozenset[tuple[str, str]] = frozenset()


# None: `init` sets all and says at once what is wrong; `apply` sets none.
_requested = jax.make_user_context(None)


def calibrate(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    kinds: Collection[str] = KINDS,
    kept: Collection[tuple[str, str]] = (),
    **kwargs: Any,
) -> dict[str, Any]:
    """Set a network's steps from data, layer by layer in network order, every ADC on before the next layer is measured.

    The only place that sets steps from data: `init` calls the same code on its input. It draws nothing at random, and
    can be traced. A layer that is called several times gets the mean of what each call would set (of logarithms, and of
    the middles of ladders), in lifted transforms too.

    Args:
      model: any Flax module that contains cimjax layers.
      variables: what `model.init` returned, or a trained network's, or one's of full precision, which has no steps and
        gets them; not changed.
      *args, **kwargs: what `model.apply` takes after the variables: the images, and switches such as `train=True` for
        batch normalisation in batch mode.
      kinds: which steps to set, of "activation", "weight" and "psum" (which includes offsets).
      kept: whose steps stay nevertheless, and are what others are set behind: ("block1/conv2", "weight"), ....

    Returns:
      Variables with new steps; everything else, batch statistics too, as it was.

    Raises:
      ValueError: for an unknown kind, for variables without a parameter that is not set here, or for a layer that
        iterations of a loop share (see `refuse_unknown`).

    Warns:
      CalibrationWarning: for each layer whose steps cannot be good: much of the input lost, an input that is the same
        everywhere, ADC steps or weights of which nothing was seen; or whose steps were not set at all. And for a rule
        of `convert_network` that names no layer.
    """
    with _paths_of_layers() as paths:
        variables, reports = calibrate_and_report(model, variables, *args, kinds=kinds, kept=kept, **kwargs)
    tell_rules(getattr(model, RULES_OF_ARRAYS, ()), paths)
    for name, report in reports.items():
        tell(name, report)
    return variables


@contextlib.contextmanager
def _paths_of_layers() -> Iterator[list[str]]:
    """The paths of all layers with a kernel that are called inside, in order."""
    found: dict[str, None] = {}

    def call(run: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        result, layer = run(*args, **kwargs), context.module
        if context.method_name == "__call__" and layer.scope is not None and layer.has_variable("params", "kernel"):
            found["/".join(layer.path)] = None
        return result

    paths: list[str] = []
    with nn.intercept_methods(call):
        yield paths
    paths.extend(found)


def calibrate_and_report(
    model: nn.Module,
    variables: Mapping[str, Any],
    *args: Any,
    kinds: Collection[str] = KINDS,
    kept: Collection[tuple[str, str]] = (),
    **kwargs: Any,
) -> tuple[dict[str, Any], dict[str, CalibrationReport]]:
    """As `calibrate`, which says nothing but returns what there is to say, by layer: for traced programs."""
    if isinstance(kinds, str) or not kinds or any(kind not in KINDS for kind in kinds):
        unknown = kinds if isinstance(kinds, str) else next((kind for kind in kinds if kind not in KINDS), kinds)
        raise ValueError(f"`kinds` names {shown(unknown)}; give a tuple of {', '.join(KINDS)}.")
    _check_kept(kept, variables.get("params", {}))
    given: Any = {**variables, "params": _with_records(variables.get("params", {}))}
    with _requested(_Request(tuple(kinds), frozenset(kept))):
        try:
            _, updated = model.apply(given, *args, mutable=list(given), **kwargs)
        except flax.errors.InvalidRngError as error:
            if '"params"' not in str(error):
                raise
            # Flax would draw what is not there.
            raise ValueError(
                f"`variables` are without a parameter that is not set from data; give all but steps. ({error})"
            ) from error
    params, reports = _without_records(updated["params"])
    made = _paths(params) - _paths(variables.get("params", {}))
    if lacking := sorted(path for path in made if trained_as(path) not in kinds):
        raise ValueError(
            f"`variables` are without {lacking[0]}, which is not set from data; give all parameters but steps of the "
            f"`kinds`, which are {', '.join(kinds)}."
        )
    return {**variables, "params": params}, reports


def _check_kept(kept: Collection[tuple[str, str]], params: Any) -> None:
    """Refuse what names no step that there is."""
    there = {(path.rpartition("/")[0], trained_as(path)) for path in stored_steps(params)}
    for each in kept:
        if each not in there:
            names = sorted(there)[:6]
            raise ValueError(
                f"`kept` has {shown(each)}, which these variables do not have; give pairs of a layer and a kind, such "
                f"as {', '.join(map(str, names)) or 'none: there are no steps yet'}."
            )


def without_calibration() -> contextlib.AbstractContextManager[None]:
    """Inside, `init` leaves steps at 1: quick, where only shapes are wanted, or where steps are set later.

    >>> with without_calibration():
    ...     variables = model.init(jax.random.key(0), x)  # doctest: +SKIP
    """
    return _requested(_Request(()))


def kinds_to_set(module: nn.Module) -> tuple[str, ...] | None:
    """Which kinds of steps a layer shall set from its input now: what `calibrate` asks for, or else all in `init`.

    No kind where all that is asked for is kept; None where nothing is asked for, and where its parameters cannot be
    changed, as inside `nn.while_loop`: what is set nowhere else is reported.
    """
    if module.scope is None or not module.is_mutable_collection("params"):
        return None
    of_init = _Request(KINDS if module.is_initializing() else ())
    request: _Request = of_init if _requested.value is None else _requested.value
    if not request.kinds:
        return None
    path = "/".join(module.path)
    return tuple(kind for kind in request.kinds if (path, kind) not in request.kept)


def make_room(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Make a step that a layer lacks, as the variables of full precision do, where `calibrate` is about to set it."""
    if not module.is_initializing() and kinds_to_set(module) is not None and not module.has_variable("params", name):
        module.put_variable("params", name, jnp.zeros(shape, jnp.float32))


def set_steps(module: nn.Module, values: Mapping[str, Any], report: CalibrationReport, *, first: bool) -> None:
    """Store a layer's steps, from its second call on the mean of what all calls give; and what is to be said of them.

    Args:
      values: by parameter name; None is left out.
      report: of this call.
      first: whether the layer had no steps before this call.
    """
    given = {name: value for name, value in values.items() if value is not None}
    given, report = _of_all_copies(module, given, report)
    record = None if _requested.value is None else _record(module)
    calls = _passes_before(module, first) if record is None else jnp.max(record.calls)
    for name, value in given.items():
        before: Any = module.get_variable("params", name)
        mean = before + (value - before) / (calls + 1)
        module.put_variable("params", name, jnp.where(calls == 0, value, mean))
    if record is not None:
        module.put_variable("params", _RECORD, record.joined(report))
    elif loop_that_is_asked() is None:  # a callback would be taken for a result of its iterations
        tell(name_of(module), report)


def refuse_unknown(module: nn.Module, x: Any) -> None:
    """Refuse to set steps where an input is not known before its parameters: inside a loop whose iterations share the
    layer's parameters, as recurrent cells do, and in Flax's `lazy_init` (which gives zeros from Flax 0.12.12 on).

    Raises:
      ValueError: naming the layer, and how to set its steps.
    """
    assert module.scope is not None
    loop = loop_that_is_asked()
    if loop is None:
        if type(x).__name__ != "JaxprTracer" or any(isinstance(own, type(x)) for own in jax.tree.leaves(_own(module))):
            return
        raise ValueError(
            f"`{name_of(module)}` sets its steps from data, which lazy_init has not: call it inside "
            "cimjax.without_calibration(), then cimjax.calibrate(model, variables, data)."
        )
    keys = module.scope.rngs.get("params")
    own = module.variables.get("params", {}) if keys is None else keys.rng
    if not is_of(loop, x) or any(is_of(loop, value) for value in jax.tree.leaves(own)):
        return
    raise ValueError(
        f"`{name_of(module)}` is shared by the iterations of a loop (nn.RNN, or nn.scan with variable_broadcast), "
        "inside which no steps can be set from data: initialise the network inside cimjax.without_calibration(), "
        "then calibrate the body by itself on the input of one iteration, and put its parameters in their place."
    )


def _record(module: nn.Module) -> CalibrationReport:
    """What is known of a layer before this call, of the shape that `_with_records` gives it."""
    if module.has_variable("params", _RECORD):
        record: CalibrationReport = module.get_variable("params", _RECORD)
        return record
    return _nothing_known(module.variables.get("params", {}))


def _nothing_known(params: Mapping[str, Any]) -> CalibrationReport:
    # Of the shape of a parameter: transforms stack both alike.
    return CalibrationReport.nothing(params.get(_OF_ARRAYS, params.get(_OF_QUANTIZE, 0.0)))


def _passes_before(module: nn.Module, first: bool) -> int:
    """How often a layer set its steps before, in an `init` that leaves no record."""
    assert module.scope is not None
    # Counted where Flax counts random numbers: in lifted transforms, and in their compiled programs, that stays right.
    counts: dict[str, Any] = module.scope.rng_counters
    before: int = 0 if first else counts.get(_PASSES, 0)
    counts[_PASSES] = before + 1
    return before


def _of_all_copies(module: nn.Module, steps: Any, report: CalibrationReport) -> tuple[Any, CalibrationReport]:
    """Steps and report of a layer that `nn.vmap` copies: where the copies share parameters, of all of them together."""
    return _together(steps, report, _own(module)) if is_copied(module) else (steps, report)


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
    if any(jax.tree.leaves(batched[2])):
        return _together(steps, report, own), tuple(batched[:2])
    mean, worst = (
        jax.tree.map(lambda value, mapped, join=join: join(value, axis=0) if mapped else value, values, is_mapped)
        for join, values, is_mapped in ((jnp.mean, steps, batched[0]), (jnp.max, report, batched[1]))
    )
    return _together(mean, worst, own), jax.tree.map(lambda _: False, tuple(batched[:2]))


def _with_records(params: Any) -> Any:
    """Parameters with room for a report in every layer that has steps."""
    if not isinstance(params, Mapping):
        return params
    room = {name: _with_records(value) for name, value in params.items()}
    if _OF_ARRAYS in params or set(params) == {_OF_QUANTIZE}:
        room[_RECORD] = _nothing_known(params)
    return room


def _paths(params: Any) -> set[str]:
    return set(flax.traverse_util.flatten_dict(params, sep="/"))


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
