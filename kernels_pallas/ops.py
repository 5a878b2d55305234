"""The ops, to import from one place: `from kernels_pallas.ops import attention, linear_scan`."""

from kernels_pallas.attention import (
    NORMALIZERS,
    attention,
    attention_sharded,
    attention_step,
    merge_attention,
)
from kernels_pallas.attention.doubly_stochastic import qr_attention, sinkhorn_attention
from kernels_pallas.attention.xla import OUT_NAME as ATTENTION_OUT_NAME
from kernels_pallas.attention.xla import STATISTIC_NAME
from kernels_pallas.causal_conv import causal_conv
from kernels_pallas.delta_scan import (
    delta_product_scan,
    delta_product_scan_step,
    delta_scan,
    delta_scan_sharded,
    delta_scan_step,
    rwkv7_scan,
    rwkv7_scan_step,
)
from kernels_pallas.delta_scan.xla import OUT_NAME as DELTA_SCAN_OUT_NAME
from kernels_pallas.delta_scan.xla import STATES_NAME as DELTA_STATES_NAME
from kernels_pallas.dispatch import last_choice
from kernels_pallas.expert_mlp import expert_mlp
from kernels_pallas.expert_mlp.tpu.op import PRE_ACTIVATIONS_NAME
from kernels_pallas.grouped_matmul import grouped_matmul, permute_rows, sort_by_group
from kernels_pallas.linear_scan import linear_scan, linear_scan_sharded, linear_scan_step
from kernels_pallas.linear_scan.xla import OUT_NAME as LINEAR_SCAN_OUT_NAME
from kernels_pallas.linear_scan.xla import STATES_NAME
from kernels_pallas.rotary import rotary
from kernels_pallas.two_pass_softmax import two_pass_softmax

# What the ops name with `checkpoint_name`. A `jax.checkpoint` policy that saves these recomputes no
# op in the backward pass.
RESIDUAL_NAMES = (
    ATTENTION_OUT_NAME,
    STATISTIC_NAME,
    LINEAR_SCAN_OUT_NAME,
    STATES_NAME,
    DELTA_SCAN_OUT_NAME,
    DELTA_STATES_NAME,
    PRE_ACTIVATIONS_NAME,
)

__all__ = [
    "NORMALIZERS",
    "RESIDUAL_NAMES",
    "attention",
    "attention_sharded",
    "attention_step",
    "causal_conv",
    "delta_product_scan",
    "delta_product_scan_step",
    "delta_scan",
    "delta_scan_sharded",
    "delta_scan_step",
    "expert_mlp",
    "grouped_matmul",
    "last_choice",
    "linear_scan",
    "linear_scan_sharded",
    "linear_scan_step",
    "merge_attention",
    "permute_rows",
    "qr_attention",
    "rotary",
    "rwkv7_scan",
    "rwkv7_scan_step",
    "sinkhorn_attention",
    "sort_by_group",
    "two_pass_softmax",
]
