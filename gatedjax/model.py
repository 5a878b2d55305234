"""The language model: embed -> scan over periods of the layer pattern -> norm -> logits."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array
from jax.ad_checkpoint import checkpoint_policies
from jaxtyping import Float, Int

from gatedjax.config import ModelConfig
from gatedjax.layers import (
    FEED_FORWARDS,
    MIXERS,
    FeedForward,
    Mixer,
    NoFeedForward,
    TokenInfo,
)
from gatedjax.layers.depth import Depth
from gatedjax.layers.gate_values import COLLECTION, record
from gatedjax.layers.low_rank import low_rank_updates
from gatedjax.layers.moe.first_pass import first_pass_weights, no_weights, weights_by_block
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import OUT_NAME as PROJECTION_NAME
from gatedjax.layers.token_info import (
    History,
    arranged,
    empty_history,
    in_order,
    out_of_order,
)
from gatedjax.ops import RESIDUAL_NAMES

# The residual stream, with the logical names of its axes.
Stream = Float[Array, "B T M"]
STREAM_AXES = ("batch", "length", "embed_act")


@struct.dataclass
class Caches:
    """Decoding state: what is held of every row, and the cache of every block of the period.

    history: how many tokens, of which document, at which position: every row at its own place.
    layers: the caches by block, stacked over periods.

    first_pass: the same of the pass without experts, where there is one (`ModelConfig.first_pass`).
    """

    history: History
    layers: dict[str, Any]
    first_pass: "Caches | None" = None


@struct.dataclass
class BlockCache:
    """The cache of a block whose feed-forward has one, too."""

    mixer: Any
    feed_forward: Any


class Block(nn.Module):
    """Pre-norm mixer and pre-norm feed-forward, each on the residual stream."""

    config: ModelConfig
    index: int  # within the period
    training: bool = False

    @nn.compact
    def __call__(
        self,
        x: Stream,
        info: TokenInfo,
        cache: Any,
        router_logits: Float[Array, "B T E"] | None,
        depth: Depth | None,
    ) -> tuple[Stream, Array | None, Depth | None, Any, dict[str, Array]]:
        """(x, router logits, depth of the next block, cache, statistics).

        Router logits only where some router has a gating residual, the depth where layers ask.
        """
        c = self.config
        info = dataclasses.replace(info, depth=depth)
        mixer, feed_forward = block_layers(
            c,
            self.index,
            names=("mixer", "ffn"),
            training=self.training,
        )
        ffn_cache = None
        if isinstance(cache, BlockCache):
            ffn_cache = cache.feed_forward
            cache = cache.mixer
        normed = self._norm("mixer_norm")(x)
        if mixer.shares_values and depth is not None:
            y, cache, values = mixer.with_values(normed, info, cache)
            depth = dataclasses.replace(depth, first_values=values)
        else:
            y, cache = mixer.with_cache(normed, info, cache)
        x = x + y
        statistics = {}
        if feed_forward.has_cache:
            y, ffn_cache = feed_forward.with_cache(self._norm("ffn_norm")(x), info, ffn_cache)
            if ffn_cache is not None:
                cache = BlockCache(cache, ffn_cache)
            x = x + y
        elif not isinstance(feed_forward, NoFeedForward):
            y, statistics, new_logits = feed_forward.with_statistics(
                self._norm("ffn_norm")(x),
                info,
                router_logits,
            )
            # Carried through the scan only where a router needs them: a carry must keep its
            # structure.
            if router_logits is not None:
                router_logits = new_logits
            x = x + y
        x = nn.with_logical_constraint(x, STREAM_AXES)
        record(self, "residual", x)
        if depth is not None:
            depth = dataclasses.replace(depth, index=depth.index + 1)
        return x, router_logits, depth, cache, statistics

    def _norm(self, name: str) -> RMSNorm:
        return RMSNorm(
            self.config.norm_eps,
            self.config.zero_centered_norm,
            name=name,
        )


def block_layers(
    config: ModelConfig,
    index: int,
    names: tuple[str | None, str | None] = (None, None),
    training: bool = False,
) -> tuple[Mixer, FeedForward]:
    """The mixer and the feed-forward of block `index` of the period, as submodules `names`."""
    mixer, feed_forward = config.layer(index)
    dtype = jnp.dtype(config.dtype)
    return (
        MIXERS[mixer.kind](
            mixer,
            config.norm_eps,
            config.init_std,
            dtype,
            name=names[0],
        ),
        FEED_FORWARDS[feed_forward.kind](
            feed_forward,
            config.init_std,
            dtype,
            training,
            name=names[1],
        ),
    )


class Period(nn.Module):
    """The layers after which the pattern repeats.

    One is compiled; `nn.scan` runs it num_layers / period times.
    """

    config: ModelConfig
    training: bool = False

    @nn.compact
    def __call__(
        self,
        carry: tuple[Stream, Array | None, Depth | None],
        info: TokenInfo,
        lora_weights: dict[str, Array] | None,
        caches: dict[str, Any] | None,
    ):
        """(carry, info, LoRA weights, caches) -> (the carry, (caches, statistics)).

        The carry is (x, router logits, depth).
        """
        x, router_logits, depth = carry
        new_caches = {}
        statistics = {}
        for i, name in enumerate(self.config.block_names):
            cache = None if caches is None else caches[name]
            block = Block(
                self.config,
                i,
                self.training,
                name=name,
            )
            block_info = info
            if lora_weights is not None and name in lora_weights:
                block_info = dataclasses.replace(info, lora_weights=lora_weights[name])
            x, router_logits, depth, new_caches[name], statistics[name] = block(
                x,
                block_info,
                cache,
                router_logits,
                depth,
            )
        carry = (x, router_logits, depth)
        if caches is None:
            return carry, (None, statistics)
        return carry, (new_caches, statistics)


class LanguageModel(nn.Module):
    """A decoder-only language model with any pattern of mixers and feed-forwards.

    without_experts: low-rank experts whose weights a first pass would give add nothing: this is
      that pass.
    training: experts with a capacity drop what is beyond it, as in a train step.
    """

    config: ModelConfig
    without_experts: bool = False
    training: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        caches: Caches | None = None,
    ) -> tuple[Stream, Caches | None, dict[str, dict[str, Array]]]:
        """The hidden states of every token; `logits` turns them into those of the next token.

        Without caches: training or evaluation of (packed) rows. With empty caches: prefill. With
        filled ones: decoding (T = 1), or a further piece of the prompt. Rows may have different
        lengths: padding has segment id 0, on either side. What a token and a document are, also
        across calls, stands in `layers.token_info`. Routers that select with noise take it from the
        random stream "router", and do without where there is none.

        Args:
          tokens: their ids. Those of padding may be any number; a token's own that is not in the
            vocabulary has NaN for its vector.
          positions: of the tokens within their documents; None counts them, on from the caches
            where a document goes on.
          segment_ids: the document of each token, 0 for padding; None where a row is one document,
            or goes on with the last one of the caches.
          caches: of the tokens before.

        Returns:
          The normed hidden states, the caches, and the statistics of sparse layers, stacked over
          periods: [L / period, ...].

        Raises:
          ValueError: caches without room for the tokens, where their number is known; in a compiled
            program the hidden states of such rows are NaN. Documents, padding or a further piece
            with caches, for a mixer that does not take them.
        """
        c = self.config
        before = None
        if caches is not None:
            before = caches.history
            _check_caches(c, caches, tokens, segment_ids)
        info, after, order = arranged(tokens, positions, segment_ids, before)
        x = self._embedded(info.tokens, info.segment_ids)
        lora_weights = None
        first_pass_caches = None
        if c.first_pass is not None and self.without_experts:
            lora_weights = no_weights(tokens, c)
        elif c.first_pass is not None:
            caches_before = None if caches is None else caches.first_pass
            inputs = (tokens, positions, segment_ids, caches_before)
            lora_weights, first_pass_caches = first_pass_weights(self, *inputs)
            if order is not None:
                lora_weights = in_order(lora_weights, order)
        carry = (x, self._first_router_logits(tokens), self._first_depth(x))
        layer_caches = None if caches is None else caches.layers
        layers = layers_of(c, self.training)
        of_block = weights_by_block(c, lora_weights)
        with low_rank_updates(c.lora):
            (x, _, _), (layer_caches, statistics) = layers(carry, info, of_block, layer_caches)
        x = RMSNorm(
            c.norm_eps,
            c.zero_centered_norm,
            name="final_norm",
        )(x)
        if order is not None:
            x = out_of_order(x, order)
        if after is not None:
            caches = Caches(after, layer_caches, first_pass_caches)
        return x, caches, statistics

    def _embedded(
        self,
        tokens: Any,
        segment_ids: Int[Array, "B T"] | None,
    ) -> Stream:
        """The rows of the embedding table; zeros for padding.

        The head is made here too, where it is another matrix.
        """
        c = self.config
        axes = ("vocab", "embed_vocab")
        shape = (c.vocab_size, c.width)
        init = nn.initializers.normal(c.init_std)
        table = parameter(
            self,
            "embedding",
            axes=axes,
            shape=shape,
            init=init,
        )
        if not c.tie_embeddings:
            parameter(
                self,
                "head",
                axes=axes,
                shape=shape,
                init=init,
            )
        # Whole rows for the lookup: XLA can move a result cut along its width only by replicating
        # it.
        table = nn.with_logical_constraint(table.astype(c.dtype), ("vocab", None))
        # Below 0 is outside of the vocabulary too, not counted from its end.
        tokens = jnp.where(tokens < 0, c.vocab_size, tokens)
        x = jnp.take(
            table,
            tokens,
            axis=0,
            mode="fill",
            fill_value=jnp.nan,
        )
        if segment_ids is not None:
            is_token = segment_ids != 0
            x = jnp.where(is_token[..., None], x, 0)
        return nn.with_logical_constraint(x, STREAM_AXES)

    def _first_router_logits(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"] | None:
        """Zeros, which the first router with a gating residual gets; None where there is none."""
        experts = self.config.router_residual
        if not experts:
            return None
        router_logits = jnp.zeros((*tokens.shape, experts), jnp.float32)
        return nn.with_logical_constraint(router_logits, ("batch", "length", None))

    def _first_depth(self, x: Stream) -> Depth | None:
        """The place of the first layer; None where no layer asks for its own."""
        c = self.config
        if not c.starts_by_depth:
            return None
        index = jnp.zeros((), jnp.int32)
        if c.first_rwkv7 is None:
            return Depth(index, num_layers=c.num_layers)
        return Depth(
            index,
            first_values=jnp.zeros_like(x),
            first=c.first_rwkv7,
            num_layers=c.num_layers,
        )


def remat_policy(name: str) -> Callable[..., Any]:
    """The `jax.checkpoint` policy of `ModelConfig.remat`."""
    policies = {
        "full": checkpoint_policies.nothing_saveable,
        "kernels": checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES),
        "projections": checkpoint_policies.save_only_these_names(
            *RESIDUAL_NAMES,
            PROJECTION_NAME,
        ),
    }
    return policies[name]


def layers_of(c: ModelConfig, training: bool = False) -> nn.Module:
    """All layers, as a module "periods".

    (carry, info, LoRA weights, caches) -> (the carry, (caches, statistics)), with the carry (x,
    router logits, depth). The weights of low-rank experts are those of a first pass
    (`first_pass.weights_by_block`), or None.
    """
    period = Period
    if c.remat != "none":
        # Outside a loop XLA would merge what is computed again with what was computed first, and
        # keep it after all.
        period = nn.remat(
            Period,
            prevent_cse=not c.scan_layers,
            policy=remat_policy(c.remat),
        )
    num_periods = c.num_layers // c.period
    # Parameters and what is recorded get an axis of periods in front; caches and the weights of
    # low-rank experts are cut along theirs.
    scanned = nn.scan(
        period,
        variable_axes={"params": 0, COLLECTION: 0},
        split_rngs={"params": True, "router": True},
        in_axes=(nn.broadcast, 0, 0),
        length=num_periods,
        unroll=1 if c.scan_layers else num_periods,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(c, training, name="periods")


def head_weights(params: Any) -> Float[Array, "X M"]:
    """The output matrix: the head, or the embedding table when they are tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits(hidden: Float[Array, "... M"], weights: Float[Array, "X M"]) -> Float[Array, "... X"]:
    """Logits of the next token, float32: operands in hidden's dtype, accumulated in float32."""
    weights = weights.astype(hidden.dtype)
    return jnp.einsum("...m,xm->...x", hidden, weights, preferred_element_type=jnp.float32)


