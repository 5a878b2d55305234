"""Analytic FLOPs of the model. XLA's own count sees a scan's body only once."""

from gatedjax.config import (
    FeedForwardConfig,
    GatedAttentionConfig,
    GatedLinearAttentionConfig,
    LoRAMixtureConfig,
    MixerConfig,
    ModelConfig,
    SparseMoEConfig,
)


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token: three times the forward pass.

    What is computed again in the backward pass is not counted. A first pass for the weights of
    experts has no logits and no backward pass.
    """
    forward = forward_flops_per_token(config, seq_len)
    first_pass = 0.0
    if config.first_pass is not None:
        first_pass = forward - _logits_flops(config)
    return 3.0 * forward + first_pass


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """2 FLOPs per multiply-add: projections, mixing, feed-forwards and logits.

    Norms, gates and lookups are not counted.
    """
    total = 0.0
    for i in range(config.num_layers):
        mixer, ffn = config.layer(i)
        total += _mixer_flops(mixer, config.width, seq_len)
        total += _feed_forward_flops(ffn, config.width)
    return total + _logits_flops(config)


def _logits_flops(config: ModelConfig) -> float:
    return 2 * config.width * config.vocab_size


def _mixer_flops(mixer: MixerConfig, width: int, seq_len: int) -> float:
    if isinstance(mixer, GatedAttentionConfig):
        return _attention_flops(mixer, width, seq_len)
    return _linear_attention_flops(mixer, width)


def _feed_forward_flops(ffn: FeedForwardConfig, width: int) -> float:
    if isinstance(ffn, SparseMoEConfig):
        return _moe_flops(ffn, width)
    dense = 6 * width * ffn.hidden
    if isinstance(ffn, LoRAMixtureConfig):
        return dense + 6 * ffn.num_experts * ffn.rank * (width + ffn.hidden)
    return dense


def _attention_flops(config: GatedAttentionConfig, width: int, seq_len: int) -> float:
    queries = config.num_heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    gated_channels = {
        "none": 0,
        "sdpa": queries,
        "query": queries,
        "key": keys,
        "value": keys,
        "output": width,
    }
    gate = gated_channels[config.gate_position]
    if config.gate_input == "constant":
        gate = 0
    if config.gate_granularity == "headwise":
        gate = gate // config.head_dim
    temperatures = 0
    if config.query_scale == "selective":
        temperatures = config.num_heads + config.kv_heads
    projections = 2 * width * (2 * queries + 2 * keys + gate + temperatures)
    # A causal row sees half the sequence on average, or its window.
    seen = seq_len / 2
    if config.window is not None:
        seen = min(config.window, seen)
    return projections + 4 * queries * seen


def _linear_attention_flops(config: GatedLinearAttentionConfig, width: int) -> float:
    keys = config.num_heads * config.key_dim
    values = config.num_heads * config.value_dim
    grouped = config.kv_heads * (config.key_dim + config.value_dim)
    gate = 0 if config.output_gate == "none" else values
    projections = 2 * width * (keys + grouped + values + gate)
    # The recurrence itself: k^T v and q S, 2 K V each per head. Chunkwise forms do more; that is
    # their overhead.
    return projections + 4 * keys * config.value_dim


def _moe_flops(config: SparseMoEConfig, width: int) -> float:
    # At balance, where experts that compute get their fraction of the assignments.
    fraction = config.router.ffn_fraction or config.num_experts / config.total_experts
    computing = config.experts_per_token * fraction
    experts = 6 * width * (computing * config.hidden + config.shared_hidden)
    router = 2 * width * config.total_experts
    return experts + router
