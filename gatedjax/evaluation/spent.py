"""Quality against the FLOPs that are spent, for models whose tokens have as much of a feed-forward
as they need: adaptive MLPs and versatile ones.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import PyTree

from gatedjax.config import AdaptiveMLPConfig, BlockConfig, ModelConfig, VersatileMLPConfig
from gatedjax.data import Batch
from gatedjax.evaluation.exit_learning import token_losses
from gatedjax.evaluation.learning import held_out_text
from gatedjax.layers import AdaptiveMLP, VersatileMLP
from gatedjax.layers.block import block_layers
from gatedjax.layers.gate_values import COLLECTION
from gatedjax.model import LanguageModel, head_weights, logits
from gatedjax.training.flops import forward_flops_per_token
from gatedjax.training.run import Run

# What the layers record of how much a token has.
RECORDED = {"adaptive_mlp": "learners", "versatile_mlp": "loops"}


class Spent(NamedTuple):
    """A model on held-out text.

    loss: nats. accuracy: of the likeliest token.
    had: learners, or loops, of a token, a mean over tokens and layers; NaN of a model without any.
    flops: of a token, forward.
    """

    loss: float
    accuracy: float
    had: float
    flops: float


def is_on_demand(model: ModelConfig) -> bool:
    """Whether tokens of the model have feed-forwards of which they may have less."""
    return any(_has_name(block) for block in model.blocks)


def _has_name(block: BlockConfig) -> bool:
    return isinstance(block.feed_forward, AdaptiveMLPConfig | VersatileMLPConfig)


def spent(run: Run, model: ModelConfig, params: PyTree, most: int) -> Spent:
    """Quality against FLOPs on validation text; call it inside `jax.set_mesh(run.mesh)`.

    Args:
      run: with the text.
      model: to be measured.
      params: of it, with the state of its routers.
      most: validation batches.
    """

    @jax.jit
    def look(params: PyTree, batch: Batch) -> tuple[Array, Array, dict[int, Array]]:
        outputs: Any = LanguageModel(model).apply(
            {"params": params},
            batch.tokens,
            batch.positions,
            batch.segment_ids,
            mutable=[COLLECTION],
        )
        (hidden, _, _), state = outputs
        predicted = logits(hidden, head_weights(params))
        is_right = jnp.argmax(predicted, axis=-1) == jnp.asarray(batch.targets)
        recorded: Any = state[COLLECTION]
        return token_losses(predicted, batch), is_right, _had(model, recorded)

    sums = np.zeros(3)
    had: dict[int, list[np.ndarray]] = {}
    for batch in held_out_text(run, most):
        losses, is_right, by_layer = look(params, batch)
        mask = np.asarray(batch.loss_mask) > 0
        sums += [np.asarray(losses)[mask].sum(), np.asarray(is_right)[mask].sum(), mask.sum()]
        is_token = np.asarray(batch.segment_ids) != 0
        for layer, values in by_layer.items():
            had.setdefault(layer, []).append(np.asarray(values)[is_token])
    of_layers = {layer: np.concatenate(values) for layer, values in had.items()}
    means = [values.mean() for values in of_layers.values()]
    return Spent(
        loss=float(sums[0] / sums[2]),
        accuracy=float(sums[1] / sums[2]),
        had=float(np.mean(means)) if means else float("nan"),
        flops=spent_flops(model, run.config.data.seq_len, of_layers),
    )


def _had(model: ModelConfig, recorded: Mapping[str, Any]) -> dict[int, Array]:
    """How much every token has, by layer."""
    found = {}
    for block in model.blocks:
        if not _has_name(block):
            continue
        of_block: Any = recorded
        for name in (*block.path, "ffn", RECORDED[block.feed_forward.kind]):
            of_block = of_block[name]
        (values,) = of_block
        for period, layer in enumerate(block.layers):
            found[layer] = values[period] if block.is_repeated else values
    return found


def spent_flops(model: ModelConfig, seq_len: int, had: Mapping[int, np.ndarray]) -> float:
    """FLOPs of a token, a mean over tokens that have so much of each layer.

    Args:
      model: its configuration.
      seq_len: of the rows.
      had: by layer, the learners or loops of tokens.
    """
    total = forward_flops_per_token(model, seq_len)
    for block in model.blocks:
        _, layer = block_layers(model, block)
        for i in block.layers:
            if i not in had:
                continue
            mean = float(had[i].mean())
            total -= layer.forward_flops_per_token(model.width, seq_len)
            if isinstance(layer, AdaptiveMLP):
                total += layer.flops_with(model.width, mean)
            if isinstance(layer, VersatileMLP):
                with_slices = float(np.mean(had[i] < layer.config.loops))
                total += layer.flops_with(model.width, mean, with_slices)
    return total
