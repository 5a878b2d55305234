"""RWKV's feed-forwards, "channel mixing": a token shift and a squared ReLU (RWKV-7, arXiv
2503.14456), and a gate with a token shift of its own (RWKV-6, 2404.05892).
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import RWKV6ChannelMixConfig, RWKV7ChannelMixConfig
from gatedjax.layers import rwkv7_starts as starts
from gatedjax.layers.base import FeedForward
from gatedjax.layers.conv import previous_inputs
from gatedjax.layers.depth import ALONE
from gatedjax.layers.documents import is_token, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.rwkv7 import shifted
from gatedjax.layers.token_info import TokenInfo

# The input before the first token of a call.
LastInput = Float[Array, "... B 1 M"]


class RWKV7ChannelMix(FeedForward):
    """`relu(x' W_up)^2 W_down`, where x' lies between a token and the one before it.

    Matrices start as published, not from `init_std`.
    """

    has_cache: ClassVar[bool] = True
    # RWKV-6's, whose shift also starts from a place of its own.
    has_gate: ClassVar[bool] = False

    config: RWKV7ChannelMixConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: LastInput | None = None,
    ) -> tuple[Float[Array, "B T M"], LastInput | None]:
        # Zeros in give zeros out, and no NaN of padding gets into the gradients of parameters.
        x = without_padding(x, is_token(info))
        depth = ALONE if info.depth is None else info.depth
        previous, last_input = previous_inputs(x, info.segment_ids, cache)
        power = starts.from_one_to_almost_zero(depth)
        start = starts.shift(power if self.has_gate else power**4)
        amount = self._of_channels("shift", x.shape[-1], start)
        width = {"embed": x.shape[-1]}
        hidden = {"mlp": self.config.hidden}
        h = Projection(
            width,
            hidden,
            self.init_std,
            self.dtype,
            kernel_init=starts.orthogonal(1.0),
            name="up",
        )(shifted(x, previous, amount))
        h = jnp.square(jax.nn.relu(h))
        h = nn.with_logical_constraint(h, ("batch", "length", "mlp"))
        y = Projection(
            hidden,
            width,
            self.init_std,
            self.dtype,
            kernel_init=nn.initializers.zeros,
            name="down",
        )(h)
        if self.has_gate:
            amount = self._of_channels("gate_shift", x.shape[-1], start)
            logits = Projection(
                width,
                {"embed_act": x.shape[-1]},
                self.init_std,
                self.dtype,
                kernel_init=nn.initializers.zeros,
                name="gate",
            )(shifted(x, previous, amount))
            gates = jax.nn.sigmoid(logits.astype(jnp.float32))
            record(self, "gates", gates)
            y = (gates * y.astype(jnp.float32)).astype(y.dtype)
        return y, None if cache is None else last_input

    def _of_channels(self, name: str, width: int, start: starts.Initializer) -> Float[Array, " M"]:
        return parameter(self, name, axes=["embed_act"], shape=[width], init=start)

    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        router_logits: Float[Array, "B T E"] | None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        y, _ = self.with_cache(x, info, None)
        return y, {}, router_logits

    @nn.nowrap
    def init_cache(self, batch: int, width: int) -> LastInput:
        """Zeros in place of the token before the first."""
        return jnp.zeros((batch, 1, width), self.dtype)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        of_gate = width if self.has_gate else 0
        return 2 * width * (2 * self.config.hidden + of_gate)


class RWKV6ChannelMix(RWKV7ChannelMix):
    """RWKV-7's times `sigmoid(x'' W)`, where x'' lies elsewhere between the two tokens."""

    has_gate: ClassVar[bool] = True

    config: RWKV6ChannelMixConfig  # pyrefly: ignore  (of another kind)
