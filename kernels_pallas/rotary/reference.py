"""`rotary` by its formula, pair by pair: slow, plain, exact."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from kernels_pallas.common.precision import accumulator_dtype
from kernels_pallas.rotary.inputs import RotaryInputs, RotaryOptions, of_pairs


def rotary(inputs: RotaryInputs, options: RotaryOptions) -> Float[Array, "B T H D"]:
    """The norm `x / sqrt(mean(x^2) + eps) * scale` of every head, then the turn of every pair:

    (a, b) -> (a cos - b sin, b cos + a sin)

    All in float32 (or float64), rounded once.
    """
    dtype = accumulator_dtype(inputs.x.dtype)
    y = inputs.x.astype(dtype)
    if inputs.norm_scale is not None:
        mean_square = jnp.mean(y * y, axis=-1, keepdims=True)
        scale = inputs.norm_scale.astype(dtype)[None, None, None]
        y = y * lax.rsqrt(mean_square + options.eps) * scale
    left, right = options.pairs.coordinates()
    # The same for all heads.
    cos, sin = (table[:, :, None] for table in of_pairs(inputs, options))
    a, b = y[..., left], y[..., right]
    y = y.at[..., left].set(a * cos - b * sin)
    y = y.at[..., right].set(b * cos + a * sin)
    return y.astype(inputs.x.dtype)
