"""`rotary` in XLA: the norm, rounded to x's dtype, then the rotation, as two layers would."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.common.device import target_platform
from kernels_pallas.common.norm import rms_norm
from kernels_pallas.rotary.inputs import (
    Pairs,
    RotaryInputs,
    RotaryOptions,
    of_channels,
    of_pairs,
    quarter_turned,
)


def rotary(inputs: RotaryInputs, options: RotaryOptions) -> Float[Array, "B T H D"]:
    """As `reference.rotary`, but rounded after the norm too."""
    x = normed(inputs.x, inputs.norm_scale, options.eps)
    if not options.pairs.pairs:
        return x
    # A TPU moves half a head along the lanes slowly, in passes of their own, and multiplies by a
    # matrix of 16-bit numbers in passing.
    by_matrix = x.dtype == jnp.bfloat16 and target_platform(x) == "tpu"
    tables = of_channels(inputs, options) if by_matrix else of_pairs(inputs, options)
    # The same for all heads.
    cos, sin = (table[:, :, None] for table in tables)
    if by_matrix:
        return _turned_by_matrix(x, cos, sin, options.pairs)
    return turned(x, cos, sin, options.pairs.interleaved)


def normed(
    x: Float[Array, "B T H D"],
    norm_scale: Float[Array, " D"] | None,
    eps: float,
) -> Float[Array, "B T H D"]:
    """The RMS norm of every head, in x's dtype; x without a scale."""
    return x if norm_scale is None else rms_norm(x, norm_scale, eps)


def turned(
    x: Float[Array, "B T H D"],
    cos: Float[Array, "B T #H J"],
    sin: Float[Array, "B T #H J"],
    interleaved: bool,
) -> Float[Array, "B T H D"]:
    """`(a, b) -> (a cos - b sin, b cos + a sin)` of the pairs of the first 2 J channels.

    Args:
      x: queries or keys.
      cos, sin: of every token and pair, float32 or float64.
      interleaved: as in `Pairs`.

    Returns:
      x, turned in the dtype of cos, in its own.
    """
    num_pairs = cos.shape[-1]
    rotating = x[..., : 2 * num_pairs]
    # The coordinates of the pairs are the two halves of the rotated channels, or neighbors. Cut
    # first: all channels in float32 would be an array in memory.
    if interleaved:
        left, right = rotating[..., 0::2], rotating[..., 1::2]
    else:
        left, right = rotating[..., :num_pairs], rotating[..., num_pairs:]
    left, right = left.astype(cos.dtype), right.astype(cos.dtype)
    both = [left * cos - right * sin, right * cos + left * sin]
    if interleaved:
        rotated = jnp.stack(both, axis=-1).reshape(rotating.shape)
    else:
        rotated = jnp.concatenate(both, axis=-1)
    if 2 * num_pairs == x.shape[-1]:
        return rotated.astype(x.dtype)
    unrotated = x[..., 2 * num_pairs :]
    return jnp.concatenate([rotated.astype(x.dtype), unrotated], axis=-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _turned_by_matrix(
    x: Float[Array, "B T H D"],
    cos: Float[Array, "B T 1 D"],
    sin: Float[Array, "B T 1 D"],
    pairs: Pairs,
) -> Float[Array, "B T H D"]:
    """`x cos + (x turned by 90 degrees) sin`, in float32: the gradient is a rotation back.

    Args:
      x: queries or keys, bfloat16.
      cos, sin: of every token and channel, constants of the gradient.
      pairs: which channels are one.
    """
    matrix = jnp.asarray(pairs.quarter_turn(), x.dtype)
    quarter = quarter_turned(x, matrix)
    return (x.astype(jnp.float32) * cos + quarter * sin).astype(x.dtype)


def _forward(x: Array, cos: Array, sin: Array, pairs: Pairs):
    return _turned_by_matrix(x, cos, sin, pairs), (cos, sin)


def _backward(
    pairs: Pairs,
    residuals: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, None, None]:
    cos, sin = residuals
    return _turned_by_matrix(dy, cos, -sin, pairs), None, None


_turned_by_matrix.defvjp(_forward, _backward)
