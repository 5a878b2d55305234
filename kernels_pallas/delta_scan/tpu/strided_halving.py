"""The halving of `vector_decay.py` without work inside of registers, for the forward kernel.

A merge of blocks of h < 8 tokens that are neighbors in one register rotates rows and selects: three
merges cost more than all others. Here the first four merges see the chunk of 128 tokens in another
order: register r holds, in row s, token 16 s + r. Then the partner of a block is another register,
in these merges too. After them the rows go back into their order for the merges of 16 tokens and
more, which want whole registers of neighbors.

Rows change their order on the way through VMEM, where a load may skip rows: stores and loads cost
the vector units nothing. Token 16 s + r lies in row 17 s + r, as rows 17 apart are in different
banks of memory, and rows 16 apart are not.

The scores of the first four merges, rows and columns in the other order, go the same way. Only
pairs of tokens in the same block of 16, which have the same s, are meant.
"""

from collections.abc import Generator

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels_pallas.common.tpu import Ref
from kernels_pallas.delta_scan.tpu.tile import ChunkTerms, lanes_of, later_registers
from kernels_pallas.linear_scan.tpu.tile import (
    LANES,
    NT,
    ROWS,
    Registers,
    TileOptions,
    join_rows,
    matmul,
    split_rows,
)
from kernels_pallas.linear_scan.tpu.vector_decay import is_later_block

# Tokens of a chunk, and registers of one: blocks of BLOCK tokens have one row in each register.
CHUNK = 128
BLOCK = CHUNK // ROWS
PITCH = BLOCK + 1
# The arrays that change their order: reads, erases, writes and decays, then both scores.
NUM_ARRAYS = 6


def scratch_shape(heads: int, K: int) -> tuple[int, int]:
    """Of the memory in which rows change their order."""
    return heads * NUM_ARRAYS * _tiles(K) * ROWS * PITCH, LANES


def _tiles(K: int) -> int:
    """Registers that the lanes of one array take; scores have CHUNK of them."""
    return max(K, CHUNK) // LANES


