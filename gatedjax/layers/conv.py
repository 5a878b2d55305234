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
      segment_ids: inputs of another segment count as zeros. With a tail they are numbered, and
        padding comes last (`token_info.arranged`).
      tail: the W-1 inputs before x, of segment 1; zeros if None.

    Returns:
      y in x's dtype, summed in float32; and the tail for the tokens after x.
    """
    width = kernel.shape[0]
    segment_tail = None
    if segment_ids is not None and tail is not None:
        segment_tail = jnp.ones(tail.shape[:2], segment_ids.dtype)
    # A sum of shifted copies, one for each of the few taps.
    y = jnp.zeros(x.shape, jnp.float32)
    for w in range(width):
        lag = width - 1 - w
        lagged = _lagged(x, lag, tail).astype(jnp.float32)
        if segment_ids is not None and lag > 0:
            is_same = _lagged(segment_ids, lag, segment_tail) == segment_ids
            # Selected before it is multiplied: what is not finite over there reaches neither y nor
            # the gradient of the kernel.
            lagged = jnp.where(is_same[..., None], lagged, 0.0)
        y = y + lagged * kernel[w]
    if tail is None:
        tail = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    return y.astype(x.dtype), _next_tail(x, tail, segment_ids)


def _next_tail(
    x: Float[Array, "B T F"],
    tail: Float[Array, "B W F"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B W F"]:
    """The last inputs of each row's last document; zeros where it is shorter than that."""
    width = tail.shape[1]
    seen = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    if segment_ids is None:
        return seen[:, x.shape[1] :]
    count = jnp.sum(segment_ids != 0, axis=1)
    last = count[:, None] + jnp.arange(width)
    # Segments of a row ascend; a row without a token goes on with segment 1.
    last_segment = jnp.maximum(jnp.max(segment_ids, axis=1, keepdims=True), 1)
    segments = jnp.concatenate([jnp.ones_like(last), segment_ids], axis=1)
    is_same = jnp.take_along_axis(segments, last, axis=1) == last_segment
    inputs = jnp.take_along_axis(seen, last[..., None], axis=1)
    return jnp.where(is_same[..., None], inputs, 0)


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
