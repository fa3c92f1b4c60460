"""The options in a config path, `configs/digits.py:weight=column,psum=layer,adc_bits=2,smoke`, and their specification.

An option is a short, typed name for what people change most; any other field of a config is set by
`--config.field=value`, which `cimjax.training.config.file` reads. Nothing is validated here that `cimjax.spec` knows:
its refusals are passed on in the names that were typed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import re
import types
from collections.abc import Collection, Mapping
from typing import Any

from cimjax.spec import (
    ActivationSpec,
    ADCSpec,
    ArraySpec,
    CIMSpec,
    Encoding,
    Granularity,
    Reference,
    SignedCells,
    StartRule,
    StepKind,
    Subtract,
    TilingRule,
    WeightSpec,
)
from cimjax.spec.base import nearest, shortened
from cimjax.training.config.fields import FIELDS
from cimjax.training.config.refusals import OptionError, in_other_names


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option of a config: typed as `name=value`, or as `name` alone where it is a flag."""

    name: str
    # What a value may be: a name, a number, None (typed `none`), `int` or `float` (any such number), `bool` (a flag).
    allowed: tuple[str | float | type[float] | None, ...]
    # The value where neither the user nor the config gives one.
    default: str | float | None
    # What it chooses, in a few words.
    help: str
    # The field of `CIMSpec` that it sets, `"group.field"`; None where it sets none.
    field: str | None = None

    @property
    def values(self) -> str:
        """What may be typed after the `=`."""
        return ", ".join(map(as_typed, self.allowed))

    def parse(self, text: str | None) -> Any:
        """The typed value of what stands after the `=`; None: there is no `=`.

        Raises:
          OptionError: where it is not one of `allowed`.
        """
        if text is None and bool in self.allowed:
            return True
        if text is None:
            raise OptionError(f"option {self.name} needs a value, as in {self.name}=VALUE; allowed: {self.values}.")
        for one in self.allowed:
            if one is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if one is int and re.fullmatch("[0-9]{1,9}", text):
                return int(text)
            if one is float and re.fullmatch(r"[0-9]{1,9}(\.[0-9]{0,9})?(e-?[0-9]{1,2})?", text):
                return float(text)
            if text == as_typed(one):
                return one
        names = [as_typed(one) for one in self.allowed if one is None or isinstance(one, str)]
        meant = nearest(text, names, otherwise_all=False)
        raise OptionError(f"{self.name} is {shortened(text)!r}{meant}; allowed: {self.values}.")

    def accepts(self, value: Any) -> bool:
        """Whether a config may give this value as its default."""
        kinds = {float: (int, float)}
        return any(
            type(value) in kinds.get(one, (one,)) if isinstance(one, type) else value == one for one in self.allowed
        )


def as_typed(allowed: str | float | type | None) -> str:
    """One of the values that an option allows, as it is typed or described."""
    if allowed is int:
        return "a whole number up to 999999999"
    if allowed is float:
        return "a number, as in 64 or 0.5"
    if allowed is bool:
        return "true, false"
    return "none" if allowed is None else str(allowed)


def _names(kind: type[enum.StrEnum]) -> tuple[str, ...]:
    return tuple(str(member) for member in kind)


# How a network comes to its partial-sum quantizers.
TRAININGS = ("one_stage", "two_stage", "post_training")
# What every scheme has in common: no offset before the ADC, and LSQ's own start of weight steps.
_PUBLISHED = {"offset": False, "weight_start": "magnitude"}
# The schemes of the paper's Table I as options: granularities, training, and what is learned.
SCHEMES: dict[str, dict[str, Any]] = {
    "kim2022": {"weight": "layer", "psum": "layer", "training": "post_training"},
    "bai2023": {"weight": "array", "psum": "array", "training": "post_training"},
    "bai2024": {"weight": "array", "psum": "array", "training": "post_training"},
    "saxena2022": {"weight": "layer", "psum": "array", "training": "two_stage", "weight_step": "calibrated"},
    "saxena2023": {"weight": "layer", "psum": "column", "training": "two_stage"},
    "column": {"weight": "column", "psum": "column", "training": "one_stage"},
}

# What `encoding=learned_scales` implies where it is not typed.
_LEARNED_SCALES = {"cell_bits": 1, "step_per_plane": True}

