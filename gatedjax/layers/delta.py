"""The delta rule as a mixer, on `kernels_pallas.delta_scan`.

One layer for DeltaNet (arXiv 2406.06484), Gated DeltaNet (2412.06464), Kimi Delta Attention
(2510.26692) and Gated DeltaNet-2 (2605.22791), by configuration.
"""

from typing import ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from gatedjax.config import DeltaAttentionConfig
from gatedjax.layers.base import Mixer
from gatedjax.layers.gate_values import record
from gatedjax.layers.linear_attention import OUTPUT_GATES
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.on_mesh import delta_scan_on_mesh
from gatedjax.layers.parameters import parameter
from gatedjax.layers.past_padding import past_padding
from gatedjax.layers.projection import Projection
from gatedjax.layers.step_size import log_decay_rate, softplus_decay, step_size_bias
from gatedjax.layers.token_info import TokenInfo
from kernels_pallas.delta_scan import delta_scan_step, l2_normalized


@struct.dataclass
class DeltaCache:
    """The matrix state of every head, and the convolution's last inputs."""

    state: Float[Array, "... B H K V"]
    conv_tail: Float[Array, "... B _ F"]


class Weights(NamedTuple):
    """How much each token erases and writes: one number a head, or one a channel."""

    beta: Float[Array, "B T H"] | None
    erase: Float[Array, "B T H K"] | None
    write: Float[Array, "B T H V"] | None


def bounded_decay(
    logits: Float[Array, "..."],
    log_rate: Float[Array, "..."],
    bound: float,
) -> Float[Array, "..."]:
    """The log decay `-bound sigmoid(exp(A_log) logits)`, KDA's safe gate, float32."""
    return -bound * jax.nn.sigmoid(jnp.exp(log_rate) * logits.astype(jnp.float32))


