"""Gradients of the whole batch's loss, summed over its micro-batches."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import PyTree

from gatedjax.config import (
    Config,
)
from gatedjax.data import Batch
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.moe.losses import router_losses
from gatedjax.layers.moe.statistics import Statistics, extent
from gatedjax.sharding import RULES
from gatedjax.training import trainable
from gatedjax.training.forward import hidden_states
from gatedjax.training.micro_loss import MetricsAndStatistics, micro_loss, router_key
from gatedjax.training.state import TrainState
from gatedjax.training.teacher import Teacher

# Metrics of runs whose batches grow: the sum of the micro-batches' squared gradient norms, and the
# variance of their sum.
MICRO_SQUARES = "micro_squares"
VARIANCE = "gradient_variance"


def accumulated_gradients(
    config: Config,
    state: TrainState,
    batch: Batch,
    teacher: Teacher | None = None,
) -> tuple[PyTree, dict[str, Array], dict[str, Array]]:
    """Over micro-batches: gradients of the whole batch's loss, its metrics, counts of experts.

    Gradients are of the parameters that train.
    """
    steps = config.train.accumulation_steps
    model = config.model
    mask = batch.loss_mask.astype(jnp.float32)
    tokens = jnp.sum(mask)
    # Not max(tokens, 1): weights that sum to less are no smaller loss. A batch without targets has
    # the loss 0, and no gradient.
    tokens = jnp.where(tokens == 0.0, 1.0, tokens)
    whole = extent(jnp.asarray(batch.segment_ids))
    trained, _ = trainable.split(config, state.params)
    if steps == 1:
        loss = micro_loss(config, state, tokens, whole, None, teacher)
        gradient = jax.grad(loss, has_aux=True)
        first_index = jnp.int32(0)
        grads, (metrics, statistics) = gradient(trained, batch, first_index)
    else:
        micros = _micro_batches(batch, steps)
        counts_of_step = None
        if any(ffn.balance_loss for ffn in model.sparse_ffns()):
            counts_of_step = _assignments(config, state, micros)
        loss = micro_loss(config, state, tokens, whole, counts_of_step, teacher)
        gradient = jax.grad(loss, has_aux=True)
        if config.train.grow_batches:
            gradient = _with_square(gradient)
        grads, (metrics, statistics) = _summed(gradient, trained, micros, steps)
    # The parts have added up to the statistics of the step.
    _, of_routers = router_losses(model, statistics)
    metrics |= of_routers
    metrics["tokens"] = tokens
    return grads, metrics, _counts(statistics)


def _micro_batches(batch: Batch, count: int) -> Batch:
    """The batch as `count` micro-batches along a new first axis.

    Every device keeps its own rows: micro-batch i takes rows i, i + count, ...
    """

    def cut(x: Array) -> Array:
        rows = x.reshape(-1, count, *x.shape[1:])
        return jnp.moveaxis(rows, 1, 0)

    return jax.tree.map(cut, batch)


def _assignments(
    config: Config,
    state: TrainState,
    micros: Batch,
) -> dict[str, Array]:
    """How often each expert is chosen in all micro-batches: their forward pass, without logits.

    The loads of a balance loss are those of the whole step, and every micro-batch's gradient needs
    them. No gradient goes through them.
    """
    params = router_state.merge(state.params, state.routers)

    def counts_of(micro: Batch, index: Array) -> dict[str, Array]:
        key = router_key(config, state, index)
        with nn.logical_axis_rules(RULES):
            _, statistics, _ = hidden_states(
                config.model,
                params,
                micro,
                key,
                training=True,
            )
        return _counts(statistics)

    def add(total: dict[str, Array], indexed_micro: tuple[Batch, Array]):
        return jax.tree.map(jnp.add, total, counts_of(*indexed_micro)), None

    steps = config.train.accumulation_steps
    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(counts_of, first, jnp.int32(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, (micros, jnp.arange(steps)))
    return jax.lax.stop_gradient(total)


def _counts(statistics: Statistics) -> dict[str, Array]:
    """Of each sparse layer, by block: how often each expert was chosen."""
    return {name: of_block["counts"] for name, of_block in statistics.items() if of_block}


def _with_square(
    gradient: Callable[..., tuple[PyTree, MetricsAndStatistics]],
) -> Callable[..., tuple[PyTree, MetricsAndStatistics]]:
    """The same, and among the metrics the square of the gradient's norm."""

    def both(*args: Any) -> tuple[PyTree, MetricsAndStatistics]:
        grads, (metrics, statistics) = gradient(*args)
        metrics[MICRO_SQUARES] = optax.tree.norm(grads, squared=True)
        return grads, (metrics, statistics)

    return both


def _summed(
    gradient: Callable[..., tuple[PyTree, MetricsAndStatistics]],
    params: PyTree,
    micros: Batch,
    steps: int,
) -> tuple[PyTree, MetricsAndStatistics]:
    """Gradients, metrics and statistics summed over micro-batches, one after the other."""

    def add(
        total: tuple[PyTree, MetricsAndStatistics],
        indexed_micro: tuple[Batch, Array],
    ) -> tuple[tuple[PyTree, MetricsAndStatistics], None]:
        return jax.tree.map(jnp.add, total, gradient(params, *indexed_micro)), None

    first = jax.tree.map(lambda x: x[0], micros)
    shapes = jax.eval_shape(gradient, params, first, jnp.int32(0))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    indices = jnp.arange(steps)
    total, _ = jax.lax.scan(add, zeros, (micros, indices))
    return total


def gradient_variance(
    config: Config, metrics: dict[str, Array], grad_norm: Array
) -> dict[str, Array]:
    """The variance of the gradient, from m micro-batches' parts g_i of it; their sum is g.

    sum |m g_i - g|^2 / (m (m - 1)), multiplied out.
    """
    if MICRO_SQUARES not in metrics:
        return {}
    count = config.train.accumulation_steps
    squares = metrics.pop(MICRO_SQUARES)
    return {VARIANCE: jnp.maximum(count * squares - grad_norm**2, 0.0) / (count - 1)}
