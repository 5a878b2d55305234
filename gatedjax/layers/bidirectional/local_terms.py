"""The weights of what the layer adds for what is near: of a convolution, or of what makes one.

The parameters are the layer's own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.errors import require
from gatedjax.layers.base import Mixer
from gatedjax.layers.bidirectional.local import depthwise_conv, taps
from gatedjax.layers.parameters import parameter
from gatedjax.layers.token_info import TokenInfo


def local_conv(layer: Mixer, x: Float[Array, "B T F"], info: TokenInfo) -> Float[Array, "B T F"]:
    """A depthwise convolution with a bias on what has a place."""
    c = layer.config
    count = taps(c.local_width, info.grid)
    F = x.shape[-1]
    kernel = parameter(
        layer,
        "local",
        axes=[None, None],
        shape=[count, F],
        init=nn.initializers.normal(count**-0.5),
    )
    bias = parameter(layer, "local_bias", axes=[None], shape=[F], init=nn.initializers.zeros)
    y = depthwise_conv(x, kernel, info.grid, info.segment_ids) + bias.astype(x.dtype)
    if info.grid is None:
        return y
    # Tokens without a place: nothing is added to them, and what comes first leaves them alone.
    before = info.grid.extra
    others = x[:, :before] if c.local == "first" else jnp.zeros_like(x[:, :before])
    return jnp.concatenate([others, y[:, before:]], axis=1)


def dynamic_kernel(
    layer: Mixer, x: Float[Array, "B T M"], info: TokenInfo
) -> Float[Array, "B W F"]:
    """InLine's convolution: weights from the mean over tokens, by two layers for each head."""
    c = layer.config
    H, V = c.num_heads, c.value_dim
    count = taps(c.local_width, info.grid)
    M = x.shape[-1]
    require(M % H == 0, "num_heads", H, f"a divisor of the width {M}")
    mean = jnp.mean(x, axis=1).reshape(x.shape[0], H, M // H)
    zeros = nn.initializers.zeros
    hidden_axes = ["heads", None, None]
    start = nn.initializers.normal((M // H) ** -0.5)
    shape = [H, M // H, V]
    up = parameter(layer, "dynamic_up", axes=hidden_axes, shape=shape, init=start)
    up_bias = parameter(layer, "dynamic_up_bias", axes=hidden_axes[:2], shape=[H, V], init=zeros)
    hidden = jnp.einsum("bhm,hmv->bhv", mean, up.astype(mean.dtype)) + up_bias
    hidden = jax.nn.gelu(hidden, approximate=False)
    start = nn.initializers.normal((V * count) ** -0.5)
    shape = [H, V, V, count]
    axes = ["heads", None, None, None]
    down = parameter(layer, "dynamic_down", axes=axes, shape=shape, init=start)
    shape = [H, V, count]
    bias = parameter(layer, "dynamic_down_bias", axes=axes[:3], shape=shape, init=zeros)
    kernel = jnp.einsum("bhv,hvdw->bhdw", hidden, down.astype(hidden.dtype)) + bias
    return jnp.moveaxis(kernel.reshape(x.shape[0], H * V, count), -1, 1)
