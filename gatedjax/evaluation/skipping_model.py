"""A trained model with thresholds in its routers, below which experts are skipped."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from gatedjax.config import FrozenDict, ModelConfig, SparseMoEConfig
from gatedjax.errors import require
from gatedjax.layers.moe import state as router_state
from gatedjax.layers.tree import flatten_dict, unflatten_dict


class Thresholds(NamedTuple):
    """Of the tokens of the first kind, and of the second; the same number where there is one."""

    first: float
    second: float


def with_thresholds(
    model: ModelConfig,
    second_kind: tuple[int, ...],
    thresholds: Thresholds,
) -> ModelConfig:
    """The model with these thresholds in all of its routers.

    Args:
      model: of a trained run.
      second_kind: token ids of the second kind.
      thresholds: of the two kinds.

    Raises:
      InputError: there is no sparse layer, or one that cannot skip.
    """
    ffns = {}
    for name, ffn in model.ffns.items():
        if isinstance(ffn, SparseMoEConfig):
            router = dataclasses.replace(
                ffn.router,
                threshold=thresholds.first,
                second_kind=second_kind,
                second_threshold=thresholds.second if second_kind else 0.0,
            )
            ffn = dataclasses.replace(ffn, router=router)
        ffns[name] = ffn
    used = [block.feed_forward for block in model.blocks]
    is_sparse = any(isinstance(ffn, SparseMoEConfig) for ffn in used)
    require(is_sparse, "--checkpoint", "a model without sparse experts", "one with them")
    return dataclasses.replace(model, ffns=FrozenDict(ffns))


def with_importance(model: ModelConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, with the importances that routers with thresholds have: 1.

    Args:
      model: with thresholds.
      params: and state of routers, of the run.
    """
    flat = dict(flatten_dict(params))
    for block in model.blocks:
        ffn = block.feed_forward
        if isinstance(ffn, SparseMoEConfig):
            shape = (2,) if ffn.router.second_kind else ()
            periods = (len(block.layers),) if block.is_repeated else ()
            path = (*block.path, "ffn", router_state.NAME, "importance")
            flat[path] = jnp.ones((*periods, *shape))
    return unflatten_dict(flat)
