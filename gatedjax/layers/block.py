"""A block of a model: a mixer and a feed-forward, each on the residual stream, and their norms."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float

from gatedjax.config import BlockConfig, ModelConfig
from gatedjax.config.sources import has_own_keys
from gatedjax.layers import (
    FEED_FORWARDS,
    MIXERS,
    FeedForward,
    GatedAttention,
    Mixer,
    NoFeedForward,
    NoMixer,
    TokenInfo,
)
from gatedjax.layers.depth import Depth
from gatedjax.layers.gate_values import record
from gatedjax.layers.low_rank import expert_weights
from gatedjax.layers.norm import LayerNorm, RMSNorm

# The residual stream, with the logical names of its axes.
Stream = Float[Array, "B T M"]
STREAM_AXES = ("batch", "length", "embed_act")
# Between mixer and feed-forward, for `jax.checkpoint` policies: in place of the mixer's output,
# which the backward pass would only add again.
STREAM_NAME = "after_mixer"


@struct.dataclass
class BlockCache:
    """The cache of a block whose feed-forward has one, too."""

    mixer: Any
    feed_forward: Any


class Block(nn.Module):
    """`x + f(norm(x))` of a mixer, then of a feed-forward; either may be missing.

    Where the norms stand is the block's own: before f, after it, or both (`NormPlacement`).
    """

    config: ModelConfig
    block: BlockConfig
    training: bool = False

    def __call__(
        self,
        x: Stream,
        info: TokenInfo,
        cache: Any,
        router_logits: Float[Array, "B T E"] | None,
        depth: Depth | None,
    ) -> tuple[Stream, Array | None, Depth | None, Any, dict[str, Array], dict[str, Any]]:
        """(x, router logits, depth of the next block, cache, statistics, what is handed on).

        Router logits only where some router has a gating residual, the depth where layers ask.
        Handed on are fields of the next block's `info`, which later layers of the model ask for.
        """
        with expert_weights(info.lora_weights):
            return self._applied(x, info, cache, router_logits, depth)

    @nn.compact
    def _applied(
        self,
        x: Stream,
        info: TokenInfo,
        cache: Any,
        router_logits: Float[Array, "B T E"] | None,
        depth: Depth | None,
    ) -> tuple[Stream, Array | None, Depth | None, Any, dict[str, Array], dict[str, Any]]:
        """`__call__`, where low-rank experts have their weights."""
        info = dataclasses.replace(info, depth=depth)
        mixer, feed_forward = block_layers(
            self.config,
            self.block,
            names=("mixer", "ffn"),
            training=self.training,
        )
        handed_on: dict[str, Any] = {}
        ffn_cache = None
        if isinstance(cache, BlockCache):
            ffn_cache = cache.feed_forward
            cache = cache.mixer
        if not isinstance(mixer, NoMixer):
            before = self._before("mixer", x)
            record(self, "mixer_input", before)
            if isinstance(mixer, GatedAttention) and hands_on_attention(self.config):
                y, cache, weights = mixer.with_weights(before, info, cache)
                if self.config.shares_weights:
                    handed_on["weights"] = weights
                if self.config.shares_cache and has_own_keys(self.block.mixer):
                    handed_on["keys"] = weights
            elif mixer.gives_memory and self.config.shares_memory:
                y, cache, handed_on["memory"] = mixer.with_memory(before, info, cache)
            else:
                y, cache, depth = _mixed(mixer, before, info, cache, depth)
            record(self, "mixer_output", y)
            x = checkpoint_name(self._sum(x, self._after("mixer", y)), STREAM_NAME)
        statistics = {}
        if feed_forward.has_cache:
            y, ffn_cache = feed_forward.with_cache(self._before("ffn", x), info, ffn_cache)
            if ffn_cache is not None:
                cache = BlockCache(cache, ffn_cache)
            x = self._sum(x, self._after("ffn", y))
        elif not isinstance(feed_forward, NoFeedForward):
            before = x if feed_forward.sees_stream else self._before("ffn", x)
            record(self, "ffn_input", before)
            y, statistics, new_logits = feed_forward.with_statistics(
                before,
                info,
                router_logits,
            )
            record(self, "ffn_output", y)
            # Carried through the scan only where a router needs them: a carry must keep its
            # structure.
            if router_logits is not None:
                router_logits = new_logits
            x = self._sum(x, self._after("ffn", y))
        x = nn.with_logical_constraint(x, STREAM_AXES)
        record(self, "residual", x)
        if depth is not None:
            depth = dataclasses.replace(depth, index=depth.index + 1)
        return x, router_logits, depth, cache, statistics, handed_on

    def _sum(self, x: Stream, y: Stream) -> Stream:
        """The residual stream x and what is added to it."""
        weight = self.config.residual_weight
        if weight is None:
            return x + y
        # The squares of the two weights sum to 1.
        return weight * x + math.sqrt(1 - weight**2) * y

    def _before(self, name: str, x: Stream) -> Stream:
        """What the mixer or the feed-forward sees of the residual stream."""
        if self.block.norm == "post":
            return x
        return stream_norm(self.config, f"{name}_norm")(x)

    def _after(self, name: str, y: Stream) -> Stream:
        """What is added of its output to the residual stream."""
        if self.block.norm == "pre":
            return y
        return stream_norm(self.config, f"{name}_post_norm")(y)


def hands_on_attention(config: ModelConfig) -> bool:
    """Whether attention layers take something from each other."""
    return config.shares_weights or config.shares_cache


def stream_norm(config: ModelConfig, name: str) -> nn.Module:
    """A norm over the channels of the residual stream, as a submodule `name`."""
    if config.norm_kind == "layer":
        return LayerNorm(config.norm_eps, name=name)
    return RMSNorm(
        config.norm_eps,
        config.zero_centered_norm,
        name=name,
    )


def _mixed(
    mixer: Mixer,
    x: Stream,
    info: TokenInfo,
    cache: Any,
    depth: Depth | None,
) -> tuple[Stream, Any, Depth | None]:
    """(y, cache, depth): the first layer that shares its values hands them on in the depth."""
    if not mixer.shares_values or depth is None:
        y, cache = mixer.with_cache(x, info, cache)
        return y, cache, depth
    y, cache, values = mixer.with_values(x, info, cache)
    return y, cache, dataclasses.replace(depth, first_values=values)


def block_layers(
    config: ModelConfig,
    block: BlockConfig,
    names: tuple[str | None, str | None] = (None, None),
    training: bool = False,
) -> tuple[Mixer, FeedForward]:
    """The mixer and the feed-forward of a block, as submodules `names`.

    Args:
      config: of the model.
      block: one of its `blocks`.
      names: of the two modules.
      training: of the feed-forward.
    """
    dtype = jnp.dtype(config.dtype)
    return (
        MIXERS[block.mixer.kind](
            block.mixer,
            config.norm_eps,
            config.init_std,
            dtype,
            name=names[0],
        ),
        FEED_FORWARDS[block.feed_forward.kind](
            block.feed_forward,
            config.init_std,
            dtype,
            training,
            name=names[1],
        ),
    )


def init_block_cache(
    config: ModelConfig,
    block: BlockConfig,
    batch: int,
    length: int,
) -> Any:
    """An empty cache of one of the block's layers, for `length` tokens of `batch` rows.

    Args:
      config: of the model.
      block: one of its `blocks`.
      batch: how many rows.
      length: the most tokens a row.
    """
    mixer, feed_forward = block_layers(config, block)
    cache = mixer.init_cache(batch, length)
    if feed_forward.has_cache:
        cache = BlockCache(cache, feed_forward.init_cache(batch, config.width))
    return cache


def block_capacity(block: BlockConfig, cache: Any) -> int | None:
    """The most tokens a row that a block's cache has room for; None for any number."""
    if isinstance(cache, BlockCache):
        cache = cache.mixer
    return _mixer_alone(block).capacity(cache)


def takes_pieces(block: BlockConfig) -> bool:
    """Whether its mixer, with a cache, takes documents, padding and further pieces of a prompt."""
    return _mixer_alone(block).takes_pieces


def _mixer_alone(block: BlockConfig) -> Mixer:
    # Not a submodule of the model that asks.
    return MIXERS[block.mixer.kind](block.mixer, parent=None)
