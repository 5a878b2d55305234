"""Gated sequence-model ops for JAX: plain functions of arrays on CPU, GPU and TPU. Imports jax (and jaxtyping) only."""

from kernels_pallas.attention import attention, attention_step
from kernels_pallas.attention.xla import OUT_NAME, STATISTIC_NAME
from kernels_pallas.expert_mlp import expert_mlp
from kernels_pallas.expert_mlp.tpu.op import PRE_ACTIVATIONS_NAME
from kernels_pallas.grouped_matmul import grouped_matmul, permute_rows, sort_by_group
from kernels_pallas.linear_scan import linear_scan, linear_scan_step
from kernels_pallas.linear_scan.xla import OUT_NAME as SCAN_OUT_NAME
from kernels_pallas.linear_scan.xla import STATES_NAME

# What the ops name with `checkpoint_name`: a policy that saves these recomputes no op in the backward pass.
RESIDUAL_NAMES = (OUT_NAME, STATISTIC_NAME, SCAN_OUT_NAME, STATES_NAME, PRE_ACTIVATIONS_NAME)

__all__ = [
    "RESIDUAL_NAMES",
    "attention",
    "attention_step",
    "expert_mlp",
    "grouped_matmul",
    "linear_scan",
    "linear_scan_step",
    "permute_rows",
    "sort_by_group",
]
