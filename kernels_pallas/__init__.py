"""Gated sequence-model ops for JAX: plain functions of arrays, on CPU, GPU and TPU. Imports jax (and jaxtyping) only."""

from kernels_pallas.attention.api import attention as attention
from kernels_pallas.grouped_matmul.api import grouped_matmul as grouped_matmul
from kernels_pallas.linear_scan.api import linear_scan as linear_scan
from kernels_pallas.linear_scan.api import linear_scan_step as linear_scan_step
