"""Gated attention: projections, norms, positions, scales and the gate around `kernels_pallas.attention`."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.gate import GateLogits, apply_gate, gate_score
from gatedjax.layers.logit_scale import (
    QueryScale,
    alibi_slopes,
    keys_seen,
    logit_scale,
    unit_length,
)
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.projection import Projection, parameter
from gatedjax.layers.rope import apply_rope, inverse_frequencies, yarn_magnitude
from gatedjax.layers.token_info import TokenInfo
from gatedjax.sharding import is_cut, mesh_axis, per_shard
from kernels_pallas import attention, attention_step
from kernels_pallas.attention import NORMALIZERS, Normalizer, attention_sharded


@struct.dataclass
class KVCache:
    """Keys (after rotation) and values of past tokens. Position p lives in slot p mod S: a ring for windows."""

    k: Float[Array, "B S Hk D"]
    v: Float[Array, "B S Hk D"]


class GatedAttention(nn.Module):
    """Grouped-query attention with a gate at any of the five positions of arXiv 2505.06708 (table 1)."""

    config: GatedAttentionConfig
    norm_eps: float
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T M"], info: TokenInfo, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T M"], KVCache | None]:
        """Training: no cache. Prefill: T tokens into an empty cache. Decode: one token, T = 1, at info.positions."""
        c = self.config
        q, k, v, fused_logits = self._projections(x)
        if c.qk_norm:
            q, k = self._normed("query_norm", q), self._normed("key_norm", k)
        # Keys and queries are gated after their norm, which would cancel a head-wise gate, and before rotation.
        q, k, v = (self._gated(name, y, x) for name, y in (("query", q), ("key", k), ("value", v)))
        q, k = self._rotated(q, info), self._rotated(k, info)
        if c.query_scale != "none" or c.logit_scale == "learned":
            scale = QueryScale(c, self.std, self.dtype, name="query_scale")
            q, v = scale(q, v, x, keys_seen(info.positions, c.window))
        o, cache = self._attend(q, k, v, x, fused_logits, info, cache)
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        y = Projection(heads, {"embed": x.shape[-1]}, self.std, self.dtype, name="out")(o)
        return self._gated("output", y, x), cache

    def _projections(self, x: Array) -> tuple[Array, Array, Array, Array | None]:
        """Queries, keys, values, and the gate's logits if they come with the queries: [q | gate] in every head."""
        c = self.config
        gate = 0 if not c.fused_gate else c.head_dim if c.gate_granularity == "elementwise" else 1
        q = self._project("query", x, {"heads": c.num_heads, "head_dim": c.head_dim + gate})
        k = self._project("key", x, {"kv_heads": c.kv_heads, "head_dim": c.head_dim})
        v = self._project("value", x, {"kv_heads": c.kv_heads, "head_dim": c.head_dim})
        return q[..., : c.head_dim], k, v, q[..., c.head_dim :] if gate else None

    def _normed(self, name: str, y: Array) -> Array:
        if self.config.qk_norm_kind == "l2":
            return unit_length(y, self.norm_eps)
        return RMSNorm(self.norm_eps, self.config.zero_centered_norm, "head_dim", name=name)(y)

    def _project(self, name: str, x: Array, axes: dict[str, int]) -> Array:
        y = Projection({"embed": x.shape[-1]}, axes, self.std, self.dtype, name=name)(x)
        return nn.with_logical_constraint(y, ("batch", "length", next(iter(axes)), None))

    def _gated(self, position: str, y: Array, x: Array) -> Array:
        """`y`, gated if the gate sits here."""
        c = self.config
        if c.gate_position != position:
            return y
        axes = {"embed_act": y.shape[-1]} if position == "output" else self._head_axes(position, y)
        logits = GateLogits(c, axes, self.std, self.dtype, name="gate")(x)
        return apply_gate(y, logits, c.gate_activation, c.gate_mode)

    def _head_axes(self, position: str, y: Array) -> dict[str, int]:
        heads = "kv_heads" if position in ("key", "value") else "heads"
        return {heads: y.shape[2], "head_dim": y.shape[3]}

    def _rotated(self, x: Array, info: TokenInfo) -> Array:
        c = self.config
        if c.rotary_dim == 0:
            return x
        frequencies = inverse_frequencies(
            c.rotary_dim, c.rope_base, c.yarn_factor, c.yarn_original_length
        )
        return apply_rope(x, info.positions, frequencies, yarn_magnitude(c.yarn_factor))

    def _attend(self, q, k, v, x, logits: Array | None, info: TokenInfo, cache: KVCache | None):
        """Attention and, at position "sdpa", the gate: inside the kernel where it is the kernel's sigmoid epilogue."""
        c = self.config
        gated_here = c.gate_position == "sdpa"
        if gated_here and logits is None:
            logits = GateLogits(c, self._head_axes("sdpa", q), self.std, self.dtype, name="gate")(x)
        elif gated_here:
            self.sow("probes", "score", gate_score(logits, c.gate_activation))
        in_kernel = (
            gated_here and c.gate_mode == "multiplicative" and c.gate_activation == "sigmoid"
        )
        epilogue = jnp.broadcast_to(logits, (*q.shape[:3], logits.shape[-1])) if in_kernel else None
        arrays, options = (
            self._of_heads(),
            dict(
                normalizer=normalizer_of(c), logits_soft_cap=c.logits_soft_cap, scale=logit_scale(c)
            ),
        )
        if cache is not None and x.shape[1] == 1:
            cache, distances = append_token(cache, k[:, 0], v[:, 0], info.positions[:, 0])
            options |= {} if c.alibi == "none" else {"distances": distances}
            gate, valid = None if epilogue is None else epilogue[:, 0], distances <= info.positions
            o = attention_step(
                q[:, 0], cache.k, cache.v, valid=valid, gate_logits=gate, **arrays, **options
            )[:, None]
        else:
            self.sow("probes", "q", q)
            self.sow("probes", "k", k)
            o = attention_on_mesh(
                q, k, v, epilogue, info.segment_ids, window=c.window, **arrays, **options
            )
            cache = cache if cache is None else fill(cache, k, v)
        o = (
            o
            if in_kernel or not gated_here
            else apply_gate(o, logits, c.gate_activation, c.gate_mode)
        )
        return o, cache

    def _of_heads(self) -> dict[str, Array | None]:
        """Sinks and slopes, a number per head."""
        c, zeros = self.config, nn.initializers.zeros
        sinks = parameter(self, "sink_logits", ["heads"], [c.num_heads], zeros) if c.sinks else None
        slopes = None if c.alibi == "none" else jnp.asarray(alibi_slopes(c))
        if c.alibi == "learned":
            start = lambda key, shape, dtype: jnp.asarray(alibi_slopes(c), dtype)
            slopes = parameter(self, "alibi_slopes", ["heads"], [c.num_heads], start)
        return {"sink_logits": sinks, "alibi_slopes": slopes}