# The options that every config offers.
CIM_OPTIONS = (
    Option("scheme", tuple(SCHEMES), None, "a scheme of the paper's Table I: granularities and training"),
    Option("training", TRAININGS, None, "ADCs from the start, after ideal ones, or on a trained network"),
    Option(
        "weight",
        (*_names(Granularity), None),
        "column",
        "what shares a weight step; none: full precision",
        "weight.granularity",
    ),
    Option(
        "psum", (*_names(Granularity), None), "column", "what shares an ADC step; none: ideal ADCs", "adc.granularity"
    ),
    Option("act_bits", (int, 1.5), 4, "bits of an activation", "activation.bits"),
    Option("slice_bits", (int, None), None, "bits that the DAC drives at once", "activation.slice_bits"),
    Option("weight_bits", (int, 1.5), 4, "bits of a weight", "weight.bits"),
    Option("cell_bits", (int,), 2, "bits that one cell stores", "weight.cell_bits"),
    Option("encoding", _names(Encoding), "twos_complement", "how cells store a signed weight", "weight.encoding"),
    Option("subtract", _names(Subtract), "digital", "where `differential` subtracts", "weight.subtract"),
    Option("reference", _names(Reference), "digital", "what removes the constant of `offset`", "weight.reference"),
    Option("signed_cells", _names(SignedCells), "paired", "what a signed plane costs", "weight.signed_cells"),
    Option("step_per_plane", (bool,), False, "one weight step per plane", "weight.step_per_plane"),
    Option("adc_bits", (int, 1.5), 3, "bits of an ADC", "adc.bits"),
    Option("adc_step", _names(StepKind), "learned", "how an ADC step is set", "adc.step"),
    Option("full_scale", (float, None), None, "partial sums that a `fixed` ADC spans", "adc.full_scale"),
    Option("act_step", _names(StepKind), "learned", "how an activation's step is set", "activation.step"),
    Option("act_full_scale", (float, None), None, "inputs that a `fixed` act_step spans", "activation.full_scale"),
    Option("act_start", _names(StartRule), "magnitude", "what sets an activation's first step", "activation.start"),
    Option("weight_step", ("learned", "calibrated"), "learned", "whether training moves weight steps"),
    Option("weight_start", _names(StartRule), "magnitude", "what sets a weight's first step", "weight.start"),
    Option("adc_start", _names(StartRule), "least_squares", "what sets an ADC's first step", "adc.start"),
    Option("offset", (bool,), False, "an offset of its own before each ADC", "adc.offset"),
    Option("rows", (int,), 128, "rows of an array", "array.rows"),
    Option("columns", (int,), 128, "columns of an array", "array.columns"),
    Option("active_rows", (int, None), None, "rows that are read at once", "array.active_rows"),
    Option("tiling", _names(TilingRule), "packed", "how a kernel is cut into arrays", "array.tiling"),
    Option("seed", (int,), 0, "of everything random"),
    Option("smoke", (bool,), False, "a short look instead of the whole training"),
)


def parse_options(argument: str | None, *extra: Option, **defaults: Any) -> types.SimpleNamespace:
    """The value of every option, typed.

    >>> options = parse_options("weight=layer,adc_bits=2,smoke", rows=64)
    >>> options.weight, options.psum, options.adc_bits, options.rows, options.smoke
    ('layer', 'column', 2, 64, True)

    Args:
      argument: what stands behind the colon of a config path; None or empty: nothing was typed.
      *extra: options that this config offers beside `CIM_OPTIONS`.
      **defaults: values of this config where the user gives none.

    Raises:
      OptionError: for what the user typed: an unknown option, a bad value, the same option twice, options that
        contradict each other or have no effect.
      ValueError: for a default that is no option, or is not allowed.
    """
    table = {option.name: option for option in (*CIM_OPTIONS, *extra)}
    for name, value in defaults.items():
        if name not in table or not table[name].accepts(value):
            raise ValueError(f"{name}={value!r} is no default: there is no such option, or it takes no such value.")
    typed = _read(argument, table)
    values = {option.name: option.default for option in table.values()} | defaults | typed
    values |= _of_scheme(values["scheme"], typed)
    if values["adc_step"] == StepKind.FIXED and "offset" not in typed:
        # One reference for all columns is what a fixed ADC is for; an offset in every column is not typed by accident.
        values["offset"] = False
    if values["encoding"] == Encoding.LEARNED_SCALES:
        values |= {name: value for name, value in _LEARNED_SCALES.items() if name not in typed}
    _refuse_idle(values, typed, table)
    return types.SimpleNamespace(**values)


