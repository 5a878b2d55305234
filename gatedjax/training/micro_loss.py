"""The loss of one micro-batch, as its part of the whole batch's loss."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, PyTree

from gatedjax.config import (
    AdaptiveMLPConfig,
    Config,
    SparseMoEConfig,
    VersatileMLPConfig,
)
from gatedjax.data import Batch
from gatedjax.layers.moe.losses import router_losses
from gatedjax.layers.moe.statistics import Extent, Statistics, as_part, extent, fraction
from gatedjax.layers.tree import united
from gatedjax.model import head_weights
from gatedjax.output import to_logits
from gatedjax.sharding import RULES
from gatedjax.training import trainable
from gatedjax.training.forward import hidden_states, targets_of, tokens_of_chunk
from gatedjax.training.losses import count_correct
from gatedjax.training.output_loss import model_loss
from gatedjax.training.state import TrainState
from gatedjax.training.teacher import Teacher, teacher_loss

# Metrics of a batch by name, and its part of the step's router statistics.
MetricsAndStatistics = tuple[dict[str, Array], Statistics]


def micro_loss(
    config: Config,
    state: TrainState,
    tokens: Float[Array, ""],
    whole: Extent,
    counts: Mapping[str, Array] | None,
    teacher: Teacher | None,
) -> Callable[..., tuple[Array, MetricsAndStatistics]]:
    """The loss of a micro-batch as its part of the whole batch's loss: the parts add up to it.

    Args:
      config: of the run.
      state: before the step.
      tokens: with a target, in the whole batch.
      whole: the extent of the whole batch.
      counts: of experts, in the whole batch; None where the micro-batch is all of it.
      teacher: whose terms are added; None for none.

    Returns:
      A function (parameters that train, micro-batch, its index) -> (loss, (metrics, statistics)).
    """
    _, frozen = trainable.split(config, state.params)

    def loss(
        trained: PyTree,
        micro: Batch,
        index: Array,
    ) -> tuple[Array, MetricsAndStatistics]:
        key = router_key(config, state, index)
        params = united(trained, frozen, state.routers)
        with nn.logical_axis_rules(RULES):
            hidden, statistics, added = hidden_states(
                config.model,
                params,
                micro,
                key,
                training=True,
            )
            targets, mask = targets_of(micro, hidden)
            # The name by which a profile, and the table of a compiled step, know this part.
            with jax.named_scope("token_loss"):
                own_weight = config.train.teacher.cross_entropy
                token_loss, losses = model_loss(
                    config.model,
                    *_differentiated(params, hidden, own_weight),
                    targets,
                    mask,
                    1.0 / tokens,
                    tokens_of_chunk(config.model),
                    _noise_key(config, state, index),
                )
        part = extent(jnp.asarray(micro.segment_ids))
        statistics = as_part(statistics, part, whole)
        aux_loss, _ = router_losses(config.model, statistics, counts)
        metrics = {"loss": losses.cross_entropy / tokens}
        if config.model.task == "classify":
            correct = count_correct(
                hidden,
                head_weights(params),
                targets,
                mask,
                chunk=0,
                to_logits=to_logits(config.model, params),
            )
            metrics["accuracy"] = jnp.sum(correct) / tokens
        total = token_loss + aux_loss
        if teacher is not None:
            with nn.logical_axis_rules(RULES), jax.named_scope("teacher"):
                chunk = tokens_of_chunk(config.model)
                of_teacher, parts_of_loss = teacher_loss(
                    config, teacher, params, hidden, micro, tokens, chunk
                )
            metrics |= parts_of_loss
            total = own_weight * token_loss + aux_loss + of_teacher
        if added is not None:
            metrics["added_loss"] = added * fraction(part.tokens, whole.tokens)
            total = total + metrics["added_loss"]
        return total, (metrics, statistics)

    return loss


def _differentiated(params: PyTree, hidden: Array, weight: float) -> tuple[PyTree, Array]:
    """Both as they are; without a gradient where a loss of weight 0 is only measured."""
    if weight:
        return params, hidden
    return jax.lax.stop_gradient(params), jax.lax.stop_gradient(hidden)


def router_key(
    config: Config,
    state: TrainState,
    index: Int[Array, ""],
) -> Array | None:
    """The key of a micro-batch's noise in routers; None where none selects with noise."""
    if not any(_is_noisy(block.feed_forward) for block in config.model.blocks):
        return None
    return _key_of_micro_batch(config, state, index)


def _is_noisy(ffn: Any) -> bool:
    """Whether a feed-forward of this configuration chooses with noise in training."""
    if isinstance(ffn, AdaptiveMLPConfig | VersatileMLPConfig):
        return True
    if not isinstance(ffn, SparseMoEConfig):
        return False
    return ffn.router.selection == "gumbel" or ffn.router.noise > 0


def _noise_key(
    config: Config,
    state: TrainState,
    index: Int[Array, ""],
) -> Array | None:
    """The key of the noise of the output; None where it has none."""
    if config.model.output.kind != "noisy_softmax":
        return None
    # Not the routers' numbers.
    return jax.random.fold_in(_key_of_micro_batch(config, state, index), 1)


def _key_of_micro_batch(
    config: Config,
    state: TrainState,
    index: Int[Array, ""],
) -> Array:
    """A key that no other micro-batch of the run has."""
    micro_step = state.step * config.train.accumulation_steps + index
    return jax.random.fold_in(jax.random.key(config.train.seed), micro_step)
