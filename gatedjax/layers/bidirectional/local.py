"""What tokens get of their neighbors on both sides: depthwise convolutions, in one or two axes.

Linear attention looks everywhere alike; each of the papers adds a term for what is near.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.layers.bidirectional.grid import Grid, joined, split


def taps(width: int, grid: Grid) -> int:
    """Weights of a channel: of a square on a grid, of a stretch of a sequence."""
    return width * width if grid else width


def depthwise_conv(
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"] | Float[Array, "B W F"],
    grid: Grid,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T F"]:
    """y = sum_w kernel_w x_w over a token and its neighbors on all sides, channel by channel.

    Beyond the edges are zeros. Tokens before the grid get zeros and give nothing.

    Args:
      x: the vectors of the tokens.
      kernel: the weights, row by row of the square, for all rows of the batch or one each.
      grid: height and width; empty for a sequence.
      segment_ids: documents of a sequence: neighbors of another one count as zeros.

    Returns:
      y in x's dtype, summed in float32 or better.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    kernel = kernel.astype(dtype)
    if kernel.ndim == 2:
        kernel = kernel[None]
    if grid:
        before, image = split(x, grid)
        return joined(jnp.zeros_like(before), _conv_2d(image.astype(dtype), kernel).astype(x.dtype))
    return _conv_1d(x.astype(dtype), kernel, segment_ids).astype(x.dtype)


def _conv_1d(x: Array, kernel: Array, segment_ids: Array | None) -> Array:
    width = kernel.shape[1]
    T = x.shape[1]
    sides = (width // 2, width - 1 - width // 2)
    padded = jnp.pad(x, ((0, 0), sides, (0, 0)))
    if segment_ids is None:
        segment_ids = jnp.zeros(x.shape[:2], jnp.int32)
    # Beyond the edges is another document: none has a negative id.
    padded_ids = jnp.pad(segment_ids, ((0, 0), sides), constant_values=-1)
    y = jnp.zeros_like(x)
    for w in range(width):
        is_same: Any = padded_ids[:, w : w + T] == segment_ids
        # Selected before it is multiplied, so that nothing of another document gets through.
        neighbors = jnp.where(is_same[..., None], padded[:, w : w + T], 0)
        y = y + neighbors * kernel[:, w, None]
    return y


def _conv_2d(x: Float[Array, "B h w F"], kernel: Float[Array, "_ W F"]) -> Float[Array, "B h w F"]:
    width = round(kernel.shape[1] ** 0.5)
    h, w = x.shape[1:3]
    sides = (width // 2, width - 1 - width // 2)
    padded = jnp.pad(x, ((0, 0), sides, sides, (0, 0)))
    y = jnp.zeros_like(x)
    # A sum of shifted copies, one a weight of the square.
    for row in range(width):
        for column in range(width):
            neighbors = padded[:, row : row + h, column : column + w]
            y = y + neighbors * kernel[:, row * width + column, None, None]
    return y
