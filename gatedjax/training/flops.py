"""Analytic FLOPs of the model and peak rates of devices: XLA's own count sees a scan's body only once."""

import jax

from gatedjax.config import ModelConfig
from gatedjax.model import block_layers

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
    """2 FLOPs per multiply-add: the layers say their own; logits are added; norms, gates and lookups not counted."""
    total = 2.0 * config.width * config.vocab_size
    periods = config.num_layers // config.period
    for i in range(config.period):
        for layer in block_layers(config, i):
            total += periods * layer.forward_flops_per_token(config.width, seq_len)
    return total
