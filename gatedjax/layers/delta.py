"""The delta rule as a mixer, on `kernels_pallas.delta_scan`.

One layer for DeltaNet (arXiv 2406.06484), Gated DeltaNet (2412.06464), Kimi Delta Attention
(2510.26692), Gated DeltaNet-2 (2605.22791), DeltaProduct (2502.10297) and Comba (2506.02475), by
configuration.
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
from gatedjax.layers.linear_attention import times_output_gate
from gatedjax.layers.on_mesh import delta_product_scan_on_mesh, delta_scan_on_mesh
from gatedjax.layers.parameters import parameter
from gatedjax.layers.past_padding import past_padding
from gatedjax.layers.projection import Projection
from gatedjax.layers.rope import NormOfHeads
from gatedjax.layers.step_size import log_decay_rate, softplus_decay, step_size_bias
from gatedjax.layers.token_info import TokenInfo
from kernels_pallas.delta_scan import delta_product_scan_step, delta_scan_step, l2_normalized

# Of a layer with state feedback: its erase key undoes the decay, and must stay finite. Stronger
# decays count as this one, 2e-9.
STRONGEST_LOG_DECAY = -20.0


@struct.dataclass
class DeltaCache:
    """The matrix state of every head, and the convolution's last inputs."""

    state: Float[Array, "... B H K V"]
    conv_tail: Float[Array, "... B _ F"]


class Weights(NamedTuple):
    """How much each token erases and writes: one number a head, or one a channel."""

    beta: Float[Array, "B T H"] | Float[Array, "B T n H"] | None
    erase: Float[Array, "B T H K"] | None
    write: Float[Array, "B T H V"] | None


def bounded_decay(
    logits: Float[Array, "..."],
    log_rate: Float[Array, "..."],
    bound: float,
) -> Float[Array, "..."]:
    """The log decay `-bound sigmoid(exp(A_log) logits)`, KDA's safe gate, float32."""
    return -bound * jax.nn.sigmoid(jnp.exp(log_rate) * logits.astype(jnp.float32))


def corrected(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    amount: Float[Array, " H"],
) -> Float[Array, "B T H K"]:
    """Comba's output feedback: queries less `amount` times the token's own key, in float32."""
    own = amount[:, None] * k.astype(jnp.float32)
    return (q.astype(jnp.float32) - own).astype(q.dtype)


