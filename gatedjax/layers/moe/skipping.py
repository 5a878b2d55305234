"""Calibrates the skipping of experts (MoDES, arXiv 2511.15690): how much each layer matters, and the threshold.

A chosen expert is skipped where importance of its layer x score < threshold. Both are found once, on a batch of
held-out text, with a model whose router has any threshold above 0 (so that it has the state):

    routers = calibrated(lambda routers: logits_of(params, routers, batch), state.routers)
    scores = chosen_scores(router, router_logits, k)                   # [L, B, T, k], layers as in the importances
    threshold = skip_threshold(importances, scores, skip_rate=0.8)     # for config.router.threshold

The paper minimizes the divergence over thresholds that skip at least the wanted share. Both grow with a threshold, so
for one kind of tokens the least threshold that skips enough is the best one; its search over two (text, images) is not
here, as there are no images.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jaxtyping import Float

from gatedjax.config.moe import RouterConfig
from gatedjax.layers.moe.routing import route

NEVER = 1e30  # the importance of a layer of which nothing is skipped


def calibrated(logits_of: Callable[[Mapping], Float[Array, "B T V"]], state: Mapping) -> dict:
    """The router state with every layer's importance: how far the output moves if all its experts are skipped.

    `mean KL(p || p_l)` in nats over the batch's tokens, p the whole model's distribution of the next token, p_l the one
    without layer l's experts. One run of the model for each sparse layer, and one more.

    Args:
      logits_of: the model's logits with a router state; routers with a threshold above 0.
      state: `TrainState.routers`; importances are [P], a number for each period.

    Raises:
      ValueError: the state has no importance.
    """
    flat = flatten_dict(state)
    places = [
        (path, i)
        for path, x in flat.items()
        if path[-1] == "importance"
        for i in np.ndindex(x.shape)
    ]
    if not places:
        raise ValueError(
            "calibrated: state has no importance, expected that of routers with a threshold above 0"
        )
    whole = flat | {path: jnp.full_like(flat[path], NEVER) for path, _ in places}
    p = jax.nn.log_softmax(logits_of(unflatten_dict(whole)).astype(jnp.float32))
    found = dict(flat)
    for path, i in places:
        without = whole | {path: whole[path].at[i].set(0.0)}
        found[path] = found[path].at[i].set(divergence(p, logits_of(unflatten_dict(without))))
    return unflatten_dict(found)


def divergence(log_p: Float[Array, "... V"], logits: Float[Array, "... V"]) -> Float[Array, ""]:
    """`mean KL(p || softmax(logits))`, nats, float32."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1))


def chosen_scores(
    config: RouterConfig, logits: Float[Array, "... E"], k: int, **given
) -> Float[Array, "... k"]:
    """The scores of each token's experts, which the threshold is compared with: of logits over the temperature.

    Args:
      given: `bias` and `tokens`, as for `route`.
    """
    plain = dataclasses.replace(
        config, threshold=0.0, weighting="scores", renormalize=False, scale=1.0
    )
    return route(plain, logits, k, **given).weights


def skip_threshold(
    importance: Float[Array, "L"], scores: Float[Array, "L ..."], skip_rate: float
) -> float:
    """The least threshold by which at least `skip_rate` of all places are skipped, in all layers together.

    Raises:
      ValueError: a skip rate outside [0, 1], or lengths that differ.
    """
    if not 0 <= skip_rate <= 1:
        raise ValueError(f"skip_threshold: skip_rate: got {skip_rate}, expected 0 to 1")
    if importance.ndim != 1 or scores.shape[:1] != importance.shape:
        raise ValueError(
            f"skip_threshold: scores: got shape {scores.shape}, expected [L, ...], L of {importance.shape}"
        )
    weighed = np.asarray(importance, np.float32).reshape(-1, *[1] * (scores.ndim - 1)) * np.asarray(
        scores, np.float32
    )
    ordered = np.sort(weighed, axis=None)
    skipped = math.ceil(skip_rate * ordered.size)
    return float(np.nextafter(ordered[skipped - 1], np.float32(np.inf))) if skipped else 0.0
