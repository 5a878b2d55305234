"""The train step: `train_step(state, batch) -> (state, metrics)`, and the evaluation step."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int, PyTree

from gatedjax.compiler_options import for_training
from gatedjax.config import (
    AdaptiveMLPConfig,
    Config,
    ModelConfig,
    SparseMoEConfig,
    VersatileMLPConfig,
)
from gatedjax.data import Batch
from gatedjax.layers.added_losses import ADDED_LOSSES, added_loss, has_added_losses
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.moe.losses import load_metrics, router_losses
from gatedjax.layers.moe.statistics import Extent, Statistics, as_part, extent, fraction
from gatedjax.layers.parameters import boxed_parameters
from gatedjax.layers.tree import Path, divided, flatten_dict, unflatten_dict, united
from gatedjax.model import LanguageModel, head_weights
from gatedjax.output import to_logits
from gatedjax.sharding import RULES, parts
from gatedjax.training import trainable
from gatedjax.training.losses import (
    TokenLosses,
    chunked_cross_entropy,
    count_correct,
    gathered,
)
from gatedjax.training.optim import evaluation_params
from gatedjax.training.optim_refined import L1_NORM
from gatedjax.training.output_loss import model_loss
from gatedjax.training.teacher import Teacher, teacher_loss
from kernels_pallas import dispatch

# Steps before the spike test trusts its running mean.
GUARD_WARMUP = 20
# The running mean of gradient norms looks back over about this many steps.
GUARD_MEMORY = 100


# Metrics of runs whose batches grow: the sum of the micro-batches' squared gradient norms, and the
# variance of their sum.
MICRO_SQUARES = "micro_squares"
VARIANCE = "gradient_variance"

# A number in the state: an array of shape [], or its shape or sharding in a tree of those.
Scalar = Any


@struct.dataclass
class Guard:
    """What the guard against bad steps remembers: a float32 mean, int32 counts of steps."""

    mean_grad_norm: Scalar
    accepted: Scalar
    skipped: Scalar
    skipped_in_a_row: Scalar


@struct.dataclass
class TrainState:
    """Everything that a step changes.

    The same class holds the shapes and the shardings of a state (`run.prepare`).

    step: batches seen, skipped ones too.
    opt_state: of the parameters that train (`training.trainable`).
    ema: the averages of those, None if the run keeps none.
    routers: biases and the like (`layers.moe.state`), which no gradient reaches.
    """

    step: Scalar
    params: PyTree
    opt_state: optax.OptState
    ema: PyTree | None
    guard: Guard
    routers: PyTree


def init_params(config: ModelConfig, key: Array) -> PyTree:
    """Boxed parameters and router state: each array carries the logical names of its axes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    patches = None
    if config.task == "classify":
        tokens = jnp.zeros((1, config.patches.num_tokens), jnp.int32)
        patches = jnp.zeros((*tokens.shape, config.patches.size), jnp.float32)
    with nn.logical_axis_rules(RULES), dispatch.unrecorded(), boxed_parameters():
        return LanguageModel(config).init(key, tokens, patches=patches)["params"]


def param_axes(boxed_params: PyTree) -> PyTree:
    """For each parameter, the tuple of its logical axes."""

    def is_boxed(x: Any) -> bool:
        return isinstance(x, nn.Partitioned)

    return jax.tree.map(lambda p: tuple(p.names), boxed_params, is_leaf=is_boxed)


