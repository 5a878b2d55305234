"""Gates made of other tokens by a matrix: gMLP's and MAXIM's (arXiv 2105.08050, 2201.02973).

    [u | v] = gelu(x W)
    y = (u * (S LN(v) + b)) W'                  S mixes tokens, the same for every channel
    y = (u * (S LN(v) + b + attention(x))) W'   aMLP: one small head

MAXIM's multi-axis block mixes half of the channels within blocks of neighboring patches, and half
between the patches at the same place of every cell of a grid: local, and global with few weights.
Its cross-gating block multiplies each of two streams by such a map of the other one.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.config import SpatialGateConfig
from gatedjax.errors import require
from gatedjax.layers.base import Mixer
from gatedjax.layers.gate_values import record
from gatedjax.layers.norm import LayerNorm
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import Grid, TokenInfo
from gatedjax.layers.whole_rows import (
    grid_of,
    in_cells,
    out_of_cells,
    refuse_cache,
    require_whole_rows,
)
from kernels_pallas.attention import attention

# Of the matrix of tokens: gMLP starts next to none, so that the gate starts at its bias, 1.
MATRIX_STD = {"tokens": 1e-6, "blocks_and_grid": 0.02}


def mixed_tokens(
    v: Float[Array, "..."],
    matrix: Float[Array, "T T"],
    bias: Float[Array, " T"],
    axis: int,
) -> Float[Array, "..."]:
    """`sum_t matrix[t, s] v_t + bias_s` along an axis of tokens, in float32.

    Args:
      v: any array.
      matrix: from tokens to tokens.
      bias: of each token that comes out.
      axis: of the tokens.

    Returns:
      The same shape, float32.
    """
    moved = jnp.moveaxis(v.astype(jnp.float32), axis, -1)
    mixed = moved @ matrix + bias
    return jnp.moveaxis(mixed, -1, axis)


class TokenMap(nn.Module):
    """`mixed_tokens` with parameters: a matrix, and a bias that starts at 1.

    Attributes:
      axis: of the tokens.
      init_std: of the matrix.
    """

    axis: int
    init_std: float

    @nn.compact
    def __call__(self, v: Float[Array, "..."]) -> Float[Array, "..."]:
        T = v.shape[self.axis]
        init = nn.initializers.normal(self.init_std)
        matrix = parameter(self, "matrix", axes=[None, None], shape=[T, T], init=init)
        bias = parameter(self, "bias", axes=[None], shape=[T], init=nn.initializers.ones)
        return mixed_tokens(v, matrix, bias, self.axis)


class SpatialGatingUnit(nn.Module):
    """`u * (S LN(v) + b + added)` of the two halves of the channels.

    Attributes:
      axis: of the tokens.
      init_std: of S.
      eps: of the norm.
    """

    axis: int
    init_std: float
    eps: float

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "... F"],
        added: Float[Array, "... F/2"] | None = None,
    ) -> Float[Array, "... F/2"]:
        u, v = jnp.split(x, 2, axis=-1)
        gate = TokenMap(self.axis, self.init_std, name="tokens")(
            LayerNorm(self.eps, name="norm")(v)
        )
        if added is not None:
            gate = gate + added.astype(jnp.float32)
        record(self, "gates", gate)
        return (u.astype(jnp.float32) * gate).astype(x.dtype)


class _Part(nn.Module):
    """What the parts of these layers share.

    Attributes:
      config: of the layer.
      eps: of norms.
      init_std: of matrices of channels.
      dtype: of activations.
    """

    config: SpatialGateConfig
    eps: float
    init_std: float
    dtype: DTypeLike

    def _dense(self, x: Array, name: str, width: int) -> Array:
        return Projection(
            {"embed": x.shape[-1]},
            {"mlp": width},
            self.init_std,
            self.dtype,
            has_bias=True,
            name=name,
        )(x)

    def _over_cells(
        self,
        x: Float[Array, "B R C F"],
        mix: Callable[[Array, int], Array],
        is_grid: bool,
    ) -> Float[Array, "B R C F"]:
        """`mix(x in cells, axis of tokens)`, back on the grid.

        Args:
          x: patches, by row and column.
          mix: tokens along an axis.
          is_grid: between cells of the grid, at the same place of each; within blocks if not.
        """
        c = self.config
        rows, columns = x.shape[1:3]
        cell = c.block
        axis = -2
        if is_grid:
            fits = rows % c.grid[0] == 0 and columns % c.grid[1] == 0
            require(fits, "grid", c.grid, f"divisors of the grid of patches, {rows} x {columns}")
            cell = rows // c.grid[0], columns // c.grid[1]
            axis = -3
        return out_of_cells(mix(in_cells(x, cell), axis), cell, (rows, columns))


class _Branch(_Part):
    """One of the two gated MLPs of a multi-axis block, with a norm and a residual of its own."""

    is_grid: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B R C F"]) -> Float[Array, "B R C F"]:
        def mix(cells: Array, axis: int) -> Array:
            y = LayerNorm(self.eps, name="norm")(cells)
            y = jax.nn.gelu(self._dense(y, "in", self.config.hidden))
            unit = SpatialGatingUnit(
                axis, MATRIX_STD["blocks_and_grid"], self.eps, name="gating_unit"
            )
            return cells + self._dense(unit(y), "out", cells.shape[-1])

        return self._over_cells(x, mix, self.is_grid)


class MultiAxisGate(_Part):
    """MAXIM's multi-axis gated MLP block, without the norm in front and the residual around it."""

    @nn.compact
    def __call__(self, x: Float[Array, "B R C M"]) -> Float[Array, "B R C M"]:
        M = x.shape[-1]
        of_grid, of_blocks = jnp.split(jax.nn.gelu(self._dense(x, "in", 2 * M)), 2, axis=-1)
        part = (self.config, self.eps, self.init_std, self.dtype)
        of_grid = _Branch(*part, is_grid=True, name="grid")(of_grid)
        of_blocks = _Branch(*part, name="blocks")(of_blocks)
        return self._dense(jnp.concatenate([of_grid, of_blocks], axis=-1), "out", M)


