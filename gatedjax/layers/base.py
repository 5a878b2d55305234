"""What a model asks of its layers: the two base classes. CONTRIBUTING.md adds a layer step by step.

`layer(x)` is for people. The model calls `with_cache` and `with_statistics`, which hand on what a
model needs besides y; a layer implements one of the two as its `@nn.compact` method. (RWKV-7's two
layers are more than that: its mixer shares values with later ones, its feed-forward has a cache.)
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from gatedjax.layers.conv import short_conv
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo, default_info, numbered


class Mixer(nn.Module):
    """A layer that mixes tokens.

    Attributes:
      config: the mixer's dataclass of `config/layers.py`.
      norm_eps: added to the mean square in norms.
      init_std: of the normal distribution that matrices start from.
      dtype: of the activations; parameters are float32.

    Class attributes:
      takes_pieces: with a cache it takes what the model may be given: padding at the end of a row,
        several documents, several tokens after others. A model refuses those for a mixer that does
        not say so; whole prompts and single tokens are left.
      shares_values: the layers of this kind see the values of the first of them; the model calls
        `with_values`.
      gives_memory: what it reads from its state may be other layers' too; a model with such layers
        calls `with_memory`.
    """

    takes_pieces: ClassVar[bool] = False
    shares_values: ClassVar[bool] = False
    gives_memory: ClassVar[bool] = False

    config: Any
    norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: DTypeLike = jnp.float32

    def __call__(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
    ) -> Float[Array, "B T M"]:
        """The layer's output. Without `info` every row is one document, at positions 0, 1, 2 ..."""
        # A compact method may be called by another one; its parameters belong to the layer.
        y, _ = self.with_cache(x, _info(x, info), None)
        return y

    def with_cache(
        self, x: Float[Array, "B T M"], info: TokenInfo, cache: Any
    ) -> tuple[Array, Any]:
        """(y, cache).

        Without a cache: training on (packed) rows; the second result is None. With an empty one:
        prefill, T tokens. With a filled one: decoding, T = 1, or a further piece of T tokens.

        Args:
          x: the vectors of the tokens.
          info: about them, in the form of `token_info.arranged`.
          cache: of the tokens before.
        """
        raise NotImplementedError

    def with_values(
        self, x: Float[Array, "B T M"], info: TokenInfo, cache: Any
    ) -> tuple[Array, Any, Array]:
        """(y, cache, values): as `with_cache`, for a mixer with `shares_values`.

        The values are those of the first such layer, its own if it is the first.

        Args:
          x: the vectors of the tokens.
          info: about them; `info.depth` holds the values of the first layer.
          cache: of the tokens before.
        """
        raise NotImplementedError

    def with_memory(
        self, x: Float[Array, "B T M"], info: TokenInfo, cache: Any
    ) -> tuple[Array, Any, Float[Array, "B T H V"]]:
        """(y, cache, memory): as `with_cache`, for a mixer with `gives_memory`.

        The memory is what it has read from its state, before its own norm and gate.

        Args:
          x: the vectors of the tokens.
          info: about them.
          cache: of the tokens before.
        """
        raise NotImplementedError

    def _project(
        self,
        name: str,
        x: Float[Array, "B T M"],
        axes: Mapping[str, int],
        has_bias: bool = False,
    ) -> Float[Array, "B T heads D"]:
        """`x` to heads. `axes`: logical names and sizes, of the heads, then of the channels."""
        width = {"embed": x.shape[-1]}
        return Projection(
            width,
            axes,
            self.init_std,
            self.dtype,
            has_bias=has_bias,
            name=name,
        )(x)

    def _per_head(
        self,
        name: str,
        x: Float[Array, "B T M"],
        num_heads: int,
        has_bias: bool = False,
    ) -> Float[Array, "B T heads"]:
        """One number for each head, float32: the logits of its gate or its decay."""
        width = {"embed": x.shape[-1]}
        heads = {"heads": num_heads}
        y = Projection(
            width,
            heads,
            self.init_std,
            self.dtype,
            has_bias=has_bias,
            name=name,
        )(x)
        return y.astype(jnp.float32)

    def _project_and_convolve(
        self,
        x: Float[Array, "B T M"],
        keys: Mapping[str, int],
        values: Mapping[str, int],
        *,
        queries: Mapping[str, int] | None = None,
        conv_width: int,
        conv_bias: bool = False,
        segment_ids: Int[Array, "B T"] | None,
        tail: Float[Array, "B _ F"] | None,
    ) -> tuple[list[Array], Float[Array, "B _ F"] | None]:
        """Queries, keys and values, after a short causal convolution if it has a width.

        Args:
          x: the vectors of the tokens.
          keys, values: logical names and sizes, of the heads, then of the channels.
          queries: the same; None: those of the keys.
          conv_width, conv_bias, segment_ids, tail: as of `short_conv`.

        Returns:
          The three, and the inputs of the convolution that the next token will need.
        """
        axes = {"query": queries or keys, "key": keys, "value": values}
        arrays = [self._project(name, x, of_name) for name, of_name in axes.items()]
        if not conv_width:
            return arrays, tail
        return short_conv(self, arrays, conv_width, segment_ids, tail, has_bias=conv_bias)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> Any:
        """An empty decoding cache for `length` tokens of `batch` rows."""
        raise NotImplementedError

    @nn.nowrap
    def capacity(self, cache: Any) -> int | None:
        """The most tokens a row that `cache` has room for; None for any number."""
        return None

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of one forward pass, 2 per multiply-add: matrices and mixing.

        Norms and gates not counted.
        """
        raise NotImplementedError


class FeedForward(nn.Module):
    """A layer that works on every token by itself, or (the mixtures) on what a router sends it.

    Attributes:
      config: the feed-forward's dataclass of `config/layers.py` or `config/moe.py`.
      init_std: of the normal distribution that matrices start from.
      dtype: of the activations; parameters are float32.
      training: what only training does is done: experts drop what is beyond their capacity.

    Class attributes:
      has_cache: it sees tokens before its own, and decodes with a cache: the model calls
        `with_cache`.
      sees_stream: it is given the residual stream, not the output of the norm in front of it, which
        the block then does without.
    """

    has_cache: ClassVar[bool] = False
    sees_stream: ClassVar[bool] = False

    config: Any
    init_std: float = 0.02
    dtype: DTypeLike = jnp.float32
    training: bool = False

    def __call__(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo | None = None,
    ) -> Float[Array, "B T M"]:
        """The layer's output. Without `info` every row is one document, at positions 0, 1, 2 ..."""
        y, _, _ = self.with_statistics(x, _info(x, info), None)
        return y

    def with_statistics(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        router_logits: Float[Array, "B T E"] | None,
    ) -> tuple[Array, dict[str, Array], Array | None]:
        """(y, statistics, router_logits).

        Args:
          x: the tokens.
          info: about them. Padding (segment id 0) takes no part, whatever it holds, and gives 0.
          router_logits: of the sparse layer before, for routers with a gating residual.

        Returns:
          y; what losses and log need of a sparse layer, {} of any other; and the router logits for
          the next layer: a sparse layer's own, or those that came in.
        """
        raise NotImplementedError

    def with_cache(
        self, x: Float[Array, "B T M"], info: TokenInfo, cache: Any
    ) -> tuple[Array, Any]:
        """(y, cache) of a feed-forward with `has_cache`; as a mixer's `with_cache`.

        Args:
          x: the tokens.
          info: about them.
          cache: of the tokens before; None in training.
        """
        raise NotImplementedError

    @nn.nowrap
    def init_cache(self, batch: int, width: int) -> Any:
        """An empty decoding cache of `batch` rows of a model of this width."""
        raise NotImplementedError

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        """FLOPs of one forward pass, 2 per multiply-add: matrices; norms and gates not counted."""
        raise NotImplementedError


def _info(x: Float[Array, "B T M"], info: TokenInfo | None) -> TokenInfo:
    return default_info(x) if info is None else numbered(info)
