"""One matrix a group of rows: the experts' matmuls of a sparse mixture; and the permutation that sorts the rows."""

from kernels_pallas.grouped_matmul.api import grouped_matmul
from kernels_pallas.grouped_matmul.permute import permute_rows, sort_by_group

__all__ = ["grouped_matmul", "permute_rows", "sort_by_group"]
