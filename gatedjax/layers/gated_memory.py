"""The gated memory unit of SambaY (arXiv 2507.06607): a gate on what another layer has read.

A scan reads its state once, for all the layers that follow it; a unit is two matrices and a gate on
that. It sees no other tokens, and decodes without a cache.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedMemoryConfig
from gatedjax.errors import require
from gatedjax.layers.base import Mixer
from gatedjax.layers.gate_values import record
from gatedjax.layers.mamba2 import gated_group_norm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo


class GatedMemory(Mixer):
    """`norm(M silu(x W_1)) W_2`, with M the memory that `info` holds."""

    takes_pieces: ClassVar[bool] = True

    config: GatedMemoryConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T M"], Any]:
        c = self.config
        memory = info.memory
        sizes = (c.num_heads, c.head_dim)
        require(
            memory is not None and memory.shape[2:] == sizes,
            "info.memory",
            None if memory is None else memory.shape,
            f"[B, T, {c.num_heads}, {c.head_dim}]: what a scan before the layer has read",
        )
        assert memory is not None
        heads = {"heads": c.num_heads, "head_dim": c.head_dim}
        gates = jax.nn.silu(self._project("gate", x, heads).astype(jnp.float32))
        record(self, "gates", gates)
        if c.norm:
            scale = parameter(
                self,
                "norm_scale",
                axes=list(heads),
                shape=list(sizes),
                init=nn.initializers.ones,
            )
            o = gated_group_norm(memory, gates, scale, c.num_groups, self.norm_eps)
        else:
            o = (memory.astype(jnp.float32) * gates).astype(memory.dtype)
        width = {"embed": x.shape[-1]}
        y = Projection(heads, width, self.init_std, self.dtype, name="out")(o)
        return y, cache

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> Any:
        """An empty cache: no arrays."""
        return ()

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        return 4 * width * c.num_heads * c.head_dim
