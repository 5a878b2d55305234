"""The state of a training run, and how it begins."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array
from jaxtyping import PyTree

from gatedjax.config import (
    Config,
    ModelConfig,
)
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.parameters import boxed_parameters
from gatedjax.layers.tree import Path, divided, flatten_dict, unflatten_dict, united
from gatedjax.model import LanguageModel
from gatedjax.sharding import RULES
from gatedjax.training import trainable
from gatedjax.training.guard import Guard, Scalar
from gatedjax.training.optim import evaluation_params
from kernels_pallas import dispatch


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
    made = flatten_dict(nn.meta.unbox(traced_params(config.model, key)))
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


def init_params(config: ModelConfig, key: Array) -> PyTree:
    """Boxed parameters and router state: each array carries the logical names of its axes."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    patches = None
    if config.task == "classify":
        tokens = jnp.zeros((1, config.patches.num_tokens), jnp.int32)
        patches = jnp.zeros((*tokens.shape, config.patches.size), jnp.float32)
    with nn.logical_axis_rules(RULES), dispatch.unrecorded(), boxed_parameters():
        return LanguageModel(config).init(key, tokens, patches=patches)["params"]


@functools.partial(jax.jit, static_argnums=0, inline=True)
def traced_params(config: ModelConfig, key: Array) -> PyTree:
    """`init_params` in a program: traced once for all programs of a run on one mesh."""
    return init_params(config, key)


def param_axes(boxed_params: PyTree) -> PyTree:
    """For each parameter, the tuple of its logical axes."""

    def is_boxed(x: Any) -> bool:
        return isinstance(x, nn.Partitioned)

    return jax.tree.map(lambda p: tuple(p.names), boxed_params, is_leaf=is_boxed)


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
