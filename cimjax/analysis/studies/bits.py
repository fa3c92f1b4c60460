"""How many bits each ADC needs: what layers, or the planes of each, lose at fewer, the best choice under a budget of
energy, fine-tuned.

What is lost is measured in `cimjax.analysis.studies.sensitivity`, the choice is made in `bits_allocation`; runs
are those of `cimjax train` with rules for the layers whose bits differ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cimjax.analysis import figures
from cimjax.analysis.studies.bits_allocation import allocate, cheapest
from cimjax.analysis.studies.bits_tables import Choice, Columns, data_of, figure_of, text_of
from cimjax.analysis.studies.runs import Case, Runs, Study, described, failures, finished, train_cases
from cimjax.spec.base import shortened
from cimjax.spec.codes import code_range

if TYPE_CHECKING:
    from cimjax.analysis.studies.sensitivity import Bits

BASE = "base"
# Epochs of fine-tuning and of its warm-up, as a part of those of the base run. The learning rate is the base run's, not
# a choice that was settled: with a tenth of it, on the digits (one seed, test images, budget 0.4), the chosen bits came
# to 97.2 instead of 98.9 %, equal bits to 98.9 instead of 98.6 %, so that which of the two is better depends on it.
FINE_TUNING = 0.25


def parse_bits(words: Sequence[str]) -> list[float]:
    """Numbers of bits as typed, `1`, `1.5`, `2`, ... up to 16; rising.

    Raises:
      ValueError: in one line.
    """
    allowed: dict[str, float] = {"1.5": 1.5, **{str(number): number for number in range(1, 17)}}
    if not words or any(word not in allowed for word in words) or len(set(words)) < len(words):
        text = shortened(",".join(words))
        raise ValueError(f"--bits is {text!r}; give different numbers from 1 to 16, whole ones or 1.5, as in 1,2,3,4.")
    return sorted(allowed[word] for word in words)


def parse_budget(text: str) -> Fraction:
    """A budget as typed, a part of the base run's energy: `0.5`.

    Raises:
      ValueError: in one line.
    """
    try:
        budget = Fraction(text)
    except (ValueError, ZeroDivisionError):
        budget = Fraction(0)
    if budget <= 0:
        raise ValueError(f"--budget is {shortened(text)!r}; give a part of the base run's energy above 0, as in 0.5.")
    return budget


def study_bits(
    runs: Runs,
    *,
    bits: Sequence[str] = ("1", "2", "3", "4"),
    budget: str = "0.5",
    by: str = "layer",
) -> Study:
    """Train a network, measure what columns lose at other bits, choose bits under a budget, and fine-tune them.

    One choice is made for all seeds, by their mean. Beside it, all layers are given the same bits, those whose energy
    is nearest to the budget, and are fine-tuned alike.

    Args:
      runs: the bits of their config are those of the base run; their folder also gets what was measured
        (`sensitivities-seed=0.json`), the table (`bits.md`, `.json`) and the figure.
      bits: that columns may have, as typed.
      budget: of the energy of all ADCs, conversions times codes, as a part of the base run's, as typed.
      by: what gets its bits together, "layer" or "plane", the columns of a layer that hold digits of one significance.

    Raises:
      ValueError: as `study_granularity` does; where no layer has an ADC, or the budget is below the fewest bits.
      Stopped: as `sweep` does.
    """
    figures.require_matplotlib()
    options, part = parse_bits(bits), parse_budget(budget)
    groups = _groups(runs, options, by)
    allowed = _allowed(groups, options, part)
    base = [Case(BASE, "")]
    outcomes = train_cases(runs, base)
    if not outcomes[0].accuracies:
        return Study(failures(outcomes).strip(), [], len(outcomes[0].failed))
    ended = [int(row["seed"]) for row in outcomes[0].rows if "accuracy" in row]
    increases, chosen = _measured(runs, groups, options, allowed, ended)
    cases = base + [_case(choice, groups, runs) for choice in chosen]
    outcomes = train_cases(runs, cases)
    text = text_of(groups, increases, chosen, outcomes, len(runs.seeds))
    data = {"budget": float(part), **data_of(groups, increases, chosen, outcomes)}
    return finished(runs, "bits", text, data, outcomes, bits=figure_of(groups, increases, chosen))


def _groups(runs: Runs, options: Sequence[float], by: str) -> list[Columns]:
    """What has ADCs, in order: layers, or their planes from the lowest."""
    found = []
    for layer in described(runs.config, runs.fields).layers:
        if layer.cost is None or layer.spec is None or layer.spec.adc is None:
            continue
        spec, adc, conversions = layer.spec, layer.spec.adc, layer.cost.adc_conversions
        planes: Sequence[int | None] = range(len(spec.weight.planes)) if by == "plane" else [None]
        if by == "plane" and spec.weight.dummy_columns:
            raise ValueError(f"{layer.name} has dummy columns, which belong to no plane; give --by layer.")
        if by == "plane" and adc.plane_bits is None:
            try:
                dataclasses.replace(adc, plane_bits=(options[0],) * len(planes))
            except ValueError as error:
                raise ValueError(
                    f"{layer.name}'s planes cannot have their own bits, give --by layer: {error}"
                ) from None
        if by == "layer" and adc.plane_bits is not None:
            raise ValueError(f"the ADCs of {layer.name} have bits by plane; give --by plane.")
        for plane in planes:
            own = adc.bits if plane is None or adc.plane_bits is None else adc.plane_bits[plane]
            share = conversions // len(planes)
            energies = {one: share * code_range(one, signed=False).size for one in {*options, own}}
            found.append(Columns(layer.name, plane, own, share, energies))
    if not found:
        raise ValueError(f"no layer of {shortened(runs.config)} has an ADC, so that there are no bits to choose.")
    return found


def _of_layers(groups: Sequence[Columns], chosen: Mapping[str, float]) -> dict[str, Bits]:
    """Bits for each layer, by path, of which some columns are given others than they have; for all of its planes where
    planes have their own."""
    found: dict[str, Bits] = {}
    for path in dict.fromkeys(group.path for group in groups):
        own = [group for group in groups if group.path == path]
        bits = [chosen.get(group.name, group.bits) for group in own]
        if bits != [group.bits for group in own]:
            found[path] = bits[0] if own[0].plane is None else tuple(bits)
    return found


def _allowed(groups: Sequence[Columns], options: Sequence[float], part: Fraction) -> int:
    """The energy of a budget, rounded down."""
    own = sum(group.energies[group.bits] for group in groups)
    least = cheapest([[group.energies[one] for one in options] for group in groups])
    allowed = math.floor(part * own)
    if least > allowed:
        # Rounded up: what the message says is enough.
        smallest = math.ceil(10_000 * Fraction(least, own)) / 10_000
        raise ValueError(
            f"--budget is {float(part):g}, but {options[0]:g} bits everywhere take {smallest:g} of the base run's "
            f"energy; give at least --budget {smallest:g}, or fewer --bits."
        )
    return allowed


def _measured(
    runs: Runs, groups: Sequence[Columns], options: Sequence[float], allowed: int, seeds: Sequence[int]
) -> tuple[dict[str, dict[float, list[float]]], list[Choice]]:
    """By how much the loss rises where some columns have other bits, by their name and bits, for each seed; and the
    choices: the best ones, then the same for all where these are others."""
    from cimjax.analysis.progress import Progress
    from cimjax.analysis.studies.sensitivity import KeptMeasurement

    workdir = Path(runs.workdir)
    with Progress() as progress:
        networks = [
            KeptMeasurement(runs.folder(BASE, seed), workdir / f"sensitivities-seed={seed}.json", progress.doing)
            for seed in seeds
        ]

        def rises(bits: Mapping[str, float]) -> list[float]:
            """Of the loss, for each seed, with these bits for some columns."""
            other = _of_layers(groups, bits)
            return [network(other).loss - network({}).loss for network in networks]

        found = {group.name: {one: rises({group.name: one}) for one in options} for group in groups}
        energies = [[group.energies[one] for one in options] for group in groups]
        means = [[_mean(found[group.name][one]) for one in options] for group in groups]
        best = [options[number] for number in allocate(energies, means, allowed)]
        # The nearest to the budget; of two as near the cheaper.
        of_all = {one: sum(group.energies[one] for group in groups) for one in options}
        same = min(options, key=lambda one: (abs(of_all[one] - allowed), of_all[one]))
        plans = {f"allocated {_joined(best)}": best, f"uniform P{same:g}": [same] * len(groups)}
        choices = []
        for name, bits in plans.items():
            chosen = {group.name: one for group, one in zip(groups, bits, strict=True)}
            energy = sum(group.energies[chosen[group.name]] for group in groups)
            expected = sum(_mean(found[name][one]) for name, one in chosen.items())
            choices.append(Choice(name, chosen, energy, expected, _mean(rises(chosen))))
    alike = choices[0].bits == choices[1].bits
    return found, choices[1:] if alike else choices


def _joined(bits: Sequence[float]) -> str:
    """Bits in the order of columns: "3221", or "1.5-2-10" where a number has several letters."""
    words = [f"{one:g}" for one in bits]
    return ("" if all(len(word) == 1 for word in words) else "-").join(words)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _case(choice: Choice, groups: Sequence[Columns], runs: Runs) -> Case:
    """The fine-tuning of the base run with the bits of a choice, as rules before those that the config has."""
    from cimjax.analysis.studies.sensitivity import rules_for, with_bits
    from cimjax.training.config.file import load_config, take_overrides

    loaded = load_config(runs.config, take_overrides(runs.fields)[0])
    specs = described(runs.config, runs.fields).specs
    other = _of_layers(groups, choice.bits)
    rules = rules_for({path: with_bits(specs[path], bits) for path, bits in other.items()})
    plain: tuple[Any, ...] = (*((pattern, spec.to_dict()) for pattern, spec in rules), *loaded.rules)
    values = {
        "rules": tuple((pattern, spec and dict(spec)) for pattern, spec in plain),
        "start": "run",
        "epochs": max(1.0, round(FINE_TUNING * loaded.epochs)),
        "warmup_epochs": FINE_TUNING * loaded.warmup_epochs,
        # The network has been trained with its ADCs before.
        "ideal_share": 0.0,
        "recalibrate_epochs": (),
    }
    return Case(choice.name, "", BASE, tuple(f"--config.{name}={value}" for name, value in values.items()))