class _Order:
    """One array [CHUNK, D] in memory, row s * PITCH + r for token BLOCK s + r."""

    def __init__(self, ref: Ref, K: int, head: int, array: int):
        self._ref = ref
        self._first_tile = (head * NUM_ARRAYS + array) * _tiles(K)

    def store(self, rows: Registers) -> None:
        """Registers of tokens in their order."""
        for i, x in enumerate(rows):
            s, r = divmod(i * ROWS, BLOCK)
            self._store(s * PITCH + r, 1, x)

    def load(self, D: int) -> Registers:
        """Registers of tokens in their order."""
        rows = []
        for i in range(BLOCK):
            s, r = divmod(i * ROWS, BLOCK)
            rows.append(self._load(s * PITCH + r, 1, D))
        return rows

    def store_strided(self, rows: Registers) -> None:
        """Register r has the tokens of number r in their blocks."""
        for r, x in enumerate(rows):
            self._store(r, PITCH, x)

    def load_strided(self, D: int) -> Registers:
        """Register r has the tokens of number r in their blocks."""
        return [self._load(r, PITCH, D) for r in range(BLOCK)]

    def _rows(self, tile: int, start: int, stride: int) -> pl.Slice:
        """ROWS rows of a tile of 128 lanes."""
        first = (self._first_tile + tile) * ROWS * PITCH
        return pl.ds(first + start, ROWS, stride=stride)

    def _store(self, start: int, stride: int, x: Float[Array, "8 D"]) -> None:
        for tile in range(x.shape[1] // LANES):
            lanes = slice(tile * LANES, (tile + 1) * LANES)
            self._ref[self._rows(tile, start, stride)] = x[:, lanes]

    def _load(self, start: int, stride: int, D: int) -> Float[Array, "8 D"]:
        tiles = [self._ref[self._rows(tile, start, stride)] for tile in range(D // LANES)]
        return tiles[0] if len(tiles) == 1 else jnp.concatenate(tiles, axis=1)


def chunk_terms(
    options: TileOptions,
    reads: Float[Array, "C K"],
    erases: Float[Array, "C K"],
    k: Float[Array, "C K"],
    decay: Float[Array, "C K"],
    totals: tuple[Float[Array, "1 K"], ...],
    diagonal: Float[Array, "C 1"],
    ref: Ref,
    head: int,
) -> Generator[None, None, ChunkTerms]:
    """The terms of a chunk of 128 tokens (a generator).

    Args:
      options: the static arguments.
      reads, erases: q and -e times the decay of their own token.
      k: the keys.
      decay: of each token and channel.
      totals: the decay of every span, as the exponential of the sum of logs.
      diagonal: what each query reads of its own token's write.
      ref: memory of `scratch_shape`.
      head: of the block, to have a part of `ref` of its own.

    Returns:
      The terms.
    """
    K = k.shape[1]
    span = CHUNK // len(totals)
    orders = [_Order(ref, K, head, array) for array in range(NUM_ARRAYS)]
    for order, x in zip(orders, (reads, erases, k, decay)):
        order.store(split_rows(x))
    read_rows, erase_rows, write_rows, block_totals = [x.load_strided(K) for x in orders[:4]]
    yield

    def product(later_reads: Registers, later_erases: Registers, writes: Registers):
        """The scores of later blocks: rows of queries, and rows of erase keys."""
        rows = join_rows(later_reads + later_erases)
        found = split_rows(matmul(options, rows, join_rows(writes), NT))
        return found[: len(later_reads)], found[len(later_reads) :]

    # Blocks of h tokens, which are blocks of h registers.
    lane = lanes_of(CHUNK)
    zeros = jnp.zeros(lane.shape, jnp.float32)
    read_scores = [zeros] * BLOCK
    erase_scores = [zeros] * BLOCK
    h = 1
    while h < BLOCK:
        later = [r for r in range(BLOCK) if r & h]
        new_reads, new_erases = product(
            [read_rows[r] for r in later],
            [erase_rows[r] for r in later],
            write_rows,
        )
        for r, read_score, erase_score in zip(later, new_reads, new_erases):
            # Everything on the earlier side of the row's block: what is too early for this merge is
            # overwritten by the merge where it belongs.
            is_earlier = lane < r // h * h * ROWS
            read_scores[r] = jnp.where(is_earlier, read_score, read_scores[r])
            erase_scores[r] = jnp.where(is_earlier, erase_score, erase_scores[r])
        for r in range(BLOCK):
            partner = block_totals[r // h ^ 1]
            if r & h:
                read_rows[r] = read_rows[r] * partner
                erase_rows[r] = erase_rows[r] * partner
            else:
                write_rows[r] = write_rows[r] * partner
        block_totals = [a * b for a, b in zip(block_totals[::2], block_totals[1::2])]
        h *= 2
        yield

    # Back into the order of tokens.
    for order, rows in zip(orders, (read_rows, erase_rows, write_rows)):
        order.store_strided(rows)
    read_rows, erase_rows, write_rows = [x.load(K) for x in orders[:3]]
    read_blocks = _side_by_side(orders[4], read_scores)
    erase_blocks = _side_by_side(orders[5], erase_scores)
    read_blocks = _with_diagonal(read_blocks, split_rows(diagonal))
    (all_totals,) = block_totals
    # One row [1, K] for each block.
    block_totals = [all_totals[s : s + 1] for s in range(ROWS)]
    yield

    # The scores of queries as matmuls see them, two rows of bfloat16 in one of words.
    read_words = [
        jnp.where((lane >= BLOCK * s) & (lane < BLOCK * (s + 1)), x, jnp.zeros_like(x))
        for s in range(ROWS)
        for x in _words(options, read_blocks)
    ]
    rows_of_erases = [[erase_blocks[1]] * ROWS]
    words_in_block = len(read_words) // ROWS
    h = BLOCK
    while h < span:
        new_reads, new_erases = product(
            later_registers(read_rows, h),
            later_registers(erase_rows, h),
            write_rows,
        )
        rows_of_erases.append(new_erases)
        new_words = iter(_words(options, new_reads))
        for i in range(len(read_words)):
            first_token = i // words_in_block * BLOCK
            if first_token & h:
                # Not of another span.
                first_of_span = first_token // span * span
                is_earlier = (lane >= first_of_span) & (lane < first_token // h * h)
                read_words[i] = jnp.where(is_earlier, next(new_words), read_words[i])
        for i in range(BLOCK):
            partner = block_totals[i * ROWS // h ^ 1]
            if is_later_block(i, h, False):
                read_rows[i] = read_rows[i] * partner
                erase_rows[i] = erase_rows[i] * partner
            else:
                write_rows[i] = write_rows[i] * partner
        block_totals = [a * b for a, b in zip(block_totals[::2], block_totals[1::2])]
        h *= 2
        yield

    def operand(rows: Registers) -> Array:
        return join_rows(rows).astype(options.operand)

    return ChunkTerms(
        read_scores=_from_words(options, read_words),
        # Blocks of 8: the left one of each block of 16, and the right one.
        erase_blocks=jnp.where((lane & ROWS) == 0, erase_blocks[0], erase_blocks[1]),
        erase_rows=tuple(rows_of_erases),
        reads=operand(read_rows),
        erases=operand(erase_rows),
        writes=operand(write_rows),
        totals=totals,
    )


def _side_by_side(order: _Order, scores: Registers) -> Registers:
    """The blocks of 16 rows on the diagonal of scores, side by side in two registers."""
    order.store_strided(scores)
    # Registers 2 s and 2 s + 1 have the rows of block s; columns of it are lanes 8 j + s.
    by_block = order.load(CHUNK)
    lane = lanes_of(CHUNK)
    packed = []
    for half in range(2):
        x = by_block[half]
        for s in range(1, ROWS):
            x = jnp.where((lane & (ROWS - 1)) == s, by_block[2 * s + half], x)
        packed.append(_with_lanes_in_order(x))
    return packed


def _with_lanes_in_order(x: Float[Array, "8 C"]) -> Float[Array, "8 C"]:
    """Lane 8 j + s becomes lane 16 s + j."""
    lane = lanes_of(CHUNK)
    source = ROWS * (lane % BLOCK) + lane // BLOCK
    return jnp.take_along_axis(x, source, axis=1, mode="promise_in_bounds")


def _with_diagonal(blocks: Registers, diagonal: Registers) -> Registers:
    """Writes columns [8, 1] onto the diagonals of blocks that lie side by side."""
    lane = lanes_of(CHUNK)
    row = lax.broadcasted_iota(jnp.int32, lane.shape, 0)
    result = []
    for half, x in enumerate(blocks):
        is_diagonal = (lane & (BLOCK - 1)) == row + half * ROWS
        of_rows = jnp.broadcast_to(diagonal[half], lane.shape)
        for s in range(1, ROWS):
            of_rows = jnp.where(lane >= s * BLOCK, diagonal[2 * s + half], of_rows)
        result.append(jnp.where(is_diagonal, of_rows, x))
    return result


def _words(options: TileOptions, rows: Registers) -> list[Array]:
    """Registers as matmuls see them: two of bfloat16 are one of words."""
    if options.operand != jnp.bfloat16:
        return rows
    return split_rows(pltpu.bitcast(join_rows(rows).astype(jnp.bfloat16), jnp.int32))


def _from_words(options: TileOptions, words: list[Array]) -> Array:
    """The inverse of `_words`, joined."""
    matrix = join_rows(words)
    return pltpu.bitcast(matrix, jnp.bfloat16) if options.operand == jnp.bfloat16 else matrix
