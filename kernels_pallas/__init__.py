"""Gated sequence-model ops for JAX: plain functions of arrays on CPU, GPU and TPU. Imports jax (and jaxtyping) only."""

from kernels_pallas.linear_scan import linear_scan, linear_scan_step

__all__ = ["linear_scan", "linear_scan_step"]
