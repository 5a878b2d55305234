"""What tokens get of their neighbors on both sides: depthwise convolutions, in one or two axes.

Linear attention looks everywhere alike; each of the papers adds a term for what is near.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.layers.bidirectional.grid import joined, split
from gatedjax.layers.conv import centered_conv
from gatedjax.layers.token_info import Grid


def taps(width: int, grid: Grid | None) -> int:
    """Weights of a channel: of a square on a grid, of a stretch of a sequence."""
    return width if grid is None else width * width


def depthwise_conv(
    x: Float[Array, "B T F"],
    kernel: Float[Array, "W F"] | Float[Array, "B W F"],
    grid: Grid | None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T F"]:
    """y = sum_w kernel_w x_w over a token and its neighbors on all sides, channel by channel.

    Beyond the edges are zeros. Tokens before the grid get zeros and give nothing.

    Args:
      x: the vectors of the tokens.
      kernel: the weights, row by row of the square, for all rows of the batch or one each.
      grid: of the tokens; None for a sequence.
      segment_ids: documents of a sequence, with one kernel for all of them: neighbors of another
        one count as zeros.

    Returns:
      y in x's dtype, summed in float32 or better.
    """
    if grid is None:
        if kernel.ndim == 2:
            return centered_conv(x, kernel, segment_ids)

        def of_row(x: Array, kernel: Array) -> Array:
            return centered_conv(x[None], kernel)[0]

        return jax.vmap(of_row)(x, kernel)
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    kernel = kernel.astype(dtype)
    if kernel.ndim == 2:
        kernel = kernel[None]
    before, image = split(x, grid)
    return joined(jnp.zeros_like(before), _conv_2d(image.astype(dtype), kernel).astype(x.dtype))


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
