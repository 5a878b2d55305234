"""What routers remember besides parameters: biases, a temperature, a layer's importance.

It is never seen by the optimizer. It lives in `TrainState.routers`, is put among the parameters
(under `router_state`) wherever the model runs, and is changed once a step, by the loads of the
whole batch on all devices.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import ModelConfig
from gatedjax.config.moe import SparseMoEConfig
from gatedjax.config.on_demand import VersatileMLPConfig
from gatedjax.config.router import RouterConfig
from gatedjax.layers.moe.statistics import loads
from gatedjax.layers.parameters import parameter
from gatedjax.layers.stochastic_gate import annealed_temperature
from gatedjax.layers.tree import divided, flatten_dict, unflatten_dict, united

# The submodule of a sparse layer that holds its router's state.
NAME = "router_state"

STATE_OF_RULE = {
    "none": (),
    "sign": ("bias",),
    "pid": ("bias", "integral", "error"),
}


class RouterState(nn.Module):
    """The state of one layer's router, by name; nothing that the configuration does not use.

    bias [E], integral [E], error [E]: of the bias rule; the last two of "pid" only
    temperature []: of the logits
    importance []: of the layer, for skipping (MoDES calibrates it; 1 until then); [2] for tokens of
      the first and the second kind, where there is a second
    """

    config: SparseMoEConfig

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        router = self.config.router
        state = {}
        for name in STATE_OF_RULE[router.bias_rule]:
            state[name] = parameter(
                self,
                name,
                axes=["router"],
                shape=[self.config.total_experts],
                init=nn.initializers.zeros,
            )
        if router.anneal_steps:
            start = nn.initializers.constant(router.temperature)
            state["temperature"] = parameter(
                self,
                "temperature",
                axes=[],
                shape=[],
                init=start,
            )
        if router.skips:
            ones = nn.initializers.ones
            state["importance"] = parameter(
                self,
                "importance",
                axes=[None] if router.second_kind else [],
                shape=[2] if router.second_kind else [],
                init=ones,
            )
        return state


def split(params: Mapping[str, Any]) -> tuple[Mapping[str, Any], dict]:
    """(parameters, router state) of all that `LanguageModel.init` made.

    The state is {} where no router has any.
    """
    state, trained = divided(params, lambda path: NAME in path)
    return trained, dict(state)


def merge(params: Mapping[str, Any], state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the model runs on: the inverse of `split`."""
    return united(params, state)


def updated(
    config: ModelConfig,
    state: Mapping[str, Any],
    counts: Mapping[str, Float[Array, "P E"]],
    step: Int[Array, ""],
) -> Mapping[str, Any]:
    """The state after a step.

    Args:
      config: of the model.
      state: before the step, of all layers.
      counts: for each block with a sparse layer, the assignments of the whole batch, stacked over
        the block's layers.
      step: how many steps there have been, this one included.

    Returns:
      The new state, in the same places.
    """
    if not state:
        return state
    new = {}
    flat = flatten_dict(state)
    for block in config.blocks:
        place = (*block.path, "ffn", NAME)
        old = {path[-1]: array for path, array in flat.items() if path[:-1] == place}
        ffn = block.feed_forward
        if old and isinstance(ffn, VersatileMLPConfig):
            lower = temperature(ffn, step)
            new |= {(*place, name): jnp.full_like(array, lower) for name, array in old.items()}
        if not old or not isinstance(ffn, SparseMoEConfig):
            continue
        # Counts are stacked over the block's layers; state is so in the blocks of the period.
        of_block = counts[block.name]
        of_layer = updated_layer(
            ffn,
            old,
            of_block if block.is_repeated else of_block[0],
            step,
        )
        new |= {(*place, name): array for name, array in of_layer.items()}
    return unflatten_dict(new)


def updated_layer(
    config: SparseMoEConfig,
    state: Mapping[str, Array],
    counts: Float[Array, "... E"],
    step: Int[Array, ""],
) -> dict[str, Array]:
    """The state of one layer's router after a step.

    Importances stay: `skipping.calibrated` sets them.

    Args:
      config: of the layer.
      state: before the step.
      counts: the assignments of the whole batch.
      step: how many steps there have been, this one included.

    Returns:
      The new state, with the same names.
    """
    new = dict(state)
    router = config.router
    if "temperature" in state:
        new["temperature"] = jnp.full_like(state["temperature"], temperature(router, step))
    if router.bias_rule == "none":
        return new
    error = load_error(counts, target_load(config))
    if router.bias_rule == "sign":
        new["bias"] = sign_update(state["bias"], error, router.bias_rate)
        return new
    bias, integral, error = pid_update(
        state["integral"],
        state["error"],
        error,
        router.pid_gains,
    )
    return new | {
        "bias": bias,
        "integral": integral,
        "error": error,
    }


def temperature(
    config: RouterConfig | VersatileMLPConfig, step: Int[Array, ""]
) -> Float[Array, ""]:
    """The temperature of a step: the same factor every step, until `anneal_steps`."""
    return annealed_temperature(
        step,
        config.temperature,
        config.final_temperature,
        config.anneal_steps,
    )


def target_load(config: SparseMoEConfig) -> Float[Array, " E"]:
    """The fraction of assignments that each expert should have.

    All the same, or `ffn_fraction` to those that compute.
    """
    computing = config.num_experts
    free = config.total_experts - computing
    fraction = config.router.ffn_fraction or computing / (computing + free)
    of_computing = [fraction / max(computing, 1)] * computing
    of_free = [(1.0 - fraction) / max(free, 1)] * free
    return jnp.asarray(of_computing + of_free, jnp.float32)


def load_error(counts: Float[Array, "... E"], target: Float[Array, " E"]) -> Float[Array, "... E"]:
    """How far each expert is below its target, relative to an even load.

    1 if it had nothing of an even load; 0 where nothing was assigned to any expert.
    """
    is_something = jnp.sum(counts, axis=-1, keepdims=True) > 0
    return jnp.where(is_something, (target - loads(counts)) * target.shape[0], 0.0)


def sign_update(
    bias: Float[Array, "... E"],
    error: Float[Array, "... E"],
    rate: float,
) -> Float[Array, "... E"]:
    """`b + u sign(error)`.

    DeepSeek-V3's balancing without a loss (arXiv 2408.15664), u = 0.001 there.
    """
    return bias + rate * jnp.sign(error)


def pid_update(
    integral: Float[Array, "... E"],
    previous: Float[Array, "... E"],
    error: Float[Array, "... E"],
    gains: tuple[float, ...],
) -> tuple[Array, Array, Array]:
    """`b = Kp e + Ki sum e + Kd (e - e')`, in the manner of LongCat-Flash (arXiv 2509.01322).

    The paper does not print its gains; these act on relative errors (`load_error`), so they do not
    depend on E.

    Args:
      integral: the sum of the errors so far.
      previous: e', the error of the step before.
      error: e.
      gains: Kp, Ki, Kd.

    Returns:
      (bias, integral, error), for the next step.
    """
    proportional, integrating, derivative = gains
    integral = integral + error
    bias = proportional * error + integrating * integral + derivative * (error - previous)
    return bias, integral, error
