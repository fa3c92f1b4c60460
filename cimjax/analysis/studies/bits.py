"""How many bits each ADC needs: what every layer loses at fewer, the best choice under a budget of energy, fine-tuned.

What a layer loses is measured in `cimjax.analysis.studies.sensitivity`, the choice is made in `bits_allocation`; runs
are those of `cimjax train` with rules for the layers whose bits differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from cimjax.analysis import figures
from cimjax.analysis.studies.bits_allocation import allocate, cheapest
from cimjax.analysis.studies.bits_tables import Choice, Layer, data_of, figure_of, text_of
from cimjax.analysis.studies.runs import Case, Study, described, failures, folder_of, save, train_cases
from cimjax.spec.base import shortened

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
    config: str,
    workdir: str | Path,
    *,
    bits: Sequence[str] = ("1", "2", "3", "4"),
    budget: str = "0.5",
    seeds: Sequence[int] = (0,),
    fields: Sequence[str] = (),
    jobs: int = 1,
    retry: bool = False,
) -> Study:
    """Train a network, measure what every layer loses at other bits, choose bits under a budget, and fine-tune them.

    One choice is made for all seeds, by their mean. Beside it, all layers are given the same bits, those whose energy
    is nearest to the budget, and are fine-tuned alike.

    Args:
      config: a config file with options for all runs; its own bits are those of the base run.
      workdir: a folder for the runs, what was measured (`sensitivities-seed=0.json`), the table (`bits.md`, `.json`)
        and the figure.
      bits: that a layer may have, as typed.
      budget: of the energy of all ADCs, conversions times codes, as a part of the base run's, as typed.
      seeds, fields, jobs, retry: as for `study_granularity`.

    Raises:
      ValueError: as `study_granularity` does; where no layer has an ADC, or the budget is below the fewest bits.
      Stopped: as `sweep` does.
    """
    figures.require_matplotlib()
    options, part = parse_bits(bits), parse_budget(budget)
    layers = _layers(config, fields, options)
    allowed = _allowed(layers, options, part)
    base = [Case(BASE, "")]
    outcomes = train_cases(config, base, seeds, workdir, fields=fields, jobs=jobs, retry=retry)
    if not outcomes[0].accuracies:
        return Study(failures(outcomes).strip(), [], len(outcomes[0].failed))
    ended = [int(row["seed"]) for row in outcomes[0].rows if "accuracy" in row]
    increases, chosen = _measured(layers, options, allowed, Path(workdir), ended)
    cases = base + [_case(choice, config, fields) for choice in chosen]
    outcomes = train_cases(config, cases, seeds, workdir, fields=fields, jobs=jobs, retry=retry)
    text = text_of(layers, increases, chosen, outcomes, len(seeds)) + failures(outcomes)
    files = save(workdir, "bits", text, {"budget": float(part), **data_of(layers, increases, chosen, outcomes)})
    files += figures.save(figure_of(layers, increases, chosen), workdir, "bits")
    return Study(text, files, sum(len(outcome.failed) for outcome in outcomes))


def _layers(config: str, fields: Sequence[str], options: Sequence[float]) -> list[Layer]:
    """The layers that have ADCs, in order."""
    from cimjax.analysis.studies.sensitivity import with_bits

    found = []
    for layer in described(config, fields).layers:
        if layer.cost is not None and layer.spec is not None and layer.spec.adc is not None:
            spec, conversions = layer.spec, layer.cost.adc_conversions
            own = layer.spec.adc.bits
            energies = {one: conversions * with_bits(spec, one).adc_codes for one in {*options, own}}
            found.append(Layer(layer.name, own, conversions, energies))
    if not found:
        raise ValueError(f"no layer of {shortened(config)} has an ADC, so that there are no bits to choose.")
    return found


def _allowed(layers: Sequence[Layer], options: Sequence[float], part: Fraction) -> int:
    """The energy of a budget, rounded down."""
    own = sum(layer.energies[layer.bits] for layer in layers)
    least = cheapest([[layer.energies[one] for one in options] for layer in layers])
    allowed = math.floor(part * own)
    if least > allowed:
        # Rounded up: what the message says is enough.
        smallest = math.ceil(10_000 * Fraction(least, own)) / 10_000
        raise ValueError(
            f"--budget is {float(part):g}, but {options[0]:g} bits in all layers take {smallest:g} of the base run's "
            f"energy; give at least --budget {smallest:g}, or fewer --bits."
        )
    return allowed


def _measured(
    layers: Sequence[Layer], options: Sequence[float], allowed: int, workdir: Path, seeds: Sequence[int]
) -> tuple[dict[str, dict[float, list[float]]], list[Choice]]:
    """By how much the loss rises where one layer has other bits, by path and bits, for each seed; and the choices: the
    best ones, then the same for all layers where these are others."""
    from cimjax.analysis.progress import Progress
    from cimjax.analysis.studies.sensitivity import KeptMeasurement

    with Progress() as progress:
        networks = [
            KeptMeasurement(folder_of(workdir, BASE, seed), workdir / f"sensitivities-seed={seed}.json", progress.doing)
            for seed in seeds
        ]

        def rises(bits: Mapping[str, float]) -> list[float]:
            """Of the loss, for each seed, with these bits for some layers."""
            other = {layer.path: bits[layer.path] for layer in layers if bits.get(layer.path, layer.bits) != layer.bits}
            return [network(other).loss - network({}).loss for network in networks]

        found = {layer.path: {one: rises({layer.path: one}) for one in options} for layer in layers}
        energies = [[layer.energies[one] for one in options] for layer in layers]
        means = [[_mean(found[layer.path][one]) for one in options] for layer in layers]
        best = [options[number] for number in allocate(energies, means, allowed)]
        # The nearest to the budget; of two as near the cheaper.
        of_all = {one: sum(layer.energies[one] for layer in layers) for one in options}
        same = min(options, key=lambda one: (abs(of_all[one] - allowed), of_all[one]))
        plans = {f"allocated {_joined(best)}": best, f"uniform P{same:g}": [same] * len(layers)}
        choices = []
        for name, bits in plans.items():
            chosen = {layer.path: one for layer, one in zip(layers, bits, strict=True)}
            energy = sum(layer.energies[chosen[layer.path]] for layer in layers)
            expected = sum(_mean(found[path][one]) for path, one in chosen.items())
            choices.append(Choice(name, chosen, energy, expected, _mean(rises(chosen))))
    alike = choices[0].bits == choices[1].bits
    return found, choices[1:] if alike else choices


def _joined(bits: Sequence[float]) -> str:
    """Bits in the order of layers: "3221", or "1.5-2-10" where a number has several letters."""
    words = [f"{one:g}" for one in bits]
    return ("" if all(len(word) == 1 for word in words) else "-").join(words)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _case(choice: Choice, config: str, fields: Sequence[str]) -> Case:
    """The fine-tuning of the base run with the bits of a choice, as rules before those that the config has."""
    from cimjax.analysis.studies.sensitivity import rules_for, with_bits
    from cimjax.training.config.file import load_config, take_overrides

    loaded = load_config(config, take_overrides(fields)[0])
    specs = described(config, fields).specs
    other = {path: with_bits(specs[path], one) for path, one in choice.bits.items()}
    rules = rules_for({path: spec for path, spec in other.items() if spec != specs[path]})
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
