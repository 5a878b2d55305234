"""One matrix for each group of rows, as a sparse mixture's experts need it.

And the permutation that sorts rows by group.
"""

from kernels_pallas.grouped_matmul.api import grouped_matmul
from kernels_pallas.grouped_matmul.permute import permute_rows, sort_by_group

__all__ = ["grouped_matmul", "permute_rows", "sort_by_group"]
