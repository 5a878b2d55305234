"""Gated associative memory (arXiv 2509.00605): a short convolution and a learned memory, gated.

y = sigmoid(x W_l + b_l) * conv(x) + sigmoid(x W_g + b_g) * softmax(x M^T) M
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import AssociativeMemoryConfig
from gatedjax.errors import require
from gatedjax.layers.base import Mixer
from gatedjax.layers.conv import causal_conv, uniform
from gatedjax.layers.documents import is_token, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo

# What the convolution saw last: [B, conv_width - 1, M].
Tail = Float[Array, "B _ M"]


def recalled(
    x: Float[Array, "B T M"],
    memory: Float[Array, "S M"],
) -> Float[Array, "B T M"]:
    """`softmax(x M^T) M`, in float32: the rows of the memory by their likeness to each token."""
    memory = memory.astype(jnp.float32)
    weights = jax.nn.softmax(x.astype(jnp.float32) @ memory.T, axis=-1)
    return weights @ memory


class AssociativeMemory(Mixer):
    """A causal depthwise convolution and a learned memory, each behind a gate of the token."""

    takes_pieces: ClassVar[bool] = True

    config: AssociativeMemoryConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: Tail | None = None,
    ) -> tuple[Float[Array, "B T M"], Tail | None]:
        c = self.config
        M = c.width
        require(x.shape[-1] == M, "width", M, f"that of the layer's input, {x.shape[-1]}")
        x = without_padding(x.astype(self.dtype), is_token(info))

        def uniform_taps(key: Array, shape: tuple[int, ...], dtype) -> Array:
            return uniform(key, shape, dtype, bound=c.conv_width**-0.5)

        kernel = parameter(self, "conv", [None, "embed_act"], [c.conv_width, M], uniform_taps)
        bias = parameter(self, "conv_bias", ["embed_act"], [M], uniform_taps)
        local, tail = causal_conv(x, kernel, info.segment_ids, cache, bias)
        memory = parameter(
            self,
            "memory",
            axes=[None, "embed"],
            shape=[c.slots, M],
            init=nn.initializers.xavier_uniform(),
        )
        gate_axes = {"gates": 2, "embed_act": M}
        gate = Projection(
            {"embed": M}, gate_axes, self.init_std, self.dtype, has_bias=True, name="gate"
        )
        gates = jax.nn.sigmoid(gate(x).astype(jnp.float32))
        record(self, "gates", gates)
        y = gates[:, :, 0] * local.astype(jnp.float32) + gates[:, :, 1] * recalled(x, memory)
        return y.astype(self.dtype), None if cache is None else tail

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> Tail:
        """An empty cache; its size does not depend on `length`."""
        c = self.config
        return jnp.zeros((batch, c.conv_width - 1, c.width), self.dtype)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        return 4 * width * width + 4 * width * self.config.slots
