"""What of a batch goes through the model: hidden states, and the targets to predict from them."""

from typing import Any

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.config import ModelConfig
from gatedjax.data import Batch
from gatedjax.layers.added_losses import ADDED_LOSSES, added_loss, has_added_losses
from gatedjax.layers.moe.statistics import Statistics
from gatedjax.model import LanguageModel
from gatedjax.sharding import parts


def hidden_states(
    model: ModelConfig,
    params: PyTree,
    batch: Batch,
    key: Array | None = None,
    training: bool = False,
) -> tuple[Float[Array, "B T M"], Statistics, Float[Array, ""] | None]:
    """The model's last hidden states of a batch, what its routers did, and losses of its layers.

    The losses are None where no layer adds any, and means over the tokens of the batch.

    Args:
      model: the model's configuration.
      params: parameters and router state.
      batch: rows of packed documents.
      key: randomness of routers that select with noise.
      training: experts with a capacity drop what is beyond it.
    """
    rngs = None if key is None else {"router": key}
    adds_losses = training and has_added_losses(model)
    outputs: Any = LanguageModel(model, training=training).apply(
        {"params": params},
        batch.tokens,
        batch.positions,
        batch.segment_ids,
        patches=batch.patches,
        rngs=rngs,
        mutable=[ADDED_LOSSES] if adds_losses else False,
    )
    added = None
    if adds_losses:
        outputs, sown = outputs
        added = added_loss(model, sown)
    hidden, _, statistics = outputs
    return hidden, statistics, added


def targets_of(
    batch: Batch,
    hidden: Float[Array, "B _ M"],
) -> tuple[Int[Array, "B _"], Float[Array, "B _"]]:
    """Targets of the hidden states and their weights: of an image there is one of each."""
    places = hidden.shape[1]
    targets = jnp.asarray(batch.targets)[:, :places]
    return targets, jnp.asarray(batch.loss_mask)[:, :places]


def tokens_of_chunk(model: ModelConfig) -> int:
    """Tokens of the whole mesh whose logits exist at once: the configuration counts a device's."""
    return model.loss_chunk * parts("batch") * parts("length")
