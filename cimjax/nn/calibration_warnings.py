"""What is said of data from which no good steps follow: the numbers of a `CalibrationReport` as sentences."""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import flax
import flax.linen as nn
import jax

from cimjax.core.calibration.report import CalibrationReport
from cimjax.spec.rules import Rules, on_rules

# Parts whose loss is worth a word. LSQ's start clips a third of an input after a ReLU at one bit, and less at more.
MUCH_NEGATIVE, MUCH_CLIPPED = 0.2, 0.4
# A read group that nothing drives is worth a word, a column that holds a few digits is not.
MANY_SILENT = 0.02


class CalibrationWarning(UserWarning):
    """Steps were set from data from which no good steps follow."""


def messages(reports: Mapping[str, CalibrationReport]) -> Iterator[tuple[str, str]]:
    """A layer's name and a line for each thing that is wrong, of reports that are no longer traced."""
    for name, report in reports.items():
        for _, sentence in _sentences(report):
            yield name, f"{name}: {sentence}"


def tell(name: str, report: CalibrationReport) -> None:
    """Warn of what a report says of a layer, now or, in a traced program, when it runs: of each matter once."""
    if any(isinstance(value, jax.core.Tracer) for value in report):
        jax.debug.callback(functools.partial(_warn, name, set()), report)
    else:
        _warn(name, set(), report)


def _warn(name: str, said: set[str], report: CalibrationReport) -> None:
    for matter, sentence in _sentences(report):
        if matter not in said:
            said.add(matter)
            warnings.warn(f"{name}: {sentence}", CalibrationWarning, stacklevel=level_of_caller())


def _sentences(report: CalibrationReport) -> Iterator[tuple[str, str]]:
    """What is wrong, by matter; causes hide what follows from them."""
    again = "call cimjax.calibrate(model, variables, data)"
    if not report.calls:
        yield (
            "calls",
            "no steps were set, it was not called, or where its parameters cannot change; calibrate it by a call that "
            "reaches it.",
        )
        return
    if report.missing:
        yield (
            "missing",
            f"{report.missing:,} of its input's values are NaN or infinite, and steps were set from them; mend that, "
            f"then {again}.",
        )
        return
    if report.constant:
        yield (
            "constant",
            "steps were set from an input that is empty or the same everywhere, and say nothing of others; give real "
            f"data to `init`, or {again} before training.",
        )
        return
    if report.negative > MUCH_NEGATIVE:
        yield (
            "negative",
            f"{report.negative:.0%} of the input's magnitude is negative and lost, because its codes are not signed; "
            "give the layer's `activation` signed=True, or put a ReLU before it.",
        )
    if report.clipped > MUCH_CLIPPED:
        yield (
            "clipped",
            f"{report.clipped:.0%} of the input's magnitude lies beyond its codes and is lost; give the layer's "
            "`activation` start='least_squares', more bits or, where it is fixed, a larger full_scale.",
        )
    elif report.single:
        yield (
            "single",
            f"{report.single:,} ADC steps were set from one partial sum each; give more examples to `init`, or {again} "
            "before training.",
        )
    elif report.silent > MANY_SILENT * report.groups:
        yield (
            "silent",
            f"{report.silent:,} of {report.groups:,} ADC steps saw partial sums of 0 alone and stay at 1; calibrate on "
            "data that drives all inputs.",
        )
    if report.empty:
        yield (
            "empty",
            f"{report.empty:,} of its weight steps have weights of 0 alone and stay at 1; set them once the weights "
            f"are there: {again}.",
        )


def tell_rules(rules: Rules, paths: Sequence[str]) -> None:
    """Warn of rules of a converted network that name none of its layers, which are at `paths`."""
    for line in on_rules(rules, paths):
        warnings.warn(line, CalibrationWarning, stacklevel=level_of_caller())


def name_of(module: nn.Module) -> str:
    """A layer's path in its network; its class where it is the network."""
    return "/".join(module.path) or type(module).__name__


def level_of_caller() -> int:
    """How far up the stack the user's own line is, as `warnings.warn` counts for its caller."""
    ours = tuple(str(Path(package.__file__).parent) for package in (sys.modules["cimjax"], flax, jax))  # type: ignore[arg-type]
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((*ours, contextlib.__file__)):
        level, frame = level + 1, frame.f_back
    return level
