"""Layers without ADCs, by `joined`: ONE convolution with the dequantized kernel.

Partial sums that nothing rounds add up to what an undivided kernel gives, `sum_{t,r,k} g_t f_k s_w P = conv(a, w^)`
with `w^ = sum_k f_k s_w d_k`: so none is computed, and none kept for the gradients.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cimjax.core import readout
from cimjax.core.cells import StoredArrays
from cimjax.core.programs import products
from cimjax.core.programs.contract import Layer
from cimjax.core.programs.kept_codes import smallest_type
from cimjax.core.step_sizes import StepSizes, expand_weight
from cimjax.core.tiling import Tiling, untile_kernel
from cimjax.spec import CIMSpec, Operands


def run(codes: Array, arrays: StoredArrays, steps: StepSizes, layer: Layer) -> Array:
    """As `contract.ArrayProgram`, for specifications whose `adc` is None; in float32, as dequantized weights are no
    small integers."""
    tiling, _, spec, execution = layer
    kernel = untile_kernel(dequantize(arrays, steps, tiling, spec), tiling)
    execution = dataclasses.replace(execution, operands=Operands.FLOAT32)
    undivided = layer._replace(tiling=tiling.undivided, execution=execution)
    return _convolve(undivided, codes, kernel[..., None, :, :]).reshape(-1, tiling.features)


def dequantize(arrays: StoredArrays, steps: StepSizes, tiling: Tiling, spec: CIMSpec) -> Float[Array, "*kernel R c O"]:
    """What each place counts: `sum_k f_k s_w d_k`, and in a true row the constant of an `offset` encoding."""
    if spec.skips_decomposition:
        return arrays.codes * expand_weight(steps.weight, tiling)
    scale = jnp.moveaxis(readout.output_scale(steps, tiling, spec), 1, 0)  # (K, R or 1, O)
    scale = jnp.expand_dims(scale, (*range(1, 1 + len(tiling.kernel_size)), -2))
    weights = jnp.sum(arrays.digits * scale, axis=0)
    if arrays.reference is None:
        return weights
    return weights + arrays.reference[..., None] * readout.constant(steps, tiling, spec)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(layer: Layer, codes: Array, kernel: Array) -> Array:
    """(N, H, W, C) by (kh, kw, 1, C, O) to (N, OH, OW, O)."""
    return products.sums(layer, codes, kernel)[0]


def _forward(layer: Layer, codes: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(layer, codes, kernel), (codes.astype(smallest_type(layer.spec.activation.code_range)), kernel)


def _backward(layer: Layer, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    codes, kernel = residuals
    operands = layer, codes.astype(jnp.float32), kernel, (gradient,)
    return products.to_inputs(*operands), products.to_columns(*operands)


_convolve.defvjp(_forward, _backward)
