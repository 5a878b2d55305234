"""Gated feed-forward: SwiGLU and GEGLU (arXiv 2002.05202); and none at all."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedMLPConfig, NoFeedForwardConfig
from gatedjax.layers.base import FeedForward
from gatedjax.layers.documents import is_token, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": jax.nn.gelu}


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated_product(
    gate_logits: Float[Array, "..."],
    up: Float[Array, "..."],
    activation: str,
) -> Float[Array, "..."]:
    """`activation(gate_logits) * up`, in float32; returned in up's dtype.

    The backward pass keeps the two arrays as they are given, and computes the float32 ones between
    them and the product again: they are larger, and quickly made.
    """
    gates = ACTIVATIONS[activation](gate_logits.astype(jnp.float32))
    return (gates * up.astype(jnp.float32)).astype(up.dtype)


def _gated_product_forward(gate_logits: Array, up: Array, activation: str):
    return gated_product(gate_logits, up, activation), (gate_logits, up)


def _gated_product_backward(
    activation: str,
    inputs: tuple[Array, Array],
    dproduct: Array,
) -> tuple[Array, Array]:
    gate_logits, up = inputs
    gates, of_gates = jax.vjp(ACTIVATIONS[activation], gate_logits.astype(jnp.float32))
    dproduct = dproduct.astype(jnp.float32)
    dup = (dproduct * gates).astype(up.dtype)
    (dgate_logits,) = of_gates(dproduct * up.astype(jnp.float32))
    return dgate_logits.astype(gate_logits.dtype), dup


gated_product.defvjp(_gated_product_forward, _gated_product_backward)


class GatedMLP(FeedForward):
    """`(activation(x W_gate) * (x W_up)) W_down`."""

    config: GatedMLPConfig

    @nn.compact
    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
        router_logits: Float[Array, "B T E"] | None = None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        c = self.config
        # Zeros in give zeros out, and no NaN of padding gets into the matrices' gradients.
        x = without_padding(x, is_token(info))
        width = {"embed": x.shape[-1]}
        hidden = {"mlp": c.hidden}
        # Two projections, not one cut in half: each is cut over devices along its own columns.
        gate_logits = Projection(
            width,
            hidden,
            self.init_std,
            self.dtype,
            name="gate",
        )(x)
        up = Projection(
            width,
            hidden,
            self.init_std,
            self.dtype,
            name="up",
        )(x)
        record(self, "gates", ACTIVATIONS[c.activation](gate_logits.astype(jnp.float32)))
        h = gated_product(gate_logits, up, c.activation)
        h = nn.with_logical_constraint(h, ("batch", "length", "mlp"))
        y = Projection(
            hidden,
            width,
            self.init_std,
            self.dtype,
            name="down",
        )(h)
        return y, {}, router_logits

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        return 6 * width * self.config.hidden


class NoFeedForward(FeedForward):
    """Nothing: a block that is a mixer alone. A model does without its norm, too."""

    config: NoFeedForwardConfig

    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        router_logits: Float[Array, "B T E"] | None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        return jnp.zeros_like(x), {}, router_logits

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        return 0.0
