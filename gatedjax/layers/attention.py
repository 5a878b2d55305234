"""Gated attention.

Projections, norms, positions, scales and the gate around `kernels_pallas.attention`, which is
called in `attention_or_step.py`: on rows of tokens, or on new tokens and the cache.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.after_sdpa import AfterSDPA
from gatedjax.layers.attention_flops import attention_flops
from gatedjax.layers.attention_or_step import LogitParts, attention_or_step, refuse_cache
from gatedjax.layers.base import Mixer
from gatedjax.layers.block_gate import BlockGate
from gatedjax.layers.gate import (
    GateLogits,
    HeadGateLogits,
    activated_gate,
    apply_gate,
    apply_split_gate,
    split_gate,
)
from gatedjax.layers.gate_values import record
from gatedjax.layers.kv_cache import KVCache, capacity, empty_cache
from gatedjax.layers.logit_scale import QueryScale, alibi_slopes, keys_seen
from gatedjax.layers.norm import HeadsNorm, RMSNorm, unit_length
from gatedjax.layers.normalizer import over_gamma
from gatedjax.layers.parameters import parameter
from gatedjax.layers.pieces import Row
from gatedjax.layers.projection import Projection
from gatedjax.layers.rope import (
    NormedRope,
    apply_rope,
    frequencies_of,
    grid_angles,
    rotate,
    yarn_magnitude,
)
from gatedjax.layers.selective_rope import RopePhase, SelectiveAngles, for_queries
from gatedjax.layers.shared_weights import SharedWeights, ValueCache
from gatedjax.layers.token_info import TokenInfo
from gatedjax.layers.value_bank import ValueBankMix

Queries = Float[Array, "B T H D"]
Keys = Float[Array, "B T Hk D"]


class GatedAttention(Mixer):
    """Grouped-query attention with a gate at any of five positions (arXiv 2505.06708, table 1)."""

    takes_pieces: ClassVar[bool] = True

    config: GatedAttentionConfig

    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: KVCache | ValueCache | None = None,
    ) -> tuple[Float[Array, "B T M"], KVCache | ValueCache | None]:
        y, cache, _ = self.with_weights(x, info, cache)
        return y, cache

    @nn.compact
    def with_weights(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: KVCache | ValueCache | None = None,
    ) -> tuple[Float[Array, "B T M"], KVCache | ValueCache | None, SharedWeights]:
        """(y, cache, weights): as `with_cache`, and what later layers may take their weights from.

        Args:
          x: the vectors of the tokens.
          info: about them; `info.weights` or `info.keys` for a layer that shares another one's.
          cache: of the tokens before.
        """
        c = self.config
        fused_logits = None
        phase = None
        log_gate = None
        if c.shares_weights:
            q, k = self._handed_on(info)
            v = self._values(x, info)
        else:
            q, k, v, fused_logits = self._projections(x, info)
            q, k, phase, log_gate = self._positioned(q, k, x, info, cache)
            q, v = self._scaled(q, v, x, info)
        gate = split_gate(self._sdpa_logits(q, x, fused_logits), c, q)
        token_sinks = self._token_sinks(x)
        o, cache, weights = self._attention(
            Row(q, k, v, gate.in_op, info.segment_ids), token_sinks, log_gate, info, cache
        )
        if isinstance(cache, KVCache):
            cache = dataclasses.replace(cache, phase=phase)
        if c.changes_output:
            o = AfterSDPA(c, self.norm_eps, name="after_sdpa")(o, v)
        o = apply_split_gate(o, gate, c)
        if c.gate_fine_tuning and c.gate_start is not None:
            o = o * (1.0 / c.gate_start)
        y = self._output(o, x.shape[-1])
        if c.shares_weights:
            y = y + self._compensation(x)
        return self._gated("output", y, x), cache, weights

    def _projections(
        self,
        x: Array,
        info: TokenInfo,
    ) -> tuple[Queries, Keys, Keys, Array | None]:
        """Queries, keys, values; and the gate's logits if they come with the queries."""
        c = self.config
        # In every head the query comes first, then the gate: [q | gate], as Qwen3-Next has it. The
        # axis has a name of its own, so that Muon takes the two for two matrices.
        channels = {"head_dim": c.head_dim}
        if c.fused_gate and c.gate_granularity == "elementwise":
            channels = {"query_and_gate": 2 * c.head_dim}
        elif c.fused_gate:
            channels = {"query_and_headwise_gate": c.head_dim + 1}
        has_bias = c.bias != "none"
        q = self._project("query", x, {"heads": c.num_heads, **channels}, has_bias)
        fused_logits = q[..., c.head_dim :] if c.fused_gate else None
        q = q[..., : c.head_dim]
        if c.shares_cache:
            if info.keys is None or info.keys.v is None:
                raise ValueError("info.keys: got None with shares_cache, expected another layer's")
            return q, info.keys.k, info.keys.v, fused_logits
        # Key and value heads may be fewer: each serves a group of query heads.
        kv_axes = {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        k = self._project("key", x, kv_axes, has_bias)
        v = self._values(x, info)
        return q, k, v, fused_logits

    def _values(self, x: Array, info: TokenInfo) -> Keys:
        """Values, with what the bank of the model adds to them, gated if the gate is there."""
        c = self.config
        axes = {"kv_heads": c.kv_heads, "head_dim": c.head_dim}
        v = self._project("value", x, axes, c.bias != "none")
        if c.value_bank:
            v = ValueBankMix(self.dtype, name="value_bank")(v, x, info.bank_values)
        return self._gated("value", v, x)

    def _handed_on(self, info: TokenInfo) -> tuple[Queries, Keys]:
        """Queries and keys of the layer whose weights this one shares."""
        if info.weights is None:
            raise ValueError("info.weights: got None with shares_weights, expected another layer's")
        return info.weights.q, info.weights.k

    def _positioned(
        self,
        q: Queries,
        k: Keys,
        x: Array,
        info: TokenInfo,
        cache: KVCache | ValueCache | None,
    ) -> tuple[Queries, Keys, RopePhase | None, Array | None]:
        """Queries and keys: normed, gated, rotated; where a rotation by tokens then stands; and the
        block gate, which sees them before they are rotated.
        """
        c = self.config
        phase = None
        if c.selective_rope != "none":
            # In front of the norm, as published.
            held = cache.phase if isinstance(cache, KVCache) else None
            q, k, phase = self._rotated_by_tokens(q, k, x, info, held)
        # The norm of queries and keys keeps the logits bounded, whatever their weights become.
        if self._norms_and_rotates_at_once():
            q = self._normed_and_rotated("query_norm", q, info)
            if not c.shares_cache:
                k = self._normed_and_rotated("key_norm", k, info)
            return q, k, None, None
        if c.qk_norm:
            q = self._normed("query_norm", q)
            if not c.shares_cache:
                k = self._normed("key_norm", k)
        # Queries and keys are gated after their norm, which would cancel a head-wise gate, and
        # before rotation.
        q = self._gated("query", q, x)
        k = self._gated("key", k, x)
        log_gate = None
        # A token that is decoded sees all blocks.
        if c.block_gate and (cache is None or x.shape[1] > 1):
            gate = BlockGate(c.block_gate, c.rope_base, c.causal, name="block_gate")
            log_gate = gate(q, k)
        if c.selective_rope == "none":
            q = self._rotated(q, info)
            if not c.shares_cache:
                k = self._rotated(k, info)
        return q, k, phase, log_gate

    def _scaled(self, q: Queries, v: Keys, x: Array, info: TokenInfo) -> tuple[Queries, Keys]:
        """Queries, and values, times factors of tokens: the kernel has one scale for all."""
        c = self.config
        if c.query_scale != "none" or c.logit_scale == "learned":
            scale = QueryScale(c, self.init_std, self.dtype, name="query_scale")
            q, v = scale(q, v, x, keys_seen(info.positions, c.window))
        if c.normalizer == "reluformer":
            q = over_gamma(self, c, q)
        return q, v

    def _normed(self, name: str, y: Array) -> Array:
        if self.config.qk_norm_kind == "l2":
            return unit_length(y, self.norm_eps)
        if self.config.qk_norm_kind == "rms_all_heads":
            norm = HeadsNorm(self.norm_eps, self.config.zero_centered_norm, name=name)
            return norm(y)
        norm = RMSNorm(
            self.norm_eps,
            self.config.zero_centered_norm,
            "head_dim",
            name=name,
        )
        return norm(y)

    def _norms_and_rotates_at_once(self) -> bool:
        """Whether nothing stands between the norm of every head and a rotation by positions."""
        c = self.config
        is_normed = c.qk_norm and c.qk_norm_kind == "rms"
        is_rotated = c.rotary_dim > 0 and not c.rope_grid and c.selective_rope == "none"
        stands_between = c.gate_position in ("query", "key") or c.block_gate
        return is_normed and is_rotated and not stands_between

    def _normed_and_rotated(self, name: str, y: Array, info: TokenInfo) -> Array:
        c = self.config
        norm = NormedRope(self.norm_eps, c.zero_centered_norm, name=name)
        return norm(
            y,
            info.positions,
            frequencies_of(c),
            yarn_magnitude(c.yarn_factor),
            c.rope_layout == "interleaved",
        )

    def _rotated(self, y: Array, info: TokenInfo) -> Array:
        c = self.config
        if c.rotary_dim == 0:
            return y
        is_interleaved = c.rope_layout == "interleaved"
        if c.rope_grid:
            angles = grid_angles(info.grid, c.rotary_dim, c.rope_base)
            return rotate(y, jnp.asarray(angles), interleaved=is_interleaved)
        return apply_rope(
            y,
            info.positions,
            frequencies_of(c),
            yarn_magnitude(c.yarn_factor),
            interleaved=is_interleaved,
        )

    def _rotated_by_tokens(
        self,
        q: Queries,
        k: Keys,
        x: Array,
        info: TokenInfo,
        phase: RopePhase | None,
    ) -> tuple[Queries, Keys, RopePhase]:
        """Queries, keys, and the phase after the last token (Selective RoPE).

        Args:
          q: queries.
          k: keys.
          x: the layer's input, which says how far each token turns.
          info: about the tokens.
          phase: before the first token; None without a cache.
        """
        c = self.config
        module = SelectiveAngles(c, self.dtype, name="selective_rope")
        angles, phase = module(x, info, frequencies_of(c), phase)
        magnitude = yarn_magnitude(c.yarn_factor)
        is_interleaved = c.rope_layout == "interleaved"
        q = rotate(q, for_queries(angles, c.num_heads), magnitude, is_interleaved)
        return q, rotate(k, angles, magnitude, is_interleaved), phase

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
        c = self.config
        if c.gate_input == "head" or c.gate_start is not None:
            logits = HeadGateLogits(c, self.init_std, self.dtype, name="gate")(x)
        else:
            logits = GateLogits(c, axes, self.init_std, self.dtype, name="gate")(x)
        record(self, "gates", activated_gate(logits, c.gate_activation))
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
            return self._gate_logits({"heads": q.shape[2], "head_dim": q.shape[3]}, x)
        record(self, "gates", activated_gate(fused_logits, c.gate_activation))
        return fused_logits

    def _token_sinks(self, x: Array) -> Float[Array, "B T H"] | None:
        """The sink logits of every token, float32; None where tokens have none of their own."""
        c = self.config
        if not c.token_sinks:
            return None
        return self._per_head("token_sinks", x, c.num_heads)

    def _attention(
        self,
        row: Row,
        token_sinks: Float[Array, "B T H"] | None,
        log_gate: Float[Array, "B H N N"] | None,
        info: TokenInfo,
        cache: KVCache | ValueCache | None,
    ) -> tuple[Queries, KVCache | ValueCache | None, SharedWeights]:
        """`attention_or_step`, with the heads' own numbers."""
        sink_logits, slopes = self._head_parameters()
        parts = LogitParts(sink_logits, slopes, token_sinks, log_gate)
        return attention_or_step(self, self.config, row, parts, info, cache)

    def _head_parameters(self) -> tuple[Array | None, Array | None]:
        """Sink logits and ALiBi slopes, a number for every head; None where there are none."""
        c = self.config
        axes, shape = ["heads"], [c.num_heads]
        sink_logits = None
        if c.sinks:
            zeros = nn.initializers.zeros
            sink_logits = parameter(self, "sink_logits", axes=axes, shape=shape, init=zeros)
        if c.alibi == "none":
            return sink_logits, None

        def fixed(key: Array, shape: tuple[int, ...], dtype) -> Array:
            return jnp.asarray(alibi_slopes(c), dtype)

        if c.alibi == "learned":
            slopes = parameter(self, "alibi_slopes", axes=axes, shape=shape, init=fixed)
            return sink_logits, slopes
        return sink_logits, jnp.asarray(alibi_slopes(c))

    def _output(self, o: Queries, width: int) -> Float[Array, "B T M"]:
        """The heads' outputs, brought together."""
        c = self.config
        record(self, "heads_output", o)
        return Projection(
            {"heads": c.num_heads, "head_dim": c.head_dim},
            {"embed": width},
            self.init_std,
            self.dtype,
            has_bias=c.bias == "all",
            name="out",
        )(o)

    def _compensation(self, x: Array) -> Float[Array, "B T M"]:
        """What a layer with another one's weights adds: a map of its input, zero at the start."""
        width = x.shape[-1]
        return Projection(
            {"embed": width},
            {"embed_act": width},
            0.0,
            self.dtype,
            kernel_init=nn.initializers.zeros,
            name="compensation",
        )(x)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> KVCache | ValueCache | tuple[()]:
        if not self.config.causal:
            refuse_cache()
        if self.config.shares_cache:
            # No arrays.
            return ()
        return empty_cache(
            self.config,
            batch,
            length,
            self.dtype,
        )

    @nn.nowrap
    def capacity(self, cache: Any) -> int | None:
        # The layer whose cache it is says how much room there is.
        return None if self.config.shares_cache else capacity(self.config, cache)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        return attention_flops(self.config, width, seq_len)
