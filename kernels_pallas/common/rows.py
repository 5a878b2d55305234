"""The rows of a batch one at a time: where memory matters and time does not."""

from collections.abc import Callable

import jax


def row_by_row[Rows, Results](compute: Callable[[Rows], Results], rows: Rows) -> Results:
    """`compute(rows)`, whose memory is that of one row besides the results.

    Args:
      compute: of arrays [1, ...] makes arrays [1, ...], and knows no row but its own.
      rows: arrays [B, ...] in a tree.

    Returns:
      A tree of arrays [B, ...].
    """

    def of_row(row: Rows) -> Results:
        results = compute(jax.tree.map(lambda array: array[None], row))
        return jax.tree.map(lambda array: array[0], results)

    return jax.lax.map(of_row, rows)
