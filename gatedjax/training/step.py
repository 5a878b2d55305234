"""TrainState, `train_step(state, batch) -> (state, metrics)` and `eval_step(params, batch) -> sums`."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import Config, ModelConfig, SparseMoEConfig
from gatedjax.data import Batch
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.moe.losses import Statistics, load_metrics, router_losses
from gatedjax.layers.parameters import boxed_parameters
from gatedjax.model import LanguageModel, head_weights
from gatedjax.sharding import RULES, parts
from gatedjax.training.losses import TokenLosses, chunked_cross_entropy
from gatedjax.training.optim import evaluation_params
from kernels_pallas import dispatch


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
    routers: dict  # biases and the like (`router_state`), which no gradient reaches


# Steps before the spike test trusts its running mean.
GUARD_WARMUP = 20


def init_params(config: ModelConfig, key: Array):
    """Boxed parameters and router state: each array carries the logical names of its axes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    with nn.logical_axis_rules(RULES), dispatch.unrecorded(), boxed_parameters():
        return LanguageModel(config).init(key, tokens)["params"]


def param_axes(boxed_params):
    """For each parameter, the tuple of its logical axes."""
    return jax.tree.map(
        lambda p: tuple(p.names), boxed_params, is_leaf=lambda p: isinstance(p, nn.Partitioned)
    )


def init_state(config: Config, tx: optax.GradientTransformation, key: Array) -> TrainState:
    """The state before the first step; jit it with out_shardings so that no device ever holds all of it."""
    params, routers = router_state.split(nn.meta.unbox(init_params(config.model, key)))
    zero = jnp.int32(0)
    ema = params if config.optim.ema_decay else None
    return TrainState(
        zero, params, tx.init(params), ema, Guard(jnp.float32(0.0), zero, zero, zero), routers
    )


def batch_losses(
    model: ModelConfig, params, batch: Batch, key: Array | None = None
) -> tuple[TokenLosses, Statistics]:
    """Token loss sums of a batch, and what its routers did. `key`: randomness of routers that select with noise."""
    rngs = None if key is None else {"router": key}
    with nn.logical_axis_rules(RULES):
        hidden, _, statistics = LanguageModel(model).apply(
            {"params": params}, batch.tokens, batch.positions, batch.segment_ids, rngs=rngs
        )
        # Gathered along the width before the loop over chunks, which would gather it for each.
        weights = nn.with_logical_constraint(
            head_weights(params).astype(hidden.dtype), ("vocab", None)
        )
    chunk = model.loss_chunk * parts("batch") * parts("length")
    losses = chunked_cross_entropy(hidden, weights, batch.targets, batch.loss_mask, chunk)
    return losses, statistics


def train_step(
    config: Config, tx: optax.GradientTransformation, state: TrainState, batch: Batch
) -> tuple[TrainState, dict[str, Array]]:
    """One optimizer step over a global batch, in `accumulation_steps` micro-batches.

    The loss is the sum over all tokens with a target, divided by their number in the whole batch, so neither the mesh
    nor the number of micro-batches changes it. A step whose loss or gradient is not finite, or whose gradient norm
    exceeds `skip_factor` times its running mean, leaves the state as it was and is counted.
    """
    grads, metrics, counts = _accumulated_gradients(config, state, batch)
    grad_norm = optax.tree.norm(grads)
    ok, guard = _guarded(config, state.guard, metrics["loss"], grad_norm)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        decay = config.optim.ema_decay
        ema = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, ema, params)
    routers = router_state.updated(config.model, state.routers, counts, state.step + 1)
    new, old = (
        (params, opt_state, ema, routers),
        (state.params, state.opt_state, state.ema, state.routers),
    )
    params, opt_state, ema, routers = jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)
    metrics |= load_metrics(config.model, counts)
    metrics |= {
        "grad_norm": grad_norm,
        "skipped_steps": guard.skipped,
        "skipped_in_a_row": guard.skipped_in_a_row,
    }
    return TrainState(state.step + 1, params, opt_state, ema, guard, routers), metrics


