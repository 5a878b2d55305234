"""What the GPU kernels of `linear_scan` share.

The plan of a call, its arrays as the kernels take them, and where a program finds its own tile.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from kernels_pallas.common.finite import is_finite
from kernels_pallas.common.padding import padded, power_of_two, round_up
from kernels_pallas.common.precision import one_pass_allowed
from kernels_pallas.linear_scan.gpu.tile import Tile
from kernels_pallas.linear_scan.gpu.tuning import Schedule
from kernels_pallas.linear_scan.inputs import DecayKind

# Triton's indices are 32-bit.
MAX_ELEMENTS = 2**31


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
    decay: DecayKind
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
    return_final_state: bool
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

    def in_order(self, x: Array, axis: int) -> Array:
        """A small array in the order of the recurrence."""
        return jnp.flip(x, axis) if self.reverse else x

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


def beyond_indices(plan: Any, batch: int) -> str | None:
    """Why the arrays of a call of `batch` rows are too large, or None when they are not."""
    tokens = plan.T * max(plan.K, plan.V)
    states = plan.chunks * plan.K * plan.V
    largest = batch * plan.H * max(tokens, states)
    if largest >= MAX_ELEMENTS:
        return f"takes arrays and saved states below 2**31 elements, not {largest}"
    return None


def padded_tokens(T: int, x: Float[Array, "B T Hx D"], width: int) -> Array:
    """[B, T, heads, width]: a padded token writes nothing, and does not decay the state."""
    return padded(padded(x, 1, T), 3, width)


def padded_state(plan: Any, state: Array | None) -> Float[Array, "B H K V"] | None:
    """`Inputs.state`."""
    if state is None:
        return None
    return padded(padded(state, 2, plan.K), 3, plan.V)


def whole_blocks(D: int) -> int:
    """D filled up to a power of two from 16 on, or above 32 to a multiple of 32."""
    if D <= 32:
        return max(16, power_of_two(D))
    return round_up(D, 32)


def matmuls(interpret: bool, *arrays: Array) -> tuple[Any, Any]:
    """The dtype of what is multiplied, and the precision. Interpreted matmuls round nothing."""
    if interpret:
        return jnp.dtype(jnp.float32), lax.Precision.HIGHEST
    is_one_pass = one_pass_allowed()
    if is_one_pass and all(x.dtype == jnp.bfloat16 for x in arrays):
        return jnp.dtype(jnp.bfloat16), None
    preset = lax.DotAlgorithmPreset
    # float16 has 10 bits of fraction, as TF32.
    if is_one_pass and all(x.dtype.itemsize == 2 for x in arrays):
        return jnp.dtype(jnp.float32), preset.TF32_TF32_F32
    return jnp.dtype(jnp.float32), preset.TF32_TF32_F32_X3


def sum_of_heads(parts: Float[Array, "B T H D"], x: Float[Array, "B T Hx D"]) -> Array:
    """Sums the parts that query heads contribute to a shared head, in x's dtype."""
    if parts.shape == x.shape:
        return parts
    B, T, heads, D = x.shape
    return parts.reshape(B, T, heads, -1, D).sum(3).astype(x.dtype)
