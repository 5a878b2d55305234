"""A chunk of 128 tokens in another order: register r holds, in row s, token 16 s + r.

Rows change their order on the way through VMEM, where a load may skip rows: stores and loads cost
the vector units nothing. A block of 16 tokens starts 17 rows after the one before: rows 17 apart
are in different banks of memory, and rows 16 apart are not.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float

from kernels_pallas.common.tpu import LANES, Ref
from kernels_pallas.delta_scan.tpu.plan import Grid, Plan
from kernels_pallas.delta_scan.tpu.tokens import Tokens
from kernels_pallas.linear_scan.tpu.tile import ROWS, Registers, join_rows, split_rows

# Tokens of a chunk, and registers of one: blocks of BLOCK tokens have one row in each register.
CHUNK = 128
BLOCK = CHUNK // ROWS
# Rows of memory for all rows of an array.
ARRAY_ROWS = ROWS * (BLOCK + 1)
# Arrays of a head that change their order: q, k, decays, erase keys; then, back into the order of
# tokens, reads, erases and writes, and both scores.
NUM_ARRAYS = 9


def scratch_shape(heads: int, K: int) -> tuple[int, int]:
    """Of the memory in which rows change their order."""
    return heads * NUM_ARRAYS * _tiles(K) * ARRAY_ROWS, LANES


def _tiles(K: int) -> int:
    """Registers that the lanes of one array take; scores have CHUNK of them."""
    return max(K, CHUNK) // LANES


def lanes_of_tokens(lane: Array) -> Array:
    """For every place in the other order, one after the other, the token that is there."""
    return BLOCK * (lane % ROWS) + lane // ROWS


def tokens_of_lanes(lane: Array) -> Array:
    """The inverse of `lanes_of_tokens`."""
    return ROWS * (lane % BLOCK) + lane // BLOCK


class Order:
    """One array in memory: block s of num_rows rows begins at row s * (num_rows + 1)."""

    def __init__(self, ref: Ref, K: int, head: int, array: int, num_rows: int = BLOCK):
        self._ref = ref
        self._first_tile = (head * NUM_ARRAYS + array) * _tiles(K)
        self._num_rows = num_rows
        self._pitch = num_rows + 1

    def store(self, rows: Registers) -> None:
        """Registers of rows in their order."""
        for i, x in enumerate(rows):
            self._store(self._place(i), 1, x)

    def load(self, D: int) -> Registers:
        """Registers of rows in their order."""
        return [self._load(self._place(i), 1, D) for i in range(self._num_rows)]

    def store_strided(self, rows: Registers) -> None:
        """Register r has row r of every block."""
        for r, x in enumerate(rows):
            self._store(r, self._pitch, x)

    def load_strided(self, D: int) -> Registers:
        """Register r has row r of every block."""
        return [self._load(r, self._pitch, D) for r in range(self._num_rows)]

    def _place(self, register: int) -> int:
        block, row = divmod(register * ROWS, self._num_rows)
        return block * self._pitch + row

    def _rows(self, tile: int, start: int, stride: int) -> pl.Slice:
        """ROWS rows of a tile of 128 lanes."""
        first = (self._first_tile + tile) * ARRAY_ROWS
        return pl.ds(first + start, ROWS, stride=stride)

    def _store(self, start: int, stride: int, x: Array) -> None:
        if x.dtype != jnp.float32:
            x = jax.lax.bitcast_convert_type(x, jnp.float32)
        for tile in range(x.shape[1] // LANES):
            lanes = slice(tile * LANES, (tile + 1) * LANES)
            self._ref[self._rows(tile, start, stride)] = x[:, lanes]

    def _load(self, start: int, stride: int, D: int) -> Float[Array, "8 D"]:
        tiles = [self._ref[self._rows(tile, start, stride)] for tile in range(D // LANES)]
        return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=1)


class StridedTokens(Tokens):
    """`Tokens` in the other order: row 8 r + s of its arrays is token 16 s + r."""

    def __init__(
        self,
        plan: Plan,
        grid: Grid,
        refs: dict[str, Ref],
        chunk: int,
        head: int,
        num_spans: int,
        ref: Ref,
    ):
        """As `Tokens`; `ref` is memory of `scratch_shape`."""
        self._memory = ref
        super().__init__(plan, grid, refs, chunk, head, num_spans)

    def _loaded(self, name: str, num_heads: int, D: int) -> Float[Array, "C D"]:
        x = self.refs[name][self._index(num_heads, D)]
        array = ("q", "k", "decay", "erase").index(name)
        if x.dtype != jnp.bfloat16:
            order = Order(self._memory, self.plan.K, self.head, array)
            order.store(split_rows(x.astype(jnp.float32)))
            return join_rows(order.load_strided(D))
        # Words hold two tokens of bfloat16, the earlier one in their lower half.
        order = Order(self._memory, self.plan.K, self.head, array, BLOCK // 2)
        order.store(split_rows(pltpu.bitcast(x, jnp.int32)))
        rows = []
        for x in order.load_strided(D):
            words = jax.lax.bitcast_convert_type(x, jnp.int32)
            rows += [words << 16, words & jnp.int32(-(2**16))]
        return join_rows([jax.lax.bitcast_convert_type(x, jnp.float32) for x in rows])

    def _tokens_of_rows(self) -> Array:
        row = jax.lax.broadcasted_iota(jnp.int32, (CHUNK, 1), 0)
        return lanes_of_tokens(row)

    @classmethod
    def _in_order(cls, rows: Float[Array, "R C"]) -> Float[Array, "R C"]:
        lane = jax.lax.broadcasted_iota(jnp.int32, rows.shape, 1)
        source = lanes_of_tokens(lane)
        return jnp.take_along_axis(rows, source, axis=1, mode="promise_in_bounds")

    def _sums_of_spans(self, x: Float[Array, "C K"]) -> list[Float[Array, "1 K"]]:
        first, *others = split_rows(x)
        # One row for each block.
        sums = sum(others, first)
        blocks = ROWS // len(self._spans)
        rows = [slice(n * blocks, (n + 1) * blocks) for n in range(len(self._spans))]
        return [jnp.sum(sums[r], axis=0, keepdims=True) for r in rows]


def is_in_block(lane: Array, block: int, size: int) -> Bool[Array, "8 C"]:
    """The lanes of a block of `size`."""
    return (lane >= block * size) & (lane < (block + 1) * size)
