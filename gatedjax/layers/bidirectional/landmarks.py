"""SOFT's landmarks: a few vectors that stand for the queries of a square, or a stretch, of tokens.

The parameters are the layer's own.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.errors import require
from gatedjax.layers.base import Mixer
from gatedjax.layers.bidirectional.grid import split
from gatedjax.layers.norm import LayerNorm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.token_info import TokenInfo


def landmarks_of(
    layer: Mixer,
    q: Float[Array, "B T H K"],
    info: TokenInfo,
) -> Float[Array, "B m H K"]:
    """GELU(LayerNorm(W q)) of all queries of a square or a stretch, for every head alike."""
    c = layer.config
    r = c.landmark_size
    B, T, H, K = q.shape
    if info.grid is not None:
        h, w = info.grid.rows, info.grid.columns
        fits = h % r == 0 and w % r == 0
        require(fits, "landmark_size", r, f"a divisor of the grid's sides {(h, w)}")
        image = split(q, info.grid).image.reshape(B, h // r, r, w // r, r, H, K)
        blocks = jnp.moveaxis(image, 3, 2).reshape(B, -1, r * r, H, K)
    else:
        require(T % r == 0, "landmark_size", r, f"a divisor of the {T} tokens of a row")
        blocks = q.reshape(B, T // r, r, H, K)
    kernel = parameter(
        layer,
        "landmark",
        axes=[None, None, None],
        shape=[blocks.shape[2], K, K],
        init=nn.initializers.normal((blocks.shape[2] * K) ** -0.5),
    )
    landmarks = jnp.einsum("bmrhk,rkd->bmhd", blocks, kernel.astype(q.dtype))
    normed = LayerNorm(layer.norm_eps, axis_name="head_dim", name="landmark_norm")(landmarks)
    return jax.nn.gelu(normed, approximate=False)
