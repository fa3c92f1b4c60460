"""Specifications: what is refused and in which words, round trips, and the facts that follow from them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES

from cimjax.spec import ActivationSpec, ADCSpec, ArraySpec, CIMSpec, Encoding, Granularity, VariationSpec, WeightSpec
from cimjax.spec.codes import CodeRange, Plane

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (ActivationSpec, {"bits": 0}, r"`bits` is 0; give a whole number of bits from 1 to 16, or 1.5"),
    (ActivationSpec, {"bits": 2.5}, r"`bits` is 2.5"),
    (ActivationSpec, {"bits": True}, r"`bits` is True"),
    (ActivationSpec, {"bits": "4"}, r"`bits` is '4'"),
    (ActivationSpec, {"bits": float("nan")}, r"`bits` is nan"),
    (ActivationSpec, {"bits": 1.5}, r"`bits` is 1.5 for an unsigned activation; set `signed=True`"),
    (ActivationSpec, {"signed": 1}, r"`signed` is 1; give True or False"),
    (ActivationSpec, {"bits": 1, "slice_bits": 1}, r"`slice_bits` is 1 for 1-bit codes"),
    (ActivationSpec, {"bits": 1.5, "signed": True, "slice_bits": 1}, r"`slice_bits` is 1 for 1.5-bit codes"),
    (ActivationSpec, {"slice_bits": 0}, r"`slice_bits` is 0"),
    (ActivationSpec, {"gradient_factor": 0}, r"`gradient_factor` is 0; give a number from 1e-06 to 1,000,000"),
    (ActivationSpec, {"gradient_factor": 1e30}, r"`gradient_factor` is 1e\+30; give a number from"),
    (WeightSpec, {"bits": 9}, r"`bits` is 9; give a whole number of bits from 1 to 8"),
    (WeightSpec, {"bits": 1}, r"`bits` is 1 with `encoding` twos_complement.*use 'differential' or 'offset'"),
    (WeightSpec, {"bits": 1.5}, r"`bits` is 1.5 with `encoding` twos_complement; three codes need 'differential'"),
    (WeightSpec, {"bits": 1.5, "encoding": "offset"}, r"`bits` is 1.5 with `encoding` offset"),
    (WeightSpec, {"cell_bits": 1.5}, r"`cell_bits` is 1.5; give a whole number of bits from 1 to 8\."),
    (
        WeightSpec,
        {"granularity": "colum"},
        r"`granularity` is 'colum' \(did you mean 'column'\?\); allowed: layer, array",
    ),
    (WeightSpec, {"granularity": "row"}, r"`granularity` is 'row'.*allowed: layer, array, column"),
    (WeightSpec, {"encoding": "sign"}, r"`encoding` is 'sign'.*allowed: twos_complement, differential, offset"),
    (WeightSpec, {"subtract": "analog"}, r"`subtract` is 'analog' with `encoding` twos_complement; it belongs to 'di"),
    (WeightSpec, {"reference": "adc"}, r"`reference` is 'adc' with `encoding` twos_complement; it belongs to 'off"),
    (
        WeightSpec,
        {"step_per_plane": True, "granularity": "layer"},
        r"`step_per_plane` is True with `granularity` layer",
    ),
    (
        WeightSpec,
        {"step_per_plane": True, "encoding": "differential"},
        r"`step_per_plane` is True with `encoding` diff",
    ),
    (ADCSpec, {"bits": 17}, r"`bits` is 17"),
    (ADCSpec, {"step": "learn"}, r"`step` is 'learn' \(did you mean 'learned'\?\)"),
    (ADCSpec, {"range": "unsigned"}, r"`range` is 'unsigned'.*allowed: auto, signed"),
    (ADCSpec, {"step": "fixed"}, r"`full_scale` is None with `step` 'fixed'; give the span of psums"),
    (ADCSpec, {"step": "fixed", "full_scale": -1}, r"`full_scale` is -1; give a number from 1e-06 to 1,000,000,000"),
    (ADCSpec, {"full_scale": 3.0}, r"`full_scale` is 3.0 with `step` learned; it belongs to `step` 'fixed'"),
    (ADCSpec, {"plane_bits": 3}, r"`plane_bits` is 3; give several numbers of bits, from 1 to 16 or 1.5, as in"),
    (ADCSpec, {"plane_bits": (2, 2.5)}, r"`plane_bits` is \(2, 2.5\); give several"),
    (ADCSpec, {"plane_bits": ()}, r"`plane_bits` is \(\); give several"),
    (ADCSpec, {"plane_bits": (2,), "granularity": "array"}, r"`plane_bits` is \(2,\) with `granularity` array"),
    (ADCSpec, {"plane_bits": (2,), "step": "fixed", "full_scale": 9}, r"`plane_bits` is \(2,\) .* `step` fixed"),
    (CIMSpec, {"adc": ADCSpec(plane_bits=(1, 2, 3))}, r"`plane_bits` is \(1, 2, 3\) for 2 planes; give bits for each"),
    (ArraySpec, {"rows": 0}, r"`rows` is 0; give a whole number of at least 1"),
    (ArraySpec, {"columns": 12.5}, r"`columns` is 12.5"),
    (
        ArraySpec,
        {"tiling": "pack"},
        r"`tiling` is 'pack' \(did you mean 'packed'\?\); allowed: packed, balanced, im2col",
    ),
    (ArraySpec, {"rows": 64, "active_rows": 65}, r"`active_rows` is 65 but an array has 64 rows"),
    (ArraySpec, {"active_rows": 0}, r"`active_rows` is 0"),
    (VariationSpec, {"sigma": -0.1}, r"`sigma` is -0.1; give a number from 0 to 2\."),
    (VariationSpec, {"sigma": 100}, r"`sigma` is 100; give a number from 0 to 2\."),
    (VariationSpec, {}, r"`VariationSpec` is given without `sigma`; it has no default, give it\."),
    (CIMSpec, {"variation": {}}, r"`VariationSpec` is given without `sigma`"),
    (ADCSpec, {"bit": 3}, r"`ADCSpec` has no field 'bit' \(did you mean 'bits'\?\)\."),
    (CIMSpec, {"colour": 3}, r"`CIMSpec` has no field 'colour' \(known: "),
    (VariationSpec, {"sigma": 0.1, "on": "cell"}, r"`on` is 'cell' \(did you mean 'cells'\?\)"),
    (CIMSpec, {"weight": 4}, r"`weight` is 4; give a WeightSpec\."),
    (CIMSpec, {"adc": 3}, r"`adc` is 3; give a ADCSpec or None\."),
    (ADCSpec, {"gradient_margin": -0.5}, r"`gradient_margin` is -0.5; give a number from 0 to 1,000,000"),
    (ADCSpec, {"gradient_bumps": 101}, r"`gradient_bumps` is 101; give a number from 0 to 100"),
    (ADCSpec, {"gradient_bumps": 1e-9}, r"`gradient_bumps` is 1e-09, too narrow to pass anything; give 0, or 0.01 to"),
    (ADCSpec, {"gradient_bumps": 0.5, "gradient_margin": 2}, r"is 0.5 with `gradient_margin` 2.0, which"),
    (ADCSpec, {"digital_gain": 1}, r"`digital_gain` is 1"),
    (ADCSpec, {"digital_gain": True, "step": "power_of_two"}, r"`digital_gain` is True with `step` 'power_of_two'"),
    (ADCSpec, {"start": "mean"}, r"`start` is 'mean'"),
    (WeightSpec, {"start": "widest"}, r"`start` is 'widest'"),
    (CIMSpec, {"array": ArraySpec(columns=2)}, r"`columns` is 2 but one output needs 3 columns \(2 planes"),
    (
        CIMSpec,
        {"array": ArraySpec(columns=2), "weight": WeightSpec(encoding="offset", reference="adc")},
        r"`columns` is 2 but one output needs 3 columns",
    ),
    (
        CIMSpec,
        {"adc": ADCSpec(range="signed")},
        r"`range` is 'signed' without an offset, but some columns are never neg",
    ),
]


@pytest.mark.parametrize("kind,options,message", REFUSED, ids=[f"{k.__name__}-{o}"[:60] for k, o, _ in REFUSED])
def test_what_cannot_be_is_refused_in_one_clear_line(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        kind(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_dictionaries_round_trip(case: Any) -> None:
    text = json.dumps(case.spec.to_dict())
    again = CIMSpec.from_dict(json.loads(text))
    assert again == case.spec and hash(again) == hash(case.spec)


def test_dictionaries_with_unknown_fields_are_refused_by_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"`CIMSpec` has no field 'wieght' \(did you mean 'weight'\?\)"):
        CIMSpec.from_dict({"wieght": {}})
    with pytest.raises(ValueError, match=r"`WeightSpec` has no field 'xyz' \(known: bits, cell_bits"):
        CIMSpec.from_dict({"weight": {"xyz": 1}})
    with pytest.raises(ValueError, match="`CIMSpec` is built from a dictionary of its fields, got 3"):
        CIMSpec.from_dict(3)  # type: ignore[arg-type]
    assert CIMSpec.from_dict({"weight": {"bits": 8}, "adc": None}).adc is None
    assert CIMSpec(weight={"bits": 8}).weight.bits == 8  # type: ignore[arg-type]


def test_specifications_are_frozen_and_normalised() -> None:
    spec = WeightSpec(bits=4.0, granularity="layer")
    assert spec.bits == 4 and isinstance(spec.bits, int)
    assert spec.granularity is Granularity.LAYER and spec.encoding is Encoding.TWOS_COMPLEMENT
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.bits = 3  # type: ignore[misc]
    assert ArraySpec(rows=64).rows_per_read == 64 and ArraySpec(rows=64, active_rows=8).rows_per_read == 8


def test_code_ranges_are_those_of_the_table() -> None:
    for bits, unsigned, signed, weight in (
        (1, (0, 1, 2), (-1, 1, 2), (-1, 1, 2)),
        (2, (0, 3, 4), (-2, 1, 4), (-1, 1, 3)),
        (4, (0, 15, 16), (-8, 7, 16), (-7, 7, 15)),
    ):
        assert ActivationSpec(bits=bits).code_range == CodeRange(*unsigned)
        assert ActivationSpec(bits=bits, signed=True).code_range == CodeRange(*signed)
        assert WeightSpec(bits=bits, encoding="differential").code_range == CodeRange(*weight)
        assert WeightSpec(bits=bits, encoding="offset").code_range == CodeRange(*signed)
        assert ADCSpec(bits=bits).code_range(signed=False) == CodeRange(*unsigned)
        assert ADCSpec(bits=bits).code_range(signed=True) == CodeRange(*signed)
        assert ADCSpec(bits=bits, offset=True).code_range(signed=True) == CodeRange(*unsigned)
        assert ADCSpec(bits=bits, offset=True, range="signed").code_range(signed=False) == CodeRange(*signed)
    assert ActivationSpec(bits=1.5, signed=True).code_range == (-1, 1, 3)
    assert ADCSpec(bits=1.5).code_range(signed=False) == (0, 2, 3)


def test_planes_of_the_papers_code_and_of_slices() -> None:
    assert WeightSpec(bits=3, cell_bits=1).planes == (Plane(1, 0, 1), Plane(2, 0, 1), Plane(-4, 0, 1))
    assert WeightSpec(bits=4, cell_bits=2).planes == (Plane(1, 0, 3), Plane(4, -2, 1))
    assert WeightSpec(bits=5, cell_bits=2).planes == (Plane(1, 0, 3), Plane(4, 0, 3), Plane(-16, 0, 1))
    assert WeightSpec(bits=3, cell_bits=1, encoding="differential").planes == (
        Plane(1, 0, 1),
        Plane(2, 0, 1),
        Plane(-1, 0, 1),
        Plane(-2, 0, 1),
    )
    assert WeightSpec(bits=1, encoding="offset").planes == (Plane(2, 0, 1),)
    assert ActivationSpec(bits=3, slice_bits=2, signed=True).slices == (Plane(1, 0, 3), Plane(-4, 0, 1))
    assert ActivationSpec(bits=1, signed=True).slices == (Plane(1, -1, 1),)


def test_an_ideal_adc_has_no_codes_and_ideal_cells_no_export() -> None:
    with pytest.raises(ValueError, match="an ideal ADC has no codes"):
        _ = CIMSpec(adc=None).adc_ranges
    with pytest.raises(ValueError, match="an ideal ADC has no codes"):
        _ = CIMSpec(adc=None).reference_ranges
    with pytest.raises(ValueError, match=r"`signed_cells` is 'ideal'.*use 'paired' to export"):
        CIMSpec(weight=WeightSpec(signed_cells="ideal")).require_exportable()
    CIMSpec().require_exportable()
    CIMSpec(weight=WeightSpec(bits=3, cell_bits=1, signed_cells="ideal")).require_exportable()


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


SPECS = (ActivationSpec, WeightSpec, ADCSpec, ArraySpec, VariationSpec, CIMSpec)
# What nobody means, by what is wrong with it.
ODD = {
    "a number of 400 digits": 10**400,
    "a number that Python does not write": -(10**5000),
    "a deep list": nested(10_000),
    "an array of NumPy": np.zeros((3, 3)),
    "an array of one number": np.ones(1),
    "an array of JAX": jnp.arange(3),
    "an array of text": np.array(["learned", "column"]),
    "a long text": "column" * 10_000,
    "infinity": float("inf"),
    "a complex number": 3j,
    "a type": int,
}


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize("kind", SPECS)
def test_every_field_of_every_specification_refuses_what_is_odd_in_one_line(kind: Any, value: Any) -> None:
    for field in dataclasses.fields(kind):
        others = {"sigma": 0.1} if kind is VariationSpec else {}
        with pytest.raises(ValueError) as caught:
            kind(**others | {field.name: value})
        message = str(caught.value)
        assert f"`{field.name}`" in message or field.name in ("activation", "weight", "adc", "array", "variation")
        assert "\n" not in message and len(message) < 300


def test_a_specification_by_position_is_refused_by_name_of_its_field() -> None:
    with pytest.raises(ValueError, match="`ADCSpec` got 3; name its fields, as in bits=VALUE"):
        ADCSpec(3)  # type: ignore[misc]
    with pytest.raises(ValueError, match="`ADCSpec` has no field 3 "):
        ADCSpec.from_dict({3: 4})  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", SPECS)
def test_a_specification_is_the_dataclass_that_editors_see_and_can_be_copied(kind: Any) -> None:
    """Whatever refuses unknown fields, signatures, copies and pickles are those of a frozen dataclass."""
    parameters = inspect.signature(kind).parameters
    assert list(parameters) == [field.name for field in dataclasses.fields(kind)]
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}
    spec = kind(sigma=0.5) if kind is VariationSpec else kind()
    for again in (copy.copy(spec), copy.deepcopy(spec), pickle.loads(pickle.dumps(spec)), dataclasses.replace(spec)):
        assert again == spec and hash(again) == hash(spec)


def test_the_largest_variation_and_gradient_factors_that_are_taken_stay_finite() -> None:
    """Through a layer, its calibration and its gradients."""
    import jax

    from cimjax import CIMDense

    spec = CIMSpec(
        activation=ActivationSpec(gradient_factor=1e6),
        weight=WeightSpec(gradient_factor=1e6),
        adc=ADCSpec(gradient_factor=1e6, offset=True),
        variation=VariationSpec(sigma=2, on="cells"),  # type: ignore[arg-type]
    )
    layer, x = CIMDense(32, spec=spec), jax.random.uniform(jax.random.key(0), (16, 300))
    keys = {"params": jax.random.key(1), "variation": jax.random.key(2)}
    params = layer.init(keys, x)["params"]

    def loss(params: Any) -> Any:
        return jnp.mean(jnp.square(layer.apply({"params": params}, x, rngs=keys)))

    values = jax.tree.leaves(jax.value_and_grad(loss)(params))
    assert all(bool(jnp.all(jnp.isfinite(value))) for value in (*values, *jax.tree.leaves(params)))


@hypothesis.given(
    st.dictionaries(
        st.sampled_from(["bits", "cell_bits", "granularity", "encoding", "step_per_plane"]),
        st.integers() | st.text() | st.none() | st.floats() | st.lists(st.integers()),
    )
)
def test_no_input_ends_in_another_error(options: dict[str, Any]) -> None:
    try:
        WeightSpec(**options)
    except ValueError as error:
        assert str(error)
