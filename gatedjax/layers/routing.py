"""Routers as pure functions: logits -> experts, weights; and the statistics that keep experts balanced."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int


class Routing(NamedTuple):
    """Where each token goes: k expert ids and the weights of their outputs, and the full softmax, float32."""

    experts: Int[Array, "... k"]
    weights: Float[Array, "... k"]
    probabilities: Float[Array, "... E"]


def softmax_topk(logits: Float[Array, "... E"], experts_per_token: int, renormalize: bool) -> Routing:
    """Softmax over all experts, then the k largest (Mixtral, Qwen-MoE, OLMoE). Ties go to the lower expert id.

    Not renormalised, the weights sum to less than 1 (OLMoE); renormalised, this equals `topk_softmax`.
    """
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, experts_per_token)
    if renormalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return Routing(experts, weights, probabilities)


def topk_softmax(logits: Float[Array, "... E"], experts_per_token: int, renormalize: bool = True) -> Routing:
    """The k largest logits, then softmax over them (gpt-oss). The weights always sum to 1."""
    logits = logits.astype(jnp.float32)
    chosen, experts = jax.lax.top_k(logits, experts_per_token)
    return Routing(experts, jax.nn.softmax(chosen, axis=-1), jax.nn.softmax(logits, axis=-1))


ROUTERS = {"softmax_topk": softmax_topk, "topk_softmax": topk_softmax}


def expert_load(experts: Int[Array, "... k"], num_experts: int) -> Float[Array, " E"]:
    """Share of all assignments that each expert received; sums to 1. Not differentiable."""
    counts = jnp.zeros(num_experts, jnp.float32).at[experts.reshape(-1)].add(1.0)
    return counts / experts.size


def balance_loss(load: Float[Array, " E"], probabilities: Float[Array, "... E"]) -> Float[Array, ""]:
    """`E sum_i f_i P_i`, f_i the load of expert i, P_i its mean probability; 1 at balance (arXiv 2101.03961, eq. 4).

    Both are means over the global batch: under jit on a mesh the means go over all devices, so no shard has its own
    loss (arXiv 2501.11873 shows why that matters). Hugging Face's value is k times this one, MoE++'s is this one / E.
    """
    share = jnp.mean(probabilities, axis=range(probabilities.ndim - 1))
    return load.shape[0] * jnp.sum(jax.lax.stop_gradient(load) * share)


def router_z_loss(logits: Float[Array, "... E"]) -> Float[Array, ""]:
    """`mean logsumexp(logits)^2`, float32: keeps router logits small (arXiv 2202.08906, eq. 5)."""
    return jnp.mean(jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1) ** 2)
