"""The ops for use in other codebases: plain functions of arrays, from `kernels_pallas.ops`.

    from gatedjax.ops import attention, linear_scan

attention            softmax, sigmoid and other normalizers; the output gate is part of the kernel
attention_step       the same for one decoded token and a cache of keys and values
attention_sharded    the same inside `shard_map`, with the tokens split over a mesh axis
merge_attention      one attention of several over other keys, by their log-sum-exps
sinkhorn_attention   doubly stochastic weights by Sinkhorn's iteration; not causal
qr_attention         doubly stochastic weights from an orthogonal matrix; not causal
linear_scan          gated linear attention in chunks, for any rank of decay
linear_scan_step     the same for one decoded token and a state
linear_scan_sharded  the same inside `shard_map`, with the tokens split over a mesh axis
delta_scan           the delta rule in chunks, exact for any decay and any keys
delta_scan_step      the same for one decoded token and a state
delta_scan_sharded   the same inside `shard_map`, with the tokens split over a mesh axis
rwkv7_scan           RWKV-7, by two steps of the delta rule a token
rwkv7_scan_step      the same for one decoded token and a state
delta_product_scan   DeltaProduct, by several steps of the delta rule a token
delta_product_scan_step  the same for one decoded token and a state
grouped_matmul       rows sorted by group, each times the matrix of its group
expert_mlp           the gated MLPs of sparse experts, on rows sorted by expert
sort_by_group        the permutation that sorts rows by group, its inverse and the group sizes
permute_rows         rows copied and permuted, differentiable without a scatter
causal_conv          the short convolution of linear mixers and the SiLU behind it
rotary               rotary positions of queries and keys, after the norm of every head
two_pass_softmax     softmax without a maximum, exponentials as mantissa and exponent
last_choice          which implementation the last traced call of an op was compiled to, and why
NORMALIZERS          the names that `attention` takes as `normalizer`
RESIDUAL_NAMES       what a `jax.checkpoint` policy saves so that no op is computed twice
"""

from kernels_pallas.ops import (
    NORMALIZERS,
    RESIDUAL_NAMES,
    attention,
    attention_sharded,
    attention_step,
    causal_conv,
    delta_product_scan,
    delta_product_scan_step,
    delta_scan,
    delta_scan_sharded,
    delta_scan_step,
    expert_mlp,
    grouped_matmul,
    last_choice,
    linear_scan,
    linear_scan_sharded,
    linear_scan_step,
    merge_attention,
    permute_rows,
    qr_attention,
    rotary,
    rwkv7_scan,
    rwkv7_scan_step,
    sinkhorn_attention,
    sort_by_group,
    two_pass_softmax,
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
