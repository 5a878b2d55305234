"""Gated attention.

Projections, norms, positions, scales and the gate around `kernels_pallas.attention`.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.base import Mixer
from gatedjax.layers.gate import GateLogits, activated_gate, apply_gate
from gatedjax.layers.gate_values import record
from gatedjax.layers.kv_cache import (
    KVCache,
    append,
    capacity,
    distances_of_slots,
    empty_cache,
    in_time_order,
    num_tokens,
)
from gatedjax.layers.logit_scale import QueryScale, alibi_slopes, keys_seen, logit_scale
from gatedjax.layers.norm import RMSNorm, unit_length
from gatedjax.layers.on_mesh import attention_on_mesh
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.rope import apply_rope, inverse_frequencies, yarn_magnitude
from gatedjax.layers.token_info import History, TokenInfo, history_of
from kernels_pallas.attention import (
    NORMALIZERS,
    Normalizer,
    attention_step,
)

Queries = Float[Array, "B T H D"]
Keys = Float[Array, "B T Hk D"]


class GatedAttention(Mixer):
    """Grouped-query attention with a gate at any of five positions (arXiv 2505.06708, table 1)."""

    takes_pieces: ClassVar[bool] = True

    config: GatedAttentionConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: KVCache | None = None,
    ) -> tuple[Float[Array, "B T M"], KVCache | None]:
        c = self.config
        q, k, v, fused_logits = self._projections(x)
        # The norm of queries and keys keeps the logits bounded, whatever their weights become.
        if c.qk_norm:
            q = self._normed("query_norm", q)
            k = self._normed("key_norm", k)
        # Queries and keys are gated after their norm, which would cancel a head-wise gate, and
        # before rotation.
        q = self._gated("query", q, x)
        k = self._gated("key", k, x)
        v = self._gated("value", v, x)
        q = self._rotated(q, info)
        k = self._rotated(k, info)
        if c.query_scale != "none" or c.logit_scale == "learned":
            # Factors of tokens are put on the queries: the kernel has one scale for all.
            scale = QueryScale(
                c,
                self.init_std,
                self.dtype,
                name="query_scale",
            )
            q, v = scale(q, v, x, keys_seen(info.positions, c.window))
        gate_logits = self._sdpa_logits(q, x, fused_logits)
        o, cache = self._gated_attention(q, k, v, gate_logits, info, cache)
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        width = {"embed": x.shape[-1]}
        y = Projection(
            heads,
            width,
            self.init_std,
            self.dtype,
            name="out",
        )(o)
        return self._gated("output", y, x), cache

    def _projections(self, x: Array) -> tuple[Queries, Keys, Keys, Array | None]:
        """Queries, keys, values; and the gate's logits if they come with the queries."""
        c = self.config
        # In every head the query comes first, then the gate: [q | gate], as Qwen3-Next has it. The
        # axis has a name of its own, so that Muon takes the two for two matrices.
        channels = {"head_dim": c.head_dim}
        if c.fused_gate and c.gate_granularity == "elementwise":
            channels = {"query_and_gate": 2 * c.head_dim}
        elif c.fused_gate:
            channels = {"query_and_headwise_gate": c.head_dim + 1}
        q = self._project("query", x, {"heads": c.num_heads, **channels})
        # Key and value heads may be fewer: each serves a group of query heads.
        kv_axes = {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        k = self._project("key", x, kv_axes)
        v = self._project("value", x, kv_axes)
        fused_logits = q[..., c.head_dim :] if c.fused_gate else None
        return q[..., : c.head_dim], k, v, fused_logits

    def _normed(self, name: str, y: Array) -> Array:
        if self.config.qk_norm_kind == "l2":
            return unit_length(y, self.norm_eps)
        norm = RMSNorm(
            self.norm_eps,
            self.config.zero_centered_norm,
            "head_dim",
            name=name,
        )
        return norm(y)

    def _rotated(self, y: Array, info: TokenInfo) -> Array:
        c = self.config
        if c.rotary_dim == 0:
            return y
        frequencies = inverse_frequencies(
            c.rotary_dim,
            c.rope_base,
            c.yarn_factor,
            c.yarn_original_length,
        )
        return apply_rope(
            y,
            info.positions,
            frequencies,
            yarn_magnitude(c.yarn_factor),
        )

    def _gated(
        self,
        position: str,
        y: Array,
        x: Array,
    ) -> Array:
        """`y`, gated if the gate is at this position (but for "sdpa")."""
        c = self.config
        if c.gate_position != position:
            return y
        # The output has no heads: its gate is one of channels.
        if position == "output":
            axes = {"embed_act": y.shape[-1]}
        else:
            heads = "heads" if position == "query" else "kv_heads"
            axes = {heads: y.shape[2], "head_dim": y.shape[3]}
        logits = self._gate_logits(axes, x)
        return apply_gate(
            y,
            logits,
            c.gate_activation,
            c.gate_mode,
        )

    def _gate_logits(self, axes: dict[str, int], x: Array) -> Array:
        logits = GateLogits(
            self.config,
            axes,
            self.init_std,
            self.dtype,
            name="gate",
        )(x)
        record(self, "gates", activated_gate(logits, self.config.gate_activation))
        return logits

    def _sdpa_logits(
        self,
        q: Array,
        x: Array,
        fused_logits: Array | None,
    ) -> Array | None:
        """The logits of a gate at position "sdpa", on the output of the attention.

        None if it is elsewhere.
        """
        c = self.config
        if c.gate_position != "sdpa":
            return None
        if fused_logits is None:
            return self._gate_logits(
                {
                    "heads": q.shape[2],
                    "head_dim": q.shape[3],
                },
                x,
            )
        record(self, "gates", activated_gate(fused_logits, c.gate_activation))
        return fused_logits

    def _gated_attention(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        gate_logits: Array | None,
        info: TokenInfo,
        cache: KVCache | None,
    ) -> tuple[Queries, KVCache | None]:
        """Attention and its gate, which is inside the kernel where it is the kernel's sigmoid
        epilogue.
        """
        c = self.config
        if gate_logits is None:
            return self._attention(
                q,
                k,
                v,
                None,
                info,
                cache,
            )
        if c.gate_mode == "multiplicative" and c.gate_activation == "sigmoid":
            # Shared logits have one head; the kernel wants all of them.
            shape = (*q.shape[:3], gate_logits.shape[-1])
            return self._attention(
                q,
                k,
                v,
                jnp.broadcast_to(gate_logits, shape),
                info,
                cache,
            )
        o, cache = self._attention(
            q,
            k,
            v,
            None,
            info,
            cache,
        )
        return apply_gate(
            o,
            gate_logits,
            c.gate_activation,
            c.gate_mode,
        ), cache

    def _attention(
        self,
        q: Queries,
        k: Keys,
        v: Keys,
        gate_logits: Array | None,
        info: TokenInfo,
        cache: KVCache | None,
    ) -> tuple[Queries, KVCache | None]:
        """The op, on rows of tokens or on new tokens and the cache; the cache with these tokens."""
        c = self.config
        sink_logits, slopes = self._head_parameters()
        options = {
            "normalizer": normalizer_of(c),
            "logits_soft_cap": c.logits_soft_cap,
            "scale": logit_scale(c),
        }
        if cache is None:
            # What the probes measure the attention rows from, without the kernel ever storing them.
            record(self, "q", q)
            record(self, "k", k)
            o = attention_on_mesh(
                q,
                k,
                v,
                gate_logits,
                info.segment_ids,
                sink_logits,
                slopes,
                window=c.window,
                **options,
            )
            return o, None

        before = history_of(info)
        self._require_room(cache, q, info)
        new_cache = append(
            cache,
            k,
            v,
            before,
            info.segment_ids,
        )
        if q.shape[1] == 1:
            # The cache may be a ring, whose slots are in any order: what is visible is said slot by
            # slot.
            distances, valid = distances_of_slots(
                cache.k.shape[1],
                before,
                info.segment_ids,
            )
            o = attention_step(
                q[:, 0],
                new_cache.k,
                new_cache.v,
                valid=valid,
                gate_logits=None if gate_logits is None else gate_logits[:, 0],
                sink_logits=sink_logits,
                alibi_slopes=slopes,
                distances=None if slopes is None else distances,
                **options,
            )[:, None]
        else:
            row = _row_of_piece(
                q,
                k,
                v,
                gate_logits,
                info.segment_ids,
                cache,
                before,
            )
            o = attention_on_mesh(
                *row,
                sink_logits,
                slopes,
                window=c.window,
                **options,
            )
            o = o[:, -q.shape[1] :]
        return self._where_there_is_room(o, cache, before, info), new_cache

    def _require_room(
        self,
        cache: KVCache,
        q: Queries,
        info: TokenInfo,
    ) -> None:
        """Refuses what can never fit, whatever the cache holds."""
        most = self.capacity(cache)
        length = q.shape[1]
        if most is not None and info.segment_ids is None and length > most:
            raise ValueError(f"cache: got room for {most} tokens, expected at least {length}")

    def _where_there_is_room(
        self,
        o: Queries,
        cache: KVCache,
        before: History,
        info: TokenInfo,
    ) -> Queries:
        """`o`, and NaN in rows that have become longer than the cache.

        How many tokens a cache holds is not known when a program is compiled, and a program cannot
        raise; a cache that silently forgot would be worse.
        """
        most = self.capacity(cache)
        if most is None:
            return o
        is_full = before.tokens + num_tokens(o, info.segment_ids) > most
        return jnp.where(is_full[:, None, None, None], jnp.nan, o)

    def _head_parameters(self) -> tuple[Array | None, Array | None]:
        """Sink logits and ALiBi slopes, a number for every head; None where there are none."""
        c = self.config
        axes, shape = ["heads"], [c.num_heads]
        sink_logits = None
        if c.sinks:
            zeros = nn.initializers.zeros
            sink_logits = parameter(
                self,
                "sink_logits",
                axes=axes,
                shape=shape,
                init=zeros,
            )
        if c.alibi == "none":
            return sink_logits, None

        def start(
            key: Array,
            shape: tuple[int, ...],
            dtype,
        ) -> Array:
            return jnp.asarray(alibi_slopes(c), dtype)

        if c.alibi == "learned":
            return sink_logits, parameter(
                self,
                "alibi_slopes",
                axes=axes,
                shape=shape,
                init=start,
            )
        return sink_logits, jnp.asarray(alibi_slopes(c))

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> KVCache:
        return empty_cache(
            self.config,
            batch,
            length,
            self.dtype,
        )

    @nn.nowrap
    def capacity(self, cache: KVCache) -> int | None:
        return capacity(self.config, cache)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        q_channels = c.num_heads * c.head_dim
        kv_channels = c.kv_heads * c.head_dim
        # What the gate multiplies, and so how many columns its projection has.
        gated_channels = {
            "none": 0,
            "sdpa": q_channels,
            "query": q_channels,
            "key": kv_channels,
            "value": kv_channels,
            "output": width,
        }
        gate_channels = gated_channels[c.gate_position]
        if c.gate_input == "constant":
            gate_channels = 0
        if c.gate_granularity == "headwise":
            gate_channels //= c.head_dim
        temperatures = c.num_heads + c.kv_heads if c.query_scale == "selective" else 0
        columns = 2 * q_channels + 2 * kv_channels + gate_channels + temperatures
        # A causal row sees half the sequence on average, or its window.
        seen = seq_len / 2 if c.window is None else min(c.window, seq_len / 2)
        return 2 * width * columns + 4 * q_channels * seen


class _Row(NamedTuple):
    """What `attention_on_mesh` is called with, of a piece and what the cache holds before it."""

    q: Queries
    k: Keys
    v: Keys
    gate_logits: Array | None
    segment_ids: Int[Array, "B T"] | None


def _row_of_piece(
    q: Queries,
    k: Keys,
    v: Keys,
    gate_logits: Array | None,
    segment_ids: Int[Array, "B T"] | None,
    cache: KVCache,
    before: History,
) -> _Row:
    """A piece of several tokens after those of the cache, as one row of self-attention.

    The queries of the tokens in the cache are gone and not wanted: theirs are zeros. That computes
    more than needed, and makes a piece what one longer prompt is: window, distances and documents
    are where they always were.

    Args:
      q, k, v, gate_logits: of the piece.
      segment_ids: numbered documents of the piece; None if it goes on with the cache's.
      cache: the tokens before.
      before: what it holds.
    """
    if before.is_empty:
        return _Row(q, k, v, gate_logits, segment_ids)
    held, is_held = in_time_order(cache, before)
    if segment_ids is None:
        segment_ids = jnp.ones(q.shape[:2], jnp.int32)
    earlier = held.k.shape[1]

    def after_zeros(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[1] = (earlier, 0)
        return jnp.pad(x, widths)

    return _Row(
        q=after_zeros(q),
        k=jnp.concatenate([held.k.astype(k.dtype), k], axis=1),
        v=jnp.concatenate([held.v.astype(v.dtype), v], axis=1),
        gate_logits=None if gate_logits is None else after_zeros(gate_logits),
        segment_ids=jnp.concatenate([is_held.astype(jnp.int32), segment_ids], axis=1),
    )


def normalizer_of(c: GatedAttentionConfig) -> Normalizer:
    """The normalizer of `config.normalizer`, with the configuration's parameters."""
    parameters: dict[str, dict[str, Any]] = {
        "sigmoid": {"length": c.normalizer_length},
        "relu": {"length": c.normalizer_length},
        "relu_squared": {"length": c.normalizer_length},
        "clipped_softmax": {"alpha": c.clip_alpha, "length": c.normalizer_length},
        "reweighted_softplus": {"power": c.reweight_power},
        "entmax": {"alpha": c.entmax_alpha},
    }
    return dataclasses.replace(NORMALIZERS[c.normalizer], **parameters.get(c.normalizer, {}))
