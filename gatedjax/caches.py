"""The decoding state of a language model: what is held of every row, block by block."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jaxtyping import Int

from gatedjax.config import ModelConfig
from gatedjax.layers.block import block_capacity, init_block_cache, takes_pieces
from gatedjax.layers.token_info import History, empty_history


@struct.dataclass
class Caches:
    """Decoding state: what is held of every row, and the cache of every block.

    history: how many tokens, of which document, at which position: every row at its own place.
    layers: the caches by block; those of the period are stacked over periods.
    first_pass: the same of the pass without experts, where there is one (`ModelConfig.first_pass`).
    router: the same of the router before all layers, where there is one.
    """

    history: History
    layers: dict[str, Any]
    first_pass: "Caches | None" = None
    router: "Caches | None" = None


def init_caches(
    config: ModelConfig,
    batch: int,
    length: int,
) -> Caches:
    """Empty caches for `length` tokens of `batch` rows.

    Raises:
      ValueError: the model is an encoder.
    """
    if config.task != "lm":
        raise ValueError(f"config.task: got {config.task!r}, expected 'lm': encoders need no cache")
    caches = Caches(empty_history(batch), _layer_caches(config, batch, length))
    if config.router_model is not None:
        caches = dataclasses.replace(caches, router=init_caches(config.router_model, batch, length))
    if config.first_pass is None:
        return caches
    # The buffers of the two passes must not be the same: both are donated.
    first_pass = Caches(empty_history(batch), _layer_caches(config, batch, length))
    return dataclasses.replace(caches, first_pass=first_pass)


def _layer_caches(
    config: ModelConfig,
    batch: int,
    length: int,
) -> dict[str, Any]:
    """The cache of every block; those of the period are stacked over periods."""

    def stacked(x: Array) -> Array:
        return jnp.zeros((config.num_periods, *x.shape), x.dtype)

    caches = {}
    for block in config.blocks:
        cache = init_block_cache(config, block, batch, length)
        caches[block.name] = jax.tree.map(stacked, cache) if block.is_repeated else cache
    return caches


def check_caches(
    config: ModelConfig,
    caches: Caches,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> None:
    """ValueError for what the caches cannot take, as far as that is known now."""
    most = None
    is_simple = segment_ids is None and (tokens.shape[1] == 1 or caches.history.is_empty)
    for block in config.blocks:
        if not is_simple and not takes_pieces(block):
            raise ValueError(
                "caches: got segment_ids or a further piece of a prompt, expected neither: "
                f"{block.mixer.kind} takes one prompt and then single tokens"
            )
        capacity = block_capacity(block, caches.layers[block.name])
        if capacity is not None:
            most = capacity if most is None else min(most, capacity)
    if most is None or not _is_known(caches.history.tokens) or not _is_known(segment_ids):
        return
    added = np.full(tokens.shape[0], tokens.shape[1])
    if segment_ids is not None:
        added = np.sum(np.asarray(segment_ids) != 0, axis=1)
    longest = int(np.max(np.asarray(caches.history.tokens) + added))
    if longest > most:
        raise ValueError(f"caches: got room for {most} tokens a row, expected at least {longest}")


def _is_known(x: Array | None) -> bool:
    """Whether its numbers can be looked at now, by this process."""
    return not isinstance(x, jax.core.Tracer) and getattr(x, "is_fully_addressable", True)