class _SpatialWeights(_Part):
    """What a stream multiplies the other one by: as a multi-axis block, without gates inside."""

    @nn.compact
    def __call__(self, x: Float[Array, "B R C M"]) -> Float[Array, "B R C M"]:
        M = x.shape[-1]
        x = jax.nn.gelu(self._dense(LayerNorm(self.eps, name="norm")(x), "in", 2 * M))
        of_grid, of_blocks = jnp.split(x, 2, axis=-1)
        std = MATRIX_STD["blocks_and_grid"]

        def mixed(part: Array, name: str) -> Array:
            def mix(cells: Array, axis: int) -> Array:
                return TokenMap(axis, std, name=name)(cells).astype(self.dtype)

            return self._over_cells(part, mix, is_grid=name == "grid")

        both = [mixed(of_grid, "grid"), mixed(of_blocks, "blocks")]
        return self._dense(jnp.concatenate(both, axis=-1), "out", M)


class CrossGate(_Part):
    """MAXIM's cross-gating block of two streams of the same shape: y g(x) and x g(y).

    Returns (x, y): y' = y + (y g(x)) W, and x' = x + y' + (x g(y)) W. `hidden` of the configuration
    is not used.
    """

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B R C M"],
        y: Float[Array, "B R C M"],
    ) -> tuple[Float[Array, "B R C M"], Float[Array, "B R C M"]]:
        require(x.shape == y.shape, "y", y.shape, f"x's shape {x.shape}")
        M = x.shape[-1]
        part = (self.config, self.eps, self.init_std, self.dtype)

        def stream(x: Array, name: str) -> tuple[Array, Array, Array]:
            first = self._dense(x, f"first_{name}", M)
            inner = LayerNorm(self.eps, name=f"norm_{name}")(first)
            inner = jax.nn.gelu(self._dense(inner, f"in_{name}", M))
            return first, inner, _SpatialWeights(*part, name=f"weights_{name}")(inner)

        first_x, inner_x, gate_of_x = stream(x, "x")
        first_y, inner_y, gate_of_y = stream(y, "y")
        y = first_y + self._dense(inner_y * gate_of_x, "out_y", M)
        x = first_x + y + self._dense(inner_x * gate_of_y, "out_x", M)
        return x, y


class SpatialGate(Mixer):
    """gMLP's spatial gating, or MAXIM's multi-axis block: tokens mixed by gates alone."""

    config: SpatialGateConfig

    @nn.compact
    def with_cache(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T M"], Any]:
        c = self.config
        require_whole_rows(c.kind, info, cache)
        if c.over == "blocks_and_grid":
            return self._over_patches(x, grid_of(c.kind, info)), None
        width, hidden, gated = {"embed": x.shape[-1]}, {"mlp": c.hidden}, {"mlp": c.hidden // 2}
        given = {"init_std": self.init_std, "dtype": self.dtype, "has_bias": True}
        y = jax.nn.gelu(Projection(width, hidden, **given, name="in")(x))
        std = MATRIX_STD["tokens"]
        attended = self._attended(x) if c.tiny_attention else None
        y = SpatialGatingUnit(-2, std, self.norm_eps, name="gating_unit")(y, attended)
        return Projection(gated, width, **given, name="out")(y), None

    def _attended(self, x: Float[Array, "B T M"]) -> Float[Array, "B T F/2"]:
        """aMLP's tiny attention: one head, in both directions."""
        c = self.config
        given = {"init_std": self.init_std, "dtype": self.dtype}
        width, head = {"embed": x.shape[-1]}, {"heads": 1, "head_dim": c.tiny_attention}
        q = Projection(width, head, **given, has_bias=True, name="tiny_query")(x)
        # A bias of keys would add the same number to all logits of a query.
        k = Projection(width, head, **given, name="tiny_key")(x)
        v = Projection(width, head, **given, has_bias=True, name="tiny_value")(x)
        o = attention(q, k, v, causal=False)
        gated = {"mlp": c.hidden // 2}
        return Projection(head, gated, **given, has_bias=True, name="tiny_out")(o)

    def _over_patches(self, x: Float[Array, "B T M"], grid: Grid) -> Float[Array, "B T M"]:
        """The multi-axis block; tokens that are no patches get nothing."""
        patches = x[:, grid.extra :]
        on_grid = patches.reshape(x.shape[0], grid.rows, grid.columns, x.shape[-1])
        block = MultiAxisGate(
            self.config, self.norm_eps, self.init_std, self.dtype, name="multi_axis"
        )
        y = block(on_grid).reshape(patches.shape)
        return jnp.pad(y, ((0, 0), (grid.extra, 0), (0, 0)))

    @nn.nowrap
    def init_cache(self, batch: int, length: int) -> NoReturn:
        return refuse_cache(self.config.kind)

    @nn.nowrap
    def forward_flops_per_token(self, width: int, seq_len: int) -> float:
        c = self.config
        if c.over == "tokens":
            tiny = c.tiny_attention * (6 * width + c.hidden + 4 * seq_len)
            return 3 * width * c.hidden + c.hidden * seq_len + tiny
        block, cells = c.block[0] * c.block[1], c.grid[0] * c.grid[1]
        # In and out, and both branches: in, tokens, out.
        return 8 * width * width + 6 * width * c.hidden + c.hidden * (block + cells)
