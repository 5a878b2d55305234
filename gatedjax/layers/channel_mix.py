"""RWKV-7's feed-forward, "channel mixing" (arXiv 2503.14456): a token shift and a squared ReLU."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import RWKV7ChannelMixConfig
from gatedjax.layers import rwkv7_starts as starts
from gatedjax.layers.base import FeedForward
from gatedjax.layers.conv import previous_inputs
from gatedjax.layers.depth import ALONE
from gatedjax.layers.documents import is_token, without_padding
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
        amount = parameter(
            self,
            "shift",
            axes=["embed_act"],
            shape=[x.shape[-1]],
            init=starts.shift(starts.from_one_to_almost_zero(depth) ** 4),
        )
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
        return y, None if cache is None else last_input

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
        return 4 * width * self.config.hidden
