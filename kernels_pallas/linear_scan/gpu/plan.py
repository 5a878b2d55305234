"""What the GPU kernels of `linear_scan` share: the plan of a call, its arrays, and where a program
finds its own.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from kernels_pallas.linear_scan.gpu.tile import Tile
from kernels_pallas.linear_scan.gpu.tuning import Schedule


class Plan(NamedTuple):
    """What of a call is static. T, K and V are as the kernels see them: whole chunks and blocks."""

    T: int
    H: int
    Hk: int
    Hv: int
    K: int
    V: int
    decay: str  # "vector", "scalar" or "none"
    inclusive: bool
    reverse: bool
    scale: float
    chunk: int
    segments: int  # parts of the sequence that are walked side by side
    operand: jnp.dtype  # of what is multiplied, and of what kernels hand to each other
    precision: object  # of matmuls of float32 operands
    out_dtype: jnp.dtype
    schedule: Schedule
    interpret: bool

    @property
    def chunks(self) -> int:
        return self.T // self.chunk

    @property
    def tile(self) -> Tile:
        return Tile(self.operand, self.precision, self.inclusive)

    def key_head(self, h):
        return h // (self.H // self.Hk)

    def value_head(self, h):
        return h // (self.H // self.Hv)

    def place(self, n):
        """The n-th chunk in the order of the recurrence, as it lies in memory."""
        return self.chunks - 1 - n if self.reverse else n

    def rows(self) -> Array:
        """The rows of a chunk [C] in the order of the recurrence, as they lie in memory."""
        row = lax.iota(jnp.int32, self.chunk)
        return self.chunk - 1 - row if self.reverse else row


class Inputs(NamedTuple):
    """Big arrays run along T as the caller's, small ones (factors, sums) in the order of the
    recurrence.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hv V"]
    logs: (
        Float[Array, "B T H K"] | Float[Array, "#B H T"] | None
    )  # scalar ones in the order of the recurrence
    starts: (
        Float[Array, "B T"] | None
    )  # 1 where the state is emptied before the token; in that order too
    bonus: Float[Array, "H K"] | None
    state: Float[Array, "B H K V"] | None


def block_rows(rows: Array, first, size: int):
    """The index of a tile: those rows, `size` columns from `first`."""
    return rows[:, None], (first + lax.iota(jnp.int32, size))[None, :]


def load(ref, *index) -> Array:
    """A tile in float32."""
    return pltriton.load(ref.at[index]).astype(jnp.float32)
