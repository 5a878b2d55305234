"""What linear mixers see of the tokens just before: the short causal depthwise convolution, and
RWKV's token shift. For encoders a convolution over the tokens on both sides.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.layers.parameters import parameter


def short_conv(
    module: nn.Module,
    arrays: Sequence[Float[Array, "B T ..."]],
    width: int,
    segment_ids: Int[Array, "B T"] | None,
    tail: Float[Array, "B _ F"] | None,
    has_bias: bool = False,
) -> tuple[list[Array], Float[Array, "B _ F"]]:
    """Queries, keys and values after a causal depthwise convolution and SiLU.

    Args:
      module: owns the kernel, its parameter "conv" [W, F] over the channels of all arrays.
      arrays: [B, T, heads, channels] each.
      width: tokens that the convolution sees.
      segment_ids: as in `causal_conv`.
      tail: the inputs before the first token; zeros if None.
      has_bias: add a parameter "conv_bias" [F] before the SiLU (Mamba-2).

    Returns:
      The arrays, and the inputs that the next token will need.
    """
    sizes = [math.prod(x.shape[2:]) for x in arrays]
    kernel = parameter(
        module,
        "conv",
        axes=[None, None],
        shape=[width, sum(sizes)],
        init=nn.initializers.normal(width**-0.5),
    )
    bias = None
    if has_bias:
        bias = parameter(
            module,
            "conv_bias",
            axes=[None],
            shape=[sum(sizes)],
            init=partial(uniform, bound=width**-0.5),
        )
    # Depthwise: no channel sees another. Joining the arrays for one call would copy them twice.
    mixed = []
    tails = []
    end = 0
    for x, size in zip(arrays, sizes):
        own = slice(end, end + size)
        end += size
        y, tail_after = causal_conv(
            x.reshape(*x.shape[:2], -1),
            kernel[:, own],
            segment_ids,
            None if tail is None else tail[..., own],
            None if bias is None else bias[own],
            is_activated=True,
        )
        mixed.append(y.reshape(x.shape))
        tails.append(tail_after)
    return mixed, jnp.concatenate(tails, axis=-1)


def causal_conv(
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"],
    segment_ids: Int[Array, "B T"] | None = None,
    tail: Float[Array, "B W-1 F"] | None = None,
    bias: Float[Array, " F"] | None = None,
    *,
    is_activated: bool = False,
) -> tuple[Float[Array, "B T F"], Float[Array, "B W-1 F"]]:
    """`y_t = b + sum_w kernel[w] x_{t - (W-1) + w}`, per channel, over t's own segment only.

    Args:
      x: the inputs.
      kernel: the weights of a token's last W inputs, its own last.
      segment_ids: inputs of another segment count as zeros. With a tail they are numbered, and
        padding comes last (`token_info.arranged`).
      tail: the W-1 inputs before x, of segment 1; zeros if None.
      bias: b; zeros if None.
      is_activated: y is the SiLU of this sum.

    Returns:
      y in x's dtype, computed in float32; and the tail for the tokens after x.
    """
    width = kernel.shape[0]
    how = _How(before=width - 1, is_activated=is_activated)
    if tail is None:
        y = _convolved(how, x, kernel, bias, segment_ids)
        tail = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    else:
        y = _plain(how, x, kernel, bias, segment_ids, tail)
    return y, _next_tail(x, tail, segment_ids)


def centered_conv(
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"],
    segment_ids: Int[Array, "B T"] | None = None,
    bias: Float[Array, " F"] | None = None,
) -> Float[Array, "B T F"]:
    """`y_t = b + sum_w kernel[w] x_{t - floor((W-1) / 2) + w}`, per channel, for encoders.

    Args:
      x: the inputs.
      kernel: the weights of a token's neighbors; of an even number one more comes after it.
      segment_ids: inputs of another segment count as zeros.
      bias: b; zeros if None.

    Returns:
      y in x's dtype, summed in float32.
    """
    how = _How(before=(kernel.shape[0] - 1) // 2, is_activated=False)
    return _convolved(how, x, kernel, bias, segment_ids)


class _How(NamedTuple):
    """What a convolution is beside its arrays.

    Attributes:
      before: how many tokens ago the input of the first tap was.
      is_activated: whether a SiLU follows.
    """

    before: int
    is_activated: bool


# With a gradient of its own: otherwise the product of every tap with dy is rounded, lies in memory,
# and is added up by another pass. Nothing is kept but the inputs.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolved(
    how: _How,
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"],
    bias: Float[Array, " F"] | None,
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B T F"]:
    return _plain(how, x, kernel, bias, segment_ids)


def _convolved_forward(how: _How, *arrays: Array | None):
    return _convolved(how, *arrays), arrays


def _convolved_backward(how: _How, arrays: tuple, dy: Array) -> tuple[Array | None, ...]:
    x, kernel, bias, segment_ids = arrays
    dsum = dy.astype(jnp.float32)
    if how.is_activated:
        before_silu = _sum_of_taps(how.before, x, kernel, bias, segment_ids)
        _, of_silu = jax.vjp(jax.nn.silu, before_silu)
        (dsum,) = of_silu(dsum)
    # In memory, for all taps: rounded as dy is.
    dsum = dsum.astype(dy.dtype)
    dx = jnp.zeros(x.shape, jnp.float32)
    dkernel = []
    for w in range(kernel.shape[0]):
        lag = how.before - w
        # Of the tokens that have seen this one.
        dx = dx + _lagged_in_segment(dsum, -lag, segment_ids).astype(jnp.float32) * kernel[w]
        seen = _lagged_in_segment(x, lag, segment_ids).astype(jnp.float32)
        dkernel.append(jnp.sum(dsum.astype(jnp.float32) * seen, axis=(0, 1)))
    dbias = None
    if bias is not None:
        dbias = jnp.sum(dsum, axis=(0, 1), dtype=jnp.float32).astype(bias.dtype)
    return dx.astype(x.dtype), jnp.stack(dkernel).astype(kernel.dtype), dbias, None


_convolved.defvjp(_convolved_forward, _convolved_backward)


def _plain(
    how: _How,
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"],
    bias: Float[Array, " F"] | None,
    segment_ids: Int[Array, "B T"] | None,
    tail: Float[Array, "B _ F"] | None = None,
) -> Float[Array, "B T F"]:
    """The convolution, and the SiLU."""
    y = _sum_of_taps(how.before, x, kernel, bias, segment_ids, tail)
    return (jax.nn.silu(y) if how.is_activated else y).astype(x.dtype)


def _sum_of_taps(
    before: int,
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"],
    bias: Float[Array, " F"] | None,
    segment_ids: Int[Array, "B T"] | None,
    tail: Float[Array, "B _ F"] | None = None,
) -> Float[Array, "B T F"]:
    """The convolution, float32: a sum of shifted copies, one for each of the few taps."""
    y = jnp.zeros(x.shape, jnp.float32)
    for w in range(kernel.shape[0]):
        lagged = _lagged_in_segment(x, before - w, segment_ids, tail)
        y = y + lagged.astype(jnp.float32) * kernel[w]
    return y if bias is None else y + bias


def previous_inputs(
    x: Float[Array, "B T F"],
    segment_ids: Int[Array, "B T"] | None = None,
    tail: Float[Array, "B 1 F"] | None = None,
) -> tuple[Float[Array, "B T F"], Float[Array, "B 1 F"]]:
    """RWKV's token shift: the input of the token before, zeros where a document begins.

    Args:
      x: the inputs.
      segment_ids: as in `causal_conv`.
      tail: the input before x, of segment 1; zeros if None.

    Returns:
      The inputs one token earlier, and the tail for the tokens after x.
    """
    previous = _lagged_in_segment(x, 1, segment_ids, tail)
    if tail is None:
        tail = jnp.zeros((x.shape[0], 1, x.shape[2]), x.dtype)
    return previous, _next_tail(x, tail, segment_ids)


def _lagged_in_segment(
    x: Float[Array, "B T F"],
    lag: int,
    segment_ids: Int[Array, "B T"] | None,
    tail: Float[Array, "B _ F"] | None = None,
) -> Float[Array, "B T F"]:
    """x of `lag` tokens ago, or -lag tokens ahead; zeros where that is another segment's."""
    lagged = _lagged(x, lag, tail)
    if segment_ids is None or lag == 0:
        return lagged
    segment_tail = None
    if tail is not None:
        segment_tail = jnp.ones(tail.shape[:2], segment_ids.dtype)
    is_same = _lagged(segment_ids, lag, segment_tail) == segment_ids
    # Selected before it is multiplied: what is not finite over there reaches neither the output nor
    # the gradient of what it is multiplied by.
    return jnp.where(is_same[..., None], lagged, 0)


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
    """[B, T, ..]: x of `lag` tokens ago; before the first the end of `tail`, or zeros.

    Without a tail also of tokens ahead: zeros behind the last.
    """
    if tail is None:
        # One pad: where T is cut over devices, XLA then sends no more than the edges.
        sides = [(0, 0, 0)] * x.ndim
        sides[1] = (lag, -lag, 0)
        return jax.lax.pad(x, jnp.zeros((), x.dtype), sides)
    start = tail.shape[1] - lag
    extended = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
    return extended[:, start : start + x.shape[1]]


def uniform(
    key: Array,
    shape: tuple[int, ...],
    dtype,
    bound: float,
) -> Array:
    """Uniform between -bound and bound, as PyTorch starts maps and convolutions."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)