class DeltaAttention(Mixer):
    """Short convolution, unit keys, the delta rule, per-head norm, output gate."""

    takes_pieces: ClassVar[bool] = True
    gives_memory: ClassVar[bool] = True

    config: DeltaAttentionConfig

    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: DeltaCache | None = None,
    ) -> tuple[Float[Array, "B T M"], DeltaCache | None]:
        y, cache, _ = self.with_memory(x, info, cache)
        return y, cache

    @nn.compact
    def with_memory(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: DeltaCache | None = None,
    ) -> tuple[Float[Array, "B T M"], DeltaCache | None, Float[Array, "B T H V"]]:
        c = self.config
        keys = {"kv_heads": c.key_heads, "head_dim": c.key_dim}
        values = {"heads": c.num_heads, "head_dim": c.value_dim}
        # The state and the convolution go on from where the tokens before ended.
        (q, k, v), tail = self._project_and_convolve(
            x,
            keys,
            values,
            conv_width=c.conv_width,
            conv_bias=c.conv_bias,
            segment_ids=info.segment_ids,
            tail=None if cache is None else cache.conv_tail,
        )
        log_decay = self._log_decay(x)
        if log_decay is not None:
            record(self, "log_decay", log_decay)
        weights = self._weights(x, k)
        memory, state = self._scan(q, k, v, log_decay, weights, info, cache)
        # Normed head by head: how large a state grows depends on its keys and decays.
        eps = self.norm_eps if c.norm_eps is None else c.norm_eps
        o = RMSNorm(eps, axis_name="head_dim", name="norm")(memory)
        if c.output_gate != "none":
            o = self._gated(o, x)
        width = {"embed": x.shape[-1]}
        y = Projection(values, width, self.init_std, self.dtype, name="out")(o)
        if state is None or tail is None:
            return y, None, memory
        return y, DeltaCache(state, tail), memory

    def _project_low(
        self,
        name: str,
        x: Array,
        channels: int,
        rank: int | None,
    ) -> Float[Array, "B T H D"]:
        """Channels of every head; through `rank` of them first, if there is a rank."""
        axes = {"heads": self.config.num_heads, "head_dim": channels}
        if rank is None:
            return self._project(name, x, axes)
        width = {"embed": x.shape[-1]}
        low = {"rank": rank}
        x = Projection(width, low, self.init_std, self.dtype, name=f"{name}_down")(x)
        y = Projection(low, axes, self.init_std, self.dtype, name=f"{name}_up")(x)
        return nn.with_logical_constraint(y, ("batch", "length", "heads", None))

    # --- the gates

    def _log_decay(self, x: Array) -> Float[Array, "B T H"] | Float[Array, "B T H K"] | None:
        """One log decay for each head or for each key channel; None for DeltaNet."""
        c = self.config
        if c.decay == "none":
            return None
        heads = [c.num_heads]
        if c.decay == "scalar":
            logits = self._per_head("decay", x, c.num_heads)
            bias_shape = heads
            bias_axes = ["heads"]
        else:
            logits = self._project_low("decay", x, c.key_dim, c.decay_rank)
            bias_shape = [c.num_heads, c.key_dim]
            bias_axes = ["heads", "head_dim"]
        bias = parameter(
            self,
            "dt_bias",
            axes=bias_axes,
            shape=bias_shape,
            init=step_size_bias,
        )
        is_bounded = c.decay_form == "bounded"
        log_rate = parameter(
            self,
            "a_log",
            axes=["heads"],
            shape=heads,
            init=nn.initializers.zeros if is_bounded else log_decay_rate,
        )
        if c.decay == "vector":
            # The same rate for all channels of a head.
            log_rate = log_rate[:, None]
        logits = logits.astype(jnp.float32) + bias
        if is_bounded:
            return bounded_decay(logits, log_rate, c.decay_bound)
        return softplus_decay(logits, log_rate)

    def _weights(self, x: Array, k: Float[Array, "B T Hk K"]) -> Weights:
        c = self.config
        largest = 2.0 if c.negative_eigenvalues else 1.0
        if c.erase_and_write == "heads":
            beta = largest * jax.nn.sigmoid(self._per_head("beta", x, c.num_heads))
            record(self, "gates", beta)
            return Weights(beta, None, None)
        # One weight for each channel of the key that erases, and of the value that is written.
        erase = self._project_low("erase", x, c.key_dim, None)
        write = self._project_low("write", x, c.value_dim, None)
        erase = largest * jax.nn.sigmoid(erase.astype(jnp.float32))
        write = jax.nn.sigmoid(write.astype(jnp.float32))
        record(self, "gates", erase)
        # The erase key is normalized as the scan normalizes keys.
        keys = jnp.repeat(l2_normalized(k.astype(jnp.float32)), c.num_heads // c.key_heads, axis=2)
        return Weights(None, erase * keys, write)

    def _gated(self, o: Array, x: Array) -> Array:
        """`o` times the output gate, in float32."""
        c = self.config
        logits = self._project_low("output_gate", x, c.value_dim, c.output_gate_rank)
        gates = OUTPUT_GATES[c.output_gate](logits.astype(jnp.float32))
        record(self, "output_gates", gates)
        return (o.astype(jnp.float32) * gates).astype(o.dtype)

    # --- the scan

    def _scan(
        self,
        q: Array,
        k: Array,
        v: Array,
        log_decay: Array | None,
        weights: Weights,
        info: TokenInfo,
        cache: DeltaCache | None,
    ) -> tuple[Array, Array | None]:
        """The output of every token, and the state after the last one if there is a cache."""
        segment_ids = info.segment_ids
        state = None if cache is None else cache.state
        if state is not None and segment_ids is not None:
            # A key of zeros erases and writes nothing.
            k, v, log_decay, state, segment_ids = past_padding(
                k,
                v,
                log_decay,
                state,
                segment_ids,
            )
        if state is not None and q.shape[1] == 1:
            token = jax.tree.map(lambda y: y[:, 0], (q, k, v, log_decay, weights))
            q, k, v, log_decay, weights = token
            o, state = delta_scan_step(
                q,
                k,
                v,
                state,
                weights.beta,
                log_decay,
                erase=weights.erase,
                write=weights.write,
                l2_norm=True,
            )
            return o[:, None], state
        return delta_scan_on_mesh(
            q,
            k,
            v,
            weights.beta,
            log_decay,
            weights.erase,
            weights.write,
            segment_ids,
            state,
            l2_norm=True,
            chunk_size=self.config.chunk_size,
        )

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> DeltaCache:
        """An empty cache; its size does not depend on `length`."""
        c = self.config
        state = jnp.zeros((batch, c.num_heads, c.key_dim, c.value_dim), jnp.float32)
        channels = 2 * c.key_heads * c.key_dim + c.num_heads * c.value_dim
        tail_length = max(c.conv_width - 1, 0)
        return DeltaCache(state, jnp.zeros((batch, tail_length, channels), self.dtype))

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        keys = c.key_heads * c.key_dim
        states = c.num_heads * c.key_dim
        values = c.num_heads * c.value_dim
        channels = 2 * keys + 2 * values
        if c.decay == "scalar":
            channels += c.num_heads
        projections = 2 * width * channels
        if c.decay == "vector":
            projections += _through(width, c.decay_rank, states)
        if c.erase_and_write == "heads":
            projections += 2 * width * c.num_heads
        else:
            projections += 2 * width * (states + values)
        if c.output_gate != "none":
            projections += _through(width, c.output_gate_rank, values)
        # The recurrence itself: k^T u, e S and q S, 2 K V each per head. Chunkwise forms do more;
        # that is their overhead.
        return projections + 6 * states * c.value_dim


def _through(width: int, rank: int | None, channels: int) -> float:
    """FLOPs of a projection from the model width, through `rank` channels if it has a rank."""
    if rank is None:
        return 2 * width * channels
    return 2 * rank * (width + channels)
