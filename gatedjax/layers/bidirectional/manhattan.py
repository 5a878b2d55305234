"""Attention along the rows of windows, then along their columns, with a decay by distance.

    r[y, x] = sum_x' softmax_x'(q k + |x - x'| log gamma) v[y, x']
    o[y, x] = sum_y' softmax_y'(q k + |y - y'| log gamma) r[y', x]

RMT's decomposed Manhattan attention (arXiv 2309.11523) inside Swin's windows, which every other
layer shifts: the retention variant of Gated-SwinRMT (arXiv 2604.06014).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from gatedjax.errors import require


def manhattan_log_decay(num_heads: int) -> Float[np.ndarray, " H"]:
    """RMT's log gamma of the heads, log(1 - 2^(-2 - 4 h / H))."""
    exponents = -2.0 - 4.0 * np.arange(num_heads) / num_heads
    return np.log1p(-(2.0**exponents)).astype(np.float32)


def manhattan_attention(
    q: Float[Array, "B h w H K"],
    k: Float[Array, "B h w H K"],
    v: Float[Array, "B h w H V"],
    log_decay: Float[Array, " H"],
    *,
    window: int | None = None,
    shift: int = 0,
) -> Float[Array, "B h w H V"]:
    """Rows, then columns, each by softmax with a decay.

    Args:
      q, k, v: on the grid.
      log_decay: log gamma of every head.
      window: the side of square windows that do not see each other; None, or as large as the grid,
        for one window.
      shift: by how many rows and columns the windows are moved; what is moved beyond the edge sees
        nothing of the other side.

    Returns:
      The outputs, in v's dtype; weights in float32 or better, scaled by K^-0.5.

    Raises:
      InputError: windows that do not fit the grid.
    """
    grid = q.shape[1:3]
    sides = tuple(size if window is None else min(window, size) for size in grid)
    for side, size in zip(sides, grid):
        require(size % side == 0, "window", window, f"a divisor of the grid's sides {grid}")
    # A side that is one window has nothing to be shifted.
    shifts = tuple(shift if side < size else 0 for side, size in zip(sides, grid))

    def windows(x: Array) -> Array:
        x = jnp.roll(x, (-shifts[0], -shifts[1]), axis=(1, 2))
        return _windows(x, sides)

    out_dtype = v.dtype
    dtype = jnp.promote_types(jnp.result_type(q, v), jnp.float32)
    q, k, v = (windows(x.astype(dtype)) for x in (q, k, v))
    q = q * q.shape[-1] ** -0.5
    log_decay = log_decay.astype(dtype)
    rows, columns = (_strips(size, side, by) for size, side, by in zip(grid, sides, shifts))
    # Windows row by row: which strip of the image each of their rows and columns comes from.
    row_strips = np.repeat(rows, len(columns), axis=0)
    column_strips = np.tile(columns, (len(rows), 1))

    along_rows = _weights(jnp.einsum("bnyxhk,bnyzhk->bnyhxz", q, k), log_decay, column_strips)
    v = jnp.einsum("bnyhxz,bnyzhv->bnyxhv", along_rows, v)
    along_columns = _weights(jnp.einsum("bnyxhk,bnzxhk->bnxhyz", q, k), log_decay, row_strips)
    out = jnp.einsum("bnxhyz,bnzxhv->bnyxhv", along_columns, v)

    out = _from_windows(out, grid)
    return jnp.roll(out, shifts, axis=(1, 2)).astype(out_dtype)


def _weights(
    logits: Float[Array, "B n _ H s s"],
    log_decay: Float[Array, " H"],
    strips: np.ndarray,
) -> Float[Array, "B n _ H s s"]:
    """Softmax over a line of a window, of those that come from one strip of the image."""
    places = np.arange(logits.shape[-1])
    distance = np.abs(places[:, None] - places)
    logits = logits + log_decay[:, None, None] * distance
    is_seen = strips[:, :, None] == strips[:, None, :]
    logits = jnp.where(is_seen[None, :, None, None], logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def _strips(size: int, side: int, shift: int) -> np.ndarray:
    """[windows along an axis, side]: 1 for what was moved over the edge, 0 for the rest."""
    is_moved = np.arange(size) >= size - shift
    return is_moved.reshape(size // side, side)


def _windows(x: Float[Array, "B h w H D"], sides: tuple[int, ...]) -> Float[Array, "B n y x H D"]:
    B, h, w, *channels = x.shape
    side_y, side_x = sides
    x = x.reshape(B, h // side_y, side_y, w // side_x, side_x, *channels)
    return jnp.moveaxis(x, 3, 2).reshape(B, -1, side_y, side_x, *channels)


def _from_windows(
    x: Float[Array, "B n y x H D"], grid: tuple[int, ...]
) -> Float[Array, "B h w H D"]:
    B, _, side_y, side_x, *channels = x.shape
    h, w = grid
    x = x.reshape(B, h // side_y, w // side_x, side_y, side_x, *channels)
    return jnp.moveaxis(x, 2, 3).reshape(B, h, w, *channels)
