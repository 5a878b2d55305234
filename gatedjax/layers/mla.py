"""Multi-head latent attention (arXiv 2405.04434) around `kernels_pallas.attention`.

    c = norm(x W_c),  s = rope(x W_s)               of a token, for all heads: latent and shared key
    k_h = [c W_k,h | s],  v_h = c W_v,h             of head h
    q_h = [x W_q,h | rope(x W_s,h)]                 or of a normed latent in place of x
    o_h = attention(q_h, k_h, v_h),  y = (o gate) W_o

Rows of tokens are attended to in this expanded form. One token against a cache takes the absorbed
form: with q_h = [a | b] its product with a key is (a W_k,h^T) c + b s, so that the cached vectors
[c | s] are the keys themselves, one head for all queries, and the latents are the values, mixed
first and multiplied by W_v,h after that.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from gatedjax.config import MLAConfig
from gatedjax.layers.base import Mixer
from gatedjax.layers.gate import (
    GateLogits,
    SplitGate,
    activated_gate,
    apply_gate,
    apply_split_gate,
    split_gate,
)
from gatedjax.layers.gate_values import record
from gatedjax.layers.kv_cache import (
    KVCache,
    append_to_slots,
    distances_of_slots,
    slots_in_time_order,
)
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.on_mesh import attention_on_mesh
from gatedjax.layers.parameters import parameter
from gatedjax.layers.pieces import Row, require_room, row_of_piece, where_there_is_room
from gatedjax.layers.projection import Projection, Weights, contract
from gatedjax.layers.rope import apply_rope, inverse_frequencies, yarn_magnitude
from gatedjax.layers.token_info import TokenInfo, history_of
from kernels_pallas.attention import NORMALIZERS, attention_step

Queries = Float[Array, "B T H K"]
Latents = Float[Array, "B T _"]


@struct.dataclass
class LatentCache:
    """The normed latent and the rotated shared key of past tokens, side by side.

    The row's token i (from 0) is in slot i mod S, as in `KVCache`.
    """

    latent: Float[Array, "... B S _"]


def expanded(
    latent: Latents,
    up: Float[Array, "r H _"],
    nope_dim: int,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H V"]]:
    """Keys and values of all heads.

    Args:
      latent: of every token, and its shared key.
      up: what makes a head's own key channels and its values of the latent.
      nope_dim: how many of its columns are the key's.
    """
    rank, num_heads, _ = up.shape
    own = contract(latent[..., :rank], up, 1)
    shared = latent[..., None, rank:]
    shared = jnp.broadcast_to(shared, (*latent.shape[:2], num_heads, shared.shape[-1]))
    k = jnp.concatenate([own[..., :nope_dim], shared], axis=-1)
    return k, own[..., nope_dim:]


def absorbed_query(
    q: Float[Array, "B H K"],
    up: Float[Array, "r H _"],
    nope_dim: int,
) -> Float[Array, "B H _"]:
    """Queries whose product with a cached vector is that of `q` with the key made from it."""
    of_latent = jnp.einsum("bhn,rhn->bhr", q[..., :nope_dim], up[..., :nope_dim])
    return jnp.concatenate([of_latent, q[..., nope_dim:]], axis=-1)


class MLA(Mixer):
    """Attention whose keys and values are made from one latent a token; optionally gated."""

    takes_pieces: ClassVar[bool] = True

    config: MLAConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: LatentCache | None = None,
    ) -> tuple[Float[Array, "B T M"], LatentCache | None]:
        c = self.config
        q = self._queries(x, info)
        latent = self._latents(x, info)
        # Keys and values of a head side by side, as published.
        up = Weights(
            {"rank": c.kv_rank},
            {"heads": c.num_heads, "head_dim": c.nope_dim + c.value_dim},
            self.init_std,
            self.dtype,
            name="kv_up",
        )()
        o, cache = self._gated_attention(q, latent, up, self._gate_logits(x), info, cache)
        y = Projection(
            {"heads": c.num_heads, "head_dim": c.value_dim},
            {"embed": x.shape[-1]},
            self.init_std,
            self.dtype,
            name="out",
        )(o)
        return y, cache

    def _queries(self, x: Array, info: TokenInfo) -> Queries:
        c = self.config
        axes = {"heads": c.num_heads, "head_dim": c.key_dim}
        if c.q_rank is None:
            q = self._project("query", x, axes)
        else:
            low = {"rank": c.q_rank}
            width = {"embed": x.shape[-1]}
            q = Projection(width, low, self.init_std, self.dtype, name="query_down")(x)
            q = self._normed("query_norm", q)
            q = Projection(low, axes, self.init_std, self.dtype, name="query_up")(q)
        rotated = self._rotated(q[..., c.nope_dim :], info)
        return jnp.concatenate([q[..., : c.nope_dim], rotated], axis=-1)

    def _latents(self, x: Array, info: TokenInfo) -> Latents:
        """What is kept of every token; every device has that of all heads."""
        c = self.config
        width = {"embed": x.shape[-1]}
        channels = {"rank": c.cached_dim}
        both = Projection(width, channels, self.init_std, self.dtype, name="kv_down")(x)
        both = nn.with_logical_constraint(both, ("batch", "length", None))
        latent = self._normed("kv_norm", both[..., : c.kv_rank])
        # One head, which all queries share.
        shared_key = self._rotated(both[..., None, c.kv_rank :], info)[:, :, 0]
        return jnp.concatenate([latent, shared_key], axis=-1)

    def _normed(self, name: str, latent: Float[Array, "B T r"]) -> Float[Array, "B T r"]:
        # A logical axis of vectors: "rank" would make a matrix of the scale.
        norm = RMSNorm(self.config.latent_norm_eps, axis_name="head_dim", name=name)
        return norm(latent)

    def _rotated(self, y: Float[Array, "B T _ K"], info: TokenInfo) -> Float[Array, "B T _ K"]:
        c = self.config
        if c.rope == "none" or c.rope_dim == 0:
            return y
        frequencies = inverse_frequencies(
            c.rope_dim,
            c.rope_base,
            c.yarn_factor,
            c.yarn_original_length,
        )
        magnitude = yarn_magnitude(c.yarn_factor, c.yarn_mscale)
        return apply_rope(
            y,
            info.positions,
            frequencies,
            magnitude / yarn_magnitude(c.yarn_factor, c.yarn_mscale_all),
            interleaved=c.rope == "interleaved",
        )

    def _gate_logits(self, x: Array) -> Array | None:
        c = self.config
        if c.gate_position == "none":
            return None
        logits = GateLogits(
            c,
            {"heads": c.num_heads, "head_dim": c.value_dim},
            self.init_std,
            self.dtype,
            name="gate",
        )(x)
        record(self, "gates", activated_gate(logits, c.gate_activation))
        return logits

    def _gated_attention(
        self,
        q: Queries,
        latent: Latents,
        up: Float[Array, "r H _"],
        gate_logits: Array | None,
        info: TokenInfo,
        cache: LatentCache | None,
    ) -> tuple[Float[Array, "B T H V"], LatentCache | None]:
        """The op and the gate, on rows of tokens or on new tokens and the cache.

        Args:
          q: queries, rotated.
          latent: of the tokens, with their shared keys.
          up: what makes keys and values of latents.
          gate_logits: None without a gate.
          info: about the tokens.
          cache: of the tokens before.

        Returns:
          The gated outputs of the heads; the cache with these tokens, if there was one.
        """
        c = self.config
        if cache is not None and q.shape[1] == 1:
            return self._decoded(q, latent, up, gate_logits, info, cache)
        gate = split_gate(gate_logits, c, q)
        k, v = expanded(latent, up, c.nope_dim)
        row = Row(q, k, v, gate.in_op, info.segment_ids)
        if cache is None:
            # As in gated attention: what the probes measure attention from.
            record(self, "q", q)
            record(self, "k", k)
            return self._attended(row, gate), None
        before = history_of(info)
        most = self.capacity(cache)
        require_room(most, q.shape[1], info.segment_ids)
        if not before.is_empty:
            held, is_held = slots_in_time_order(cache.latent, before)
            row = row_of_piece(row, KVCache(*expanded(held, up, c.nope_dim)), is_held)
        o = self._attended(row, gate, last=q.shape[1])
        o = where_there_is_room(o, most, before, info.segment_ids)
        return o, self._with_tokens(cache, latent, info)

    def _attended(
        self,
        row: Row,
        gate: SplitGate,
        last: int | None = None,
    ) -> Float[Array, "B T H V"]:
        """The gated outputs of a row's `last` tokens; of all if that is None."""
        c = self.config
        o = attention_on_mesh(
            *row,
            self._sink_logits(),
            None,
            window=c.window,
            **op_options(c),
        )
        if last is not None:
            o = o[:, -last:]
        return apply_split_gate(o, gate, c)

    def _decoded(
        self,
        q: Float[Array, "B 1 H K"],
        latent: Float[Array, "B 1 _"],
        up: Float[Array, "r H _"],
        gate_logits: Array | None,
        info: TokenInfo,
        cache: LatentCache,
    ) -> tuple[Float[Array, "B 1 H V"], LatentCache]:
        """One token against the cache, in the absorbed form. Arguments as `_gated_attention`."""
        c = self.config
        before = history_of(info)
        new_cache = self._with_tokens(cache, latent, info)
        # The ring's slots are in any order.
        slots = cache.latent.shape[1]
        _, valid = distances_of_slots(slots, before, info.segment_ids)
        # One head of keys. Values are the same array: without the shared keys they would be a copy
        # of the cache. What comes of those channels is left out.
        one_head = new_cache.latent[:, :, None]
        mixed = attention_step(
            absorbed_query(q[:, 0], up, c.nope_dim),
            one_head,
            one_head,
            valid=valid,
            sink_logits=self._sink_logits(),
            **op_options(c),
        )
        o = jnp.einsum("bhr,rhv->bhv", mixed[..., : c.kv_rank], up[..., c.nope_dim :])
        o = o[:, None]
        if gate_logits is not None:
            o = apply_gate(o, gate_logits, c.gate_activation, c.gate_mode)
        return where_there_is_room(o, self.capacity(cache), before, info.segment_ids), new_cache

    def _with_tokens(
        self,
        cache: LatentCache,
        latent: Latents,
        info: TokenInfo,
    ) -> LatentCache:
        before = history_of(info)
        return LatentCache(append_to_slots(cache.latent, latent, before, info.segment_ids))

    def _sink_logits(self) -> Float[Array, " H"] | None:
        c = self.config
        if not c.sinks:
            return None
        return parameter(
            self,
            "sink_logits",
            axes=["heads"],
            shape=[c.num_heads],
            init=nn.initializers.zeros,
        )

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> LatentCache:
        c = self.config
        slots = length if c.window is None else min(c.window, length)
        return LatentCache(jnp.zeros((batch, slots, c.cached_dim), self.dtype))

    @nn.nowrap
    def capacity(self, cache: LatentCache) -> int | None:
        slots = cache.latent.shape[-2]
        window = self.config.window
        is_ring = window is not None and slots >= window
        return None if is_ring else slots

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        value_channels = c.num_heads * c.value_dim
        query_channels = c.num_heads * c.key_dim
        query = width * query_channels
        if c.q_rank is not None:
            query = c.q_rank * (width + query_channels)
        kv_up = c.kv_rank * c.num_heads * (c.nope_dim + c.value_dim)
        gate_channels = 0
        if c.gate_position == "sdpa" and c.gate_input == "token":
            gate_channels = c.num_heads if c.gate_granularity == "headwise" else value_channels
        columns = c.cached_dim + value_channels + gate_channels
        # A causal row sees half the sequence on average, or its window.
        seen = seq_len / 2 if c.window is None else min(c.window, seq_len / 2)
        mixing = 2 * (query_channels + value_channels) * seen
        return 2 * (query + width * columns + kv_up) + mixing


def logit_scale(c: MLAConfig) -> float:
    """What logits are multiplied by inside the op."""
    scale = c.key_dim**-0.5 if c.attention_scale is None else c.attention_scale
    return scale * yarn_magnitude(c.yarn_factor, c.yarn_mscale_all) ** 2


def op_options(c: MLAConfig) -> dict[str, Any]:
    """Static arguments of the op, but for the window."""
    return {
        "normalizer": NORMALIZERS[c.normalizer],
        "logits_soft_cap": c.logits_soft_cap,
        "scale": logit_scale(c),
    }
