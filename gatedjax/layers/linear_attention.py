"""Gated linear attention (arXiv 2312.06635) on `kernels_pallas.linear_scan`.

RetNet and HGRN2 by config, and layers with Mamba-2's decay. Those are not Mamba-2 (`mamba2.py`),
which also adds D x to its output, gates before its norm, and shares B and C among heads.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedLinearAttentionConfig
from gatedjax.layers.base import Mixer
from gatedjax.layers.conv import short_conv
from gatedjax.layers.feature_maps import features_of
from gatedjax.layers.gate_values import record
from gatedjax.layers.norm import HeadsNorm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.rope import NormOfHeads, apply_rope, inverse_frequencies, rotate
from gatedjax.layers.scan_or_step import scan_or_step
from gatedjax.layers.selective_rope import (
    RopePhase,
    SelectiveAngles,
    empty_phase,
    for_queries,
    selective_flops,
)
from gatedjax.layers.step_size import log_decay_rate, step_size_bias
from gatedjax.layers.token_info import TokenInfo


@struct.dataclass
class ScanCache:
    """The matrix state of every head, and the convolution's last inputs.

    The state has one more value column when the scan is normalized. With Selective RoPE also where
    the rotation stands.
    """

    state: Float[Array, "... B H K V"]
    conv_tail: Float[Array, "... B _ F"]
    phase: RopePhase | None = None


def logsigmoid_decay(logits: Float[Array, "..."], temperature: float) -> Float[Array, "..."]:
    """GLA's log decay, `log sigmoid(logits) / temperature`, float32 (arXiv 2312.06635, section
    4.4).
    """
    return jax.nn.log_sigmoid(logits.astype(jnp.float32)) / temperature


def forget_gate(
    logits: Float[Array, "B T H K"],
    floor: Float[Array, "H K"] | None,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H K"]]:
    """HGRN2's log decay and keys, `(log f, 1 - f)` with `f = floor + (1 - floor) sigmoid(logits)`.

    In float32 (arXiv 2404.07904, section 3.1). None is a floor of 0.
    """
    logits = logits.astype(jnp.float32)
    # Not 1 - f, which loses what is left of a gate that is almost open.
    keys = jax.nn.sigmoid(-logits)
    log_sigmoid = jax.nn.log_sigmoid(logits)
    if floor is None:
        return log_sigmoid, keys
    has_floor = floor > 0
    # With a floor the gate is away from 0; without one its logarithm is that of the sigmoid alone.
    safe_floor = jnp.where(has_floor, floor, 0.5)
    above = jnp.log(safe_floor + (1 - safe_floor) * jax.nn.sigmoid(logits))
    return jnp.where(has_floor, above, log_sigmoid), (1 - floor) * keys


def rising_floors(logits: Float[Array, "L H K"]) -> Float[Array, "L H K"]:
    """Floors of forget gates: 0 at the first layer, rising to less than 1 (arXiv 2404.07904)."""
    fractions = jax.nn.softmax(logits, axis=0)
    return jnp.cumsum(fractions, axis=0) - fractions[0]


def retention_decay(num_heads: int) -> Float[np.ndarray, " H"]:
    """RetNet's log decay per head, `log(1 - 2^(-5 - h))` (arXiv 2307.08621, equation 8)."""
    exponents = -5.0 - np.arange(num_heads)
    return np.log1p(-(2.0**exponents)).astype(np.float32)


OUTPUT_GATES = {"swish": jax.nn.silu, "sigmoid": jax.nn.sigmoid}


