"""The language model: embed -> layers -> norm -> logits; and the encoder, of the same layers.

Its layers are those of the prefix, a scan over periods of the layer pattern, those of the suffix
(`ModelConfig.blocks`).
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.caches import Caches, check_caches
from gatedjax.caches import init_caches as init_caches  # its documented address is here
from gatedjax.config import BlockConfig, ModelConfig
from gatedjax.layer_stack import Carry, of_period, periods_of, rematerialized, through_block
from gatedjax.layers import TokenInfo
from gatedjax.layers.block import STREAM_AXES, Block, Stream, stream_norm
from gatedjax.layers.depth import Depth
from gatedjax.layers.last_token import at_places, info_of_last, last_places
from gatedjax.layers.linear_attention import rising_floors
from gatedjax.layers.low_rank import low_rank_updates
from gatedjax.layers.moe.first_pass import first_pass_weights, no_weights, weights_by_block
from gatedjax.layers.moe.given_experts import given_experts
from gatedjax.layers.moe.shared_router import shared_experts
from gatedjax.layers.parameters import parameter
from gatedjax.layers.patches import PatchEmbedding, image_info, pooled
from gatedjax.layers.token_info import History, arranged, in_order, out_of_order
from gatedjax.layers.token_rows import TABLE_AXES, token_rows

# Parameters of outputs other than softmax (`output.py`): what is added to the products with the
# head, and the code of each token.
HEAD_BIAS = "head_bias"
CODES = "codes"


class LanguageModel(nn.Module):
    """A decoder-only language model with any pattern of mixers and feed-forwards.

    With `ModelConfig.task` masked_lm or classify an encoder, whose tokens see each other in both
    directions.

    without_experts: low-rank experts whose weights a first pass would give add nothing: this is
      that pass.
    training: experts with a capacity drop what is beyond it, as in a train step.
    last_alone: of a prompt only the last token of each row is asked for: the hidden states are
      [B, 1, M], and the layers of a second decoder, where there is one, see no other
      (`ModelConfig.cross_decoder`).
    """

    config: ModelConfig
    without_experts: bool = False
    training: bool = False
    last_alone: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        caches: Caches | None = None,
        patches: Float[Array, "B T P"] | None = None,
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
          patches: of images, for task classify: tokens, positions and documents then say nothing.

        Returns:
          The normed hidden states (of an image one, `patches.pooled`), the caches, and the
          statistics of sparse layers by block, stacked over the block's layers.

        Raises:
          ValueError: caches without room for the tokens, where their number is known; in a compiled
            program the hidden states of such rows are NaN. Documents, padding or a further piece
            with caches, for a mixer that does not take them.
        """
        c = self.config
        if c.task == "classify":
            return self._image_states(tokens, patches)
        before = None
        if caches is not None:
            before = caches.history
            check_caches(c, caches, tokens, segment_ids)
        info, after, order = arranged(tokens, positions, segment_ids, before)
        last = None
        if self.last_alone:
            if after is None:
                raise ValueError("caches: got None, expected those of a prompt with last_alone")
            last = (last_places(info, tokens.shape[1]), after)
        x = self._embedded(info.tokens, info.segment_ids)
        if c.embedding_norm:
            x = stream_norm(c, "embedding_norm")(x)
        if c.value_bank is not None:
            info = dataclasses.replace(info, bank_values=self._bank_values(info, c.value_bank))
        lora_weights = None
        first_pass_caches = None
        if c.first_pass is not None and self.without_experts:
            # Projections without weights leave their updates out.
            lora_weights = None if c.lora.num_experts else no_weights(tokens, c)
        elif c.first_pass is not None:
            caches_before = None if caches is None else caches.first_pass
            inputs = (tokens, positions, segment_ids, caches_before)
            lora_weights, first_pass_caches = first_pass_weights(self, *inputs)
            if order is not None:
                lora_weights = in_order(lora_weights, order)
        experts = contextlib.nullcontext()
        router_caches = None
        if c.router_model is not None:
            caches_before = None if caches is None else caches.router
            inputs = (tokens, positions, segment_ids, caches_before)
            ids, router_caches = shared_experts(self, *inputs)
            experts = given_experts(ids if order is None else in_order(ids, order))
        carry = (x, self._first_router_logits(tokens), self._first_depth(x))
        layer_caches = None if caches is None else caches.layers
        of_block = weights_by_block(c, lora_weights)
        with low_rank_updates(c.lora), experts:
            (x, _, _), layer_caches, statistics = self._layers(
                carry,
                info,
                of_block,
                layer_caches,
                last,
            )
        if last is not None and c.cross_decoder is None:
            x = at_places(x, last[0])
        x = stream_norm(c, "final_norm")(x)
        if order is not None and last is None:
            x = out_of_order(x, order)
        if after is not None:
            caches = Caches(after, layer_caches, first_pass_caches, router_caches)
        return x, caches, statistics

    def _image_states(
        self,
        tokens: Int[Array, "B T"],
        patches: Float[Array, "B T P"] | None,
    ) -> tuple[Float[Array, "B 1 M"], None, dict[str, dict[str, Array]]]:
        """What is classified of each image, no caches, and the statistics."""
        c = self.config
        if patches is None:
            raise ValueError("patches: got None, expected those of images: task is 'classify'")
        embed = PatchEmbedding(c.patches, c.width, c.init_std, c.dtype, name="patches")
        x = nn.with_logical_constraint(embed(patches), STREAM_AXES)
        self._make_head()
        if c.embedding_norm:
            x = stream_norm(c, "embedding_norm")(x)
        carry = (x, self._first_router_logits(tokens), self._first_depth(x))
        with low_rank_updates(c.lora):
            (x, _, _), _, statistics = self._layers(carry, image_info(c.patches, x), None, None)
        return pooled(c.patches, stream_norm(c, "final_norm")(x)), None, statistics

    def _table(self, name: str, rows: int) -> Float[Array, "X M"]:
        """A vector for each token of the vocabulary, or for each class."""
        c = self.config
        return parameter(
            self,
            name,
            axes=TABLE_AXES,
            shape=(rows, c.width),
            init=nn.initializers.normal(c.init_std),
        )

    def _layers(
        self,
        carry: Carry,
        info: TokenInfo,
        lora_weights: dict[str, Array] | None,
        caches: dict[str, Any] | None,
        last: tuple[Int[Array, "B 1"], History] | None = None,
    ) -> tuple[Carry, Any, dict[str, dict[str, Array]]]:
        """Prefix, periods, suffix: (carry, caches, statistics).

        Args:
          carry: of the first layer.
          info: about the tokens.
          lora_weights, caches: by block.
          last: the places of the tokens which alone the second decoder sees, and what the caches
            will hold; None if it sees all.
        """
        c = self.config
        new_caches = {}
        statistics = {}
        # The name of its first block; None without a second decoder.
        cut = None if last is None else c.cross_decoder

        def with_last_alone(
            carry: Carry,
            info_of_run: TokenInfo,
            block: BlockConfig,
        ) -> tuple[Carry, TokenInfo]:
            """Unchanged, unless the second decoder begins with the block."""
            if last is None or block.name != cut:
                return carry, info_of_run
            places, after = last
            x, router_logits, depth = carry
            x = at_places(x, places)
            if router_logits is not None:
                router_logits = at_places(router_logits, places)
            return (x, router_logits, depth), info_of_last(info_of_run, after, places)

        def run_alone(
            carry: Carry,
            info_of_run: TokenInfo,
            blocks: Iterable[BlockConfig],
        ) -> tuple[Carry, TokenInfo]:
            """Layers that are in no period, one after the other."""
            module = rematerialized(c, Block)
            for block in blocks:
                name = block.name
                carry, info_of_run = with_last_alone(carry, info_of_run, block)
                weights = None if lora_weights is None else lora_weights.get(name)
                carry, new_caches[name], of_layer, info_of_run = through_block(
                    module(c, block, self.training, name=name),
                    carry,
                    info_of_run,
                    None if weights is None else weights[0],
                    None if caches is None else caches[name],
                )
                # An axis of layers, as the blocks of the period have it; here there is one.
                statistics[name] = jax.tree.map(lambda x: x[None], of_layer)
            return carry, info_of_run

        carry, of_prefix = run_alone(carry, info, c.prefix_blocks)
        # Memory, keys and values are handed on from the prefix to all layers; attention weights are
        # shared within such a run, as within a period.
        info = dataclasses.replace(of_prefix, weights=info.weights)
        carry, info = with_last_alone(carry, info, c.repeated_blocks[0])
        draws = self.is_initializing() or self.has_rng("router")
        carry, (of_periods, statistics_of_periods) = periods_of(c, self.training, draws)(
            carry,
            info,
            of_period(c, lora_weights),
            of_period(c, caches),
        )
        carry, _ = run_alone(carry, info, c.suffix_blocks)
        statistics |= statistics_of_periods
        if caches is None:
            return carry, None, statistics
        return carry, new_caches | of_periods, statistics

    def _embedded(
        self,
        tokens: Any,
        segment_ids: Int[Array, "B T"] | None,
    ) -> Stream:
        """The rows of the embedding table; zeros for padding.

        The head is made here too, where it is another matrix.
        """
        c = self.config
        table = self._table("embedding", c.vocab_size)
        self._make_head()
        x = token_rows(table, tokens, segment_ids, c.dtype)
        return nn.with_logical_constraint(x, STREAM_AXES)

    def _make_head(self) -> None:
        """The output matrix, if it has one of its own, and what outputs other than softmax have."""
        c = self.config
        if c.has_head:
            self._table("head", c.output.rows(c.vocab_size))
        if c.output.kind == "fourier":
            rows = (c.output.rows(c.vocab_size),)
            init = nn.initializers.normal(c.init_std)
            parameter(self, HEAD_BIAS, axes=(None,), shape=rows, init=init)
        if c.output.kind == "sphereface2":
            start = nn.initializers.constant(c.output.first_bias(c.vocab_size))
            parameter(self, HEAD_BIAS, axes=(), shape=(), init=start)
        if c.output.kind == "vq":
            CodesOfTokens(c, name=CODES)()

    def _bank_values(
        self,
        info: TokenInfo,
        shape: tuple[int, int, int],
    ) -> Float[Array, "B T S Hk D"]:
        """The value vectors of every token, for all layers that mix them into their own (MoVE).

        Zero at the start: the model is then the one without a bank.
        """
        table = parameter(
            self,
            "value_bank",
            axes=TABLE_AXES,
            shape=(self.config.vocab_size, math.prod(shape)),
            init=nn.initializers.zeros,
        )
        rows = token_rows(table, info.tokens, info.segment_ids, self.config.dtype)
        values = rows.reshape(*rows.shape[:2], *shape)
        return nn.with_logical_constraint(values, ("batch", "length", None, "kv_heads", None))

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
        depth = Depth(jnp.zeros((), jnp.int32), num_layers=c.num_layers)
        if c.decay_floors is not None:
            logits = parameter(
                self,
                "decay_floors",
                axes=(None, "heads", "head_dim"),
                shape=(c.num_layers, *c.decay_floors),
                init=nn.initializers.zeros,
            )
            depth = dataclasses.replace(depth, decay_floors=rising_floors(logits))
        if c.first_rwkv7 is not None:
            depth = dataclasses.replace(
                depth,
                first_values=jnp.zeros_like(x),
                first=c.first_rwkv7,
            )
        return depth


class CodesOfTokens(nn.Module):
    """The code of each token of the vocabulary, which never trains: token i has code i mod codes
    until others are given (`training.vq_head`). Whole numbers, which float32 holds exactly.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self) -> Float[Array, " X"]:
        c = self.config

        def by_turns(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
            return (jnp.arange(shape[0]) % c.output.codes).astype(dtype)

        return parameter(self, "frozen", axes=("vocab",), shape=(c.vocab_size,), init=by_turns)


def head_weights(params: Any) -> Float[Array, "X M"]:
    """The output matrix: the head, or the embedding table when they are tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits(hidden: Float[Array, "... M"], weights: Float[Array, "X M"]) -> Float[Array, "... X"]:
    """Logits of the next token, float32: operands in hidden's dtype, accumulated in float32."""
    weights = weights.astype(hidden.dtype)
    return jnp.einsum("...m,xm->...x", hidden, weights, preferred_element_type=jnp.float32)