def init_caches(
    config: ModelConfig,
    batch: int,
    length: int,
) -> Caches:
    """Empty caches for `length` tokens of `batch` rows."""
    caches = Caches(empty_history(batch), _layer_caches(config, batch, length))
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
    """The cache of every block, stacked over periods."""
    num_periods = config.num_layers // config.period

    def stacked(x: Array) -> Array:
        return jnp.zeros((num_periods, *x.shape), x.dtype)

    caches = {}
    for i, name in enumerate(config.block_names):
        mixer, feed_forward = block_layers(config, i)
        cache = mixer.init_cache(batch, length)
        if feed_forward.has_cache:
            cache = BlockCache(cache, feed_forward.init_cache(batch, config.width))
        caches[name] = jax.tree.map(stacked, cache)
    return caches


def _check_caches(
    config: ModelConfig,
    caches: Caches,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
) -> None:
    """Refuses what the caches cannot take, as far as that is known now."""
    most = None
    is_simple = segment_ids is None and (tokens.shape[1] == 1 or caches.history.is_empty)
    for i, name in enumerate(config.block_names):
        mixer_config, _ = config.layer(i)
        # Not a submodule of the model that asks.
        mixer = MIXERS[mixer_config.kind](mixer_config, parent=None)
        if not is_simple and not mixer.takes_pieces:
            raise ValueError(
                "caches: got segment_ids or a further piece of a prompt, expected neither: "
                f"{mixer_config.kind} takes one prompt and then single tokens"
            )
        cache = caches.layers[name]
        if isinstance(cache, BlockCache):
            cache = cache.mixer
        capacity = mixer.capacity(cache)
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
