"""Soft mixture of experts (arXiv 2308.00951): no token is routed; experts work on mixtures of all of them.

Not causal, and blind to document boundaries: for encoders. A causal model refuses it (`config/run.py`).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import SoftMoEConfig
from gatedjax.layers.mlp import gated_product
from gatedjax.layers.projection import parameter
from gatedjax.layers.token_info import TokenInfo


def slot_logits(
    x: Float[Array, "B T M"], phi: Float[Array, "M E s"], scale: Float[Array, ""]
) -> Float[Array, "B T E s"]:
    """Cosines of tokens and slots, times a learned scale (section 2.3): otherwise they would grow with the width."""
    x, phi = x.astype(jnp.float32), phi.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
    phi = phi * jax.lax.rsqrt(jnp.sum(phi * phi, axis=0, keepdims=True) + 1e-6)
    return scale * jnp.einsum("btm,mes->btes", x, phi)


def soft_experts(
    x: Float[Array, "B T M"],
    logits: Float[Array, "B T E s"],
    gate: Float[Array, "E M F"],
    up: Float[Array, "E M F"],
    down: Float[Array, "E F M"],
    activation: str,
) -> Float[Array, "B T M"]:
    """Slots are means of tokens (softmax over T), outputs are means of slots (softmax over E s); both in float32."""
    dispatch = jax.nn.softmax(logits, axis=1)
    combine = jax.nn.softmax(logits.reshape(*logits.shape[:2], -1), axis=-1).reshape(logits.shape)
    slots = jnp.einsum("btes,btm->besm", dispatch, x.astype(jnp.float32)).astype(x.dtype)
    into = lambda kernel: jnp.einsum("besm,emf->besf", slots, kernel)
    y = jnp.einsum("besf,efm->besm", gated_product(into(gate), into(up), activation), down)
    return jnp.einsum("btes,besm->btm", combine, y.astype(jnp.float32)).astype(x.dtype)


class SoftMoE(nn.Module):
    """E gated MLPs with s slots each; cost does not depend on how many experts there are, only on E s."""

    config: SoftMoEConfig
    std: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Array | None = None,
    ):
        """Returns y, no statistics (loads are even by construction), and the router logits as they came."""
        c, width = self.config, x.shape[-1]
        lecun = nn.initializers.lecun_normal(in_axis=0, out_axis=(1, 2))
        phi = parameter(
            self,
            "phi",
            ["embed", "router", None],
            [width, c.num_experts, c.slots_per_expert],
            lecun,
        )
        scale = parameter(self, "scale", [], [], nn.initializers.ones)
        stack = lambda name, axes, *shape: parameter(
            self, name, ["expert", *axes], [c.num_experts, *shape], nn.initializers.normal(self.std)
        ).astype(self.dtype)
        gate, up = (stack(name, ("embed", "mlp"), width, c.hidden) for name in ("gate", "up"))
        down = stack("down", ("mlp", "embed"), c.hidden, width)
        y = soft_experts(
            x.astype(self.dtype), slot_logits(x, phi, scale), gate, up, down, c.activation
        )
        return y, {}, router_logits
