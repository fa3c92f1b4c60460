"""Every code of every encoding: digits are within their cells, and decode to the code."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cimjax.core import encoding
from cimjax.spec import ActivationSpec, WeightSpec
from cimjax.spec.codes import CodeRange

OPTIONS = [
    {"encoding": "twos_complement"},
    {"encoding": "differential", "subtract": "digital"},
    {"encoding": "differential", "subtract": "analog"},
    {"encoding": "offset"},
]


def weights() -> list[WeightSpec]:
    specs = []
    for options, bits, cell_bits in itertools.product(OPTIONS, (1, 1.5, 2, 3, 4, 5, 6, 7, 8), range(1, 9)):
        if (bits == 1 and options["encoding"] == "twos_complement") or (
            bits == 1.5 and options["encoding"] != "differential"
        ):
            continue
        specs.append(WeightSpec(bits=bits, cell_bits=cell_bits, **options))
    return specs


def all_codes(codes: CodeRange) -> np.ndarray:
    return np.array([-1.0, 1.0], np.float32) if codes.binary else np.arange(codes.q_min, codes.q_max + 1.0, dtype="f4")


def short_name(spec: WeightSpec) -> str:
    return f"{spec.encoding}-{spec.subtract}-{spec.bits}-{spec.cell_bits}"


def test_encode_and_decode_are_inverse_for_every_code() -> None:
    specs = weights()
    assert len(specs) == 264
    for spec in specs:
        codes = all_codes(spec.code_range)
        # One size for all, so that every operation is compiled once.
        digits = np.asarray(encoding.encode(jnp.asarray(np.resize(codes, 256)), spec))[:, : len(codes)]
        assert len(digits) == len(spec.planes)
        for plane, row in zip(spec.planes, digits, strict=True):
            assert row.min() >= plane.d_min and row.max() <= plane.d_max, spec
            assert plane.magnitude < 2**spec.cell_bits or plane.signed
            np.testing.assert_array_equal(row, np.rint(row))
        np.testing.assert_array_equal(encoding.decode(jnp.asarray(digits), spec), codes)
        # Different codes are stored differently.
        assert len({tuple(column) for column in digits.T}) == len(codes)


@pytest.mark.parametrize("signed", [False, True])
def test_slices_add_up_to_the_code(signed: bool) -> None:
    for bits, slice_bits in itertools.product(range(2, 11), range(1, 11)):
        spec = ActivationSpec(bits=bits, signed=signed, slice_bits=slice_bits)
        codes = all_codes(spec.code_range)
        slices = np.asarray(encoding.slice_codes(jnp.asarray(codes), spec))
        assert len(slices) == -(-bits // slice_bits)
        total = sum(s.significance * row for s, row in zip(spec.slices, slices, strict=True))
        np.testing.assert_array_equal(total, codes)
        for s, row in zip(spec.slices, slices, strict=True):
            assert row.min() >= s.d_min and row.max() <= s.d_max


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(spec, marks=pytest.mark.full if spec.bits > 5 else (), id=short_name(spec))
        for spec in weights()
        if spec.cell_bits in (1, 2)
    ],
)
def test_the_gradient_through_the_digits_is_exact_for_a_linear_reader(spec: WeightSpec) -> None:
    """Whoever reads `sum_k f_k d_k` sees the gradient of the code itself, for every code."""
    codes = jnp.asarray(np.resize(all_codes(spec.code_range), 256))
    cotangent = jnp.linspace(-1, 2, len(codes))

    def read(codes: jax.Array) -> jax.Array:
        return jnp.sum(cotangent * encoding.decode(encoding.encode(codes, spec), spec))

    np.testing.assert_allclose(jax.grad(read)(codes), cotangent, rtol=1e-6)


def test_a_differential_code_hears_only_the_planes_of_its_sign() -> None:
    spec = WeightSpec(bits=3, cell_bits=1, encoding="differential")
    weights = jnp.array([1.0, 2.0, -10.0, -20.0])

    def read(code: jax.Array) -> jax.Array:
        return jnp.sum(encoding.encode(code, spec) * weights)

    slopes = [float(jax.grad(read)(jnp.float32(code))) for code in (2, -2, 0)]
    # The plus planes say 1/1 and 2/2, the minus planes -10/-1 and -20/-2.
    np.testing.assert_allclose(slopes, [1.0, 10.0, 5.5])


def test_planes_may_take_their_digits_from_different_codes() -> None:
    spec = WeightSpec(bits=4, cell_bits=2, step_per_plane=True)
    codes = jnp.array([[1.0, 2.0, -3.0], [5.0, -7.0, 7.0]])
    digits = encoding.encode(codes, spec)
    shared = WeightSpec(bits=4, cell_bits=2)
    np.testing.assert_array_equal(digits[0], encoding.encode(codes[0], shared)[0])
    np.testing.assert_array_equal(digits[1], encoding.encode(codes[1], shared)[1])
