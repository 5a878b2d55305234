"""Analytic FLOPs of the model and peak rates of devices: XLA's own count sees a scan's body only once."""

import jax

from gatedjax.config import (
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    LoRAMixtureConfig,
    ModelConfig,
    SparseMoEConfig,
)

# Dense bfloat16 FLOP/s of one device (public data sheets). A device that is not here gets no MFU.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops() -> float | None:
    """Peak bfloat16 FLOP/s over all devices of the run, or None if the device is not in the table."""
    kind = jax.devices()[0].device_kind
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] * jax.device_count() if matches else None


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token: three times the forward pass, recomputation not counted.

    A first pass for the weights of experts has no logits and no backward pass.
    """
    forward = forward_flops_per_token(config, seq_len)
    first = 0.0 if config.first_pass is None else forward - 2 * config.width * config.vocab_size
    return 3.0 * forward + first


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """2 FLOPs per multiply-add: projections, mixing, feed-forwards and logits; norms, gates and lookups not counted."""
    layers = 0.0
    for i in range(config.num_layers):
        mixer, ffn = config.layer(i)
        mix = (
            _attention_flops if isinstance(mixer, GatedAttentionConfig) else _linear_attention_flops
        )
        layers += mix(mixer, config.width, seq_len)
        if isinstance(ffn, SparseMoEConfig):
            layers += _moe_flops(ffn, config.width)
        else:
            layers += 6 * config.width * ffn.hidden
        if isinstance(ffn, LoRAMixtureConfig):
            layers += 6 * ffn.num_experts * ffn.rank * (config.width + ffn.hidden)
    return layers + 2 * config.width * config.vocab_size


def _attention_flops(c: GatedAttentionConfig, width: int, seq_len: int) -> float:
    q, kv = c.num_heads * c.head_dim, c.kv_heads * c.head_dim
    gated_channels = {"none": 0, "sdpa": q, "query": q, "key": kv, "value": kv, "output": width}[
        c.gate_position
    ]
    gate = 0 if c.gate_input == "constant" else gated_channels
    gate = gate // c.head_dim if c.gate_granularity == "headwise" else gate
    temperatures = c.num_heads + c.kv_heads if c.query_scale == "selective" else 0
    # A causal row sees half the sequence on average, or its window.
    seen = seq_len / 2 if c.window is None else min(c.window, seq_len / 2)
    return 2 * width * (2 * q + 2 * kv + gate + temperatures) + 4 * q * seen


def _linear_attention_flops(c: GatedLinearAttentionConfig, width: int, seq_len: int) -> float:
    keys, values = c.num_heads * c.key_dim, c.num_heads * c.value_dim
    shared = c.kv_heads * (c.key_dim + c.value_dim)
    projections = 2 * width * (keys + shared + values * (1 if c.output_gate == "none" else 2))
    # The recurrence itself: k^T v and q S, 2 K V each per head. Chunkwise forms do more; that is their overhead.
    return projections + 4 * keys * c.value_dim


def _moe_flops(c: SparseMoEConfig, width: int) -> float:
    # At balance, where experts that compute get their share of the assignments.
    computing = c.experts_per_token * (c.router.ffn_fraction or c.num_experts / c.total_experts)
    return 6 * width * (computing * c.hidden + c.shared_hidden) + 2 * width * c.total_experts