def normalizer_of(c: GatedAttentionConfig) -> Normalizer:
    """The normalizer of `config.normalizer`, with the configuration's parameters."""
    length = {"length": c.normalizer_length}
    parameters = {
        "sigmoid": length,
        "relu": length,
        "relu_squared": length,
        "clipped_softmax": {"alpha": c.clip_alpha, **length},
        "reweighted_softplus": {"power": c.reweight_power},
        "entmax": {"alpha": c.entmax_alpha},
    }
    return dataclasses.replace(NORMALIZERS[c.normalizer], **parameters.get(c.normalizer, {}))


def attention_on_mesh(q, k, v, gate, segment_ids, *, sink_logits, alibi_slopes, **options) -> Array:
    """`attention`; where the ambient mesh cuts the tokens, every device attends for its share of the queries."""
    if not is_cut("length", q.shape[1]):
        by_head = dict(sink_logits=sink_logits, alibi_slopes=alibi_slopes)
        return attention(q, k, v, gate_logits=gate, segment_ids=segment_ids, **by_head, **options)

    def part(q, k, v, gate, segment_ids, sink_logits, alibi_slopes):
        return attention_sharded(
            q,
            k,
            v,
            axis_name=mesh_axis("length"),
            gate_logits=gate,
            segment_ids=segment_ids,
            sink_logits=sink_logits,
            alibi_slopes=alibi_slopes,
            **options,
        )

    queries, keys = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
    in_axes = queries, keys, keys, queries, ("batch", "length"), ("heads",), ("heads",)
    return per_shard(part, in_axes, queries)(q, k, v, gate, segment_ids, sink_logits, alibi_slopes)


def init_cache(config: GatedAttentionConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache for `length` tokens; a window needs no more than its own slots."""
    slots = length if config.window is None else min(config.window, length)
    shape = (batch, slots, config.kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def fill(cache: KVCache, k: Float[Array, "B T Hk D"], v: Float[Array, "B T Hk D"]) -> KVCache:
    """The cache after a prompt of T tokens at positions 0 .. T-1: its last S tokens, each in slot position mod S."""
    slots, length = cache.k.shape[1], k.shape[1]
    kept = min(slots, length)
    where = jnp.arange(length - kept, length) % slots
    write = lambda old, new: old.at[:, where].set(new[:, length - kept :].astype(old.dtype))
    return KVCache(write(cache.k, k), write(cache.v, v))


def append_token(
    cache: KVCache, k: Float[Array, "B Hk D"], v: Float[Array, "B Hk D"], position: Array
):
    """The cache with the token at `position` [B] written, and how far back the token of each slot is: int32 [B, S].

    Slots that hold nothing yet are further back than the sequence is long.
    """
    slots = cache.k.shape[1]
    write = jax.vmap(
        lambda old, new, p: jax.lax.dynamic_update_index_in_dim(
            old, new.astype(old.dtype), p % slots, 0
        )
    )
    # Slot s holds the newest position <= p that is s modulo S; before the ring has gone round once, some hold nothing.
    distances = (position[:, None] - jnp.arange(slots)) % slots
    return KVCache(write(cache.k, k, position), write(cache.v, v, position)), distances
