"""Tokens of an image: row by row of a grid, behind those without a place on it (a class token)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gatedjax.errors import require

# Height and width; empty for a sequence.
Grid = tuple[int, ...]


class OnGrid(NamedTuple):
    """The tokens before the grid, and those on it."""

    before: Float[Array, "B _ *channels"]
    image: Float[Array, "B h w *channels"]


def tokens_before(num_tokens: int, grid: Grid) -> int:
    """How many tokens have no place on the grid.

    Raises:
      InputError: there are fewer tokens than places.
    """
    places = grid[0] * grid[1]
    require(num_tokens >= places, "grid", grid, f"at most {num_tokens} places, one a token")
    return num_tokens - places


def split(x: Float[Array, "B T *channels"], grid: Grid) -> OnGrid:
    """The tokens by their place."""
    before = tokens_before(x.shape[1], grid)
    image = x[:, before:].reshape(x.shape[0], *grid, *x.shape[2:])
    return OnGrid(x[:, :before], image)


def joined(before: Array, image: Array) -> Float[Array, "B T *channels"]:
    """The tokens in their order."""
    B, h, w = image.shape[:3]
    return jnp.concatenate([before, image.reshape(B, h * w, *image.shape[3:])], axis=1)


def serpentines(num_tokens: int, grid: Grid) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Two orders in which neighbors on the grid follow each other: by rows, and by columns.

    Every other row, or column, is walked backward. Tokens before the grid stay in front.
    """
    before = tokens_before(num_tokens, grid)
    numbers = before + np.arange(grid[0] * grid[1]).reshape(grid)

    def walked(lines: np.ndarray) -> np.ndarray:
        lines = lines.copy()
        lines[1::2] = lines[1::2, ::-1]
        return np.concatenate([np.arange(before), lines.reshape(-1)])

    return walked(numbers), walked(numbers.T)


def grid_angles(
    num_tokens: int,
    grid: Grid,
    channels: int,
    base: float = 10_000.0,
) -> Float[np.ndarray, "T J"]:
    """Angles of rotary positions of rows and columns, as MALA and NaLaFormer rotate.

    Of `channels` that rotate, neighbors are a pair; pairs of the first half rotate by the row,
    those of the second half by the column. Tokens before the grid do not rotate.

    Args:
      num_tokens: T.
      grid: height and width.
      channels: a multiple of 4; there are J = channels / 2 pairs.
      base: frequencies run from 1 to 1 / base.
    """
    frequencies = base ** -np.linspace(0.0, 1.0, channels // 4)
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    on_grid = np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], axis=1)
    none = np.zeros((tokens_before(num_tokens, grid), channels // 2))
    return np.concatenate([none, on_grid]).astype(np.float32)


def grid_coordinates(num_tokens: int, grid: Grid) -> Float[np.ndarray, "T _"]:
    """Where tokens are, from 0 to 1 along each axis; those before the grid are at 0."""
    if not grid:
        return np.linspace(0.0, 1.0, num_tokens, dtype=np.float32)[:, None]
    axes = [np.linspace(0.0, 1.0, size, dtype=np.float32) for size in grid]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    none = np.zeros((tokens_before(num_tokens, grid), 2), np.float32)
    return np.concatenate([none, places])
