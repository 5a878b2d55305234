"""What routers remember besides parameters: biases, a temperature, a layer's importance. Never seen by the optimizer.

It lives in `TrainState.routers`, is put among the parameters (under `router_state`) wherever the model runs, and is
changed once a step, by the loads of the whole batch on all devices.
"""

from collections.abc import Mapping

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import ModelConfig
from gatedjax.config.moe import RouterConfig, SparseMoEConfig

NAME = "router_state"


def split(params: Mapping) -> tuple[dict, dict]:
    """(parameters, router state) of all that `LanguageModel.init` made. The state is {} where no router has any."""
    flat = flatten_dict(params)
    state = {path: x for path, x in flat.items() if NAME in path}
    if not state:
        return params, {}
    return unflatten_dict({p: x for p, x in flat.items() if p not in state}), unflatten_dict(state)


def merge(params: Mapping, state: Mapping) -> dict:
    """What the model runs on: the inverse of `split`."""
    return unflatten_dict(flatten_dict(params) | flatten_dict(state)) if state else params


def updated(
    config: ModelConfig,
    state: Mapping,
    counts: Mapping[str, Float[Array, "P E"]],
    step: Int[Array, ""],
) -> dict:
    """The state after a step.

    Args:
      counts: for each sparse layer of the period, the assignments of the whole batch, stacked over periods.
      step: how many steps there have been, this one included.
    """
    flat = flatten_dict(state)
    new = dict(flat)
    for path, old in flat.items():
        ffn = next(config.layer(int(name[6:]))[1] for name in path if name.startswith("layer_"))
        layer = path[: path.index(NAME) + 1]
        if path[-1] == "temperature":
            new[path] = jnp.full_like(old, temperature(ffn.router, step))
        elif path[-1] == "bias":
            error = load_error(
                counts[next(n for n in path if n.startswith("layer_"))], target_load(ffn)
            )
            if ffn.router.bias_rule == "sign":
                new[path] = sign_update(old, error, ffn.router.bias_rate)
            else:
                terms = flat[(*layer, "integral")], flat[(*layer, "error")]
                update = pid_update(*terms, error, ffn.router.pid_gains)
                new |= {(*layer, name): x for name, x in zip(("bias", "integral", "error"), update)}
    return unflatten_dict(new)


def temperature(config: RouterConfig, step: Int[Array, ""]) -> Float[Array, ""]:
    """From `temperature` to `final_temperature` over `anneal_steps` steps, by the same factor every step."""
    done = jnp.clip(step.astype(jnp.float32) / config.anneal_steps, 0.0, 1.0)
    return config.temperature * (config.final_temperature / config.temperature) ** done


def target_load(config: SparseMoEConfig) -> Float[Array, " E"]:
    """The share of assignments that each expert should have: all the same, or `ffn_fraction` to those that compute."""
    ffn, free = config.num_experts, config.total_experts - config.num_experts
    share = config.router.ffn_fraction or ffn / (ffn + free)
    return jnp.asarray(
        [share / max(ffn, 1)] * ffn + [(1.0 - share) / max(free, 1)] * free, jnp.float32
    )


def load_error(counts: Float[Array, "... E"], target: Float[Array, " E"]) -> Float[Array, "... E"]:
    """How far each expert is below its target, relative to an even share: 1 if it had nothing of an even share."""
    load = counts / jnp.maximum(jnp.sum(counts, axis=-1, keepdims=True), 1.0)
    return (target - load) * target.shape[0]


def sign_update(
    bias: Float[Array, "... E"], error: Float[Array, "... E"], rate: float
) -> Float[Array, "... E"]:
    """`b + u sign(error)`: DeepSeek-V3's balancing without a loss (arXiv 2408.15664), u = 0.001 there."""
    return bias + rate * jnp.sign(error)


def pid_update(
    integral: Float[Array, "... E"],
    previous: Float[Array, "... E"],
    error: Float[Array, "... E"],
    gains: tuple[float, ...],
) -> tuple[Array, Array, Array]:
    """(bias, integral, error): `b = Kp e + Ki sum e + Kd (e - e')`, in the manner of LongCat-Flash (arXiv 2509.01322).

    The paper does not print its gains; these act on relative errors (`load_error`), so they do not depend on E.
    """
    proportional, integrating, derivative = gains
    integral = integral + error
    return (
        proportional * error + integrating * integral + derivative * (error - previous),
        integral,
        error,
    )