def spec_from_options(options: types.SimpleNamespace) -> dict[str, Any] | None:
    """`CIMSpec.to_dict()` of the options; None, which is full precision, with `weight=none`.

    Raises:
      OptionError: in the words of `CIMSpec`, with the names of options for those of its fields.
    """
    if options.weight is None:
        return None
    fields: dict[str, dict[str, Any]] = {"activation": {}, "weight": {}, "adc": {}, "array": {}}
    for option in CIM_OPTIONS:
        if option.field:
            group, _, field = option.field.partition(".")
            fields[group][field] = getattr(options, option.name)
    with _in_names_of_options("activation"):
        activation = ActivationSpec(**fields["activation"])
    with _in_names_of_options("weight"):
        weight = WeightSpec(**fields["weight"])
    with _in_names_of_options("adc"):
        adc = None if options.psum is None else ADCSpec(**fields["adc"])
    with _in_names_of_options("array"):
        array = ArraySpec(**fields["array"])
        return CIMSpec(activation=activation, weight=weight, adc=adc, array=array).to_dict()


def _read(argument: str | None, table: Mapping[str, Option]) -> dict[str, Any]:
    """What the user typed, each option once."""
    typed: dict[str, Any] = {}
    for item in (argument or "").split(",") if (argument or "").strip() else ():
        name, equals, text = (part.strip() for part in item.partition("="))
        if not name:
            raise OptionError(
                f"an option is empty in {shortened(argument or '')!r}; write them as name=value,name=value,flag."
            )
        if name not in table:
            meant = nearest(name, table, otherwise_all=False)
            if name in FIELDS:
                meant = f", which is a field and named config.{name}"
            raise OptionError(f"unknown option {shortened(name)!r}{meant}; known: {', '.join(table)}.")
        if name in typed:
            raise OptionError(f"option {name} is given twice; leave one of them out.")
        typed[name] = table[name].parse(text if equals else None)
    return typed


def field_of(name: str) -> str:
    """The field of `CIMSpec`, or its group, without which an option has no effect; empty for one that needs none."""
    fields = {option.name: option.field or "" for option in CIM_OPTIONS} | {
        "training": "adc.",
        "weight_step": "weight.",
    }
    return fields.get(name, "")


def _of_scheme(scheme: str | None, typed: Mapping[str, Any]) -> dict[str, Any]:
    """What the name of a scheme stands for; what is no part of its definition may be typed beside it."""
    if scheme is None:
        return {}
    meant = SCHEMES[scheme]
    for name, value in meant.items():
        if name in typed and typed[name] != value:
            given = f"{name}={'none' if typed[name] is None else typed[name]}"
            text = ",".join(f"{name}={value}" for name, value in meant.items())
            raise OptionError(f"scheme={scheme} means {text}, not {given}; leave one of them out.")
    return meant | {name: value for name, value in _PUBLISHED.items() if name not in typed}


def _refuse_idle(values: Mapping[str, Any], typed: Collection[str], table: Mapping[str, Option]) -> None:
    """An option that changes nothing would mislead whoever reads the command later."""
    for name in typed:
        field = table[name].field or field_of(name)
        if not field or values[name] is None:
            continue
        if values["weight"] is None:
            raise OptionError(f"{name} has no effect with weight=none, which is full precision; leave one of them out.")
        if values["psum"] is None and field.startswith("adc."):
            raise OptionError(f"{name} has no effect with psum=none, which is an ideal ADC; leave one of them out.")
        if name == "act_start" and values["act_step"] == StepKind.FIXED:
            raise OptionError("act_start has no effect with act_step=fixed; leave one of them out.")
        if name == "adc_start" and values["adc_step"] == StepKind.FIXED and not values["offset"]:
            raise OptionError("adc_start has no effect with adc_step=fixed and no offset; leave one of them out.")


def _in_names_of_options(group: str) -> contextlib.AbstractContextManager[None]:
    fields = ((*option.field.partition("."), option.name) for option in CIM_OPTIONS if option.field)
    return in_other_names({field: name for of, _, field, name in fields if of == group})
