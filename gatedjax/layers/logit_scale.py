"""What a layer multiplies its logits and values by, token by token or head by head, and the slopes of ALiBi."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.projection import Projection, parameter


def unit_length(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """`x / |x|` over the last axis, in float32; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    return (x32 * jax.lax.rsqrt(jnp.sum(x32 * x32, -1, keepdims=True) + eps)).astype(x.dtype)


def keys_seen(positions: Int[Array, "B T"], window: int | None) -> Int[Array, "B T"]:
    """How many keys a causal token sees: its position in its document and itself, or its window."""
    return positions + 1 if window is None else jnp.minimum(positions + 1, window)


def mean_log(length: int) -> float:
    """The mean of log n over the rows n = 1 .. length of a causal sequence; at least that of two rows."""
    return float(np.mean(np.log(np.arange(1, max(length, 2) + 1))))


class QueryScale(nn.Module):
    """`config.query_scale` and a learned `config.logit_scale`: queries (and, if selective, values) times a number each.

    log_length: log n. scalable_softmax: s_h log n, with s_h = 1 / mean(log n) at the start: 1 on average.
    selective: tanh(x w_h) + 1 + sigmoid(a_h) log n for queries, 1 + tanh(x u_h) for values. The paper leaves the
    functions of the token open: these are one linear map a head. a_h is -4 at the start: near the plain softmax.
    """

    config: GatedAttentionConfig
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B T H D"],
        v: Float[Array, "B T Hk D"],
        x: Float[Array, "B T M"],
        seen,
    ):
        """(q, v), scaled in float32 and returned in their dtypes. `seen` [B, T] keys of every token."""
        c = self.config
        log_n = jnp.log(seen.astype(jnp.float32))[:, :, None]
        by_head = lambda name, start: parameter(
            self, name, ["heads"], [c.num_heads], nn.initializers.constant(start)
        )
        times = jnp.float32(1.0)
        if c.query_scale == "log_length":
            times = log_n
        if c.query_scale == "scalable_softmax":
            times = by_head("length_scale", 1 / mean_log(c.normalizer_length)) * log_n
        if c.query_scale == "selective":
            of_tokens = lambda name, heads, n: jnp.tanh(
                Projection({"embed": x.shape[-1]}, {heads: n}, self.std, self.dtype, name=name)(
                    x
                ).astype(jnp.float32)
            )
            times = of_tokens("query_temperature", "heads", c.num_heads) + 1
            times = times + jax.nn.sigmoid(by_head("length_weight", -4.0)) * log_n
            v = _scaled(v, 1 + of_tokens("value_temperature", "kv_heads", c.kv_heads))
        if c.logit_scale == "learned":
            # One for the layer in the paper; by head here, as its successors have it.
            times = times * by_head(
                "logit_scale", math.log2(max(c.normalizer_length**2 - c.normalizer_length, 2))
            )
        return _scaled(q, times), v


def logit_scale(c: GatedAttentionConfig) -> float:
    """What logits are multiplied by inside the op."""
    return {"inverse_sqrt": c.head_dim**-0.5, "learned": 1.0, "log_dim": math.log(c.head_dim)}[
        c.logit_scale
    ]


def alibi_slopes(c: GatedAttentionConfig) -> Float[np.ndarray, " H"]:
    """The slopes of `config.alibi`, fixed or at the start; positive ones favor near keys."""
    if c.alibi == "balanced":
        slopes = 2.0 ** -np.arange(1, c.num_heads // 2 + 1)
        return np.concatenate([slopes, -slopes]).astype(np.float32)
    return (2.0 ** (-8 * np.arange(1, c.num_heads + 1) / c.num_heads)).astype(np.float32)


def _scaled(y: Float[Array, "B T H D"], times: Float[Array, "... #H"]) -> Float[Array, "B T H D"]:
    return (y.astype(jnp.float32) * times[..., None]).astype(y.dtype)
