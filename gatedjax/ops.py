"""The ops for use in other codebases: plain functions of arrays, from `kernels_pallas`.

    from gatedjax.ops import attention, linear_scan

`last_choice("attention")` says which implementation the last traced call was compiled to, and why.
"""

from kernels_pallas import (
    RESIDUAL_NAMES,
    attention,
    attention_step,
    expert_mlp,
    grouped_matmul,
    linear_scan,
    linear_scan_step,
    permute_rows,
    sort_by_group,
)
from kernels_pallas.attention import NORMALIZERS, attention_sharded
from kernels_pallas.dispatch import last_choice
from kernels_pallas.linear_scan import linear_scan_sharded

__all__ = [
    "NORMALIZERS",
    "RESIDUAL_NAMES",
    "attention",
    "attention_sharded",
    "attention_step",
    "expert_mlp",
    "grouped_matmul",
    "last_choice",
    "linear_scan",
    "linear_scan_sharded",
    "linear_scan_step",
    "permute_rows",
    "sort_by_group",
]