def init_state(
    config: Config,
    tx: optax.GradientTransformation,
    key: Array,
    given: Mapping[Path, Array] | None = None,
) -> TrainState:
    """The state before the first step.

    Jit it with out_shardings, so that no device ever holds all of it.

    Args:
      config: the run's configuration.
      tx: the optimizer of the parameters that train.
      key: randomness of the parameters that are made here.
      given: parameters, and state of routers, that are not: by path.
    """
    made = flatten_dict(nn.meta.unbox(init_params(config.model, key)))
    params, routers = router_state.split(unflatten_dict(made | dict(given or {})))
    trained, _ = trainable.split(config, params)
    zero = jnp.int32(0)
    guard = Guard(
        mean_grad_norm=jnp.float32(0.0),
        accepted=zero,
        skipped=zero,
        skipped_in_a_row=zero,
    )
    return TrainState(
        step=zero,
        params=params,
        opt_state=tx.init(trained),
        ema=trained if config.optim.ema_decay else None,
        guard=guard,
        routers=routers,
    )


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
        hidden, _, _ = _hidden_states(model, params, batch)
        targets, mask = _targets(batch, hidden)
        return chunked_cross_entropy(
            hidden,
            gathered(head_weights(params), hidden),
            targets=targets,
            mask=mask,
            chunk=_tokens_of_chunk(model),
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
    chunk = _tokens_of_chunk(model)
    with nn.logical_axis_rules(RULES):
        hidden, _, _ = _hidden_states(model, params, batch)
        targets, mask = _targets(batch, hidden)
        weights = gathered(head_weights(params), hidden)
        inputs = (hidden, weights, targets, mask, chunk)
        as_logits = to_logits(model, params)
        losses = chunked_cross_entropy(*inputs, by_row=True, to_logits=as_logits)
        return losses, count_correct(*inputs, as_logits), hidden


def _targets(
    batch: Batch,
    hidden: Float[Array, "B _ M"],
) -> tuple[Int[Array, "B _"], Float[Array, "B _"]]:
    """Targets of the hidden states and their weights: of an image there is one of each."""
    places = hidden.shape[1]
    targets = jnp.asarray(batch.targets)[:, :places]
    return targets, jnp.asarray(batch.loss_mask)[:, :places]


def _tokens_of_chunk(model: ModelConfig) -> int:
    """Tokens of the whole mesh whose logits exist at once: the configuration counts a device's."""
    return model.loss_chunk * parts("batch") * parts("length")


def _hidden_states(
    model: ModelConfig,
    params: PyTree,
    batch: Batch,
    key: Array | None = None,
    training: bool = False,
) -> tuple[Float[Array, "B T M"], Statistics, Float[Array, ""] | None]:
    """The model's last hidden states of a batch, what its routers did, and losses of its layers.

    Those are None where no layer adds any, and means over the tokens of the batch.

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


def train_step(
    config: Config,
    tx: optax.GradientTransformation,
    state: TrainState,
    batch: Batch,
    teacher: Teacher | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step over a global batch, in `accumulation_steps` micro-batches.

    The loss is the weighted sum over all tokens, divided by the sum of the weights in the whole
    batch (`loss_mask`: 1 for a token with a target): neither the mesh nor the number of
    micro-batches changes it. The same holds for the losses of routers, which are about all tokens.
    A balance loss multiplies the loads of the whole batch: with several micro-batches a forward
    pass over all of them counts those first. A step whose losses or gradient are not finite (a
    token that is NaN makes them so), or whose gradient norm exceeds `skip_factor` times its running
    mean, leaves the state as it was and is counted.

    Args:
      config: the run's configuration.
      tx: the optimizer.
      state: before the step.
      batch: the rows of all devices.
      teacher: what `train.teacher` names (`given_teacher.load`); None where it names none.

    Returns:
      The state after the step, and the metrics of the step.
    """
    if (teacher is None) != (config.train.teacher.run == ""):
        given = "none" if teacher is None else "one"
        raise ValueError(
            f"teacher: got {given}, expected that of train.teacher.run = "
            f"{config.train.teacher.run!r}"
        )
    grads, metrics, counts = _accumulated_gradients(config, state, batch, teacher)
    with jax.named_scope("update"):
        trained, frozen = trainable.split(config, state.params)
        grad_norm = optax.tree.norm(grads)
        # Losses of routers and layers too, which are not in what is logged as the loss.
        loss = metrics["loss"] + metrics.get("aux_loss", 0.0) + metrics.get("added_loss", 0.0)
        if teacher is not None:
            loss = loss + metrics["teacher_loss"]
        is_good, guard = _guarded(config, state.guard, loss, grad_norm)
        updates, opt_state = tx.update(grads, state.opt_state, trained)
        moved: Any = optax.apply_updates(trained, updates)
        new = dataclasses.replace(
            state,
            params=united(moved, frozen),
            opt_state=opt_state,
            ema=_updated_average(config, state.ema, evaluation_params(opt_state, moved), guard),
            routers=router_state.updated(config.model, state.routers, counts, state.step + 1),
        )
        new = jax.tree.map(lambda n, o: jnp.where(is_good, n, o), new, state)
    # The step and the guard count bad steps too.
    new = dataclasses.replace(new, step=state.step + 1, guard=guard)
    metrics |= load_metrics(config.model, counts)
    metrics |= {
        "grad_norm": grad_norm,
        **_l1_norm(config, grads),
        **_variance(config, metrics, grad_norm),
        "skipped_steps": guard.skipped,
        "skipped_in_a_row": guard.skipped_in_a_row,
    }
    return new, metrics


def _l1_norm(config: Config, grads: PyTree) -> dict[str, Array]:
    """The sum of the gradient's absolute values, where the configuration asks for it."""
    if not config.optim.record_l1_norm:
        return {}
    return {L1_NORM: optax.tree.norm(grads, ord=1)}


def _updated_average(
    config: Config,
    ema: PyTree | None,
    params: PyTree,
    guard: Guard,
) -> PyTree | None:
    """The mean of the parameters after each step that was taken, the random start not among them.

    The parameters after step t of n weigh (1 - d) d^(n - t) / (1 - d^n): an exponential average,
    corrected for its start. Its first value is the parameters after the first step.
    """
    if ema is None:
        return None
    decay = config.optim.ema_decay
    # Steps that were skipped do not count.
    steps = jnp.maximum(guard.accepted, 1).astype(jnp.float32)
    # 1 - d^n without its cancellation for a d near 1.
    correction = -jnp.expm1(steps * math.log(decay))
    # Exactly 1 at the first step: of the start nothing is left, however large it was.
    weight = jnp.where(steps == 1.0, 1.0, (1.0 - decay) / correction)
    return jax.tree.map(lambda a, p: (1.0 - weight) * a + weight * p, ema, params)


# Metrics of a batch by name, and its part of the step's router statistics.
MetricsAndStatistics = tuple[dict[str, Array], Statistics]


def _accumulated_gradients(
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
        loss = _micro_loss(config, state, tokens, whole, None, teacher)
        gradient = jax.grad(loss, has_aux=True)
        first_index = jnp.int32(0)
        grads, (metrics, statistics) = gradient(trained, batch, first_index)
    else:
        micros = _micro_batches(batch, steps)
        counts_of_step = None
        if any(ffn.balance_loss for ffn in _sparse_layers(model)):
            counts_of_step = _assignments(config, state, micros)
        loss = _micro_loss(config, state, tokens, whole, counts_of_step, teacher)
        gradient = jax.grad(loss, has_aux=True)
        if config.train.grow_batches:
            gradient = _with_square(gradient)
        grads, (metrics, statistics) = _summed(gradient, trained, micros, steps)
    # The parts have added up to the statistics of the step.
    _, of_routers = router_losses(model, statistics)
    metrics |= of_routers
    metrics["tokens"] = tokens
    return grads, metrics, _counts(statistics)


def _with_square(
    gradient: Callable[..., tuple[PyTree, MetricsAndStatistics]],
) -> Callable[..., tuple[PyTree, MetricsAndStatistics]]:
    """The same, and among the metrics the square of the gradient's norm."""

    def both(*args: Any) -> tuple[PyTree, MetricsAndStatistics]:
        grads, (metrics, statistics) = gradient(*args)
        metrics[MICRO_SQUARES] = optax.tree.norm(grads, squared=True)
        return grads, (metrics, statistics)

    return both


def _variance(config: Config, metrics: dict[str, Array], grad_norm: Array) -> dict[str, Array]:
    """The variance of the gradient, from m micro-batches' parts g_i of it; their sum is g.

    sum |m g_i - g|^2 / (m (m - 1)), multiplied out.
    """
    if MICRO_SQUARES not in metrics:
        return {}
    count = config.train.accumulation_steps
    squares = metrics.pop(MICRO_SQUARES)
    return {VARIANCE: jnp.maximum(count * squares - grad_norm**2, 0.0) / (count - 1)}


def _counts(statistics: Statistics) -> dict[str, Array]:
    """Of each sparse layer, by block: how often each expert was chosen."""
    return {name: of_block["counts"] for name, of_block in statistics.items() if of_block}


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
        key = _router_key(config, state, index)
        with nn.logical_axis_rules(RULES):
            _, statistics, _ = _hidden_states(
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


def _micro_batches(batch: Batch, count: int) -> Batch:
    """The batch as `count` micro-batches along a new first axis.

    Every device keeps its own rows: micro-batch i takes rows i, i + count, ...
    """

    def cut(x: Array) -> Array:
        rows = x.reshape(-1, count, *x.shape[1:])
        return jnp.moveaxis(rows, 1, 0)

    return jax.tree.map(cut, batch)


def _micro_loss(
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
    """

    _, frozen = trainable.split(config, state.params)

    def loss(
        trained: PyTree,
        micro: Batch,
        index: Array,
    ) -> tuple[Array, MetricsAndStatistics]:
        key = _router_key(config, state, index)
        params = united(trained, frozen, state.routers)
        with nn.logical_axis_rules(RULES):
            hidden, statistics, added = _hidden_states(
                config.model,
                params,
                micro,
                key,
                training=True,
            )
            targets, mask = _targets(micro, hidden)
            # The name by which a profile, and the table of a compiled step, know this part.
            with jax.named_scope("token_loss"):
                own_weight = config.train.teacher.cross_entropy
                token_loss, losses = model_loss(
                    config.model,
                    *_differentiated(params, hidden, own_weight),
                    targets,
                    mask,
                    1.0 / tokens,
                    _tokens_of_chunk(config.model),
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
                chunk = _tokens_of_chunk(config.model)
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


def _sparse_layers(model: ModelConfig) -> list[SparseMoEConfig]:
    """The sparse feed-forwards that the model uses."""
    used = [model.ffns[name] for name in model.ffn_pattern]
    return [ffn for ffn in used if isinstance(ffn, SparseMoEConfig)]


def _router_key(
    config: Config,
    state: TrainState,
    index: Int[Array, ""],
) -> Array | None:
    """Fresh noise for every micro-batch; None where no router selects with noise."""
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
    """The same for the noise of the output; None where it has none."""
    if config.model.output.kind != "noisy_softmax":
        return None
    # Not the routers' numbers.
    return jax.random.fold_in(_key_of_micro_batch(config, state, index), 1)


def _key_of_micro_batch(
    config: Config,
    state: TrainState,
    index: Int[Array, ""],
) -> Array:
    micro_step = state.step * config.train.accumulation_steps + index
    return jax.random.fold_in(jax.random.key(config.train.seed), micro_step)


def _guarded(
    config: Config,
    guard: Guard,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
) -> tuple[Bool[Array, ""], Guard]:
    """Whether to take this step, and the guard's new memory."""
    is_good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.optim.skip_factor:
        limit = config.optim.skip_factor * guard.mean_grad_norm
        is_known = guard.accepted >= GUARD_WARMUP
        is_spike = is_known & (grad_norm > limit)
        is_good &= ~is_spike
    accepted = guard.accepted + is_good
    # A plain mean at first, then an exponential one.
    count = jnp.clip(accepted, 1, GUARD_MEMORY)
    weight = 1.0 / count.astype(jnp.float32)
    change = grad_norm - guard.mean_grad_norm
    mean = guard.mean_grad_norm + weight * change
    new_guard = Guard(
        mean_grad_norm=jnp.where(is_good, mean, guard.mean_grad_norm),
        accepted=accepted,
        skipped=guard.skipped + (~is_good).astype(jnp.int32),
        skipped_in_a_row=jnp.where(is_good, 0, guard.skipped_in_a_row + 1),
    )
    return is_good, new_guard


def eval_step(model: ModelConfig, params: PyTree, batch: Batch) -> TokenLosses:
    """Token loss sums of a batch."""
    return batch_losses(model, params, batch)


def eval_step_by_row(model: ModelConfig, params: PyTree, batch: Batch) -> TokenLosses:
    """Token loss sums of every row of a batch, [B], whole on every device."""
    losses = batch_losses(model, params, batch, by_row=True)
    # Of a global batch a process could read its own rows only.
    with nn.logical_axis_rules(RULES):
        return jax.tree.map(lambda x: nn.with_logical_constraint(x, (None,)), losses)


def params_for_evaluation(state: TrainState) -> PyTree:
    """The averaged parameters if the run keeps an average, else the parameters.

    The average is an EMA or schedule-free's. The state of the routers is in its place among them.
    """
    if state.ema is None:
        params = evaluation_params(state.opt_state, state.params)
    else:
        # What does not train has no average of its own.
        frozen, _ = divided(state.params, lambda path: path not in flatten_dict(state.ema))
        params = united(frozen, state.ema)
    return router_state.merge(params, state.routers)


def jit_train_step(
    config: Config,
    tx: optax.GradientTransformation,
    shardings: PyTree,
) -> jax.stages.Wrapped:
    """`train_step` compiled for a state placed as `shardings`, which it keeps.

    The old state's memory is reused. Collectives run beside what is computed where the devices can
    do that (`MeshConfig.async_collectives`).
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    step = functools.partial(train_step, config, tx)
    return jax.jit(
        step,
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=for_training(mesh, config.mesh.async_collectives) or None,
    )
