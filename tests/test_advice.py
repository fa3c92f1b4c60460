"""What a run tells its user: only what is true of the layers at hand, and what can be done about them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from cimjax.hardware.advice import on_design
from cimjax.hardware.survey import Layer
from cimjax.hardware.table import TIMES, layer_table
from cimjax.spec import ActivationSpec, ADCSpec, ArraySpec, CIMSpec, WeightSpec
from cimjax.spec.words import describe_bits, describe_specs
from cimjax.training.metrics import mean_movement, movement
from cimjax.training.show import advice

LEARNED = CIMSpec(adc=ADCSpec(bits=3, offset=True))
CALIBRATED = CIMSpec(adc=ADCSpec(bits=3, offset=True, step="calibrated"))
FIXED = CIMSpec(adc=ADCSpec(bits=3, step="fixed", full_scale=64))
FIXED_WITH_OFFSET = CIMSpec(adc=ADCSpec(bits=3, step="fixed", full_scale=64, offset=True))
IDEAL = CIMSpec(adc=None)


def layer(name: str, spec: CIMSpec | None, kernel: tuple[int, ...] = (3, 3, 28, 16)) -> Layer:
    return Layer(name, kernel, (8, 8), spec, use_bias=False)


def stored(spec: CIMSpec, shift: float) -> dict[str, Any]:
    """Steps as a network stores them, with those of its ADCs and weights moved by `shift`."""
    names = ["weight_log_step", "activation_log_step"]
    if spec.adc is not None:
        names += ["psum_log_step"] * (spec.adc.step != "fixed") + ["psum_offset"] * spec.adc.offset
    return {name: np.full(3, shift) for name in names}


def network(*specs: CIMSpec | None) -> list[Layer]:
    return [layer(f"conv{index}", spec) for index, spec in enumerate(specs, start=1)]


def moved(layers: list[Layer], shift: float) -> dict[str, float]:
    specs = {one.name: one.spec for one in layers if one.spec is not None}
    first, now = (
        {f"{name}/{step}": value for name, spec in specs.items() for step, value in stored(spec, by).items()}
        for by in (0.0, shift)
    )
    return mean_movement(movement(first, now, specs))


@pytest.mark.parametrize(
    "specs,kinds",
    [
        ([LEARNED, LEARNED], {"activation", "weight", "psum", "offset"}),
        ([CALIBRATED, CALIBRATED], {"activation", "weight"}),
        ([FIXED, FIXED_WITH_OFFSET], {"activation", "weight"}),
        ([IDEAL], {"activation", "weight"}),
        ([FIXED, LEARNED, CALIBRATED, None], {"activation", "weight", "psum", "offset"}),
        ([None], set()),
    ],
)
def test_a_larger_step_factor_is_advised_for_steps_that_it_can_move(specs: list[Any], kinds: set[str]) -> None:
    still = advice.on_steps(moved(network(*specs), 0.0))
    assert {line.split()[0] for line in still} == kinds
    assert all("raise optimizer.step_factor" in line for line in still)
    assert advice.on_steps(moved(network(*specs), 0.1)) == []


def test_steps_that_cannot_move_do_not_lower_the_mean_of_those_that_can() -> None:
    """In a mixed network, and of a layer whose input was quantized by a module of its own."""
    assert moved(network(LEARNED, CALIBRATED, FIXED), 0.1)["psum_moved"] == pytest.approx(0.1)
    specs = {"conv1": LEARNED}
    first, now = ({"quantize/log_step": np.full((), by), "conv1/psum_log_step": np.full(3, by)} for by in (0.0, 0.2))
    assert mean_movement(movement(first, now, specs)) == pytest.approx({"activation_moved": 0.2, "psum_moved": 0.2})


def test_what_is_set_from_data_when_adcs_go_on_is_what_can_be() -> None:
    for specs, what in (
        ([LEARNED, CALIBRATED], "their steps set from data;"),
        ([FIXED, FIXED], "their steps fixed;"),
        ([FIXED, FIXED_WITH_OFFSET], "their steps fixed and their offsets set from data;"),
        ([FIXED, LEARNED, None], "their steps set from data where they are not fixed;"),
    ):
        assert advice.adcs_on(network(*specs)) == f"ADCs on, {what} until here they were ideal."


def test_only_the_ladder_that_the_user_fixed_is_the_users_to_change() -> None:
    layers = network(LEARNED, FIXED, IDEAL, None)
    bad = {"saturated": 0.5, "codes_used": 2.0}
    lines = advice.on_adcs({"conv1": bad, "conv2": bad}, layers)
    assert lines == [
        "conv1: 50% of the conversions lie beyond the ADC's ladder.",
        "conv1: a column uses 2.0 of the ADC's 8 codes on average.",
        "conv2: 50% of the conversions lie beyond the ADC's ladder; raise full_scale, now 64.",
        "conv2: a column uses 2.0 of the ADC's 8 codes on average; lower full_scale, now 64.",
    ]
    assert advice.on_adcs({"conv1": {"saturated": 0.1, "codes_used": 7.0}}, layers) == []
    assert advice.on_adcs({}, layers) == []


def active(rows: int | None, tiling: str = "packed", size: int = 128) -> CIMSpec:
    return CIMSpec(array=ArraySpec(rows=size, active_rows=rows, tiling=tiling))  # type: ignore[arg-type]


def test_rows_that_a_conversion_leaves_idle_are_named_with_what_would_use_them() -> None:
    (line,) = on_design([layer("stem", None), *network(*5 * [active(16)])])
    assert line == (
        "conv1, conv2, conv3 and 2 more: a conversion drives 9 of the 16 rows that it may, because tiling=packed keeps "
        "kernels whole; with tiling=im2col columns would be read 80 times instead of 140."
    )
    # Balanced tiles keep kernels whole, too, and whole arrays are read as their parts are.
    assert "tiling=balanced" in on_design(network(active(16, "balanced")))[0]
    assert "49 of the 70 rows" in on_design([layer("a", active(None, size=70), (7, 7, 30, 8))])[0]


@pytest.mark.parametrize(
    "spec,kernel",
    [
        (active(16, "im2col"), (3, 3, 28, 16)),
        (active(None), (3, 3, 28, 16)),
        (active(27), (3, 3, 28, 16)),
        # Nine rows are all that there are, and a single row a channel fills any number of them.
        (active(16), (3, 3, 1, 16)),
        (active(16), (1, 1, 64, 16)),
        (active(16), (300, 10)),
    ],
)
def test_nothing_is_said_where_nothing_can_be_gained(spec: CIMSpec, kernel: tuple[int, ...]) -> None:
    assert on_design([layer("a", spec, kernel), layer("b", None, kernel)]) == []


def test_an_offset_behind_a_fixed_step_is_named_with_the_option_that_takes_it_away() -> None:
    (line,) = on_design(network(FIXED_WITH_OFFSET, FIXED, LEARNED))
    assert line.startswith("conv1: the ADC's step is fixed, but every column has an offset of its own, set from data;")
    assert line.endswith("offset=false takes it away.")
    assert on_design(network(FIXED, LEARNED, CALIBRATED, IDEAL, None)) == []


def test_a_network_is_described_by_what_its_own_layers_are() -> None:
    assert describe_specs([]) == "full precision"
    assert describe_specs([IDEAL]) == "weights column, ideal ADC, A4 W4/2 P-"
    assert describe_specs([FIXED, FIXED]) == "weights column, psums fixed to 64, A4 W4/2 P3"
    assert describe_specs([LEARNED, LEARNED, IDEAL]) == "weights column, psums column, A4 W4/2 P3, 1 layer otherwise"
    sliced = dataclasses.replace(LEARNED, activation=ActivationSpec(bits=4, slice_bits=1))
    assert describe_bits(sliced) == "A4/1 W4/2 P3"
    whole = dataclasses.replace(LEARNED, activation=ActivationSpec(bits=4, slice_bits=4), weight=WeightSpec(bits=3))
    assert describe_bits(whole) == "A4 W3/2 P3"


def test_a_line_of_the_layer_table_tells_uses_copies_slices_and_rows() -> None:
    spec = dataclasses.replace(active(16), activation=ActivationSpec(bits=4, slice_bits=2))
    shown = dataclasses.replace(layer("loop/conv", spec), output=(2, 8, 8), copies=3)
    (cells,) = layer_table([shown]).rows
    assert (cells["layer"], cells["output"]) == (f"loop/conv {TIMES}3", f"2{TIMES}8{TIMES}8")
    assert (cells["rows\nread"], cells["slices"], cells["reads"]) == ("9/16", "2", "28")
