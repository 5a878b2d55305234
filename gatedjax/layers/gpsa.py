"""Gated positional self-attention of patches on a grid (ConViT, arXiv 2103.10697).

    weights = (1 - g_h) softmax(q_i k_j / sqrt(d)) + g_h softmax(w_h (dx, dy, dx^2 + dy^2))
    g_h = sigmoid(gate_h)

Both softmaxes sum to 1, so their mixture does too, and is two calls of `attention` with the same
values. In the second one queries and keys have three channels: with dx = x_j - x_i, what depends on
x_i alone leaves a softmax as it is, and the rest is (w_0 - 2 w_2 x_i) x_j + w_2 x_j^2, and the same
of y. So memory is linear in the number of patches, where the paper's table is quadratic.
"""

from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.config import GatedPositionalConfig
from gatedjax.errors import require
from gatedjax.layers.base import Mixer
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo
from gatedjax.layers.whole_rows import grid_of, refuse_cache, require_whole_rows
from kernels_pallas.attention import attention

# Of the gate's logit at the start: sigmoid(1) = 0.73 of the weight is positional.
GATE_START = 1.0


def positional_queries_and_keys(
    weights: Float[Array, "H 3"],
    grid: tuple[int, int],
) -> tuple[Float[Array, "1 T H 3"], Float[Array, "1 T 1 3"]]:
    """Queries and keys whose products are w (dx, dy, dx^2 + dy^2), but for a number of each row.

    Args:
      weights: of every head.
      grid: its height and width; patch t is at row t // width, column t % width.

    Returns:
      The queries, and the keys of all heads.
    """
    height, width = grid
    y, x = np.divmod(np.arange(height * width), width)
    # From the middle, so that squares stay small.
    x = (x - (width - 1) / 2).astype(np.float32)
    y = (y - (height - 1) / 2).astype(np.float32)
    of_x, of_y, of_square = (weights[None, :, n] for n in range(3))
    queries = jnp.stack(
        [
            of_x - 2 * of_square * x[:, None],
            of_y - 2 * of_square * y[:, None],
            jnp.broadcast_to(of_square, (height * width, weights.shape[0])),
        ],
        axis=-1,
    )
    keys = np.stack([x, y, x**2 + y**2], axis=-1)
    return queries[None], jnp.asarray(keys, weights.dtype)[None, :, None]


def gated_positional_attention(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T Hk K"],
    v: Float[Array, "B T Hk V"],
    weights: Float[Array, "H 3"],
    gate: Float[Array, "H"],
    grid: tuple[int, int],
) -> Float[Array, "B T H V"]:
    """The mixture of what patches say and where they are.

    Args:
      q, k, v: of the patches, row by row of the grid.
      weights: of dx, dy and dx^2 + dy^2, for every head.
      gate: the logit of the positional part, for every head.
      grid: height and width, T = height width.

    Returns:
      The outputs of the heads, in v's dtype.

    Raises:
      ValueError: a number of patches that does not fit the grid.
    """
    patches = grid[0] * grid[1]
    require(q.shape[1] == patches, "grid", grid, f"{q.shape[1]} patches, as in q")
    by_content = attention(q, k, v, causal=False)
    dtype = jnp.promote_types(weights.dtype, jnp.float32)
    queries, keys = positional_queries_and_keys(weights.astype(dtype), grid)
    B, T, Hk, _ = k.shape
    by_position = attention(
        jnp.broadcast_to(queries, (B, T, *queries.shape[2:])),
        jnp.broadcast_to(keys, (B, T, Hk, 3)),
        v,
        causal=False,
        scale=1.0,
    )
    positional = jax.nn.sigmoid(gate.astype(dtype))[:, None]
    mixed = (1 - positional) * by_content.astype(dtype) + positional * by_position.astype(dtype)
    return mixed.astype(v.dtype)


def local_weights(num_heads: int, locality: float) -> Float[np.ndarray, "H 3"]:
    """The paper's start: head h looks at one place of a sqrt(H) x sqrt(H) neighborhood.

    Its weights are locality (2 ox, 2 oy, -1), so that -locality ((dx - ox)^2 + (dy - oy)^2) is
    largest at the offset (ox, oy). Heads beyond the square have zeros.
    """
    side = int(num_heads**0.5)
    # As in the paper's code: an even side has offsets of halves.
    center = (side - 1) / 2 if side % 2 == 0 else side // 2
    weights = np.zeros((num_heads, 3), np.float32)
    for h in range(side * side):
        row, column = divmod(h, side)
        weights[h] = 2 * (column - center), 2 * (row - center), -1
    return locality * weights


class GatedPositionalSelfAttention(nn.Module):
    """GPSA on a grid of patches, values passing unchanged at the start as in the paper.

    Attributes:
      num_heads: how many; M is a multiple of it.
      grid: height and width.
      locality: how sharply heads look at their place at the start.
      init_std: of queries, keys and the output projection.
      dtype: of the activations.
    """

    num_heads: int
    grid: tuple[int, int]
    locality: float = 1.0
    init_std: float = 0.02
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        M = x.shape[-1]
        H = self.num_heads
        require(M % H == 0, "num_heads", H, f"a divisor of the width {M}")
        width = {"embed": M}
        heads = {"heads": H, "head_dim": M // H}

        def identity(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            return jnp.eye(M, dtype=dtype).reshape(shape)

        def start(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
            return jnp.asarray(local_weights(H, self.locality), dtype)

        q = Projection(width, heads, self.init_std, self.dtype, name="query")(x)
        k = Projection(width, heads, self.init_std, self.dtype, name="key")(x)
        v = Projection(
            width,
            heads,
            self.init_std,
            self.dtype,
            kernel_init=identity,
            name="value",
        )(x)
        positions = parameter(self, "positions", axes=["heads", None], shape=[H, 3], init=start)
        gate = parameter(
            self,
            "gate",
            axes=["heads"],
            shape=[H],
            init=nn.initializers.constant(GATE_START),
        )
        o = gated_positional_attention(q, k, v, positions, gate, self.grid)
        return Projection(
            heads,
            width,
            self.init_std,
            self.dtype,
            has_bias=True,
            name="out",
        )(o)


class GatedPositional(Mixer):
    """GPSA as a mixer of encoders: the grid is that of the images' patches."""

    config: GatedPositionalConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T M"], Any]:
        c = self.config
        require_whole_rows(c.kind, info, cache)
        grid = grid_of(c.kind, info)
        expected = "0: every token has a place on the grid (model.patches.pooling 'mean')"
        require(grid.extra == 0, f"{c.kind}: tokens before the patches", grid.extra, expected)
        attention = GatedPositionalSelfAttention(
            c.num_heads,
            (grid.rows, grid.columns),
            c.locality,
            self.init_std,
            self.dtype,
            name="attention",
        )
        return attention(x), None

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> NoReturn:
        return refuse_cache(self.config.kind)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        # Four projections; products of content, of three channels, and both with the values.
        positional = 2 * seq_len * (width + 3 * self.config.num_heads)
        return 8 * width * width + 4 * width * seq_len + positional
