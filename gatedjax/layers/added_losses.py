"""Losses of layers that a training step adds to its own: ReLUFormer's, the block gate's, those of
slices and learners.

A layer sows the weighted mean over the tokens of the batch, padding left out; the step runs the
model with this collection and adds everything that it finds (`training/forward.py`). Adaptive MLPs
sow what their gates choose, as their losses are of all layers together.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import (
    AdaptiveMLPConfig,
    GatedAttentionConfig,
    ModelConfig,
    VersatileMLPConfig,
)
from gatedjax.layers.block_gate import block_attention_map, block_gate_loss, has_tokens
from gatedjax.layers.learner_losses import CHOICES, weighted_losses
from gatedjax.layers.on_mesh import attention_on_mesh
from gatedjax.layers.tree import flatten_dict
from kernels_pallas.attention import Relu, ReluEntropy

# The Flax collection.
ADDED_LOSSES = "added_losses"
# Of the entropy that a row of n keys may have for nothing: 0.7 log n.
FREE_ENTROPY = 0.7
# Of a sum of weights: that of a row whose every logit is negative has a logarithm too.
LEAST_SUM = 1e-6


def has_added_losses(config: ModelConfig) -> bool:
    """Whether some layer of the model sows a loss."""
    mixers = [block.mixer for block in config.blocks]
    if any(isinstance(c, GatedAttentionConfig) and _adds_loss(c) for c in mixers):
        return True
    ffns = [block.feed_forward for block in config.blocks]
    if any(isinstance(c, VersatileMLPConfig) and c.balance_loss for c in ffns):
        return True
    return any(isinstance(c, AdaptiveMLPConfig) for c in ffns)


def _adds_loss(c: GatedAttentionConfig) -> bool:
    return c.reluformer_loss > 0 or (c.block_gate > 0 and c.block_gate_loss > 0)


def added_loss(config: ModelConfig, variables: Any) -> Float[Array, ""]:
    """The sum of what the layers have sown, and the losses of what the gates of learners chose."""
    total = jnp.float32(0.0)
    choices: dict[tuple[str, ...], Array] = {}
    for path, sown in flatten_dict(variables.get(ADDED_LOSSES, {})).items():
        if path[-1] == CHOICES:
            (choices[path],) = sown
        else:
            total = total + sum((jnp.sum(x) for x in sown), jnp.float32(0.0))
    # Layers of one configuration keep its budget together.
    by_config: dict[AdaptiveMLPConfig, list[Array]] = {}
    for block in config.blocks:
        of_block = choices.get((*block.path, "ffn", CHOICES))
        if of_block is not None:
            assert isinstance(block.feed_forward, AdaptiveMLPConfig)
            layers = of_block if block.is_repeated else of_block[None]
            by_config.setdefault(block.feed_forward, []).append(layers)
    for of_config, layers in by_config.items():
        total = total + weighted_losses(of_config, jnp.concatenate(layers))
    return total


def sow_reluformer_loss(
    module: nn.Module,
    c: GatedAttentionConfig,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    segment_ids: Int[Array, "B T"] | None,
    seen: Int[Array, "B T"],
    scale: float,
) -> None:
    """Sows ReLUFormer's loss of a layer, times its weight.

    Args:
      module: the layer.
      c: its configuration.
      q, k: queries over gamma, and keys, as the op gets them.
      segment_ids: of the tokens, 0 for padding; None for no padding.
      seen: how many keys every token sees.
      scale: what the op multiplies the products by.
    """
    if module.is_initializing():
        return
    by_token = reluformer_loss(q, k, segment_ids, seen, window=c.window, scale=scale)
    is_token = jnp.ones(seen.shape) if segment_ids is None else segment_ids != 0
    is_token = is_token.astype(jnp.float32)
    count = jnp.maximum(jnp.sum(is_token), 1.0)
    mean = jnp.sum(jnp.where(is_token > 0, by_token, 0.0)) / count
    module.sow(ADDED_LOSSES, "reluformer_loss", c.reluformer_loss * mean)


def sow_block_gate_loss(
    module: nn.Module,
    c: GatedAttentionConfig,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    log_gate: Float[Array, "B H N N"],
    segment_ids: Int[Array, "B T"] | None,
    scale: float,
) -> None:
    """Sows the divergence of a layer's block gate from its attention, times its weight.

    Args:
      module: the layer.
      c: its configuration.
      q, k: queries and keys as the op gets them.
      log_gate: of the gate.
      segment_ids: of the tokens, 0 for padding; None for no padding.
      scale: what the op multiplies the products by.
    """
    if module.is_initializing() or not module.is_mutable_collection(ADDED_LOSSES):
        return
    target = block_attention_map(q, k, causal=c.causal, scale=scale, segment_ids=segment_ids)
    is_row = None if segment_ids is None else has_tokens(segment_ids)
    loss = block_gate_loss(log_gate, target, is_row)
    module.sow(ADDED_LOSSES, "block_gate_loss", c.block_gate_loss * loss)


def reluformer_loss(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    segment_ids: Int[Array, "B T"] | None,
    seen: Int[Array, "B T"],
    *,
    window: int | None,
    scale: float,
) -> Float[Array, "B T"]:
    """abs(log sum_j w_ij) + max(H(w_i) - 0.7 log n_i, 0), a mean over heads (arXiv 2302.06461).

    w_ij = relu(s_ij) / sqrt(n_i / 2) are the weights and H(w_i) = -sum_j w_ij log w_ij. Both sums
    are attention to values of 1, so memory stays linear. A sum counts as 1e-6 at least: our
    reading, as in a row whose every logit is negative it is 0.

    Args:
      q, k: queries over gamma, and keys.
      segment_ids: the documents of the tokens.
      seen: n, how many keys every token sees.
      window, scale: as of the op.
    """
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    ones = jnp.ones((*k.shape[:3], 1), dtype)

    def sums(normalizer: Relu | ReluEntropy) -> Float[Array, "B T H"]:
        return attention_on_mesh(
            q,
            k,
            ones,
            None,
            segment_ids,
            None,
            None,
            normalizer=normalizer,
            window=window,
            scale=scale,
        )[..., 0]

    n = seen.astype(dtype)[..., None]
    divisor = jnp.sqrt(n / 2)
    total = sums(Relu(length=1)) / divisor
    # -sum (r / d) log(r / d) = (-sum r log r) / d + (sum r / d) log d
    entropy = sums(ReluEntropy()) / divisor + total * jnp.log(divisor)
    normalization = jnp.abs(jnp.log(jnp.maximum(total, LEAST_SUM)))
    excess = jnp.maximum(entropy - FREE_ENTROPY * jnp.log(n), 0.0)
    return jnp.mean(normalization + excess, axis=-1)