def times_output_gate(
    o: Float[Array, "B T H V"],
    logits: Float[Array, "B T H V"],
    kind: str,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H V"]]:
    """o times its gates, in float32 and rounded to o's dtype; and the gates, float32.

    Args:
      o: the output of heads.
      logits: of the gates.
      kind: of `OUTPUT_GATES`.
    """
    # Heads as columns, as matrix products make and take them: on a TPU XLA has another layout for
    # [B, T, H, V], and copies into it and back.
    columns = (*o.shape[:2], -1)
    gates = OUTPUT_GATES[kind](logits.reshape(columns).astype(jnp.float32))
    y = (o.reshape(columns).astype(jnp.float32) * gates).astype(o.dtype)
    return y.reshape(o.shape), gates.reshape(o.shape)


class GatedLinearAttention(Mixer):
    """Low-rank vector gate, per-head norm, swish output gate (arXiv 2312.06635, 4.4).

    Other decays by config.
    """

    takes_pieces: ClassVar[bool] = True
    gives_memory: ClassVar[bool] = True

    config: GatedLinearAttentionConfig

    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: ScanCache | None = None,
    ) -> tuple[Float[Array, "B T M"], ScanCache | None]:
        y, cache, _ = self.with_memory(x, info, cache)
        return y, cache

    @nn.compact
    def with_memory(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: ScanCache | None = None,
    ) -> tuple[Float[Array, "B T M"], ScanCache | None, Float[Array, "B T H V"]]:
        c = self.config
        q = self._project("query", x, {"heads": c.num_heads, "head_dim": c.key_dim})
        keys_and_decay = None
        if c.decay_form == "forget_gate":
            keys_and_decay = self._keys_and_decay(x, info)
            k = keys_and_decay[0]
        else:
            k = self._project("key", x, {"kv_heads": c.kv_heads, "head_dim": c.key_dim})
        v = self._project("value", x, {"kv_heads": c.kv_heads, "head_dim": c.value_dim})
        # The state and the convolution go on from where the tokens before ended.
        tail = None if cache is None else cache.conv_tail
        if c.conv_width:
            (q, k, v), tail = short_conv(
                self,
                (q, k, v),
                c.conv_width,
                info.segment_ids,
                tail,
                has_bias=c.conv_bias,
            )
        # The feature map is what linear attention has in place of softmax's exponential.
        q, mapped_k = features_of(c, q, k, info.positions)
        if keys_and_decay is None:
            k = mapped_k
            log_decay, v = self._decay(x, v)
        else:
            # Keys from a gate lie between 0 and 1 as they are.
            log_decay = keys_and_decay[1]
        phase = None if cache is None else cache.phase
        q, k, phase = self._rotated(q, k, x, info, phase)
        if log_decay is not None:
            record(self, "log_decay", log_decay)
        memory, state = scan_or_step(
            q,
            k,
            v,
            log_decay,
            info.segment_ids,
            None if cache is None else cache.state,
            normalize=c.normalize,
            chunk_size=c.chunk_size,
        )
        # Normed: the state grows and shrinks with the decay, and its output with it.
        eps = self.norm_eps if c.norm_eps is None else c.norm_eps
        if c.norm_heads == "all":
            norm = HeadsNorm(eps, zero_centered=False, name="norm")
        else:
            norm = NormOfHeads(eps, name="norm")
        o = norm(memory)
        if c.output_gate != "none":
            o = self._gated(o, x)
        heads = {"heads": c.num_heads, "head_dim": c.value_dim}
        width = {"embed": x.shape[-1]}
        y = Projection(
            heads,
            width,
            self.init_std,
            self.dtype,
            name="out",
        )(o)
        if state is None or tail is None:
            return y, None, memory
        return y, ScanCache(state, tail, phase), memory

    def _keys_and_decay(self, x: Array, info: TokenInfo) -> tuple[Array, Array]:
        """Keys and the log decay, both of one forget gate."""
        c = self.config
        logits = self._project("forget", x, {"heads": c.num_heads, "head_dim": c.key_dim})
        floor = None
        if c.decay_floor == "by_depth" and info.depth is not None:
            assert info.depth.decay_floors is not None
            floor = info.depth.decay_floors[info.depth.index]
        log_decay, keys = forget_gate(logits, floor)
        return keys.astype(self.dtype), log_decay

    def _rotated(
        self,
        q: Array,
        k: Array,
        x: Array,
        info: TokenInfo,
        phase: RopePhase | None,
    ) -> tuple[Array, Array, RopePhase | None]:
        """Queries and keys, rotated; where a rotation by tokens then stands.

        Args:
          q: queries.
          k: keys.
          x: the layer's input, which says how far each token turns (Selective RoPE).
          info: about the tokens.
          phase: before the first token; None without a cache.
        """
        c = self.config
        if c.rotary_dim == 0:
            return q, k, None
        frequencies = inverse_frequencies(c.rotary_dim, c.rope_base)
        if c.selective_rope == "none":
            q = apply_rope(q, info.positions, frequencies)
            return q, apply_rope(k, info.positions, frequencies), None
        module = SelectiveAngles(c, self.dtype, name="selective_rope")
        angles, phase = module(x, info, frequencies, phase)
        return rotate(q, for_queries(angles, c.num_heads)), rotate(k, angles), phase

    def _decay(self, x: Array, v: Array) -> tuple[Array | None, Array]:
        """The log decay in the rank that the scan wants, and the values, which Mamba-2's step size
        scales.
        """
        c = self.config
        if c.decay == "none":
            return None, v
        if c.decay == "constant":
            return jnp.asarray(retention_decay(c.num_heads)), v
        if c.decay_form == "softplus":
            return self._softplus_decay(x, v)
        # A low-rank map: down to `decay_rank` channels, up to a logit for every head, or for every
        # key channel of every head.
        width = {"embed": x.shape[-1]}
        rank = {"rank": c.decay_rank}
        axes = {"heads": c.num_heads}
        if c.decay == "vector":
            axes["head_dim"] = c.key_dim
        low = Projection(
            width,
            rank,
            self.init_std,
            self.dtype,
            name="decay_down",
        )(x)
        logits = Projection(
            rank,
            axes,
            self.init_std,
            self.dtype,
            name="decay_up",
        )(low)
        zeros = nn.initializers.zeros
        shape = list(axes.values())
        bias = parameter(
            self,
            "decay_bias",
            axes=list(axes),
            shape=shape,
            init=zeros,
        )
        return logsigmoid_decay(logits + bias, c.decay_temperature), v

    def _softplus_decay(self, x: Array, v: Array) -> tuple[Array, Array]:
        """Log decay and values: -exp(A_log) dt and v dt, as Mamba-2's (arXiv 2405.21060).

        The step size is dt = softplus(x W + bias), float32.
        """
        heads = {"heads": self.config.num_heads}
        width = {"embed": x.shape[-1]}
        logits = Projection(
            width,
            heads,
            self.init_std,
            self.dtype,
            name="dt",
        )(x)
        shape = list(heads.values())
        bias = parameter(
            self,
            "dt_bias",
            axes=["heads"],
            shape=shape,
            init=step_size_bias,
        )
        a_log = parameter(
            self,
            "a_log",
            axes=["heads"],
            shape=shape,
            init=log_decay_rate,
        )
        # In float32: the step size is exponentiated in the decay.
        dt = jax.nn.softplus(logits.astype(jnp.float32) + bias)
        return -jnp.exp(a_log) * dt, (v * dt[..., None]).astype(v.dtype)

    def _gated(self, o: Array, x: Array) -> Array:
        """`o` times the output gate, in float32."""
        c = self.config
        axes = {"heads": c.num_heads, "head_dim": c.value_dim}
        logits = self._project("output_gate", x, axes)
        y, gates = times_output_gate(o, logits, c.output_gate)
        record(self, "gates", gates)
        return y

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> ScanCache:
        """An empty cache; its size does not depend on `length`."""
        c = self.config
        # The state of a normalized scan has one more value column, the sum of the weights.
        value_columns = c.value_dim + int(c.normalize)
        features_and_values = (c.features_per_head, value_columns)
        state = jnp.zeros((batch, c.num_heads, *features_and_values), jnp.float32)
        channels = c.num_heads * c.key_dim + c.kv_heads * (c.key_dim + c.value_dim)
        tail_length = max(c.conv_width - 1, 0)
        tail = jnp.zeros((batch, tail_length, channels), self.dtype)
        return ScanCache(state, tail, empty_phase(c, batch, self.dtype))

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        q_channels = c.num_heads * c.key_dim
        o_channels = c.num_heads * c.value_dim
        kv_channels = c.kv_heads * (c.key_dim + c.value_dim)
        gate_channels = 0 if c.output_gate == "none" else o_channels
        projections = 2 * width * (q_channels + kv_channels + o_channels + gate_channels)
        # The recurrence itself: k^T v and q S, 2 K V each per head. Chunkwise forms do more; that
        # is their overhead.
        recurrence = 4 * c.num_heads * c.features_per_head * c.value_dim
        return projections + recurrence + selective_flops(c, width)
