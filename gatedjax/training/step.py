"""The train step: `train_step(state, batch) -> (state, metrics)`."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import PyTree

from gatedjax.compiler_options import for_training
from gatedjax.config import Config
from gatedjax.data import Batch
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.moe.losses import load_metrics
from gatedjax.layers.tree import united
from gatedjax.training import trainable
from gatedjax.training.gradients import accumulated_gradients, gradient_variance
from gatedjax.training.guard import Guard, guarded
from gatedjax.training.optim import evaluation_params
from gatedjax.training.optim_refined import L1_NORM
from gatedjax.training.state import TrainState
from gatedjax.training.teacher import Teacher


def jit_train_step(
    config: Config,
    tx: optax.GradientTransformation,
    shardings: PyTree,
    options: Mapping[str, str] | None = None,
) -> jax.stages.Wrapped:
    """`train_step` compiled for a state placed as `shardings`, which it keeps.

    The old state's memory is reused. Collectives run beside what is computed where the devices can
    do that (`MeshConfig.async_collectives`). `options` go to the compiler beside those of every
    step (`aot.larger_products`).
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    step = functools.partial(train_step, config, tx)
    for_every_step = for_training(mesh, config.mesh.async_collectives)
    return jax.jit(
        step,
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=for_every_step | dict(options or {}) or None,
    )


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
    grads, metrics, counts = accumulated_gradients(config, state, batch, teacher)
    with jax.named_scope("update"):
        trained, frozen = trainable.split(config, state.params)
        grad_norm = optax.tree.norm(grads)
        # Losses of routers and layers too, which are not in what is logged as the loss.
        loss = metrics["loss"] + metrics.get("aux_loss", 0.0) + metrics.get("added_loss", 0.0)
        if teacher is not None:
            loss = loss + metrics["teacher_loss"]
        is_good, guard = guarded(config, state.guard, loss, grad_norm)
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
        **gradient_variance(config, metrics, grad_norm),
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
