"""Gated attention units, without a softmax: FLASH, MossFormer (arXiv 2202.10447, 2302.11824).

    [u | v] = silu(x W + b),   z = silu(x W' + b')
    q, k, q', k' = z * gamma_n + beta_n, rotated                n = 1 .. 4
    A v = sum_chunk relu(q k / C)^2 v + sum_others q' k' v / C
    y = (u * A v) W''                                           FLASH
    y = ((A u * v) * sigmoid(A v * u)) W''                      MossFormer

Where tokens see later ones MossFormer's other parts can be had: half of the channels of x come from
the token before, u, v and z have their own convolution added to them, and the output is
`h + conv(h)` of `h = silu(LN(..) W'')`.

Tokens of one chunk of C see each other by a squared ReLU, those of other chunks linearly. Where
tokens see earlier ones only, chunks are counted within documents: packed documents give what they
give alone. The sum over other chunks is then a linear scan over all tokens before, less what it
gives those of the own chunk, so that no state per chunk is kept.
"""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.config import GatedUnitConfig
from gatedjax.layers.base import Mixer
from gatedjax.layers.conv import centered_conv, previous_inputs
from gatedjax.layers.documents import is_token, without_padding
from gatedjax.layers.gate_values import record
from gatedjax.layers.kv_cache import num_tokens
from gatedjax.layers.norm import LayerNorm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.rope import apply_rope, inverse_frequencies
from gatedjax.layers.scan_or_step import scan_or_step
from gatedjax.layers.token_info import History, TokenInfo, history_of
from gatedjax.layers.whole_rows import refuse_cache, require_whole_rows


@struct.dataclass
class GatedUnitCache:
    """The state of the linear part, and keys and values of the last C tokens, the newest last."""

    state: Float[Array, "... B 1 K V"]
    k: Float[Array, "... B C 2 K"]
    v: Float[Array, "... B C V"]


def within_chunk(
    q: Float[Array, "*rows T 2 K"],
    k: Float[Array, "*rows S 2 K"],
    v: Float[Array, "*rows S V"],
    seen: Bool[Array, "*rows T S"],
    chunk: int,
    linear_scale: float,
) -> Float[Array, "*rows T V"]:
    """`sum_seen (relu(q k / C)^2 - linear_scale q' k') v`, in float32.

    Args:
      q, k: the two kinds of queries and keys.
      v: values.
      seen: keys of the same chunk.
      chunk: C.
      linear_scale: of the products that a sum over all tokens has counted already; 0 for none.
    """
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    products = jnp.einsum("...tnk,...snk->...nts", q, k)
    squared = jnp.square(jax.nn.relu(products[..., 0, :, :] / chunk))
    weights = squared - linear_scale * products[..., 1, :, :]
    return jnp.where(seen, weights, 0) @ v


def places_of(
    positions: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"] | None,
    chunk: int,
) -> Int[Array, "B T 2"]:
    """Of every token its document, 0 for padding, and which chunk of that it is in."""
    if segment_ids is None:
        segment_ids = jnp.ones_like(positions)
    return jnp.stack([segment_ids, positions // chunk], axis=-1)


def same_place(
    own: Int[Array, "*rows T 2"],
    others: Int[Array, "*rows S 2"],
) -> Bool[Array, "*rows T S"]:
    """Whether tokens are of the same chunk of the same document."""
    is_same = jnp.all(own[..., :, None, :] == others[..., None, :, :], axis=-1)
    return is_same & (own[..., :, None, 0] != 0)


def causal_chunks(
    q: Float[Array, "B T 2 K"],
    k: Float[Array, "B T 2 K"],
    v: Float[Array, "B T V"],
    places: Int[Array, "B T 2"],
    chunk: int,
) -> Float[Array, "B T V"]:
    """`within_chunk` of the tokens before and of each token itself, and of the same place.

    Args:
      q, k, v: as of `within_chunk`.
      places: of the tokens. A chunk is at most C neighbors, so that its tokens lie in two
        neighboring pieces of C.
      chunk: C.
    """
    B, T, _ = places.shape
    padding = -T % chunk

    def pieces(x: Array) -> Array:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths).reshape(B, -1, chunk, *x.shape[2:])

    def with_last(x: Array) -> Array:
        before = jnp.roll(x, 1, axis=1).at[:, 0].set(0)
        return jnp.concatenate([before, x], axis=2)

    own = pieces(places)
    is_before = jnp.arange(2 * chunk) <= chunk + jnp.arange(chunk)[:, None]
    seen = same_place(own, with_last(own)) & is_before
    y = within_chunk(
        pieces(q),
        with_last(pieces(k)),
        with_last(pieces(v)),
        seen,
        chunk,
        1.0 / chunk,
    )
    return y.reshape(B, -1, v.shape[-1])[:, :T]


def both_ways(
    q: Float[Array, "B T 2 K"],
    k: Float[Array, "B T 2 K"],
    v: Float[Array, "B T V"],
    chunk: int,
) -> Float[Array, "B T V"]:
    """Squared ReLU within chunks of the row, and `q' sum_t k'_t v_t / T` over all tokens.

    Args:
      q, k, v: as of `within_chunk`.
      chunk: C.
    """
    B, T, _, _ = q.shape
    padding = -T % chunk

    def pieces(x: Array) -> Array:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths).reshape(B, -1, chunk, *x.shape[2:])

    # Keys of padding are zeros, and so are their weights.
    seen = jnp.ones((chunk, chunk), bool)
    local = within_chunk(pieces(q), pieces(k), pieces(v), seen, chunk, 0.0)
    linear_k, values = k[:, :, 1].astype(jnp.float32), v.astype(jnp.float32)
    total = jnp.einsum("btk,btv->bkv", linear_k, values) / T
    return local.reshape(B, -1, v.shape[-1])[:, :T] + q[:, :, 1].astype(jnp.float32) @ total


