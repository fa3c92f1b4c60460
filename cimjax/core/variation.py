"""Variation of stored values: log-normal factors on digits after quantization and encoding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from cimjax.core.tiling import Tiling, tile_kernel
from cimjax.spec import VariationSpec, VariationTarget


def vary(
    digits: Float[Array, "K *kernel R c O"], key: Array, tiling: Tiling, spec: VariationSpec
) -> Float[Array, "K *kernel R c O"]:
    """Digits multiplied by `exp(theta)`, `theta ~ N(0, sigma^2)` (the paper's eq. 5); zero digits stay zero.

    Args:
      digits: (K, kh, kw, R, c, O) float32; not quantized again afterwards.
      key: the random key of this chip: the same key gives the same cells.
      spec: `on="weights"` draws one theta per weight, shared by its planes and independent of the tiling; `on="cells"`
        one per digit.

    Returns:
      Array of the same shape, float32.
    """
    if spec.on == VariationTarget.CELLS:
        theta = jax.random.normal(key, digits.shape, jnp.float32)
    else:
        kernel_shape = (*tiling.kernel_size, tiling.in_channels, tiling.features)
        theta = tile_kernel(jax.random.normal(key, kernel_shape, jnp.float32), tiling)
    return digits * jnp.exp(spec.sigma * theta)


def vary_reference(digits: Float[Array, "*kernel R c"], key: Array, spec: VariationSpec) -> Float[Array, "*kernel R c"]:
    """The dummy columns' cells under variation: they vary with `on="cells"`, being cells; weights they are not.

    Args:
      digits: (kh, kw, R, c) float32.
    """
    if spec.on != VariationTarget.CELLS:
        return digits
    return digits * jnp.exp(spec.sigma * jax.random.normal(jax.random.fold_in(key, 1), digits.shape, jnp.float32))
