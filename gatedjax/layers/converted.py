"""Mixers that a trained attention layer is converted into: Lizard, RAD-RWKV6 and RAD-RWKV7.

Queries, keys, values, gate and output are gated attention's own parameters, under their names; what
is new is learned against the layer that they come from (docs/conversions.md).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from gatedjax.config import LizardConfig, RADRWKV6Config, RADRWKV7Config
from gatedjax.layers import rwkv7_starts as starts
from gatedjax.layers.attention import GatedAttention
from gatedjax.layers.gate import apply_gate
from gatedjax.layers.gate_values import record
from gatedjax.layers.kv_cache import KVCache, capacity, empty_cache
from gatedjax.layers.parameters import parameter
from gatedjax.layers.pieces import Row
from gatedjax.layers.projection import Projection
from gatedjax.layers.rwkv7 import bounded_log_decay, removal_direction
from gatedjax.layers.scan_or_step import rwkv7_scan_or_step, scan_or_step
from gatedjax.layers.shared_weights import SharedWeights
from gatedjax.layers.token_info import TokenInfo

# RAD-RWKV6's strongest log decay.
STRONGEST_LOG_DECAY = -5.0
# Where Lizard's decay starts, as a logit: 0.982. Ours: the paper does not say.
DECAY_START = 4.0


@struct.dataclass
class LizardCache:
    """The last keys and values, and the state of all tokens."""

    window: KVCache
    state: Float[Array, "... B H F _"]


@struct.dataclass
class StateCache:
    """The matrix state of every head."""

    state: Float[Array, "... B H K V"]


def hedgehog(
    x: Float[Array, "B T H D"],
    weights: Float[Array, "H D F"],
) -> Float[Array, "B T H 2*F"]:
    """Hedgehog's features (arXiv 2402.04347): softmax(x W) and softmax(-x W), float32."""
    logits = jnp.einsum(
        "bthd,hdf->bthf",
        x.astype(jnp.float32),
        weights,
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.concatenate([jax.nn.softmax(logits), jax.nn.softmax(-logits)], axis=-1)


def exponential_log_decay(logits: Float[Array, "..."]) -> Float[Array, "..."]:
    """RAD-RWKV6's `max(-exp(logits), -5)`, float32."""
    # Below its bound the exponential has no gradient, and must not overflow.
    most = jnp.log(-STRONGEST_LOG_DECAY)
    return -jnp.exp(jnp.minimum(logits.astype(jnp.float32), most))


def identity_start(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """A unit matrix for every head."""
    _, rows, columns = shape
    return jnp.broadcast_to(jnp.eye(rows, columns, dtype=dtype), shape)


def decay_start(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Logits of decays from -6 at the first channel of a head to -1 at its last.

    Ours: the papers do not say.
    """
    _, channels = shape
    return jnp.broadcast_to(jnp.linspace(-6.0, -1.0, channels, dtype=dtype), shape)


def repeated(x: Float[Array, "B T Hk D"], heads: int) -> Float[Array, "B T H D"]:
    """Each key or value head for every query head of its group."""
    return jnp.repeat(x, heads // x.shape[2], axis=2)


class Lizard(GatedAttention):
    """Linear attention on learned features with one decay a token, plus softmax over a window."""

    config: LizardConfig  # pyrefly: ignore  (a narrower one)

    @nn.compact
    def with_weights(  # pyrefly: ignore  (a cache of its own)
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: LizardCache | None = None,
    ) -> tuple[Float[Array, "B T M"], LizardCache | None, SharedWeights]:
        c = self.config
        q, k, v, fused_logits = self._projections(x, info)
        if c.qk_norm:
            q = self._normed("query_norm", q)
            k = self._normed("key_norm", k)
        linear, state = self._of_all_tokens(q, k, v, x, info, cache)
        row = Row(
            self._rotated(q, info),
            self._rotated(k, info),
            v,
            None,
            info.segment_ids,
        )
        held = None if cache is None else cache.window
        anchor, window, weights = self._attention(row, None, None, info, held)
        weight = parameter(self, "anchor_weight", axes=(), shape=(), init=nn.initializers.ones)
        o = (linear.astype(jnp.float32) + weight * anchor.astype(jnp.float32)).astype(v.dtype)
        gate_logits = self._sdpa_logits(q, x, fused_logits)
        if gate_logits is not None:
            o = apply_gate(o, gate_logits, c.gate_activation, c.gate_mode)
        y = self._output(o, x.shape[-1])
        if state is None or not isinstance(window, KVCache):
            return y, None, weights
        return y, LizardCache(window, state), weights

    def _of_all_tokens(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T Hk D"],
        v: Float[Array, "B T Hk D"],
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: LizardCache | None,
    ) -> tuple[Array, Array | None]:
        """The scan's output, and its state after the last token if there is a cache.

        Args:
          q, k, v: queries and keys before their rotation, values.
          x: the layer's input, which the decay is made from.
          info: about the tokens.
          cache: of the tokens before.
        """
        c = self.config
        q_map = self._feature_map("query_features", "heads", c.num_heads)
        k_map = self._feature_map("key_features", "kv_heads", c.kv_heads)
        logits = Projection(
            {"embed": x.shape[-1]},
            {"rank": 1},
            self.init_std,
            self.dtype,
            name="decay",
        )(x).astype(jnp.float32)
        start = starts.constant(DECAY_START)
        logits = logits + parameter(self, "decay_bias", axes=(None,), shape=(1,), init=start)
        log_decay = jax.nn.log_sigmoid(logits)
        record(self, "log_decay", log_decay)
        return scan_or_step(
            hedgehog(q, q_map).astype(self.dtype),
            hedgehog(k, k_map).astype(self.dtype),
            v,
            jnp.broadcast_to(log_decay, q.shape[:3]),
            info.segment_ids,
            None if cache is None else cache.state,
            scale=1.0,
            normalize=True,
            chunk_size=c.chunk_size,
        )

    def _feature_map(self, name: str, axis: str, heads: int) -> Float[Array, "H D F"]:
        c = self.config
        return parameter(
            self,
            name,
            axes=(axis, "head_dim", None),
            shape=(heads, c.head_dim, c.features),
            init=identity_start,
        )

    def _head_parameters(self) -> tuple[Array | None, Array | None]:
        """What the learned logits in the denominator come to for each head; no slopes."""
        c = self.config
        logits = parameter(
            self,
            "meta_logits",
            axes=(None, "heads"),
            shape=(c.meta_logits, c.num_heads),
            init=nn.initializers.zeros,
        )
        return jax.nn.logsumexp(logits, axis=0), None

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> LizardCache:  # pyrefly: ignore
        c = self.config
        window = empty_cache(c, batch, length, self.dtype)
        assert isinstance(window, KVCache)
        # One more value column: the sum of the weights.
        shape = (batch, c.num_heads, 2 * c.features, c.head_dim + 1)
        return LizardCache(window, jnp.zeros(shape, jnp.float32))

    @nn.nowrap
    def capacity(self, cache: Any) -> int | None:
        window = cache.window if isinstance(cache, LizardCache) else cache
        return capacity(self.config, window)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        of_window = super().forward_flops_per_token(width, seq_len)
        maps = 2 * (c.num_heads + c.kv_heads) * c.head_dim * c.features
        state = 4 * c.num_heads * 2 * c.features * c.head_dim
        return of_window + maps + state + 2 * width


class RADRWKV(GatedAttention):
    """A recurrence in place of the softmax: decays for every channel (RAD-RWKV6), and what is found
    under a key removed before the new is written (RAD-RWKV7).

    No norm follows: a channel writes what its decay makes room for, which keeps the state bounded.
    """

    config: RADRWKV6Config | RADRWKV7Config  # pyrefly: ignore  (narrower ones)

    @nn.compact
    def with_weights(  # pyrefly: ignore  (a cache of its own)
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: StateCache | None = None,
    ) -> tuple[Float[Array, "B T M"], StateCache | None, SharedWeights]:
        c = self.config
        q, k, v, fused_logits = self._projections(x, info)
        q, k, _, _ = self._positioned(q, k, x, info, None)
        # Decays are of query heads, and with them the keys.
        k = repeated(k, c.num_heads)
        decay_logits = self._low_rank("decay", x, c.decay_rank, decay_start, jnp.tanh)
        state = None if cache is None else cache.state
        if isinstance(c, RADRWKV7Config):
            o, state = self._with_removal(q, k, v, decay_logits, x, info, state)
        else:
            log_decay = exponential_log_decay(decay_logits)
            record(self, "log_decay", log_decay)
            # 1 - w, without its cancellation.
            k = (k.astype(jnp.float32) * -jnp.expm1(log_decay)).astype(k.dtype)
            o, state = scan_or_step(
                q,
                k,
                v,
                log_decay,
                info.segment_ids,
                state,
                chunk_size=c.chunk_size,
            )
        gate_logits = self._sdpa_logits(q, x, fused_logits)
        if gate_logits is not None:
            o = apply_gate(o, gate_logits, c.gate_activation, c.gate_mode)
        y = self._output(o, x.shape[-1])
        return y, None if state is None else StateCache(state), SharedWeights(q, k)

    def _with_removal(
        self,
        q: Float[Array, "B T H D"],
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T Hk D"],
        decay_logits: Float[Array, "B T H D"],
        x: Float[Array, "B T M"],
        info: TokenInfo,
        state: Float[Array, "B H D D"] | None,
    ) -> tuple[Array, Array | None]:
        """RAD-RWKV7's outputs, and the state if there is one.

        Args:
          q, k, v: after their rotation.
          decay_logits: of every channel.
          x: the layer's input, which the rate is made from.
          info: about the tokens.
          state: before the first token.
        """
        c = self.config
        assert isinstance(c, RADRWKV7Config)
        log_decay = bounded_log_decay(decay_logits)
        rate = jax.nn.sigmoid(self._low_rank("rate", x, c.rate_rank, nn.initializers.zeros))
        record(self, "log_decay", log_decay)
        record(self, "rate", rate)
        removal_key = removal_direction(k, jnp.ones((), jnp.float32))
        # 1 - w + a: a channel writes what its decay and its removal make room for.
        written = k.astype(jnp.float32) * (rate - jnp.expm1(log_decay))
        o, state = rwkv7_scan_or_step(
            q,
            written.astype(k.dtype),
            repeated(v, c.num_heads),
            log_decay,
            removal_key,
            rate,
            info.segment_ids,
            state,
            chunk_size=c.chunk_size,
        )
        return (o * c.head_dim**-0.5).astype(v.dtype), state

    def _low_rank(
        self,
        name: str,
        x: Float[Array, "B T M"],
        rank: int,
        bias_start: starts.Initializer,
        activation=None,
    ) -> Float[Array, "B T H D"]:
        """A bias, and two matrices with `rank` channels between them; the second one is zero at the
        start. Float32.

        Args:
          name: of the parameters.
          x: the layer's input.
          rank: channels between the two.
          bias_start: of the bias.
          activation: between the two.
        """
        c = self.config
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        low = Projection(
            {"embed": x.shape[-1]},
            {"rank": rank},
            self.init_std,
            self.dtype,
            name=f"{name}_down",
        )(x)
        if activation is not None:
            low = activation(low.astype(jnp.float32))
        logits = Projection(
            {"rank": rank},
            heads,
            self.init_std,
            self.dtype,
            kernel_init=nn.initializers.zeros,
            name=f"{name}_up",
        )(low)
        bias = parameter(
            self,
            f"{name}_bias",
            axes=list(heads),
            shape=list(heads.values()),
            init=bias_start,
        )
        return logits.astype(jnp.float32) + bias

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> StateCache:  # pyrefly: ignore
        """An empty cache; its size does not depend on `length`."""
        c = self.config
        return StateCache(jnp.zeros((batch, c.num_heads, c.head_dim, c.head_dim), jnp.float32))

    @nn.nowrap
    def capacity(self, cache: Any) -> int | None:
        return None

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        channels = c.num_heads * c.head_dim
        # Attention over no token: its projections.
        projections = super().forward_flops_per_token(width, 0)
        has_removal = isinstance(c, RADRWKV7Config)
        ranks = c.decay_rank + (c.rate_rank if isinstance(c, RADRWKV7Config) else 0)
        steps = 8 if has_removal else 4
        return projections + 2 * ranks * (width + channels) + steps * channels * c.head_dim
