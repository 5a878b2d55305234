"""Attention layers of the literature, as values: `layer("gated_attention", **QWEN3_NEXT)`.

What a preset does not fix (heads, channels) is the default; any value can be changed after it.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

Preset = Mapping[str, Any]

# Qwen3-Next (transformers' Qwen3NextAttention): queries and gate in one projection, a quarter of
# the channels rotates, norms scale by 1 + w.
QWEN3_NEXT: Preset = MappingProxyType(
    dict(
        num_heads=16,
        num_kv_heads=2,
        head_dim=256,
        gate_position="sdpa",
        gate_granularity="elementwise",
        fused_gate=True,
        qk_norm=True,
        zero_centered_norm=True,
        rope_fraction=0.25,
        rope_base=1e7,
    )
)

# gpt-oss, its windowed layers (every other one): a learned sink per head, biases, no gate, no
# QK-norm.
GPT_OSS: Preset = MappingProxyType(
    dict(
        gate_position="none",
        bias="all",
        qk_norm=False,
        sinks=True,
        window=128,
    )
)

# SWAT (arXiv 2502.18845): sigmoid without -log n (a length of 1), slopes of both signs, rotation
# and a window, whose size is a choice.
SWAT: Preset = MappingProxyType(
    dict(
        gate_position="none",
        qk_norm=False,
        normalizer="sigmoid",
        normalizer_length=1,
        alibi="balanced",
        window=512,
    )
)

# LSSAR (arXiv 2501.13428): softplus of cosines, times log head_dim and log n, weights reweighted by
# a power.
LSSAR: Preset = MappingProxyType(
    dict(
        gate_position="none",
        qk_norm_kind="l2",
        logit_scale="log_dim",
        query_scale="log_length",
        normalizer="reweighted_softplus",
    )
)

# Shaped attention (arXiv 2306.17759): the identity plus a softmax without its mean. The temperature
# of its logits is `attention_scale`, the weights of the residual stream `model.residual_weight`.
SHAPED: Preset = MappingProxyType(
    dict(
        gate_position="none",
        normalizer="centered_softmax",
        value_skip=True,
    )
)

# The recurrent view of softmax (arXiv 2507.23632): exponentials without a denominator, whose place
# a norm over the head takes.
EXP_NORM: Preset = MappingProxyType(
    dict(
        gate_position="none",
        normalizer="exp",
        after_sdpa="rms_norm",
    )
)

PRESETS: dict[str, Preset] = {
    "qwen3_next": QWEN3_NEXT,
    "gpt_oss": GPT_OSS,
    "swat": SWAT,
    "lssar": LSSAR,
    "shaped": SHAPED,
    "exp_norm": EXP_NORM,
}
