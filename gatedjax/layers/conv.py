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

    Args:
      x: the inputs.
      kernel: the weights of a token's last W inputs, its own last.
      segment_ids: inputs of another segment count as zeros.
      tail: the W-1 inputs before x; zeros if None.

    Returns:
      y in x's dtype, summed in float32; and the tail for the tokens after x.
    """
    width = kernel.shape[0]
    length = x.shape[1]
    segment_tail = None
    if segment_ids is not None and tail is not None:
        # The inputs before the row belong to the first token's segment.
        segment_tail = segment_ids[:, :1].repeat(width - 1, 1)
    # A sum of shifted copies, one for each of the few taps.
    y = jnp.zeros(x.shape, jnp.float32)
    for w in range(width):
        lag = width - 1 - w
        term = _lagged(x, lag, tail).astype(jnp.float32) * kernel[w]
        if segment_ids is not None and lag > 0:
            is_same = _lagged(segment_ids, lag, segment_tail) == segment_ids
            term = jnp.where(is_same[..., None], term, 0.0)
        y = y + term
    if tail is None:
        tail = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    seen = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    return y.astype(x.dtype), seen[:, length:]


def _lagged(
    x: Array,
    lag: int,
    tail: Array | None,
) -> Array:
    """[B, T, ..]: x of `lag` tokens ago; before the first the end of `tail`, or zeros."""
    if tail is None:
        # One pad: where T is cut over devices, XLA then sends no more than the edges.
        sides = [(0, 0, 0)] * x.ndim
        sides[1] = (lag, -lag, 0)
        return jax.lax.pad(x, jnp.zeros((), x.dtype), sides)
    start = tail.shape[1] - lag
    extended = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    return extended[:, start : start + x.shape[1]]
