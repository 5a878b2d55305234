"""RMSNorm, plain and zero-centered."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from gatedjax.layers.projection import parameter


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], eps: float
) -> Float[Array, "... D"]:
    """`x / sqrt(mean(x^2) + eps) * scale` over the last axis, in float32; returns x's dtype (arXiv 1910.07467)."""
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + eps) * scale).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis. `zero_centered`: the scale is 1 + w, with w = 0 at the start."""

    eps: float
    zero_centered: bool = False
    axis_name: str = "embed_act"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        init = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        w = parameter(self, "scale", [self.axis_name], [x.shape[-1]], init)
        return rms_norm(x, 1.0 + w if self.zero_centered else w, self.eps)
