"""Gated attention units, without a softmax: FLASH, MossFormer (arXiv 2202.10447, 2302.11824).

    [u | v] = silu(x W + b),   z = silu(x W' + b')
    q, k, q', k' = z * gamma_n + beta_n, rotated                n = 1 .. 4
    A v = sum_chunk relu(q k / C)^2 v + sum_others q' k' v / C
    y = (u * A v) W''                                           FLASH
    y = ((A u * v) * sigmoid(A v * u)) W''                      MossFormer

Tokens of one chunk of C see each other by a squared ReLU, those of other chunks linearly. Where
tokens see earlier ones only, chunks are counted within documents: packed documents give what they
give alone. The sum over other chunks is then a linear scan over all tokens before, less what it
gives those of the own chunk, so that no state per chunk is kept.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax import Array
from jaxtyping import Bool, Float, Int

from gatedjax.config import GatedUnitConfig
from gatedjax.layers.base import Mixer
from gatedjax.layers.gate_values import record
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.rope import apply_rope, inverse_frequencies
from gatedjax.layers.scan_or_step import scan_or_step
from gatedjax.layers.token_info import TokenInfo
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


def chunk_numbers(info: TokenInfo, chunk: int) -> Int[Array, "B T"]:
    """Which chunk of which document a token is in; -1 for padding."""
    number = info.positions // chunk
    if info.segment_ids is None:
        return number
    most = info.positions.shape[1] // chunk + 1
    return jnp.where(info.segment_ids == 0, -1, info.segment_ids * most + number)


def causal_chunks(
    q: Float[Array, "B T 2 K"],
    k: Float[Array, "B T 2 K"],
    v: Float[Array, "B T V"],
    numbers: Int[Array, "B T"],
    chunk: int,
) -> Float[Array, "B T V"]:
    """`within_chunk` of the tokens before and of each token itself, and of the same number.

    Args:
      q, k, v: as of `within_chunk`.
      numbers: of every token's chunk. A chunk is at most C neighbors, so that its tokens lie in two
        neighboring pieces of C.
      chunk: C.
    """
    B, T = numbers.shape
    padding = -T % chunk

    def pieces(x: Array, fill: float = 0) -> Array:
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=fill).reshape(B, -1, chunk, *x.shape[2:])

    def with_last(x: Array, fill: float = 0) -> Array:
        before = jnp.roll(x, 1, axis=1).at[:, 0].set(fill)
        return jnp.concatenate([before, x], axis=2)

    own = pieces(numbers, -1)
    others = with_last(own, -1)
    is_before = jnp.arange(2 * chunk) <= chunk + jnp.arange(chunk)[:, None]
    seen = (own[..., :, None] == others[..., None, :]) & (own[..., :, None] >= 0) & is_before
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
        width = {"embed": x.shape[-1]}
        given = {"init_std": self.init_std, "dtype": self.dtype, "has_bias": True}
        u = jax.nn.silu(Projection(width, {"mlp": c.hidden}, **given, name="gate")(x))
        v = jax.nn.silu(Projection(width, {"mlp": c.hidden}, **given, name="value")(x))
        shared = Projection(width, {"head_dim": c.key_dim}, **given, name="query_and_key")(x)
        q, k = self._queries_and_keys(jax.nn.silu(shared), info)
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
        out = Projection({"mlp": c.hidden}, width, **given, name="out")
        return out(o.astype(self.dtype)), cache

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
        if cache is None:
            return linear + causal_chunks(q, k, v, chunk_numbers(info, c.chunk), c.chunk), None
        new = GatedUnitCache(state, _pushed(cache.k, k), _pushed(cache.v, v))
        if q.shape[1] > 1:
            # A prompt: the cache was empty.
            return linear + causal_chunks(q, k, v, chunk_numbers(info, c.chunk), c.chunk), new
        # The last token and those before it in its chunk.
        age = jnp.arange(c.chunk)[::-1]
        seen = age <= info.positions % c.chunk
        return linear + within_chunk(q, new.k, new.v, seen[:, None], c.chunk, 1.0 / c.chunk), new

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


def _pushed(held: Float[Array, "B C ..."], new: Float[Array, "B T ..."]) -> Array:
    """The last C of both."""
    both = jnp.concatenate([held, new.astype(held.dtype)], axis=1)
    return both[:, -held.shape[1] :]