class GatedUnit(Mixer):
    """One head of attention without a softmax, and its gate."""

    takes_pieces: ClassVar[bool] = True

    config: GatedUnitConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: GatedUnitCache | None = None,
    ) -> tuple[Float[Array, "B T M"], GatedUnitCache | None]:
        c = self.config
        if not c.causal:
            require_whole_rows(c.kind, info, cache)
        # Nothing of padding is in a sum, whatever it holds.
        x = without_padding(x, is_token(info))
        if c.token_shift:
            half = x.shape[-1] // 2
            x = jnp.concatenate([previous_inputs(x[..., :half])[0], x[..., half:]], axis=-1)
        u = self._activated(x, "gate", {"mlp": c.hidden})
        v = self._activated(x, "value", {"mlp": c.hidden})
        shared = self._activated(x, "query_and_key", {"head_dim": c.key_dim})
        q, k = self._queries_and_keys(shared, info)
        values = v if c.form == "flash" else jnp.concatenate([v, u], axis=-1)
        attended, cache = self._attended(q, k, values, info, cache)
        u, v = u.astype(jnp.float32), v.astype(jnp.float32)
        if c.form == "flash":
            record(self, "gates", u)
            o = u * attended
        else:
            of_v, of_u = jnp.split(attended, 2, axis=-1)
            gates = jax.nn.sigmoid(of_v * u)
            record(self, "gates", gates)
            o = of_u * v * gates
        width = {"embed": x.shape[-1]}
        if c.conv_width:
            o = LayerNorm(self.norm_eps, "mlp_bias", name="out_norm")(o)
            return self._activated(o, "out", width, {"mlp": c.hidden}), cache
        return self._projected(o, "out", width, {"mlp": c.hidden}), cache

    def _projected(
        self,
        x: Float[Array, "B T F"],
        name: str,
        out_axes: dict[str, int],
        in_axes: dict[str, int] | None = None,
    ) -> Float[Array, "B T _"]:
        """x W + b.

        Args:
          x: activations.
          name: of the matrix.
          out_axes, in_axes: as of `Projection`; None for the model's channels.
        """
        return Projection(
            in_axes or {"embed": x.shape[-1]},
            out_axes,
            self.init_std,
            self.dtype,
            has_bias=True,
            name=name,
        )(x.astype(self.dtype))

    def _activated(
        self,
        x: Float[Array, "B T F"],
        name: str,
        out_axes: dict[str, int],
        in_axes: dict[str, int] | None = None,
    ) -> Float[Array, "B T _"]:
        """`h + conv(h)`, or without convolutions h, of `h = silu(x W + b)`.

        Args:
          x, name, out_axes, in_axes: as of `_projected`.
        """
        h = jax.nn.silu(self._projected(x, name, out_axes, in_axes))
        width = self.config.conv_width
        if not width:
            return h
        kernel = parameter(
            self,
            f"{name}_conv",
            axes=[None, None],
            shape=[width, h.shape[-1]],
            init=nn.initializers.normal(width**-0.5),
        )
        return h + centered_conv(h, kernel)

    def _queries_and_keys(
        self,
        z: Float[Array, "B T K"],
        info: TokenInfo,
    ) -> tuple[Float[Array, "B T 2 K"], Float[Array, "B T 2 K"]]:
        """Both kinds of each: scaled, moved and rotated copies of one vector."""
        c = self.config
        axes, shape = [None, "head_dim"], [4, c.key_dim]
        scale = parameter(self, "scale", axes, shape, nn.initializers.normal(0.02))
        offset = parameter(self, "offset", axes, shape, nn.initializers.zeros)
        four = z[:, :, None] * scale.astype(z.dtype) + offset.astype(z.dtype)
        if c.rotary_dim:
            frequencies = inverse_frequencies(c.rotary_dim, c.rope_base)
            four = apply_rope(four, info.positions, frequencies)
        return four[:, :, :2], four[:, :, 2:]

    def _attended(
        self,
        q: Float[Array, "B T 2 K"],
        k: Float[Array, "B T 2 K"],
        v: Float[Array, "B T V"],
        info: TokenInfo,
        cache: GatedUnitCache | None,
    ) -> tuple[Float[Array, "B T V"], GatedUnitCache | None]:
        """A v in float32, and the cache with these tokens.

        Args:
          q, k, v: of the tokens.
          info: about them.
          cache: of the tokens before.
        """
        c = self.config
        if not c.causal:
            return both_ways(q, k, v, c.chunk), None
        linear, state = scan_or_step(
            q[:, :, 1:],
            k[:, :, 1:],
            v[:, :, None],
            None,
            info.segment_ids,
            None if cache is None else cache.state,
            scale=1.0 / c.chunk,
            chunk_size=None,
        )
        linear = linear[:, :, 0].astype(jnp.float32)
        places = places_of(info.positions, info.segment_ids, c.chunk)
        if cache is None:
            return linear + causal_chunks(q, k, v, places, c.chunk), None
        before = history_of(info)
        # With the last C tokens in front, of which those of the same document count.
        places = jnp.concatenate([self._held_places(before), places], axis=1)
        keys = jnp.concatenate([cache.k, k.astype(cache.k.dtype)], axis=1)
        values = jnp.concatenate([cache.v, v.astype(cache.v.dtype)], axis=1)
        # Padding stands at the end: the newest tokens end where it begins.
        tokens = num_tokens(q, info.segment_ids)
        newest = tokens[:, None] + jnp.arange(c.chunk)
        held_k = jnp.take_along_axis(keys, newest[:, :, None, None], axis=1)
        held_v = jnp.take_along_axis(values, newest[:, :, None], axis=1)
        assert state is not None
        cache = GatedUnitCache(state, held_k, held_v)
        if q.shape[1] == 1:
            seen = same_place(places[:, -1:], places)
            own = within_chunk(q, keys, values, seen, c.chunk, 1.0 / c.chunk)
            return linear + own, cache
        queries = jnp.pad(q, ((0, 0), (c.chunk, 0), (0, 0), (0, 0)))
        own = causal_chunks(queries, keys, values, places, c.chunk)
        return linear + own[:, c.chunk :], cache

    def _held_places(self, before: History) -> Int[Array, "B C 2"]:
        """Of the last C tokens before these; 0 for those of other documents, and for none."""
        chunk = self.config.chunk
        age = jnp.arange(chunk, 0, -1)
        is_of_document = age <= before.in_document[:, None]
        positions = before.next_position[:, None] - age
        return places_of(positions, is_of_document.astype(jnp.int32), chunk)

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> GatedUnitCache:
        """An empty cache; its size does not depend on `length`."""
        c = self.config
        if not c.causal:
            return refuse_cache(c.kind)
        values = c.hidden if c.form == "flash" else 2 * c.hidden
        return GatedUnitCache(
            state=jnp.zeros((batch, 1, c.key_dim, values), jnp.float32),
            k=jnp.zeros((batch, c.chunk, 2, c.key_dim), self.dtype),
            v=jnp.zeros((batch, c.chunk, values), self.dtype),
        )

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        values = c.hidden if c.form == "flash" else 2 * c.hidden
        seen = c.chunk / 2 if c.causal else c.chunk
        pairs = 2 * seen * (c.key_dim + values)
        return 2 * width * (3 * c.hidden + c.key_dim) + pairs + 4 * c.key_dim * values
