"""Mixers that need all tokens of a row at once: what they refuse, and patches on their grid."""

from typing import Any

from jax import Array
from jaxtyping import Float

from gatedjax.errors import require
from gatedjax.layers.token_info import Grid, TokenInfo


def require_whole_rows(kind: str, info: TokenInfo, cache: Any) -> None:
    """Refuses caches, and rows of several documents or with padding.

    Raises:
      ValueError: by name.
    """
    if cache is not None:
        raise ValueError(f"{kind}: cache: got one, expected None: tokens see later ones")
    if info.segment_ids is not None:
        expected = "None: every row is one document without padding"
        raise ValueError(f"{kind}: info.segment_ids: got an array, expected {expected}")


def refuse_cache(kind: str) -> Any:
    """A token that sees later ones cannot be computed before they are there."""
    raise ValueError(f"{kind}: cache: got one, expected none: tokens see later ones")


def grid_of(kind: str, info: TokenInfo) -> Grid:
    """How the patches of a row lie."""
    if info.grid is None:
        raise ValueError(f"{kind}: info.grid: got None, expected the rows and columns of patches")
    return info.grid


def in_cells(
    x: Float[Array, "B R C F"],
    cell: tuple[int, ...],
) -> Float[Array, "B cells inside F"]:
    """Patches by the cell of neighbors that they are in: cells, and places inside, row by row.

    Args:
      x: patches, by row and column.
      cell: rows and columns of a cell.
    """
    B, rows, columns, F = x.shape
    fits = rows % cell[0] == 0 and columns % cell[1] == 0
    require(fits, "block", cell, f"divisors of the grid of patches, {rows} x {columns}")
    cut = x.reshape(B, rows // cell[0], cell[0], columns // cell[1], cell[1], F)
    return cut.swapaxes(2, 3).reshape(B, -1, cell[0] * cell[1], F)


def out_of_cells(
    x: Float[Array, "B cells inside F"],
    cell: tuple[int, ...],
    sides: tuple[int, ...],
) -> Float[Array, "B R C F"]:
    """The inverse of `in_cells`, for a grid of these sides."""
    B, F = x.shape[0], x.shape[-1]
    cut = x.reshape(B, sides[0] // cell[0], sides[1] // cell[1], *cell, F)
    return cut.swapaxes(2, 3).reshape(B, *sides, F)
