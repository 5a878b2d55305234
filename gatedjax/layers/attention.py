"""Gated softmax attention: projections, norms, positions and the gate around `kernels_pallas.attention`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.context import Context
from gatedjax.layers.gate import GateLogits, apply_gate
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.projection import Projection, parameter
from gatedjax.layers.rope import apply_rope, inverse_frequencies, yarn_magnitude
from kernels_pallas import attention, attention_step


@struct.dataclass
class KVCache:
    """Keys (after rotation) and values of past tokens. Position p lives in slot p mod S: a ring for windows."""

    k: Float[Array, "B S Hk D"]
    v: Float[Array, "B S Hk D"]


class GatedAttention(nn.Module):
    """Grouped-query softmax attention with a gate at any of the five positions of arXiv 2505.06708 (table 1)."""

    config: GatedAttentionConfig
    norm_eps: float
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T M"], context: Context, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B T M"], KVCache | None]:
        """Training: no cache. Prefill: T tokens into an empty cache. Decode: one token, T = 1, at context.positions."""
        c = self.config
        q = self._project("query", x, {"heads": c.num_heads, "head_dim": c.head_dim})
        k = self._project("key", x, {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim})
        v = self._project("value", x, {"kv_heads": c.num_kv_heads, "head_dim": c.head_dim})
        if c.qk_norm:
            q = RMSNorm(self.norm_eps, c.zero_centred_norm, "head_dim", name="query_norm")(q)
            k = RMSNorm(self.norm_eps, c.zero_centred_norm, "head_dim", name="key_norm")(k)
        # Keys and queries are gated after their norm, which would cancel a head-wise gate, and before rotation.
        q, k, v = (self._gated(name, y, x) for name, y in (("query", q), ("key", k), ("value", v)))
        q, k = self._rotated(q, context), self._rotated(k, context)
        o, cache = self._attend(q, k, v, x, context, cache)
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        y = Projection(heads, {"embed": x.shape[-1]}, self.std, self.dtype, name="out")(o)
        return self._gated("output", y, x), cache

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

    def _rotated(self, x: Array, context: Context) -> Array:
        c = self.config
        if c.rotary_dim == 0:
            return x
        frequencies = inverse_frequencies(c.rotary_dim, c.rope_base, c.yarn_factor, c.yarn_original_length)
        return apply_rope(x, context.positions, frequencies, yarn_magnitude(c.yarn_factor))

    def _attend(self, q, k, v, x, context: Context, cache: KVCache | None):
        """Attention and, at position "sdpa", the gate: inside the kernel where it is the kernel's sigmoid epilogue."""
        c = self.config
        sinks = parameter(self, "sink_logits", ["heads"], [c.num_heads], nn.initializers.zeros) if c.sinks else None
        gated_here = c.gate_position == "sdpa"
        logits = GateLogits(c, self._head_axes("sdpa", q), self.std, self.dtype, name="gate")(x) if gated_here else None
        in_kernel = gated_here and c.gate_mode == "multiplicative" and c.gate_activation == "sigmoid"
        epilogue = jnp.broadcast_to(logits, (*q.shape[:3], logits.shape[-1])) if in_kernel else None
        options = dict(sink_logits=sinks, soft_cap=c.soft_cap)
        if cache is not None and x.shape[1] == 1:
            cache, valid = append_token(cache, k[:, 0], v[:, 0], context.positions[:, 0])
            gate = None if epilogue is None else epilogue[:, 0]
            o = attention_step(q[:, 0], cache.k, cache.v, valid=valid, gate=gate, **options)[:, None]
        else:
            self.sow("probes", "q", q)
            self.sow("probes", "k", k)
            o = attention(q, k, v, gate=epilogue, window=c.window, segment_ids=context.segment_ids, **options)
            cache = cache if cache is None else fill(cache, k, v)
        o = o if in_kernel or not gated_here else apply_gate(o, logits, c.gate_activation, c.gate_mode)
        return o, cache


def init_cache(config: GatedAttentionConfig, batch: int, length: int, dtype: jnp.dtype) -> KVCache:
    """An empty cache for `length` tokens; a window needs no more than its own slots."""
    slots = length if config.window is None else min(config.window, length)
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def fill(cache: KVCache, k: Float[Array, "B T Hk D"], v: Float[Array, "B T Hk D"]) -> KVCache:
    """The cache after a prompt of T tokens at positions 0 .. T-1: its last S tokens, each in slot position mod S."""
    slots, length = cache.k.shape[1], k.shape[1]
    kept = min(slots, length)
    where = jnp.arange(length - kept, length) % slots
    write = lambda old, new: old.at[:, where].set(new[:, length - kept :].astype(old.dtype))
    return KVCache(write(cache.k, k), write(cache.v, v))


def append_token(cache: KVCache, k: Float[Array, "B Hk D"], v: Float[Array, "B Hk D"], position: Array):
    """The cache with the token at `position` [B] written, and which slots [B, S] that token may see."""
    slots = cache.k.shape[1]
    write = jax.vmap(lambda old, new, p: jax.lax.dynamic_update_index_in_dim(old, new.astype(old.dtype), p % slots, 0))
    # Slot s holds the newest position <= p that is s modulo S; before the ring has gone round once, some hold nothing.
    held = position[:, None] - (position[:, None] - jnp.arange(slots)) % slots
    return KVCache(write(cache.k, k, position), write(cache.v, v, position)), held >= 0
