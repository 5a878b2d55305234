"""What a layer of gated attention costs."""

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.selective_rope import selective_flops


def attention_flops(c: GatedAttentionConfig, width: int, seq_len: int) -> float:
    """Floating-point operations of a token's forward pass, of which a multiply-add is two."""
    q_channels = c.num_heads * c.head_dim
    kv_channels = c.kv_heads * c.head_dim
    # What the gate multiplies, and so how many columns its projection has.
    gated_channels = {
        "none": 0,
        "sdpa": q_channels,
        "query": q_channels,
        "key": kv_channels,
        "value": kv_channels,
        "output": width,
    }
    gate_channels = gated_channels[c.gate_position]
    if c.gate_input == "constant":
        gate_channels = 0
    if c.gate_granularity == "headwise":
        gate_channels //= c.head_dim
    if c.gate_input == "head":
        # Each head multiplies its own slice: together one column, or a hidden one for each.
        gate_channels = 1 if c.gate_hidden is None else c.gate_hidden
    # Numbers of a token and a head.
    per_head = c.num_heads if c.token_sinks else 0
    if c.query_scale == "selective":
        per_head += c.num_heads + c.kv_heads
    if c.value_bank:
        per_head += c.kv_heads * (c.value_bank + 1)
    columns = 2 * q_channels + 2 * kv_channels + gate_channels + per_head
    if c.shares_cache:
        columns -= 2 * kv_channels
    if c.shares_weights:
        # No queries, no keys; the compensation.
        columns += width - q_channels - kv_channels
    # A causal row sees half the sequence on average, or its window; any other one twice that.
    seen = seq_len / 2 if c.window is None else min(c.window, seq_len / 2)
    if not c.causal:
        seen *= 2
    seen += c.prefix
    positions = 0.0 if c.shares_weights else selective_flops(c, width)
    return 2 * width * columns + 4 * q_channels * seen + positions
