"""One number for each row, in VMEM: 128 rows in a line of lanes, as [R, 1] would take 128 times the room and traffic.

Matrices have a row's numbers in one sublane, so a stretch of a line is turned into a column and back, with a mask and a
sum. Rows are taken `ROWS` at a time, from a multiple of `ROWS` on: they never lie in two lines.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jaxtyping import Float

from kernels_pallas.grouped_matmul.tpu.visits import ROWS

LANES = 128
MOST_ROWS = 2**20  # 4 MiB of VMEM


def in_lines(x: Float[Array, "R"]) -> Float[Array, "L 128"]:
    """float32, zeros after the last row."""
    return jnp.pad(x.astype(jnp.float32), (0, -len(x) % LANES)).reshape(-1, LANES)


def column(lines, first, size: int) -> Float[Array, "{size} 1"]:
    """The numbers of rows first, first + 1, ...; anything beyond the last row."""

    def part(row):
        line, mine = _place(lines, row)
        return jnp.sum(jnp.where(mine, lines[line, :], 0.0), axis=1, keepdims=True)

    return jnp.concatenate([part(first + i) for i in range(0, size, ROWS)])


def add_sums(lines, first, values: Float[Array, "S C"], low, high) -> None:
    """Adds the sum of each of the values' rows, which are first, first + 1, ..., to those within low ... high - 1."""
    lanes = sum(values[:, i : i + LANES] for i in range(0, values.shape[1], LANES))
    for i in range(0, len(values), ROWS):
        line, mine = _place(lines, first + i)
        row = first + i + jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 0)
        total = jnp.sum(lanes[i : i + ROWS], axis=1, keepdims=True)
        # A neighbor's rows may hold anything: chosen, not multiplied.
        own = jnp.where(mine & (low <= row) & (row < high), total, 0.0)
        lines[line, :] += jnp.sum(own, axis=0, keepdims=True)


def _place(lines, row) -> tuple[pl.Slice, Array]:
    """The line of rows row ... row + ROWS - 1, and where in it they are: [ROWS, LANES]."""
    lane, sublane = (jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), axis) for axis in (1, 0))
    return pl.ds(jnp.minimum(row // LANES, lines.shape[0] - 1), 1), lane == sublane + row % LANES
