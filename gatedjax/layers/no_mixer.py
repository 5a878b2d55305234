"""No mixer: a block that is a feed-forward alone."""

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import NoMixerConfig
from gatedjax.layers.base import Mixer
from gatedjax.layers.token_info import TokenInfo


class NoMixer(Mixer):
    """Nothing. A model does without its norm, too."""

    takes_pieces: ClassVar[bool] = True

    config: NoMixerConfig

    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: Any = None,
    ) -> tuple[Array, Any]:
        return jnp.zeros_like(x), cache

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache: no arrays."""
        return ()

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        return 0.0
