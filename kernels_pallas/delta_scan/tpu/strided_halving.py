"""The halving of `vector_decay.py` without work inside of registers, for the forward kernel.

A merge of blocks of h < 8 tokens that are neighbors in one register rotates rows and selects: three
merges cost more than all others. Here the first four merges see the chunk of 128 tokens in another
order: register r holds, in row s, token 16 s + r. Then the partner of a block is another register,
in these merges too. After them the rows go back into their order for the merges of 16 tokens and
more, which want whole registers of neighbors.

The scores of the first four merges, rows and columns in the other order, go back the same way. Only
pairs of tokens in the same block of 16, which have the same s, are meant.
"""

from collections.abc import Generator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from kernels_pallas.common.tpu import Ref
from kernels_pallas.delta_scan.tpu.plan import SPAN
from kernels_pallas.delta_scan.tpu.strided import (
    BLOCK,
    CHUNK,
    NUM_ARRAYS,
    Order,
    is_in_block,
    tokens_of_lanes,
)
from kernels_pallas.delta_scan.tpu.tile import ChunkTerms, lanes_of
from kernels_pallas.linear_scan.tpu.tile import (
    NT,
    ROWS,
    Registers,
    TileOptions,
    join_rows,
    matmul,
    split_rows,
)


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
      reads, erases: q and -e times the decay of their own token, in the order of `strided.py`.
      k: the keys, in this order.
      decay: of each token and channel, in this order.
      totals: the decay of every span, as the exponential of the sum of logs.
      diagonal: what each query reads of its own token's write, in this order.
      ref: memory of `scratch_shape`.
      head: of the block, to have a part of `ref` of its own.

    Returns:
      The terms.
    """
    K = k.shape[1]
    is_rounded = options.operand == jnp.bfloat16
    rows = _Rows(*map(split_rows, (reads, erases, k, decay)))
    lane = lanes_of(CHUNK)
    zeros = jnp.zeros(lane.shape, jnp.float32)
    read_scores = [
        jnp.where(is_in_block(lane, r, ROWS), own, zeros)
        for r, own in enumerate(split_rows(diagonal))
    ]
    erase_scores = [zeros] * BLOCK
    # Blocks of 1 and 2, then of 4 and 8 tokens, which are as many registers.
    for first_h in (1, 4):
        rows, product = _two_merges(options, rows, first_h)
        yield
        for h, new in _scores_of(product, first_h):
            _place(read_scores, new.reads, h, lane)
            _place(erase_scores, new.erases, h, lane)

    # Back into the order of tokens.
    orders = [Order(ref, K, head, array) for array in range(4, NUM_ARRAYS)]
    for x, registers in zip(orders, (*rows[:3], read_scores, erase_scores)):
        x.store_strided(registers)
    # One row [1, K] for each block of 16 tokens.
    (all_totals,) = rows.totals
    block_totals = [all_totals[s : s + 1] for s in range(ROWS)]
    yield
    of_reads, of_erases, of_writes, of_read_scores, of_erase_scores = orders
    rows = _Rows(of_reads.load(K), of_erases.load(K), of_writes.load(K), block_totals)
    read_blocks = _side_by_side(of_read_scores.load(CHUNK))
    erase_blocks = _side_by_side(of_erase_scores.load(CHUNK))
    # The scores of queries are kept as matmuls see them, two rows of bfloat16 in one of words.
    read_words = [
        jnp.where(is_in_block(lane, s, BLOCK), x, zeros)
        for s in range(ROWS)
        for x in (_words(read_blocks) if is_rounded else read_blocks)
    ]
    # Blocks of 16 and 32 tokens: of 2 and 4 registers.
    rows, product = _two_merges(options, rows, BLOCK // ROWS)
    yield
    rows_of_erases = [[erase_blocks[1]] * ROWS]
    for h, new in _scores_of(product, BLOCK // ROWS):
        rows_of_erases.append(new.erases)
        new_words = _words(new.reads) if is_rounded else new.reads
        size = h * len(read_words) // BLOCK
        _place(read_words, new_words, size, lane, SPAN)

    def operand(registers: Registers) -> Array:
        return join_rows(registers).astype(options.operand)

    return ChunkTerms(
        read_scores=_from_words(read_words) if is_rounded else join_rows(read_words),
        # Blocks of 8: the left one of each block of 16, and the right one.
        erase_blocks=jnp.where((lane & ROWS) == 0, erase_blocks[0], erase_blocks[1]),
        erase_rows=tuple(rows_of_erases),
        reads=operand(rows.reads),
        erases=operand(rows.erases),
        writes=operand(rows.writes),
        totals=totals,
    )


class _Rows(NamedTuple):
    """Registers of a chunk, and the total decay of every block."""

    reads: Registers
    erases: Registers
    writes: Registers
    totals: Registers


class _Scores(NamedTuple):
    """The scores of one merge: registers of later blocks, against all tokens."""

    reads: Registers
    erases: Registers


def _two_merges(
    options: TileOptions,
    rows: _Rows,
    h: int,
) -> tuple[_Rows, Float[Array, "rows C"]]:
    """Merges blocks of h registers, then of 2 h.

    A merge's scores want the writes of earlier blocks only, half of them. So both halves go into
    the matrix unit as one operand, which takes longer to load than to multiply by.

    Args:
      options: the static arguments.
      rows: before.
      h: registers in a block.

    Returns:
      rows after both, and all scores, see `_scores_of`.
    """
    num_registers = len(rows.reads)
    later_rows = []
    writes = []
    sizes = (h, 2 * h)
    for size in sizes:
        later_rows += [x for r, x in enumerate(rows.reads) if r & size]
        later_rows += [x for r, x in enumerate(rows.erases) if r & size]
        writes.append(rows.writes)
        rows = _merged(rows, size)
    columns = []
    for r in range(num_registers):
        if not r & 2 * h:
            columns.append(writes[1][r])
        elif not r & h:
            columns.append(writes[0][r])
        else:
            # Where neither merge has anything: what the second merge has pushed out of its place.
            columns.append(writes[0][r - 3 * h])
    return rows, matmul(options, join_rows(later_rows), join_rows(columns), NT)


def _scores_of(product: Float[Array, "rows C"], h: int) -> list[tuple[int, _Scores]]:
    """The scores of both of `_two_merges`, each with its h, in the lanes of their tokens."""
    registers = split_rows(product)
    num_later = len(registers) // 4
    parts = [registers[n * num_later : (n + 1) * num_later] for n in range(4)]
    later = [r for r in range(2 * num_later) if r & h]
    for part in parts[:2]:
        for i, r in enumerate(later):
            if not r & 2 * h:
                # Back from where the second merge had left room.
                part[i] = pltpu.roll(part[i], CHUNK - 3 * h * ROWS, 1)
    return [(h, _Scores(*parts[:2])), (2 * h, _Scores(*parts[2:]))]


def _merged(rows: _Rows, h: int) -> _Rows:
    """Rows after a merge of blocks of h registers."""
    reads = list(rows.reads)
    erases = list(rows.erases)
    writes = list(rows.writes)
    for r in range(len(reads)):
        partner = rows.totals[r // h ^ 1]
        if r & h:
            reads[r] = reads[r] * partner
            erases[r] = erases[r] * partner
        else:
            writes[r] = writes[r] * partner
    totals = [a * b for a, b in zip(rows.totals[::2], rows.totals[1::2])]
    return _Rows(reads, erases, writes, totals)


def _place(
    scores: Registers,
    new: Registers,
    h: int,
    lane: Int[Array, "8 C"],
    span: int = CHUNK,
) -> None:
    """Writes a merge's scores into those of the chunk.

    A row takes everything on the earlier side of its block, but nothing of another span. What is
    too early for this merge is overwritten by the merge where it belongs, as they come in order.

    Args:
      scores: registers of the chunk, changed in place.
      new: those of later blocks.
      h: registers in a block.
      lane: of every element.
      span: tokens of a span.
    """
    tokens_in_register = CHUNK // len(scores)
    new_registers = iter(new)
    for r in range(len(scores)):
        if r & h:
            start = r // h * h * tokens_in_register
            is_earlier = lane < start
            if span < CHUNK:
                is_earlier &= lane >= start // span * span
            scores[r] = jnp.where(is_earlier, next(new_registers), scores[r])


def _side_by_side(by_block: Registers) -> Registers:
    """The blocks of 16 rows on the diagonal of scores, side by side in two registers.

    From the rows of one block after the other, of which the columns of block s are lanes 8 j + s.
    """
    lane = lanes_of(CHUNK)
    packed = []
    for half in range(2):
        x = by_block[half]
        for s in range(1, ROWS):
            x = jnp.where((lane & (ROWS - 1)) == s, by_block[2 * s + half], x)
        source = tokens_of_lanes(lane)
        packed.append(jnp.take_along_axis(x, source, axis=1, mode="promise_in_bounds"))
    return packed


def _words(rows: Registers) -> Registers:
    """Rows as bfloat16, two in one of words, which are called float32."""
    words = pltpu.bitcast(join_rows(rows).astype(jnp.bfloat16), jnp.float32)
    return split_rows(words)


def _from_words(words: Registers) -> Array:
    """The inverse of `_words`, joined."""
    return pltpu.bitcast(join_rows(words), jnp.bfloat16)
