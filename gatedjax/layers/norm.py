"""RMSNorm, plain and zero-centered, of a head or of all; LayerNorm; vectors of length 1."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from gatedjax.layers.parameters import parameter
from kernels_pallas.common.norm import rms_norm


def layer_norm(
    x: Float[Array, "... D"],
    scale: Float[Array, "*heads D"],
    bias: Float[Array, "*heads D"],
    eps: float,
) -> Float[Array, "... D"]:
    """`(x - mean) / sqrt(variance + eps) * scale + bias` over the last axis, in float32.

    Args:
      x: the vectors.
      scale: of each channel.
      bias: of each channel.
      eps: added to the variance.

    Returns:
      x's dtype (arXiv 1607.06450).
    """
    x32 = x.astype(jnp.float32)
    centered = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
    return (centered * lax.rsqrt(variance + eps) * scale + bias).astype(x.dtype)


def unit_length(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """`x / |x|` over the last axis, in float32; returns x's dtype."""
    x32 = x.astype(jnp.float32)
    square = jnp.sum(x32 * x32, axis=-1, keepdims=True)
    return (x32 * lax.rsqrt(square + eps)).astype(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last axis. `zero_centered`: the scale is 1 + w, with w = 0 at the start."""

    eps: float
    zero_centered: bool = False
    axis_name: str = "embed_act"

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return rms_norm(x, self.scale_of(x.shape[-1]), self.eps)

    @nn.compact
    def scale_of(self, width: int) -> Float[Array, " D"]:
        """What each of `width` channels is multiplied by."""
        init = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        w = parameter(
            self,
            "scale",
            axes=[self.axis_name],
            shape=[width],
            init=init,
        )
        return 1.0 + w if self.zero_centered else w


class HeadsNorm(nn.Module):
    """RMSNorm over the channels of all heads together, with a scale for each channel."""

    eps: float
    zero_centered: bool

    @nn.compact
    def __call__(self, y: Float[Array, "B T _ D"]) -> Float[Array, "B T _ D"]:
        init = nn.initializers.zeros if self.zero_centered else nn.initializers.ones
        w = parameter(
            self,
            "scale",
            axes=["heads", "head_dim"],
            shape=y.shape[2:],
            init=init,
        )
        scale = 1.0 + w if self.zero_centered else w
        together = y.reshape(*y.shape[:2], -1)
        return rms_norm(together, scale.reshape(-1), self.eps).reshape(y.shape)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis, with a scale and a bias."""

    eps: float
    axis_name: str = "embed_act"

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        axes = [self.axis_name]
        shape = [x.shape[-1]]
        ones = nn.initializers.ones
        zeros = nn.initializers.zeros
        scale = parameter(self, "scale", axes=axes, shape=shape, init=ones)
        bias = parameter(self, "bias", axes=axes, shape=shape, init=zeros)
        return layer_norm(x, scale, bias, self.eps)
