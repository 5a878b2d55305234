"""What linear mixers see of the tokens just before: the short causal depthwise convolution, and
RWKV's token shift. For encoders a convolution over the tokens on both sides.
"""

import math
from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.layers.parameters import parameter
from gatedjax.sharding import is_cut
from kernels_pallas import ops
from kernels_pallas.causal_conv import xla
from kernels_pallas.causal_conv.inputs import ConvInputs


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
    """The op `causal_conv`, which may also go on from a tail.

    Args:
      x, kernel, bias, is_activated: as of the op.
      segment_ids: inputs of another segment count as zeros. With a tail they are numbered, and
        padding comes last (`token_info.arranged`).
      tail: the W-1 inputs before x, of segment 1; zeros if None.

    Returns:
      y in x's dtype, computed in float32; and the tail for the tokens after x.
    """
    width = kernel.shape[0]
    if tail is None:
        # A kernel needs all tokens of a row; XLA sends no more than the edges.
        implementation = "xla" if is_cut("length", x.shape[1]) else None
        y = ops.causal_conv(
            x,
            kernel,
            bias,
            segment_ids,
            is_activated=is_activated,
            implementation=implementation,
        )
        tail = jnp.zeros((x.shape[0], width - 1, x.shape[2]), x.dtype)
    else:
        how = xla.How(before=width - 1, is_activated=is_activated)
        y = xla.plain(how, ConvInputs(x, kernel, bias, segment_ids), tail)
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
    how = xla.How(before=(kernel.shape[0] - 1) // 2, is_activated=False)
    return xla.convolved(how, ConvInputs(x, kernel, bias, segment_ids))


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
    previous = xla.lagged_in_segment(x, 1, segment_ids, tail)
    if tail is None:
        tail = jnp.zeros((x.shape[0], 1, x.shape[2]), x.dtype)
    return previous, _next_tail(x, tail, segment_ids)


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


def uniform(
    key: Array,
    shape: tuple[int, ...],
    dtype,
    bound: float,
) -> Array:
    """Uniform between -bound and bound, as PyTorch starts maps and convolutions."""
    return jax.random.uniform(key, shape, dtype, -bound, bound)