def split_steps(
    x: Float[Array, "B T H nD"],
    num_steps: int,
) -> Float[Array, "B T n H D"]:
    """The keys or values of a token's steps, which lie side by side within each head."""
    B, T, H, channels = x.shape
    return jnp.swapaxes(x.reshape(B, T, H, num_steps, channels // num_steps), 2, 3)


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
        steps = c.num_householder
        queries = {"kv_heads": c.key_heads, "head_dim": c.key_dim}
        keys = {"kv_heads": c.key_heads, "head_dim": steps * c.key_dim}
        values = {"heads": c.num_heads, "head_dim": steps * c.value_dim}
        # The state and the convolution go on from where the tokens before ended.
        (q, k, v), tail = self._project_and_convolve(
            x,
            keys,
            values,
            queries=queries,
            conv_width=c.conv_width,
            conv_bias=c.conv_bias,
            segment_ids=info.segment_ids,
            tail=None if cache is None else cache.conv_tail,
        )
        log_decay = self._log_decay(x)
        if log_decay is not None:
            record(self, "log_decay", log_decay)
        feedback = None
        if c.state_feedback:
            feedback = jax.nn.sigmoid(self._per_key_head("state_feedback", 1.0))
        if c.output_feedback is not None:
            amount = self._per_key_head("output_feedback", c.output_feedback)
            q = corrected(q, k, amount if feedback is None else feedback * amount)
        if feedback is not None and log_decay is not None:
            log_decay = jnp.maximum(log_decay, STRONGEST_LOG_DECAY)
        weights = self._weights(x, k, log_decay, feedback)
        memory, state = self._scan(q, k, v, log_decay, weights, info, cache)
        # Normed head by head: how large a state grows depends on its keys and decays.
        eps = self.norm_eps if c.norm_eps is None else c.norm_eps
        o = NormOfHeads(eps, name="norm")(memory)
        if c.output_gate != "none":
            o = self._gated(o, x)
        width = {"embed": x.shape[-1]}
        outputs = {"heads": c.num_heads, "head_dim": c.value_dim}
        y = Projection(outputs, width, self.init_std, self.dtype, name="out")(o)
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
        return Projection(low, axes, self.init_std, self.dtype, name=f"{name}_up")(x)

    def _per_key_head(self, name: str, start: float) -> Float[Array, " Hk"]:
        """A parameter of key heads that starts from one value."""
        heads = [self.config.key_heads]
        init = nn.initializers.constant(start)
        return parameter(self, name, axes=["kv_heads"], shape=heads, init=init)

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

    def _weights(
        self,
        x: Float[Array, "B T M"],
        k: Float[Array, "B T Hk K"],
        log_decay: Array | None,
        feedback: Float[Array, " Hk"] | None,
    ) -> Weights:
        """How much is erased and written.

        Args:
          x: the layer's input.
          k: keys, of any length.
          log_decay: of heads or of channels; None without one.
          feedback: the fraction of beta that erases, of a layer that has one.
        """
        c = self.config
        largest = 2.0 if c.negative_eigenvalues else 1.0
        if c.erase_and_write == "heads":
            beta = largest * jax.nn.sigmoid(self._beta_logits(x))
            record(self, "gates", beta)
            if c.num_householder > 1:
                return Weights(jnp.swapaxes(beta, 2, 3), None, None)
            if feedback is None:
                return Weights(beta, None, None)
            erase = beta[..., None] * self._of_states(feedback[:, None] * self._unit(k))
            if log_decay is not None:
                # What is found is erased as it was before its decay.
                of_channels = log_decay if log_decay.ndim == 4 else log_decay[..., None]
                erase = erase * jnp.exp(-of_channels)
            return Weights(beta, erase, None)
        # One weight for each channel of the key that erases, and of the value that is written.
        erase = self._project_low("erase", x, c.key_dim, None)
        write = self._project_low("write", x, c.value_dim, None)
        erase = largest * jax.nn.sigmoid(erase.astype(jnp.float32))
        write = jax.nn.sigmoid(write.astype(jnp.float32))
        record(self, "gates", erase)
        return Weights(None, erase * self._of_states(self._unit(k)), write)

    def _beta_logits(self, x: Array) -> Float[Array, "B T H"] | Float[Array, "B T H n"]:
        """One number for each head, or for each of its steps, float32."""
        c = self.config
        if c.num_householder == 1:
            return self._per_head("beta", x, c.num_heads)
        steps = {"heads": c.num_heads, "head_dim": c.num_householder}
        return self._project("beta", x, steps).astype(jnp.float32)

    def _unit(self, k: Float[Array, "B T Hk K"]) -> Float[Array, "B T Hk K"]:
        """Erase keys are normalized as the scan normalizes keys, in float32."""
        return l2_normalized(k.astype(jnp.float32))

    def _of_states(self, k: Float[Array, "B T Hk K"]) -> Float[Array, "B T H K"]:
        """Each key head for every state of its group."""
        return jnp.repeat(k, self.config.num_heads // self.config.key_heads, axis=2)

    def _gated(self, o: Array, x: Array) -> Array:
        """`o` times the output gate, in float32."""
        c = self.config
        logits = self._project_low("output_gate", x, c.value_dim, c.output_gate_rank)
        y, gates = times_output_gate(o, logits, c.output_gate)
        record(self, "output_gates", gates)
        return y

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
        if self.config.num_householder > 1:
            return self._scan_steps(q, k, v, log_decay, weights, segment_ids, state)
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

    def _scan_steps(
        self,
        q: Float[Array, "B T Hk K"],
        k: Float[Array, "B T Hk nK"],
        v: Float[Array, "B T H nV"],
        log_decay: Array | None,
        weights: Weights,
        segment_ids: Array | None,
        state: Float[Array, "B H K V"] | None,
    ) -> tuple[Array, Array | None]:
        """Several steps of the rule a token.

        Args:
          q: queries.
          k, v: keys and values of a token's steps, side by side within each head.
          log_decay: of a token.
          weights: beta of every step.
          segment_ids: of the documents.
          state: before the first token, if there is a cache.
        """
        num_steps = self.config.num_householder
        assert weights.beta is not None
        k = split_steps(k, num_steps)
        v = split_steps(v, num_steps)
        if state is not None and q.shape[1] == 1:
            o, state = delta_product_scan_step(
                q[:, 0],
                k[:, 0],
                v[:, 0],
                state,
                weights.beta[:, 0],
                None if log_decay is None else log_decay[:, 0],
                l2_norm=True,
            )
            return o[:, None], state
        return delta_product_scan_on_mesh(
            q,
            k,
            v,
            weights.beta,
            log_decay,
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
        of_step = c.key_heads * c.key_dim + c.num_heads * c.value_dim
        channels = c.key_heads * c.key_dim + c.num_householder * of_step
        tail_length = max(c.conv_width - 1, 0)
        return DeltaCache(state, jnp.zeros((batch, tail_length, channels), self.dtype))

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        keys = c.key_heads * c.key_dim
        states = c.num_heads * c.key_dim
        values = c.num_heads * c.value_dim
        steps = c.num_householder
        channels = keys + values + steps * (keys + values)
        if c.decay == "scalar":
            channels += c.num_heads
        projections = 2 * width * channels
        if c.decay == "vector":
            projections += _through(width, c.decay_rank, states)
        if c.erase_and_write == "heads":
            projections += 2 * width * steps * c.num_heads
        else:
            projections += 2 * width * (states + values)
        if c.output_gate != "none":
            projections += _through(width, c.output_gate_rank, values)
        # The recurrence itself: k^T u and e S of every step, and q S, 2 K V each per head.
        # Chunkwise forms do more; that is their overhead.
        return projections + (4 * steps + 2) * states * c.value_dim


def _through(width: int, rank: int | None, channels: int) -> float:
    """FLOPs of a projection from the model width, through `rank` channels if it has a rank."""
    if rank is None:
        return 2 * width * channels
    return 2 * rank * (width + channels)
