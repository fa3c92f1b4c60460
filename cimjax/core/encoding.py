"""Weight codes to digits and back, and activation codes to slices.

Which planes there are is decided by the specification (`WeightSpec.planes`, `ActivationSpec.slices`); here codes are
split into them, with a gradient that uses every plane.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cimjax.spec import ActivationSpec, Encoding, PlaneShares, Subtract, WeightSpec
from cimjax.spec.codes import Plane


def encode(codes: Float[Array, ...], spec: WeightSpec) -> Float[Array, "K ..."]:
    """Digits of weight codes: `q = sum_k f_k d_k + constant`, `0 <= |d_k| < 2^cell_bits`.

    The gradient to a code averages what its planes say of it: `dL/dq = sum_k alpha_k (dL/d d_k) / f_k`, with `alpha_k`
    by `spec.plane_shares` over the planes that respond: for `differential` with digital subtraction the planes of the
    code's sign (half of each sign's at 0), otherwise all. With an ideal ADC that is the exact gradient of the quantized
    convolution.

    Args:
      codes: any shape, integer-valued float32 in `spec.code_range`; with `spec.step_per_plane`, (K, ...): the codes
        that each plane takes its digit from, and of `learned_scales` the digits themselves.

    Returns:
      (K, ...) float32 digits, one leading plane axis.
    """
    return codes if spec.encoding == Encoding.LEARNED_SCALES else _split(codes, spec)


def plane_gradient_weights(spec: WeightSpec) -> tuple[tuple[float, ...], ...]:
    """What a digit's gradient counts in that of its code, `alpha_k / f_k`: `G` rows of `K`, one step for all planes.

    `G` is 1, or 2 where codes of either sign respond by planes of their own; `split_by_sign` chooses.
    """
    signs = (1, -1) if _by_sign(spec) else (0,)
    shares = [_shares(spec, [sign * plane.significance >= 0 for plane in spec.planes]) for sign in signs]
    return tuple(
        tuple(share / plane.significance for share, plane in zip(row, spec.planes, strict=True)) for row in shares
    )


def _shares(spec: WeightSpec, responds: Sequence[bool]) -> list[float]:
    """`alpha_k` of all planes, of which some respond: they add up to 1."""
    counts = [abs(plane.significance) * answer for plane, answer in zip(spec.planes, responds, strict=True)]
    if spec.plane_shares == PlaneShares.EQUAL:
        counts = [int(count > 0) for count in counts]
    elif spec.plane_shares == PlaneShares.LOWEST:
        lowest = min(count for count in counts if count)
        counts = [int(count == lowest) for count in counts]
    return [count / sum(counts) for count in counts]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def split_by_sign(codes: Array, spec: WeightSpec) -> Array:
    """Codes, once for each row of `plane_gradient_weights`: (G, ...), each passing the gradients due to its sign.

    Through these and `plane_gradient_weights` a code gets the gradient that `encode` gives it, without one for every
    digit.
    """
    return jnp.broadcast_to(codes, (2 if _by_sign(spec) else 1, *codes.shape))


def _split_by_sign_forward(codes: Array, spec: WeightSpec) -> tuple[Array, Array]:
    return split_by_sign(codes, spec), codes


def _split_by_sign_backward(spec: WeightSpec, codes: Array, gradient: Array) -> tuple[Array]:
    if not _by_sign(spec):
        return (gradient[0],)
    plus, minus = gradient
    return (jnp.where(codes > 0, plus, jnp.where(codes < 0, minus, (plus + minus) / 2)),)


split_by_sign.defvjp(_split_by_sign_forward, _split_by_sign_backward)


def _by_sign(spec: WeightSpec) -> bool:
    return spec.encoding == Encoding.DIFFERENTIAL and spec.subtract == Subtract.DIGITAL


def decode(digits: Float[Array, "K ..."], spec: WeightSpec) -> Float[Array, ...]:
    """Codes of digits, `sum_k f_k d_k + constant`: the inverse of `encode` with one step for all planes.

    Args:
      digits: (K, ...) float32.

    Returns:
      (...) float32 codes.
    """
    return sum(p.significance * d for p, d in zip(spec.planes, digits, strict=True)) + float(spec.constant)


def slice_codes(codes: Float[Array, ...], spec: ActivationSpec) -> Float[Array, "T ..."]:
    """Slices of activation codes, as driven by a DAC of `slice_bits`: `a = sum_t g_t a_t`.

    The gradient to a code is the mean over the slices of `(dL/d a_t) / g_t`.

    Args:
      codes: any shape, integer-valued float32 in `spec.code_range`.

    Returns:
      (T, ...) float32.
    """
    return codes[None] if len(spec.slices) == 1 else _split(codes, spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _split(codes: Array, spec: WeightSpec | ActivationSpec) -> Array:
    if isinstance(spec, ActivationSpec):
        return jnp.stack([_digit(codes, plane) for plane in spec.slices])
    planes = spec.planes
    per_plane = codes if spec.step_per_plane else [codes] * len(planes)
    if spec.encoding == Encoding.TWOS_COMPLEMENT:
        digits = [_digit(q, plane) for q, plane in zip(per_plane, planes, strict=True)]
    elif spec.encoding == Encoding.OFFSET:
        digits = [_digit(q - spec.constant, plane) for q, plane in zip(per_plane, planes, strict=True)]
    elif spec.subtract == Subtract.ANALOG:
        digits = [jnp.sign(codes) * _digit(jnp.abs(codes), p._replace(d_min=0)) for p in planes]
    else:
        digits = [_digit(jnp.maximum(jnp.sign(p.significance) * codes, 0.0), _plus(p)) for p in planes]
    return jnp.stack(digits)


def _plus(plane: Plane) -> Plane:
    return plane._replace(significance=abs(plane.significance))


def _digit(value: Array, plane: Plane) -> Array:
    """The digit of an integer in one plane: its bits from `|significance|` up; the top plane keeps the sign."""
    shifted = jnp.floor(value * (1.0 / abs(plane.significance)))
    if plane.signed:
        return shifted
    # A subtracting top plane of one bit holds 1 where the integer is negative, which the remainder gives as well.
    return jnp.mod(shifted, float(plane.d_max + 1))


def _split_forward(codes: Array, spec: WeightSpec | ActivationSpec) -> tuple[Array, Array]:
    return _split(codes, spec), codes


def _split_backward(spec: WeightSpec | ActivationSpec, codes: Array, gradient: Array) -> tuple[Array]:
    planes = spec.slices if isinstance(spec, ActivationSpec) else spec.planes
    if isinstance(spec, WeightSpec) and not spec.step_per_plane:
        from_planes = [
            sum(share * g for share, g in zip(row, gradient, strict=True) if share)
            for row in plane_gradient_weights(spec)
        ]
        return _split_by_sign_backward(spec, codes, jnp.stack(from_planes))
    if isinstance(spec, WeightSpec):
        (row,) = plane_gradient_weights(spec)
        return (jnp.stack([share * g for share, g in zip(row, gradient, strict=True)]),)
    return (sum(g / plane.significance for g, plane in zip(gradient, planes, strict=True)) / len(planes),)


_split.defvjp(_split_forward, _split_backward)
