"""Gated feed-forward: SwiGLU and GEGLU (arXiv 2002.05202)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedMLPConfig
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


def gated_product(
    gate: Float[Array, "..."], up: Float[Array, "..."], activation: str
) -> Float[Array, "..."]:
    """`activation(gate) * up`, in float32; returned in up's dtype."""
    return (ACTIVATIONS[activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(
        up.dtype
    )


class GatedMLP(nn.Module):
    """`(activation(x W_gate) * (x W_up)) W_down`."""

    config: GatedMLPConfig
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Array | None = None,
    ):
        """Returns y, no statistics (a sparse feed-forward has some), and the router logits as they came."""
        hidden = {"mlp": self.config.hidden}
        gate = Projection({"embed": x.shape[-1]}, hidden, self.std, self.dtype, name="gate")(x)
        up = Projection({"embed": x.shape[-1]}, hidden, self.std, self.dtype, name="up")(x)
        h = nn.with_logical_constraint(
            gated_product(gate, up, self.config.activation), ("batch", "length", "mlp")
        )
        return (
            Projection(hidden, {"embed": x.shape[-1]}, self.std, self.dtype, name="down")(h),
            {},
            router_logits,
        )
