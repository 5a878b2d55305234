"""Tokens of an image: row by row of a grid, behind those without a place on it (a class token)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gatedjax.errors import require
from gatedjax.layers.token_info import Grid


def grid_of(sides: tuple[int, ...], given: Grid | None, num_tokens: int) -> Grid | None:
    """How the tokens of a row lie; None for a sequence.

    Args:
      sides: height and width by the configuration; () for what the model says.
      given: what the model says.
      num_tokens: T. What is more than the grid's places comes before it.

    Raises:
      InputError: the two differ, or there are more places than tokens.
    """
    if not sides:
        return given
    if given is not None:
        expected = f"{(given.rows, given.columns)}, as the patches of the model, or ()"
        require(sides == (given.rows, given.columns), "grid", sides, expected)
    extra = num_tokens - sides[0] * sides[1]
    require(extra >= 0, "grid", sides, f"at most {num_tokens} places, one a token")
    return Grid(sides[0], sides[1], extra)


class OnGrid(NamedTuple):
    """The tokens before the grid, and those on it."""

    before: Float[Array, "B _ *channels"]
    image: Float[Array, "B h w *channels"]


def split(x: Float[Array, "B T *channels"], grid: Grid) -> OnGrid:
    """The tokens by their place."""
    image = x[:, grid.extra :].reshape(x.shape[0], grid.rows, grid.columns, *x.shape[2:])
    return OnGrid(x[:, : grid.extra], image)


def joined(before: Array, image: Array) -> Float[Array, "B T *channels"]:
    """The tokens in their order."""
    B, h, w = image.shape[:3]
    return jnp.concatenate([before, image.reshape(B, h * w, *image.shape[3:])], axis=1)


def serpentines(grid: Grid) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " T"]]:
    """Two orders in which neighbors on the grid follow each other: by rows, and by columns.

    Every other row, or column, is walked backward. Tokens before the grid stay in front.
    """
    numbers = grid.extra + np.arange(grid.rows * grid.columns).reshape(grid.rows, grid.columns)

    def walked(lines: np.ndarray) -> np.ndarray:
        lines = lines.copy()
        lines[1::2] = lines[1::2, ::-1]
        return np.concatenate([np.arange(grid.extra), lines.reshape(-1)])

    return walked(numbers), walked(numbers.T)


def coordinates(num_tokens: int, grid: Grid | None) -> Float[np.ndarray, "T _"]:
    """Where tokens are, from 0 to 1 along each axis; those before the grid are at 0."""
    if grid is None:
        return np.linspace(0.0, 1.0, num_tokens, dtype=np.float32)[:, None]
    sides = (grid.rows, grid.columns)
    axes = [np.linspace(0.0, 1.0, size, dtype=np.float32) for size in sides]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    return np.concatenate([np.zeros((grid.extra, 2), np.float32), places])
