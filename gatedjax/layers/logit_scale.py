"""What attention multiplies its queries, values and logits by, and the slopes of ALiBi."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection


def keys_seen(positions: Int[Array, "B T"], window: int | None) -> Int[Array, "B T"]:
    """How many keys a causal token sees: its position in its document and itself, or its window."""
    seen = positions + 1
    return seen if window is None else jnp.minimum(seen, window)


def mean_log(length: int) -> float:
    """The mean of log n over the rows n = 1 .. length of a causal sequence.

    At least that of two rows.
    """
    rows = np.arange(1, max(length, 2) + 1)
    return float(np.mean(np.log(rows)))


class QueryScale(nn.Module):
    """`config.query_scale` and a learned `config.logit_scale`.

    Factors of the queries and, if selective, of the values, for every token and head.

    log_length: log n. scalable_softmax: s_h log n, with s_h = 1 / mean(log n) at the start: 1 on
    average. selective: tanh(x w_h) + 1 + sigmoid(a_h) log n for queries, 1 + tanh(x u_h) for
    values. The paper leaves the functions of the token open: these are one linear map a head. a_h
    is -4 at the start: near the plain softmax.
    """

    config: GatedAttentionConfig
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        q: Float[Array, "B T H D"],
        v: Float[Array, "B T Hk D"],
        x: Float[Array, "B T M"],
        seen: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T H D"], Float[Array, "B T Hk D"]]:
        """(q, v), scaled in float32 and returned in their dtypes.

        Args:
          q: queries.
          v: values.
          x: the layer's input, which selective factors are made from.
          seen: how many keys every token sees.
        """
        c = self.config
        # One number for every token, the same in all heads: [B, T, 1].
        log_n = jnp.log(seen.astype(jnp.float32))[:, :, None]
        factor = jnp.float32(1.0)
        if c.query_scale == "log_length":
            factor = log_n
        if c.query_scale == "scalable_softmax":
            length_scale = self._per_head("length_scale", 1 / mean_log(_training_length(c)))
            factor = length_scale * log_n
        if c.query_scale == "selective":
            # Queries are sharpened token by token and by the length, values are scaled as they are.
            query_temperature = self._of_token(
                "query_temperature",
                x,
                "heads",
                c.num_heads,
            )
            length_weight = jax.nn.sigmoid(self._per_head("length_weight", -4.0))
            factor = query_temperature + 1 + length_weight * log_n
            value_temperature = self._of_token(
                "value_temperature",
                x,
                "kv_heads",
                c.kv_heads,
            )
            v = _scaled(v, 1 + value_temperature)
        if c.logit_scale == "learned":
            # One for the layer in the paper; one a head here, as its successors have it.
            length = _training_length(c)
            start = math.log2(max(length**2 - length, 2))
            factor = factor * self._per_head("logit_scale", start)
        return _scaled(q, factor), v

    def _per_head(self, name: str, start: float) -> Float[Array, " H"]:
        """A learned number for every head."""
        init = nn.initializers.constant(start)
        return parameter(
            self,
            name,
            axes=["heads"],
            shape=[self.config.num_heads],
            init=init,
        )

    def _of_token(
        self,
        name: str,
        x: Array,
        heads: str,
        num_heads: int,
    ) -> Float[Array, "B T _"]:
        """`tanh(x W)`, a number for every token and head, in float32."""
        width = {"embed": x.shape[-1]}
        project = Projection(
            width,
            {heads: num_heads},
            self.init_std,
            self.dtype,
            name=name,
        )
        return jnp.tanh(project(x).astype(jnp.float32))


def _training_length(c: GatedAttentionConfig) -> int:
    # The configuration refuses learned scales without it.
    assert c.normalizer_length is not None
    return c.normalizer_length


def logit_scale(c: GatedAttentionConfig) -> float:
    """What logits are multiplied by inside the op."""
    scales = {
        "inverse_sqrt": c.head_dim**-0.5 if c.attention_scale is None else c.attention_scale,
        "learned": 1.0,
        "log_dim": math.log(c.head_dim),
    }
    return scales[c.logit_scale]


def alibi_slopes(c: GatedAttentionConfig) -> Float[np.ndarray, " H"]:
    """The slopes of `config.alibi`, fixed or at the start; positive ones favor near keys."""
    if c.alibi == "balanced":
        slopes = 2.0 ** -np.arange(1, c.num_heads // 2 + 1)
        return np.concatenate([slopes, -slopes]).astype(np.float32)
    exponents = -8 * np.arange(1, c.num_heads + 1) / c.num_heads
    return (2.0**exponents).astype(np.float32)


def _scaled(y: Float[Array, "B T _ D"], factor: Float[Array, "..."]) -> Float[Array, "B T _ D"]:
    """`y` times a factor of every token and head, in float32; returned in y's dtype."""
    return (y.astype(jnp.float32) * factor[..., None]).astype(y.dtype)
