"""Calibrates the skipping of experts (MoDES, arXiv 2511.15690).

How much each layer matters, and the threshold: a chosen expert is skipped where importance of its
layer x score < threshold. Both are found once, on
a batch of held-out text, with a model whose router has any threshold above 0 (so that it has the
state):

    is_token = batch.segment_ids != 0
    routers = calibrated(lambda routers: logits_of(params, routers, batch), state.routers, is_token)
    # [L, B, T, k], layers as in the importances
    scores = chosen_scores(router, router_logits, k)
    # for config.router.threshold
    threshold = skip_threshold(importances, scores, skip_rate=0.8, is_token=is_token)

The paper minimizes the divergence over thresholds that skip at least the wanted fraction. Both grow
with a threshold, so for one kind of tokens the least threshold that skips enough is the best one.
With two kinds, each with a threshold of its own, `frontier` names the pairs that can be the best.
`python -m gatedjax.skip_experts` does all of it for a run.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float

from gatedjax.config.router import RouterConfig
from gatedjax.layers.moe.routing import route
from gatedjax.layers.moe.statistics import fraction
from gatedjax.layers.tree import flatten_dict, unflatten_dict

# The importance of a layer of which nothing is skipped.
NEVER = 1e30


def calibrated(
    logits_of: Callable[[Mapping], Float[Array, "B T X"]],
    state: Mapping[str, Any],
    is_token: Bool[Array | np.ndarray, "B T"] | None = None,
    kinds: int = 1,
) -> dict:
    """The router state with every layer's importance.

    It is how far the output moves if all experts of the layer are skipped:
    `mean KL(p || p_l)` in nats over the batch's tokens, p the whole model's distribution of the
    next token, p_l the one without layer l's experts. One run of the model for each sparse layer,
    and one more.

    Args:
      logits_of: the model's logits with a router state; routers with a threshold above 0.
      state: `TrainState.routers`; importances are [P], a number for each period.
      is_token: False for padding, which is not counted; None where there is none.
      kinds: of tokens; with 2 importances are [P, 2], and both become the layer's.

    Returns:
      The state, importances replaced.

    Raises:
      ValueError: the state has no importance.
    """
    flat = flatten_dict(state)
    paths = [path for path in flat if path[-1] == "importance"]
    if not paths:
        raise ValueError(
            "calibrated: state has no importance, expected that of routers with a threshold above 0"
        )
    # With an importance that no threshold reaches, the model is whole.
    nothing_skipped = flat | {path: jnp.full_like(flat[path], NEVER) for path in paths}
    whole = logits_of(unflatten_dict(nothing_skipped))
    log_p = jax.nn.log_softmax(whole.astype(jnp.float32))
    found = dict(flat)
    for path in paths:
        shape = flat[path].shape
        for period in np.ndindex(shape if kinds == 1 else shape[:-1]):
            # An importance of 0 is below every threshold: all experts of this layer are skipped.
            without_layer = dict(nothing_skipped)
            without_layer[path] = without_layer[path].at[period].set(0.0)
            moved = divergence(log_p, logits_of(unflatten_dict(without_layer)), is_token)
            found[path] = found[path].at[period].set(moved)
    return unflatten_dict(found)


def divergence(
    log_p: Float[Array, "... X"],
    logits: Float[Array, "... X"],
    is_token: Bool[Array | np.ndarray, "..."] | None = None,
) -> Float[Array, ""]:
    """`mean KL(p || softmax(logits))` over tokens, nats, float32; 0 without any."""
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32))
    of_token = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    if is_token is None:
        return jnp.mean(of_token)
    number = jnp.sum(jnp.asarray(is_token), dtype=jnp.float32)
    return fraction(jnp.sum(jnp.where(is_token, of_token, 0.0)), number)


def chosen_scores(
    config: RouterConfig,
    logits: Float[Array | np.ndarray, "... E"],
    k: int,
    **inputs: Any,
) -> Float[Array, "... k"]:
    """The scores of each token's experts, which the threshold is compared with.

    Args:
      config: the router.
      logits: divided by the temperature.
      k: experts per token.
      inputs: `bias` and `tokens`, as for `route`.

    Returns:
      The scores, largest first.
    """
    plain = dataclasses.replace(
        config,
        threshold=0.0,
        second_kind=(),
        second_threshold=0.0,
        weighting="scores",
        renormalize=False,
        scale=1.0,
    )
    return route(
        plain,
        jnp.asarray(logits),
        k,
        **inputs,
    ).weights


def skip_threshold(
    importance: Array | np.ndarray,
    scores: Array | np.ndarray,
    skip_rate: float,
    is_token: Array | np.ndarray | None = None,
) -> float:
    """The least threshold by which at least `skip_rate` of all places are skipped.

    Places are those of all layers together.

    Args:
      importance: [L], of every layer.
      scores: [L, ...], of the chosen experts of every layer.
      skip_rate: the fraction of places to be skipped.
      is_token: [...] without the places, False for padding, which is not counted; None where there
        is none.

    Returns:
      The threshold.

    Raises:
      ValueError: a skip rate outside [0, 1], shapes that do not fit, scores that are not finite.
    """
    if isinstance(skip_rate, bool | np.bool_) or not 0 <= skip_rate <= 1:
        raise ValueError(f"skip_threshold: skip_rate: got {skip_rate}, expected 0 to 1")
    if importance.ndim != 1 or scores.shape[:1] != importance.shape:
        expected = f"[L, ...], L of {importance.shape}"
        raise ValueError(f"skip_threshold: scores: got shape {scores.shape}, expected {expected}")
    by_layer = np.asarray(importance, np.float32)
    by_layer = by_layer.reshape(-1, *[1] * (scores.ndim - 1))
    products = by_layer * np.asarray(scores, np.float32)
    if is_token is not None:
        mask = np.asarray(is_token, bool)
        if mask.shape != scores.shape[1:-1]:
            expected = f"{scores.shape[1:-1]} for scores of shape {scores.shape}"
            raise ValueError(
                f"skip_threshold: is_token: got shape {mask.shape}, expected {expected}"
            )
        products = products[:, mask]
    if not np.all(np.isfinite(products)):
        raise ValueError("skip_threshold: scores: got NaN or Inf, expected finite numbers")
    ordered = np.sort(products, axis=None)
    skipped = math.ceil(skip_rate * ordered.size)
    if not skipped:
        return 0.0
    # The least number above the largest product that is to be skipped.
    return float(np.nextafter(ordered[skipped - 1], np.float32(np.inf)))


def frontier(
    first: Sequence[int] | np.ndarray,
    second: Sequence[int] | np.ndarray,
    wanted: int,
) -> list[tuple[int, int]]:
    """The pairs of thresholds that can be the best of those that skip enough places.

    Of each threshold of the first kind it is the least of the second that skips enough beside it:
    the divergence grows with either. That one falls as the first rises, so both lists are gone
    through once; and a pair is left out if the one before has the same second threshold.

    Args:
      first: the places that each threshold of the first kind skips, which rise.
      second: the same of the second kind.
      wanted: how many places both are to skip together.

    Returns:
      Pairs of indices; none where even the largest thresholds skip too little.

    Raises:
      ValueError: numbers that fall.
    """
    for name, skipped in (("first", first), ("second", second)):
        if np.any(np.diff(skipped) < 0):
            raise ValueError(f"frontier: {name}: got numbers that fall, expected rising ones")
    pairs: list[tuple[int, int]] = []
    j = len(second) - 1
    for i, skipped in enumerate(first):
        if skipped + second[j] < wanted:
            continue
        while j > 0 and skipped + second[j - 1] >= wanted:
            j -= 1
        if not pairs or pairs[-1][1] > j:
            pairs.append((i, j))
    return pairs
