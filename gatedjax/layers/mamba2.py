"""Mamba-2 (arXiv 2405.21060) on `kernels_pallas.linear_scan`, as its published code has it.

In the words of the scan: C is the query, B the key, the values are x times the step size dt, and
the log decay is A dt.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array, lax
from jaxtyping import Float

from gatedjax.config import Mamba2Config
from gatedjax.layers.base import Mixer
from gatedjax.layers.conv import short_conv
from gatedjax.layers.gate_values import record
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.scan_or_step import scan_or_step
from gatedjax.layers.step_size import log_decay_rate, step_size_bias
from gatedjax.layers.token_info import TokenInfo
from gatedjax.sharding import parts
from kernels_pallas.common.heads import repeat_heads


@struct.dataclass
class Mamba2Cache:
    """The matrix state of every head, and the convolution's last inputs."""

    state: Float[Array, "... B H K V"]
    conv_tail: Float[Array, "... B _ F"]


def step_sizes(
    logits: Float[Array, "B T H"],
    bias: Float[Array, " H"],
    least: float,
    largest: float | None,
) -> Float[Array, "B T H"]:
    """dt: softplus of the biased logits, within its limits, float32."""
    dt = jax.nn.softplus(logits.astype(jnp.float32) + bias)
    return jnp.clip(dt, least, largest)


def gated_group_norm(
    y: Float[Array, "B T H V"],
    gates: Float[Array, "B T H V"],
    scale: Float[Array, "H V"],
    num_groups: int,
    eps: float,
) -> Float[Array, "B T H V"]:
    """RMSNorm of `y gates` over all channels of each group of heads, in float32.

    Args:
      y: outputs of the heads.
      gates: what they are multiplied by, before the norm.
      scale: of each channel.
      num_groups: of neighboring heads.
      eps: added to the mean square.

    Returns:
      The normed product, in y's dtype.
    """
    product = y.astype(jnp.float32) * gates
    groups = product.reshape(*y.shape[:2], num_groups, -1)
    mean_square = jnp.mean(groups * groups, axis=-1, keepdims=True)
    normed = groups * lax.rsqrt(mean_square + eps)
    return (normed.reshape(y.shape) * scale).astype(y.dtype)


class Mamba2(Mixer):
    """Short convolution, decay and step size of one head, skip, gate, grouped norm."""

    takes_pieces: ClassVar[bool] = True
    gives_memory: ClassVar[bool] = True

    config: Mamba2Config

    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: Mamba2Cache | None = None,
    ) -> tuple[Float[Array, "B T M"], Mamba2Cache | None]:
        y, cache, _ = self.with_memory(x, info, cache)
        return y, cache

    @nn.compact
    def with_memory(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: Mamba2Cache | None = None,
    ) -> tuple[Float[Array, "B T M"], Mamba2Cache | None, Float[Array, "B T H V"]]:
        c = self.config
        values = {"heads": c.num_heads, "head_dim": c.head_dim}
        groups = {"groups": c.num_groups, "head_dim": c.state_dim}
        z = self._project("output_gate", x, values)
        v = self._project("value", x, values)
        k = self._project("key", x, groups)
        q = self._project("query", x, groups)
        # The state and the convolution go on from where the tokens before ended.
        (v, k, q), tail = short_conv(
            self,
            (v, k, q),
            c.conv_width,
            info.segment_ids,
            None if cache is None else cache.conv_tail,
            has_bias=c.conv_bias,
        )
        dt, log_decay = self._decay(x)
        record(self, "log_decay", log_decay)
        skip = parameter(
            self,
            "skip",
            axes=["heads"],
            shape=[c.num_heads],
            init=nn.initializers.ones,
        )
        written = (v * dt[..., None]).astype(v.dtype)
        # The scan has a state for each query head, so the heads of a group get C each.
        q = repeat_heads(q, c.num_heads)
        if c.num_groups > 1 and parts("heads") > 1:
            # A device with some of the heads could not tell whose B is whose.
            k = repeat_heads(k, c.num_heads)
        o, state = scan_or_step(
            q,
            k,
            written,
            log_decay,
            info.segment_ids,
            None if cache is None else cache.state,
            scale=1.0,
            chunk_size=c.chunk_size,
        )
        # What a token gets of itself past the state: D x.
        o = o.astype(jnp.float32) + skip[:, None] * v.astype(jnp.float32)
        memory = o.astype(v.dtype)
        o = self._gated_and_normed(memory, z)
        width = {"embed": x.shape[-1]}
        y = Projection(values, width, self.init_std, self.dtype, name="out")(o)
        if state is None:
            return y, None, memory
        return y, Mamba2Cache(state, tail), memory

    def _decay(self, x: Array) -> tuple[Float[Array, "B T H"], Float[Array, "B T H"]]:
        """(dt, A dt), float32: the step size and the log decay of every head."""
        c = self.config
        width = {"embed": x.shape[-1]}
        heads = {"heads": c.num_heads}
        logits = Projection(width, heads, self.init_std, self.dtype, name="dt")(x)
        bias = parameter(
            self,
            "dt_bias",
            axes=["heads"],
            shape=[c.num_heads],
            init=step_size_bias,
        )
        log_rate = parameter(
            self,
            "a_log",
            axes=["heads"],
            shape=[c.num_heads],
            init=log_decay_rate,
        )
        dt = step_sizes(logits, bias, c.min_step_size, c.max_step_size)
        return dt, -jnp.exp(log_rate) * dt

    def _gated_and_normed(self, o: Array, z: Array) -> Array:
        """The gate, then the norm: the other way round than in this package's other mixers."""
        c = self.config
        gates = jax.nn.silu(z.astype(jnp.float32))
        record(self, "gates", gates)
        scale = parameter(
            self,
            "norm_scale",
            axes=["heads", "head_dim"],
            shape=[c.num_heads, c.head_dim],
            init=nn.initializers.ones,
        )
        return gated_group_norm(o, gates, scale, c.num_groups, self.norm_eps)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> Mamba2Cache:
        """An empty cache; its size does not depend on `length`."""
        c = self.config
        state = jnp.zeros((batch, c.num_heads, c.state_dim, c.head_dim), jnp.float32)
        channels = c.num_heads * c.head_dim + 2 * c.num_groups * c.state_dim
        return Mamba2Cache(state, jnp.zeros((batch, c.conv_width - 1, channels), self.dtype))

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        inner = c.num_heads * c.head_dim
        # z, x and the output; B and C; dt.
        channels = 3 * inner + 2 * c.num_groups * c.state_dim + c.num_heads
        # The recurrence itself: k^T v and q S, 2 K V each per head. Chunkwise forms do more; that
        # is their overhead.
        return 2 * width * channels + 4 * inner * c.state_dim
