"""Gated sequence-model ops for JAX: plain functions of arrays on CPU, GPU and TPU. Imports jax (and jaxtyping) only."""

from kernels_pallas.attention import attention, attention_step
from kernels_pallas.grouped_matmul import grouped_matmul, permute_rows, sort_by_group
from kernels_pallas.linear_scan import linear_scan, linear_scan_step

__all__ = [
    "attention",
    "attention_step",
    "grouped_matmul",
    "linear_scan",
    "linear_scan_step",
    "permute_rows",
    "sort_by_group",
]
