"""The evaluation step: loss sums of a batch, or of each of its rows."""

import flax.linen as nn
import jax
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.config import ModelConfig
from gatedjax.data import Batch
from gatedjax.model import head_weights
from gatedjax.output import to_logits
from gatedjax.sharding import RULES
from gatedjax.training.forward import hidden_states, targets_of, tokens_of_chunk
from gatedjax.training.losses import TokenLosses, chunked_cross_entropy, count_correct
from gatedjax.training.output_matrix import gathered


def eval_step_by_row(model: ModelConfig, params: PyTree, batch: Batch) -> TokenLosses:
    """Token loss sums of every row of a batch, [B], whole on every device."""
    losses = batch_losses(model, params, batch, by_row=True)
    # Of a global batch a process could read its own rows only.
    with nn.logical_axis_rules(RULES):
        return jax.tree.map(lambda x: nn.with_logical_constraint(x, (None,)), losses)


def batch_losses(
    model: ModelConfig,
    params: PyTree,
    batch: Batch,
    by_row: bool = False,
) -> TokenLosses:
    """Token loss sums of a batch, or of each of its rows, for evaluation.

    Args:
      model: the model's configuration.
      params: parameters and router state.
      batch: rows of packed documents.
      by_row: whether the sums are of rows.
    """
    with nn.logical_axis_rules(RULES):
        hidden, _, _ = hidden_states(model, params, batch)
        targets, mask = targets_of(batch, hidden)
        return chunked_cross_entropy(
            hidden,
            gathered(head_weights(params), hidden),
            targets=targets,
            mask=mask,
            chunk=tokens_of_chunk(model),
            by_row=by_row,
            to_logits=to_logits(model, params),
        )


def batch_losses_and_correct(
    model: ModelConfig,
    params: PyTree,
    batch: Batch,
) -> tuple[TokenLosses, Float[Array, "B"], Float[Array, "B _ M"]]:
    """Of each row the loss sums, the weight of the targets that are the most likely ones, and the
    last hidden states, for the evaluation of an encoder.
    """
    chunk = tokens_of_chunk(model)
    with nn.logical_axis_rules(RULES):
        hidden, _, _ = hidden_states(model, params, batch)
        targets, mask = targets_of(batch, hidden)
        weights = gathered(head_weights(params), hidden)
        inputs = (hidden, weights, targets, mask, chunk)
        as_logits = to_logits(model, params)
        losses = chunked_cross_entropy(*inputs, by_row=True, to_logits=as_logits)
        return losses, count_correct(*inputs, as_logits), hidden
