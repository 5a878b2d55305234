"""TrainState, `train_step(state, batch) -> (state, metrics)` and `eval_step(params, batch) -> sums`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import Config, ModelConfig
from gatedjax.data import Batch
from gatedjax.losses import TokenLosses, chunked_cross_entropy
from gatedjax.model import LanguageModel, head_weights
from gatedjax.optim import evaluation_params
from gatedjax.sharding import RULES, parts


@struct.dataclass
class Guard:
    """What the guard against bad steps remembers."""

    mean_grad_norm: Float[Array, ""]
    accepted: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


@struct.dataclass
class TrainState:
    """Everything that a step changes. `step` counts batches seen, skipped ones too."""

    step: Int[Array, ""]
    params: dict
    opt_state: optax.OptState
    ema: dict | None
    guard: Guard


# Steps before the spike test trusts its running mean.
GUARD_WARMUP = 20


def init_params(config: ModelConfig, key: Array):
    """Boxed parameters: each carries the logical names of its axes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    with nn.logical_axis_rules(RULES):
        return LanguageModel(config).init(key, tokens)["params"]


def param_axes(boxed_params):
    """For each parameter, the tuple of its logical axes."""
    return jax.tree.map(lambda p: tuple(p.names), boxed_params, is_leaf=lambda p: isinstance(p, nn.Partitioned))


def init_state(config: Config, tx: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first step; jit it with out_shardings so that no device ever holds all of it."""
    params = nn.meta.unbox(init_params(config.model, key))
    zero = jnp.int32(0)
    ema = params if config.optim.ema_decay else None
    return TrainState(zero, params, tx.init(params), ema, Guard(jnp.float32(0.0), zero, zero, zero))


def batch_losses(model: ModelConfig, params, batch: Batch) -> tuple[TokenLosses, dict[str, Array]]:
    """Token loss sums of a batch, and `router_statistics`."""
    with nn.logical_axis_rules(RULES):
        hidden, _, statistics = LanguageModel(model).apply(
            {"params": params}, batch.tokens, batch.positions, batch.segment_ids
        )
        # Gathered along the width before the loop over chunks, which would gather it for each.
        weights = nn.with_logical_constraint(head_weights(params).astype(hidden.dtype), ("vocab", None))
    chunk = model.loss_chunk * parts("batch") * parts("length")
    losses = chunked_cross_entropy(hidden, weights, batch.targets, batch.loss_mask, chunk)
    return losses, router_statistics(statistics)


def router_statistics(statistics: dict[str, dict[str, Array]]) -> dict[str, Array]:
    """Over all sparse layers: summed auxiliary loss, mean balance loss, largest load of an expert over its share."""
    sparse = [s for s in statistics.values() if s]
    if not sparse:
        return {}
    loads = [s["load"] for s in sparse]
    return {
        "aux_loss": sum(jnp.sum(s["aux_loss"]) for s in sparse),
        "balance_loss": jnp.mean(jnp.concatenate([s["balance_loss"] for s in sparse])),
        "load_max_over_mean": jnp.max(jnp.stack([jnp.max(load) * load.shape[-1] for load in loads])),
    }


def train_step(
    config: Config, tx: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step over a global batch, in `accumulation_steps` micro-batches.

    The loss is the sum over all tokens with a target, divided by their number in the whole batch, so neither the mesh
    nor the number of micro-batches changes it. A step whose loss or gradient is not finite, or whose gradient norm
    exceeds `skip_factor` times its running mean, leaves the state as it was and is counted.
    """
    grads, metrics = _accumulated_gradients(config, state.params, batch)
    grad_norm = optax.tree.norm(grads)
    ok, guard = _guarded(config, state.guard, metrics["loss"], grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        decay = config.optim.ema_decay
        ema = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, ema, params)
    new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
    params, opt_state, ema = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
    metrics |= {
        "grad_norm": grad_norm,
        "skipped_steps": guard.skipped,
        "skipped_in_a_row": guard.skipped_in_a_row,
    }
    return TrainState(state.step + 1, params, opt_state, ema, guard), metrics


def _accumulated_gradients(config: Config, params, batch: Batch):
    """Gradients of the whole batch's loss, and its metrics, scanning over micro-batches."""
    parts = config.train.accumulation_steps
    tokens = jnp.maximum(jnp.sum(batch.loss_mask.astype(jnp.float32)), 1.0)

    def micro_loss(params, micro: Batch):
        losses, router = batch_losses(config.model, params, micro)
        token_loss = (losses.cross_entropy + config.model.z_loss * losses.z_loss) / tokens
        metrics = {"loss": losses.cross_entropy / tokens} | {k: v / parts for k, v in router.items()}
        return token_loss + metrics.get("aux_loss", 0.0), metrics

    gradient = jax.grad(micro_loss, has_aux=True)
    if parts == 1:
        grads, metrics = gradient(params, batch)
    else:
        # Every device keeps its own rows: micro-batch a takes rows a, a + parts, ...
        micros = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], micros))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        add = lambda total, micro: (jax.tree.map(jnp.add, total, gradient(params, micro)), None)
        (grads, metrics), _ = jax.lax.scan(add, zeros, micros)
    return grads, metrics | {"tokens": tokens}


def _guarded(config: Config, guard: Guard, loss: Array, grad_norm: Array) -> tuple[Array, Guard]:
    """Whether to take this step, and the guard's new memory."""
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.optim.skip_factor:
        spike = grad_norm > config.optim.skip_factor * guard.mean_grad_norm
        ok &= ~(spike & (guard.accepted >= GUARD_WARMUP))
    count = guard.accepted + ok
    # A plain mean at first, then an exponential one over about 100 steps.
    share = 1.0 / jnp.clip(count, 1, 100).astype(jnp.float32)
    mean = jnp.where(ok, guard.mean_grad_norm + share * (grad_norm - guard.mean_grad_norm), guard.mean_grad_norm)
    bad = (~ok).astype(jnp.int32)
    return ok, Guard(mean, count, guard.skipped + bad, jnp.where(ok, 0, guard.skipped_in_a_row + 1))


def eval_step(model: ModelConfig, params, batch: Batch) -> TokenLosses:
    """Token loss sums of a batch."""
    return batch_losses(model, params, batch)[0]


def params_for_evaluation(state: TrainState):
    """The averaged parameters if the run keeps an average (EMA or schedule-free), else the parameters."""
    return state.ema if state.ema is not None else evaluation_params(state.opt_state, state.params)


def jit_train_step(config: Config, tx: optax.GradientTransformation, shardings):
    """`train_step` compiled for a state placed as `shardings`, which it keeps; the old state's memory is reused."""
    step = functools.partial(train_step, config, tx)
    return jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
