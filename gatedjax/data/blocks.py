"""Rows of the global order, a batch at a time."""

from collections.abc import Sequence
from typing import Any

import grain
import jax
import numpy as np

from gatedjax.data.batch import Batch, stack_rows


class Block(grain.MapDataset[Batch]):
    """Global batches of `batch_size` rows of `parent`, of which this process holds `rows`.

    The first batch begins at row `first_row` of the parent, the last one ends before `end_row`.
    Where the rows end inside a batch, rows of padding fill it.
    """

    def __init__(
        self,
        parent: grain.MapDataset[Batch],
        batch_size: int,
        rows: Sequence[int],
        first_row: int = 0,
        end_row: int | None = None,
    ):
        super().__init__(parent)
        self._rows = rows
        # For an endless parent, `len` is sys.maxsize: nothing is past its end.
        self._end_row = len(parent) if end_row is None else min(end_row, len(parent))
        self.batch_size = batch_size
        self.first_row = first_row

    def between(self, first_row: int, end_row: int | None = None) -> "Block":
        """The batches of these rows of the global order."""
        return Block(
            self._parent,
            self.batch_size,
            self._rows,
            first_row,
            self._end_row if end_row is None else end_row,
        )

    def __len__(self) -> int:
        num_rows = max(self._end_row - self.first_row, 0)
        return -(-num_rows // self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            assert step == 1, "global batches are read in order"
            first_row = self.first_row + start * self.batch_size
            return self.between(first_row, self.first_row + stop * self.batch_size)
        block = []
        for row in self._rows:
            parent_index = self.first_row + index * self.batch_size + row
            if parent_index < self._end_row:
                block.append(self._parent[parent_index])
            else:
                # Padding: segment 0, nothing to predict.
                block.append(jax.tree.map(np.zeros_like, self._parent[self._end_row - 1]))
        return stack_rows(block)
