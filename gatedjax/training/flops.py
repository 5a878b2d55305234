"""Analytic FLOPs of the model. XLA's own count sees a scan's body only once."""

from gatedjax.config import ModelConfig
from gatedjax.model import block_layers


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token: three times the forward pass.

    Padding is no token: it goes through no expert. What is computed again in the backward pass is
    not counted, nor is the pass that counts loads before the gradients of micro-batches. A first
    pass for the weights of experts has no logits and no backward pass.
    """
    forward = forward_flops_per_token(config, seq_len)
    first_pass = 0.0
    if config.first_pass is not None:
        first_pass = forward - _logits_flops(config)
    return 3.0 * forward + first_pass


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """2 FLOPs per multiply-add: what the layers say of themselves, and the logits.

    Norms, gates and lookups are not counted.
    """
    periods = config.num_layers // config.period
    total = _logits_flops(config)
    for block in range(config.period):
        for layer in block_layers(config, block):
            total += periods * layer.forward_flops_per_token(config.width, seq_len)
    return total


def _logits_flops(config: ModelConfig) -> float:
    return 2.0 * config.width * config.vocab_size