def _accumulated_gradients(config: Config, state: TrainState, batch: Batch):
    """Gradients of the whole batch's loss, its metrics, and how often each expert was chosen: over micro-batches."""
    parts = config.train.accumulation_steps
    tokens = jnp.maximum(jnp.sum(batch.loss_mask.astype(jnp.float32)), 1.0)

    def micro_loss(params, micro: Batch, index: Array, counts):
        params = router_state.merge(params, state.routers)
        losses, routers = batch_losses(
            config.model, params, micro, _router_key(config, state.step * parts + index)
        )
        aux, means, counts = router_losses(config.model, routers, counts)
        token_loss = (losses.cross_entropy + config.model.z_loss * losses.z_loss) / tokens
        metrics = {"loss": losses.cross_entropy / tokens} | {k: v / parts for k, v in means.items()}
        return token_loss + aux / parts, (metrics, counts)

    gradient = jax.grad(micro_loss, has_aux=True)
    if parts == 1:
        grads, (metrics, counts) = gradient(state.params, batch, jnp.int32(0), {})
        return grads, metrics | {"tokens": tokens}, counts
    # Every device keeps its own rows: micro-batch a takes rows a, a + parts, ...
    micros = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
    shapes = jax.eval_shape(
        gradient, state.params, jax.tree.map(lambda x: x[0], micros), jnp.int32(0), {}
    )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total, micro):
        grads, (metrics, counts) = total
        new_grads, (new_metrics, counts) = gradient(state.params, *micro, counts)
        return (
            jax.tree.map(jnp.add, grads, new_grads),
            (jax.tree.map(jnp.add, metrics, new_metrics), counts),
        ), None

    (grads, (metrics, counts)), _ = jax.lax.scan(add, zeros, (micros, jnp.arange(parts)))
    return grads, metrics | {"tokens": tokens}, counts


def _router_key(config: Config, micro_step: Array) -> Array | None:
    """Fresh noise for every micro-batch; None where no router selects with noise."""
    sparse = [f for f in config.model.ffns.values() if isinstance(f, SparseMoEConfig)]
    noisy = any(f.router.selection == "gumbel" for f in sparse)
    return jax.random.fold_in(jax.random.key(config.train.seed), micro_step) if noisy else None


def _guarded(config: Config, guard: Guard, loss: Array, grad_norm: Array) -> tuple[Array, Guard]:
    """Whether to take this step, and the guard's new memory."""
    ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if config.optim.skip_factor:
        spike = grad_norm > config.optim.skip_factor * guard.mean_grad_norm
        ok &= ~(spike & (guard.accepted >= GUARD_WARMUP))
    count = guard.accepted + ok
    # A plain mean at first, then an exponential one over about 100 steps.
    share = 1.0 / jnp.clip(count, 1, 100).astype(jnp.float32)
    mean = jnp.where(
        ok, guard.mean_grad_norm + share * (grad_norm - guard.mean_grad_norm), guard.mean_grad_norm
    )
    bad = (~ok).astype(jnp.int32)
    return ok, Guard(mean, count, guard.skipped + bad, jnp.where(ok, 0, guard.skipped_in_a_row + 1))


def eval_step(model: ModelConfig, params, batch: Batch) -> TokenLosses:
    """Token loss sums of a batch."""
    return batch_losses(model, params, batch)[0]


def params_for_evaluation(state: TrainState):
    """The averaged parameters if the run keeps an average (EMA or schedule-free), else the parameters; with the state
    of the routers in its place among them."""
    params = (
        state.ema if state.ema is not None else evaluation_params(state.opt_state, state.params)
    )
    return router_state.merge(params, state.routers)


def jit_train_step(config: Config, tx: optax.GradientTransformation, shardings):
    """`train_step` compiled for a state placed as `shardings`, which it keeps; the old state's memory is reused."""
    step = functools.partial(train_step, config, tx)
    return jax.jit(step, out_shardings=(shardings, None), donate_argnums=0)
