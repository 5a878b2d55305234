"""The short causal depthwise convolution in front of linear mixers."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


def causal_conv(
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"],
    segment_ids: Int[Array, "B T"] | None = None,
    tail: Float[Array, "B W-1 F"] | None = None,
) -> tuple[Float[Array, "B T F"], Float[Array, "B W-1 F"]]:
    """`y_t = sum_w kernel[w] x_{t - (W-1) + w}`, per channel, over inputs of t's own segment only.

    `tail`: the W-1 inputs before x (zeros if None). Returns y in x's dtype, summed in float32, and the new tail.
    """
    width, length = kernel.shape[0], x.shape[1]
    y = jnp.zeros(x.shape, jnp.float32)
    for w in range(width):
        lag = width - 1 - w
        term = _lagged(x, lag, tail).astype(jnp.float32) * kernel[w]
        if segment_ids is not None and lag > 0:
            # What stands before the row (the tail) belongs to the first token's segment.
            earlier = _lagged(
                segment_ids, lag, None if tail is None else segment_ids[:, :1].repeat(width - 1, 1)
            )
            term = jnp.where((earlier == segment_ids)[..., None], term, 0.0)
        y = y + term
    before = (
        jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
        if tail is None
        else tail.astype(x.dtype)
    )
    return y.astype(x.dtype), jnp.concatenate([before, x], axis=1)[:, length:]


def _lagged(x: Array, lag: int, tail: Array | None) -> Array:
    """[B, T, ..]: x of `lag` tokens ago; before the first the end of `tail`, or zeros."""
    if tail is None:  # one pad: where T is cut over devices, XLA then sends no more than the edges
        sides = [(lag, -lag, 0) if axis == 1 else (0, 0, 0) for axis in range(x.ndim)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), sides)
    start = tail.shape[1] - lag
    return jnp.concatenate([tail.astype(x.dtype), x], axis=1)[:, start : start + x.shape[1]]
