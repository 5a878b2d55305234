"""What the GPU kernels of `linear_scan` share.

The plan of a call, its arrays as the kernels take them, and where a program finds its own tile.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from kernels_pallas.common.finite import is_finite
from kernels_pallas.linear_scan.gpu.tile import Tile
from kernels_pallas.linear_scan.gpu.tuning import Schedule


class Plan(NamedTuple):
    """The static arguments of a call. T, K and V are padded to whole chunks and blocks.

    Attributes:
      chunk: tokens in a chunk.
      segments: parts of the sequence that are scanned side by side.
      operand: the dtype of what is multiplied, and of what kernels pass to each other.
      precision: of products of float32 operands.
      fast_exp: whether exponentials are one instruction, with a relative error of 2^-22.
    """

    T: int
    H: int
    Hk: int
    Hv: int
    K: int
    V: int
    decay: Literal["vector", "scalar", "none"]
    inclusive: bool
    reverse: bool
    scale: float
    chunk: int
    segments: int
    operand: Any
    precision: Any
    fast_exp: bool
    out_dtype: Any
    schedule: Schedule
    interpret: bool

    @property
    def chunks(self) -> int:
        return self.T // self.chunk

    @property
    def tile(self) -> Tile:
        return Tile(self.operand, self.precision, self.inclusive, self.fast_exp)

    def key_head(self, h):
        """The key head of query head h."""
        return h // (self.H // self.Hk)

    def value_head(self, h):
        """The value head of query head h."""
        return h // (self.H // self.Hv)

    def place(self, n):
        """Where the n-th chunk in the order of the recurrence lies in memory."""
        return self.chunks - 1 - n if self.reverse else n

    def rows(self) -> Array:
        """The rows of a chunk [C] in the order of the recurrence, as they lie in memory."""
        row = lax.iota(jnp.int32, self.chunk)
        return self.chunk - 1 - row if self.reverse else row


class Inputs(NamedTuple):
    """The arrays of a call, padded.

    Large arrays run along T as the caller's. Small ones, scalar logs and `starts`, are in the order
    of the recurrence.

    Attributes:
      logs: vector logs [B, T, H, K] as the caller gave them, scalar ones [B, H, T] with the resets
        of segments in them, and no less than LOG_ZERO.
      starts: 1 where the state is reset before the token.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hv V"]
    logs: Float[Array, "#B T H K"] | Float[Array, "#B H T"] | None
    starts: Float[Array, "B T"] | None
    bonus: Float[Array, "H K"] | None
    state: Float[Array, "B H K V"] | None


def block_rows(rows: Array, first, size: int) -> tuple[Array, Array]:
    """The index of a tile: these rows, and `size` columns from `first` on."""
    columns = first + lax.iota(jnp.int32, size)
    return rows[:, None], columns[None, :]


def load(ref, *index) -> Array:
    """A tile in float32."""
    return pltriton.load(ref.at[index]).astype(jnp.float32)


def over_blocks(count: int, body, carry):
    """carry = body(block, carry) for each block; a single one needs no loop."""
    if count == 1:
        return body(0, carry)
    return lax.fori_loop(0, count, body, carry)


def count_bad(x: Array) -> Int[Array, ""]:
    """How many elements of a tile are NaN or infinite."""
    is_bad = jnp.logical_not(is_finite(x))
    return jnp.sum(is_bad.astype(jnp.int32), dtype=jnp.int32)
