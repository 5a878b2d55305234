"""NiNformer's gate (arXiv 2403.02411): channels times what an MLP-Mixer block makes of all tokens.

m = x + MLP_tokens(LN(x))
m = m + MLP_channels(LN(m))
y = (x W + b) * m
"""

from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import MixerGateConfig
from gatedjax.layers.base import Mixer
from gatedjax.layers.gate_values import record
from gatedjax.layers.norm import LayerNorm
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo
from gatedjax.layers.whole_rows import refuse_cache, require_whole_rows


class MixerGate(Mixer):
    """A linear map of every token, gated by all of them."""

    config: MixerGateConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T M"], Any]:
        c = self.config
        require_whole_rows(c.kind, info, cache)
        of_tokens = LayerNorm(self.norm_eps, name="token_norm")(x).swapaxes(1, 2)
        of_tokens = self._mlp(of_tokens, "token", None, c.token_hidden)
        mixed = x + of_tokens.swapaxes(1, 2)
        of_channels = LayerNorm(self.norm_eps, name="channel_norm")(mixed)
        mixed = mixed + self._mlp(of_channels, "channel", "embed", c.channel_hidden)
        record(self, "gates", mixed)
        y = self._dense(x, "value", {"embed": x.shape[-1]}, {"embed_act": x.shape[-1]})
        return (y.astype(jnp.float32) * mixed.astype(jnp.float32)).astype(y.dtype), None

    def _mlp(self, x: Array, name: str, axis: str | None, hidden: int) -> Array:
        """Two matrices with biases and a GELU between them, along the last axis."""
        outer = {axis or "tokens": x.shape[-1]}
        h = jax.nn.gelu(self._dense(x, f"{name}_up", outer, {"mlp": hidden}))
        return self._dense(h, f"{name}_down", {"mlp": hidden}, outer)

    def _dense(self, x: Array, name: str, inputs: dict[str, int], outputs: dict[str, int]) -> Array:
        return Projection(
            inputs,
            outputs,
            self.init_std,
            self.dtype,
            has_bias=True,
            name=name,
        )(x)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> NoReturn:
        return refuse_cache(self.config.kind)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        # An MLP over T tokens, for each of M channels: M / T of it a token.
        return 4 * width * c.token_hidden + 4 * width * c.channel_hidden + 2 * width * width
