"""Analytic FLOPs of the model. XLA's own count sees a scan's body only once."""

from collections.abc import Iterable, Mapping
from typing import Any

from gatedjax.config import ModelConfig, SparseMoEConfig, VersatileMLPConfig
from gatedjax.layers import low_rank
from gatedjax.layers.block import block_layers
from gatedjax.layers.tree import Path, flatten_dict

# Parameters that every token is multiplied with: kernels of projections, and the dense matrices of
# a `LoRAMixture`.
_DENSE = ("kernel", "frozen")
# The stacks of sparse experts: a token is multiplied with some of them.
_EXPERTS = ("gate", "up", "down")


def train_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of forward and backward per token: three times the forward pass.

    Padding is no token: it goes through no expert. What is computed again in the backward pass is
    not counted, nor is the pass that counts loads before the gradients of micro-batches. A first
    pass for the weights of experts has no logits and no backward pass, a router before all layers
    no backward pass.
    """
    forward = forward_flops_per_token(config, seq_len)
    of_router = _router_flops(config, seq_len)
    first_pass = 0.0
    if config.first_pass is not None:
        first_pass = forward - _logits_flops(config)
    return 3.0 * (forward - of_router) + of_router + first_pass


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """2 FLOPs per multiply-add: what the layers say of themselves, and the logits.

    Norms, gates and lookups are not counted.
    """
    total = _logits_flops(config) + _router_flops(config, seq_len)
    if config.task == "classify":
        total += 2.0 * config.patches.size * config.width
    for block in config.blocks:
        for layer in block_layers(config, block):
            total += len(block.layers) * layer.forward_flops_per_token(config.width, seq_len)
    return total


def _router_flops(config: ModelConfig, seq_len: int) -> float:
    """Of a router before all layers."""
    router = config.router_model
    if router is None:
        return 0.0
    choice = 2.0 * config.width * config.given_experts
    return forward_flops_per_token(router, seq_len) - _logits_flops(router) + choice


def _logits_flops(config: ModelConfig) -> float:
    of_vector = 2.0 * config.width * config.vocab_size
    if config.task == "classify":
        # Of an image one vector is classified.
        return of_vector / config.patches.num_tokens
    return of_vector


def teacher_flops_per_token(
    model: ModelConfig,
    teacher: ModelConfig,
    seq_len: int,
    *,
    with_logits: bool,
    layers: Iterable[int],
) -> float:
    """FLOPs that a teacher adds to a train step: its forward pass, and no backward pass of it.

    Where activations are compared, the model's mixers get the teacher's inputs: once more forward
    and backward.

    Args:
      model: that learns from it.
      teacher: its configuration.
      seq_len: of the rows.
      with_logits: whether predictions are compared.
      layers: whose activations are compared.
    """
    total = forward_flops_per_token(teacher, seq_len)
    if not with_logits:
        total -= _logits_flops(teacher)
    compared = set(layers)
    for block in model.blocks:
        mixer, _ = block_layers(model, block)
        again = len(compared.intersection(block.layers))
        total += 3.0 * again * mixer.forward_flops_per_token(model.width, seq_len)
    return total


def low_rank_flops_per_token(params: Mapping[str, Any]) -> float:
    """FLOPs of one forward pass of the low-rank updates, which layers do not know of."""
    sizes = [p.size for path, p in flatten_dict(params).items() if low_rank.is_update(path)]
    return 2.0 * sum(sizes)


def frozen_flops_per_token(config: ModelConfig, frozen: Mapping[str, Any]) -> float:
    """FLOPs of the gradients of frozen matrices, which are not computed: 2 for each weight.

    The gradients of activations are counted in every layer, also below the first one that trains.
    Small matrices that the count of the forward pass leaves out (those of decay rates) are no
    exception here.

    Args:
      config: of the model.
      frozen: the parameters that do not train, arrays or their shapes.
    """
    total = 0.0
    for path, parameter in flatten_dict(frozen).items():
        total += 2.0 * parameter.size * _times_used(config, path)
    return total


def _times_used(config: ModelConfig, path: Path) -> float:
    """How often a token is multiplied with each weight of a parameter, on average."""
    if path[-1] in _DENSE or path == _head(config):
        return _loops(config, path)
    if path[-1] not in _EXPERTS or path[-2] != "ffn":
        return 0.0
    ffn = next(block.feed_forward for block in config.blocks if block.name in path)
    if not isinstance(ffn, SparseMoEConfig):
        return 0.0
    # As in the forward pass: experts that compute get their fraction of the assignments.
    computing = ffn.router.ffn_fraction or ffn.num_experts / ffn.total_experts
    return ffn.experts_per_token * computing / ffn.num_experts


def _loops(config: ModelConfig, path: Path) -> float:
    """How often a matrix of a feed-forward runs: 1 but for those that loops share."""
    blocks = [block for block in config.blocks if block.name in path]
    ffn = blocks[0].feed_forward if blocks and "ffn" in path else None
    is_shared = isinstance(ffn, VersatileMLPConfig) and path[-2] in _EXPERTS
    if not is_shared:
        return 1.0
    assert isinstance(ffn, VersatileMLPConfig)
    # The slices' outputs are one product more.
    return ffn.loops + float(path[-2] == "down" and ffn.loops > 1)


def _head(config: ModelConfig) -> Path:
    return ("head",) if config.has_head else ("embedding",)
