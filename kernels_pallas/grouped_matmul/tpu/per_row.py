"""One number for each row, in VMEM: 128 rows to a line of lanes.

As [R, 1], such numbers would take 128 times the memory and traffic. But a matrix has a row's
numbers in one sublane, so a stretch of a line is transposed to a column and back, with a mask and a
sum. Rows are taken `ROWS` at a time, from a multiple of `ROWS` on, so they never lie in two lines.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Bool, Float

from kernels_pallas.common.padding import padded_to_multiples
from kernels_pallas.common.tpu import Ref
from kernels_pallas.grouped_matmul.tpu.tiles import LANES, ROWS, Scalar

MOST_ROWS = 2**20  # 4 MiB of VMEM


def in_lines(x: Float[Array, "R"]) -> Float[Array, "L 128"]:
    """As the kernels take it: float32, zeros after the last row."""
    return padded_to_multiples(x.astype(jnp.float32), LANES).reshape(-1, LANES)


def column(
    lines: Ref,
    first: Scalar,
    size: int,
) -> Float[Array, "{size} 1"]:
    """The numbers of rows first, first + 1, ...; anything beyond the last row.

    `first` and `size` are multiples of `ROWS`.
    """

    def part(row: Scalar) -> Float[Array, "16 1"]:
        line, on_diagonal = _place(lines, row)
        # One number is left in each sublane, so the sum over lanes is that number.
        numbers = jnp.where(on_diagonal, lines[line, :], 0.0)
        return jnp.sum(numbers, axis=1, keepdims=True)

    parts = [part(first + i) for i in range(0, size, ROWS)]
    return jnp.concatenate(parts)


def add_sums(
    lines: Ref,
    first: Scalar,
    values: Float[Array, "S C"],
    low: Scalar,
    high: Scalar,
) -> None:
    """Adds the sum of each row of `values` to that row's number.

    Args:
      lines: [L, 128] in VMEM, the numbers.
      first: the row that values[0] belongs to, a multiple of `ROWS`.
      values: S a multiple of `ROWS`, C of `LANES`.
      low: rows before it belong to another group, and get nothing.
      high: so do rows from here on.
    """
    num_rows, num_columns = values.shape
    # Whole registers first: only one sum over the lanes of a register is left for each row.
    by_lane = values[:, :LANES]
    for i in range(LANES, num_columns, LANES):
        by_lane += values[:, i : i + LANES]
    for i in range(0, num_rows, ROWS):
        line, on_diagonal = _place(lines, first + i)
        within = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
        row = first + i + within
        is_own = on_diagonal & (low <= row) & (row < high)
        total = jnp.sum(by_lane[i : i + ROWS], axis=1, keepdims=True)
        # A neighbor's rows may hold anything, NaN too: selected away, not multiplied by 0.
        own_total = jnp.where(is_own, total, 0.0)
        lines[line, :] += jnp.sum(own_total, axis=0, keepdims=True)


def _place(lines: Ref, row: Scalar) -> tuple[pl.Slice, Bool[Array, "16 128"]]:
    """The line of rows row ... row + ROWS - 1, and a mask: which lane is which sublane's row."""
    # Rows that fill up a tile beyond the array have no line: the last one stands in for it.
    line = jnp.minimum(row // LANES, lines.shape[0] - 1)
    shape = (ROWS, LANES)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    sublane = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return pl.ds(line, 1), lane == sublane + row % LANES
