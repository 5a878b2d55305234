"""`causal_conv` in XLA, and its relatives: a sum of shifted copies, one for each tap."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.causal_conv.inputs import ConvInputs
from kernels_pallas.common.precision import accumulator_dtype


def causal_conv(inputs: ConvInputs, is_activated: bool) -> Float[Array, "B T F"]:
    """As `api.causal_conv`."""
    return convolved(How(inputs.kernel.shape[0] - 1, is_activated), inputs)


class How(NamedTuple):
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
def convolved(how: How, inputs: ConvInputs) -> Float[Array, "B T F"]:
    """Over the tokens before alone, or over those on both sides."""
    return plain(how, inputs)


def _forward(how: How, inputs: ConvInputs):
    return convolved(how, inputs), inputs


def _backward(how: How, inputs: ConvInputs, dy: Array) -> tuple[ConvInputs]:
    x, kernel, bias, segment_ids = inputs
    dtype = accumulator_dtype(x.dtype)
    dsum = dy.astype(dtype)
    if how.is_activated:
        before_silu = _sum_of_taps(how.before, inputs)
        _, of_silu = jax.vjp(jax.nn.silu, before_silu)
        (dsum,) = of_silu(dsum)
    # In memory, for all taps: rounded as dy is.
    dsum = dsum.astype(dy.dtype)
    dx = jnp.zeros(x.shape, dtype)
    dkernel = []
    for w in range(kernel.shape[0]):
        lag = how.before - w
        # Of the tokens that have seen this one.
        seeing = lagged_in_segment(dsum, -lag, segment_ids).astype(dtype)
        dx = dx + seeing * kernel[w, None, None].astype(dtype)
        seen = lagged_in_segment(x, lag, segment_ids).astype(dtype)
        dkernel.append(jnp.sum(dsum.astype(dtype) * seen, axis=(0, 1)))
    dbias = None
    if bias is not None:
        dbias = jnp.sum(dsum, axis=(0, 1), dtype=dtype).astype(bias.dtype)
    gradients = ConvInputs(
        x=dx.astype(x.dtype),
        kernel=jnp.stack(dkernel).astype(kernel.dtype),
        bias=dbias,
        segment_ids=None,
    )
    return (gradients,)


convolved.defvjp(_forward, _backward)


def plain(
    how: How,
    inputs: ConvInputs,
    tail: Float[Array, "B _ F"] | None = None,
) -> Float[Array, "B T F"]:
    """The convolution and the SiLU, with the derivative of their parts.

    Args:
      how: what they are.
      inputs: the arrays; with a tail x is of segment 1 where it goes on.
      tail: the inputs before x; zeros if None.

    Returns:
      y in x's dtype.
    """
    y = _sum_of_taps(how.before, inputs, tail)
    return (jax.nn.silu(y) if how.is_activated else y).astype(inputs.x.dtype)


def _sum_of_taps(
    before: int,
    inputs: ConvInputs,
    tail: Float[Array, "B _ F"] | None = None,
) -> Float[Array, "B T F"]:
    """The convolution, float32 or float64."""
    x, kernel, bias, segment_ids = inputs
    dtype = accumulator_dtype(x.dtype)
    y = jnp.zeros(x.shape, dtype)
    for w in range(kernel.shape[0]):
        there = lagged_in_segment(x, before - w, segment_ids, tail)
        y = y + there.astype(dtype) * kernel[w, None, None].astype(dtype)
    return y if bias is None else y + bias[None, None].astype(dtype)


def lagged_in_segment(
    x: Float[Array, "B T F"],
    lag: int,
    segment_ids: Int[Array, "B T"] | None,
    tail: Float[Array, "B _ F"] | None = None,
) -> Float[Array, "B T F"]:
    """x of `lag` tokens ago, or -lag tokens ahead; zeros where that is another segment's."""
    there = lagged(x, lag, tail)
    if segment_ids is None or lag == 0:
        return there
    segment_tail = None
    if tail is not None:
        segment_tail = jnp.ones(tail.shape[:2], segment_ids.dtype)
    is_same = lagged(segment_ids, lag, segment_tail) == segment_ids
    # Selected before it is multiplied: what is not finite over there reaches neither the output nor
    # the gradient of what it is multiplied by.
    return jnp.where(is_same[..., None], there, jnp.zeros((), x.dtype))


def lagged(
    x: Array,
    lag: int,
    tail: Array | None = None,
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
