"""What `--help` and `cimjax config show` print of options and fields, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from cimjax.training.config.fields import FIELDS, SECTIONS, checked_fields, field_of
from cimjax.training.config.options import CIM_OPTIONS, as_typed

# What `none` is, of an option, a field alone does not do.
_SPEC_MEANINGS = {option.field: option.help.partition("; none")[0] for option in CIM_OPTIONS if option.field} | {
    "activation.signed": "codes of both signs",
    **{f"{group}.gradient_factor": "of the step's gradient" for group in ("activation", "weight", "adc")},
    "adc.plane_bits": "bits of each plane's ADCs, lowest first; None: all the same",
    "weight.plane_shares": "of each plane in a weight's gradient",
    "adc.range": "auto, or signed: signed codes everywhere",
    "adc.gradient_margin": "steps beyond the codes that still learn",
    "adc.gradient_bumps": "deviation of Gaussians at thresholds that pass gradients; 0: none",
    "adc.digital_gain": "a learned factor behind each ADC",
    "adc": "None: an ideal ADC",
    "variation": "of cells: set its sigma, or None",
    "variation.sigma": "of the logarithm of what a cell holds",
    "variation.on": "weights or cells: what varies by itself",
}


def describe_options() -> str:
    """A table of the options that every config offers, for `--help`, in 80 columns."""
    rows = []
    for option in CIM_OPTIONS:
        values = "|".join("N" if one in (int, float) else as_typed(one) for one in option.allowed)
        flag = f"{option.name}, {option.name}=false"
        rows.append((flag if bool in option.allowed else f"{option.name}={values}", option.help))
    return _tabulated(rows)


def describe_fields() -> str:
    """All fields with their defaults and meanings, for `--help`, in 80 columns."""
    return _listed({name: field.default for name, field in FIELDS.items()}, allowed=True)


def describe_config(config: ConfigDict) -> str:
    """All fields of a config with their values and meanings, by what they are about, in 80 columns.

    Args:
      config: as `load_config` returns it.
    """
    values = checked_fields(config.to_dict())
    listed: dict[str, Any] = {}
    for name in dict.fromkeys((*FIELDS, *values)):
        if name == "spec" and values[name] is not None:
            for group, fields in values[name].items():
                listed |= {f"spec.{group}.{last}": fields[last] for last in fields or ()} or {f"spec.{group}": None}
        elif name in values:
            listed[name] = values[name]
    return _listed(listed, allowed=False)


def _listed(values: Mapping[str, Any], *, allowed: bool) -> str:
    sections = {field.name: heading for heading, section in SECTIONS.items() for field in section}
    rows: dict[str, list[tuple[str, str]]] = {heading: [] for heading in SECTIONS}
    for name, value in values.items():
        group, _, inner = name.partition(".")
        in_spec = group == "spec" and inner
        field = None if in_spec else field_of(name)
        meaning = field.meaning if field else _SPEC_MEANINGS.get(inner, "")
        if field and field.kind.short and allowed:
            meaning = f"{meaning} ({field.kind.short})"
        text = name if value is None and allowed else f"{name}={value}"
        rows[sections.get(name) or sections["spec" if in_spec else f"{group}.name"]].append((text, meaning))
    return "\n\n".join(f"{heading}:\n{_tabulated(section)}" for heading, section in rows.items() if section)


def _tabulated(rows: Iterable[tuple[str, str]], width: int = 80, left: int = 36) -> str:
    """Pairs of texts in two columns, the second wrapped between words; beneath the first where that is long."""
    lines = []
    for name, meaning in rows:
        first, *rest = textwrap.wrap(meaning, width - left, break_long_words=False, break_on_hyphens=False) or [""]
        name = f"  {name}"
        lines += [f"{name:{left}}{first}".rstrip()] if len(name) < left else [name, f"{'':{left}}{first}"]
        lines += [f"{'':{left}}{line}" for line in rest]
    return "\n".join(lines)
