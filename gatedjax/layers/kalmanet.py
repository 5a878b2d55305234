"""Gated KalmaNet (arXiv 2511.21016) on `layers/ridge_scan.py`, as its published code has it.

Convolution and SiLU on queries, keys and values, queries and keys of length 1, Mamba-2's scalar
decay, a gate on what is written and one on how much of the solution is read.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Float

from gatedjax.config import KalmaNetConfig
from gatedjax.layers.base import Mixer
from gatedjax.layers.gate_values import record
from gatedjax.layers.linear_attention import times_output_gate
from gatedjax.layers.norm import unit_length
from gatedjax.layers.parameters import parameter
from gatedjax.layers.past_padding import past_padding
from gatedjax.layers.projection import Projection
from gatedjax.layers.ridge_scan import ridge_scan
from gatedjax.layers.rope import NormOfHeads
from gatedjax.layers.step_size import log_decay_rate, softplus_decay, step_size_bias
from gatedjax.layers.token_info import TokenInfo


@struct.dataclass
class KalmaNetCache:
    """[H | U] of every head, and the convolution's last inputs."""

    state: Float[Array, "... B H K _"]
    conv_tail: Float[Array, "... B _ F"]


class KalmaNet(Mixer):
    """A memory with decay, read by queries that solve a ridge regression on its keys."""

    takes_pieces: ClassVar[bool] = True

    config: KalmaNetConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: KalmaNetCache | None = None,
    ) -> tuple[Float[Array, "B T M"], KalmaNetCache | None]:
        c = self.config
        keys = {"heads": c.num_heads, "head_dim": c.key_dim}
        values = {"heads": c.num_heads, "head_dim": c.value_dim}
        # The state and the convolution go on from where the tokens before ended.
        (q, k, v), tail = self._project_and_convolve(
            x,
            keys,
            values,
            conv_width=c.conv_width,
            segment_ids=info.segment_ids,
            tail=None if cache is None else cache.conv_tail,
        )
        eps = self.norm_eps if c.norm_eps is None else c.norm_eps
        q, k = unit_length(q, 1e-6), unit_length(k, 1e-6)
        if c.write_gate:
            beta = jax.nn.sigmoid(self._per_head("write_gate", x, c.num_heads))[..., None]
            k, v = (k * beta).astype(k.dtype), (v * beta).astype(v.dtype)
        alpha = jax.nn.sigmoid(self._per_head("read_gate", x, c.num_heads, has_bias=True))
        record(self, "read_gates", alpha)
        log_decay = self._log_decay(x)
        record(self, "log_decay", log_decay)

        segment_ids = info.segment_ids
        decay: Array | None = log_decay
        state = None if cache is None else cache.state
        if state is not None and segment_ids is not None:
            k, v, decay, state, segment_ids = past_padding(
                k,
                v,
                log_decay,
                state,
                segment_ids,
            )
        assert decay is not None
        o, state = ridge_scan(
            q,
            k,
            v,
            decay,
            alpha,
            ridge=c.ridge,
            iterations=c.iterations,
            initial_state=state,
            segment_ids=segment_ids,
            chunk_size=c.chunk_size,
        )
        o = NormOfHeads(eps, name="norm")(o)
        if c.output_gate != "none":
            logits = self._project("output_gate", x, values)
            o, gates = times_output_gate(o, logits, c.output_gate)
            record(self, "gates", gates)
        width = {"embed": x.shape[-1]}
        y = Projection(values, width, self.init_std, self.dtype, name="out")(o)
        if cache is None or tail is None:
            return y, None
        return y, KalmaNetCache(state, tail)

    def _log_decay(self, x: Array) -> Float[Array, "B T H"]:
        """Mamba-2's, -exp(A_log) softplus(x W + bias)."""
        heads = self.config.num_heads
        logits = self._per_head("dt", x, heads)
        bias = parameter(self, "dt_bias", axes=["heads"], shape=[heads], init=step_size_bias)
        log_rate = parameter(self, "a_log", axes=["heads"], shape=[heads], init=log_decay_rate)
        return softplus_decay(logits + bias, log_rate)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> KalmaNetCache:
        """An empty cache; its size does not depend on `length`."""
        c = self.config
        state = jnp.zeros((batch, c.num_heads, c.key_dim, c.key_dim + c.value_dim), jnp.float32)
        channels = c.num_heads * (2 * c.key_dim + c.value_dim)
        return KalmaNetCache(
            state, jnp.zeros((batch, max(c.conv_width - 1, 0), channels), self.dtype)
        )

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        keys = c.num_heads * c.key_dim
        values = c.num_heads * c.value_dim
        gates = (1 + int(c.write_gate) + 1) * c.num_heads
        output_gate = values if c.output_gate != "none" else 0
        projections = 2 * width * (2 * keys + 2 * values + output_gate + gates)
        # Writing and reading U, writing H; and a product with H an iteration.
        memory = 4 * keys * c.value_dim + 2 * keys * c.key_dim
        return projections + memory + 2 * c.iterations * keys * c.key_dim
