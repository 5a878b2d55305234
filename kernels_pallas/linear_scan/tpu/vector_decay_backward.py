"""The derivative of the halving of `vector_decay.py`, by hand.

The backward kernel goes up the halving again, then down. A merge of blocks E (earlier) and L
(later)

    scores[L, E] = reads[L] writes[E]^T
    reads[L] *= total[E]
    writes[E] *= total[L]
    total = total[E] total[L]

needs the reads of L and the writes of E, never the others: z has the one or the other, row by row.
With `pairs`, the scores' cotangent in the rows of L and its transpose in those of E, one product
is what the scores send back to both:

    dreads[L] = dscores[L, E] writes[E] + total[E] dreads'[L]
    dwrites[E] = dscores[L, E]^T reads[L] + total[L] dwrites'[E]      dz = pairs z + partner dz'

The log of total[E] receives what total's log received plus sum(reads dreads) over L after the
merge, and that of total[L] the same plus sum(writes dwrites) over E: the sum of z partner dz' over
the partner's rows. So the gate's gradient arrives at the single tokens as a sum of exactly the
products that contain it: no running sum over tokens, no difference q dq - k dk, nothing that
cancels.
"""

from collections.abc import Callable, Generator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float, Int

from kernels_pallas.linear_scan.tpu.tile import (
    ROWS,
    ChunkCotangents,
    Registers,
    TileOptions,
    join_rows,
    matmul,
    split_rows,
)
from kernels_pallas.linear_scan.tpu.vector_decay import (
    Merge,
    exchange_sides,
    is_later_block,
    swap_partners,
)

WORD_BITS = 32


class PairBits(NamedTuple):
    """All bits set where a pair of tokens (i, j) is meant, as `as_bits` has the scores.

    Attributes:
      later: where i is later than j.
      of_merge: by h, the pairs that the merge of blocks of h tokens brings together.
    """

    later: Int[Array, "words C"]
    of_merge: dict[int, Int[Array, "words C"]]


def pair_bits(options: TileOptions, chunk: int) -> PairBits:
    """The same for all heads and chunks."""

    def is_later(i: Array, j: Array) -> Array:
        return i < j if options.reverse else i > j

    of_merge = {}
    h = 1
    while h < chunk:
        of_merge[h] = _bits_where(options, chunk, _merged_by(h))
        h *= 2
    return PairBits(_bits_where(options, chunk, is_later), of_merge)


def _merged_by(h: int) -> Callable[[Array, Array], Array]:
    """Whether h is the highest bit in which two tokens differ."""
    shift = h.bit_length() - 1
    return lambda i, j: (i ^ j) >> shift == 1


def _bits_where(
    options: TileOptions,
    chunk: int,
    holds: Callable[[Array, Array], Array],
) -> Int[Array, "words C"]:
    # A word holds one row of float32, or two rows of bfloat16 below each other.
    rows_in_word = 4 // options.operand.itemsize
    bits_of_row = WORD_BITS // rows_in_word
    shape = (chunk // rows_in_word, chunk)
    first_row = lax.broadcasted_iota(jnp.int32, shape, 0) * rows_in_word
    column = lax.broadcasted_iota(jnp.int32, shape, 1)
    bits = jnp.zeros(shape, jnp.int32)
    for row in range(rows_in_word):
        # Shifted right from -1 without its sign, then to the row's place.
        ones = (1 << bits_of_row) - 1 << row * bits_of_row
        signed = ones - (1 << WORD_BITS) if ones >> WORD_BITS - 1 else ones
        bits |= jnp.where(holds(first_row + row, column), jnp.int32(signed), 0)
    return bits


def as_bits(options: TileOptions, x: Float[Array, "C D"]) -> Int[Array, "words D"]:
    """The operand of a matmul as whole words: its rows are masked by `&`, two of bfloat16 at a
    time.
    """
    return pltpu.bitcast(x.astype(options.operand), jnp.int32)


def backward(
    options: TileOptions,
    bits: PairBits,
    merges: list[Merge],
    cotangents: ChunkCotangents,
    dscores_transposed: Float[Array, "C C"],
) -> Generator[None, None, tuple[Array, Array, Array]]:
    """The derivative of `chunk_terms` (a generator).

    Args:
      options: the static arguments.
      bits: of `pair_bits`.
      merges: of `halve_and_keep`.
      cotangents: those of the terms.
      dscores_transposed: the transpose of the scores' cotangent.

    Returns:
      dreads and dwrites of single tokens, before any merge, and dlog_decay without what the token's
      own read sees; [C, K] each.
    """
    in_rows = as_bits(options, cotangents.dscores) & bits.later
    in_columns = as_bits(options, dscores_transposed) & ~bits.later
    pairs = in_rows | in_columns
    sides = (split_rows(cotangents.dreads), split_rows(cotangents.dwrites))
    # One block, the whole chunk: its log is that of the total.
    dlog = [cotangents.dlog_total]

    def scores_to_z(merge: Merge) -> Registers:
        of_merge = pltpu.bitcast(pairs & bits.of_merge[merge.h], options.operand)
        return split_rows(matmul(options, of_merge, merge.z))

    # One product ahead, so that the matrix unit is busy while a merge is undone.
    yield
    ahead = scores_to_z(merges[-1])
    for i in reversed(range(len(merges))):
        merge = merges[i]
        products = ahead
        if i > 0:
            ahead = scores_to_z(merges[i - 1])
        if merge.h >= ROWS:
            dreads, dwrites, dlog = _unmerge_blocks(options, merge, products, *sides, dlog)
            sides = (dreads, dwrites)
        else:
            if 2 * merge.h == ROWS:
                # From reads and writes to the sides of this merge.
                sides = exchange_sides(sides, ROWS, merge.h, options.reverse)
            dz_after, rest = sides
            dz, dlog = _unmerge_in_registers(merge, products, dz_after, dlog)
            sides = exchange_sides((dz, rest), merge.h, merge.h // 2, options.reverse)
        yield
    dreads, dwrites = sides
    return join_rows(dreads), join_rows(dwrites), join_rows(dlog)


def _unmerge_in_registers(
    merge: Merge,
    products: Registers,
    dz_after: Registers,
    dlog: Registers,
) -> tuple[Registers, Registers]:
    """(dz, dlog) after a merge of blocks of h < 8 rows -> before it.

    The rows of a block are still to be summed in dlog, so every row adds what its partner has.
    """
    z = split_rows(merge.z.astype(jnp.float32))
    dz = []
    new_dlog = []
    for i, product in enumerate(products):
        # Of the row that the merge multiplied with its partner's total.
        through_partner = dz_after[i] * merge.partners[i]
        received = z[i] * through_partner
        dz.append(through_partner + product)
        new_dlog.append(dlog[i] + swap_partners(dlog[i] + received, merge.h))
    return dz, new_dlog


def _unmerge_blocks(
    options: TileOptions,
    merge: Merge,
    products: Registers,
    dreads: Registers,
    dwrites: Registers,
    dlog: Registers,
) -> tuple[Registers, Registers, Registers]:
    """(dreads, dwrites, dlog) after a merge of blocks of h >= 8 rows -> before it.

    dlog has one register [8, K] for each block of 2h rows, and gets one for each of h: the sums
    over its 8 rows are still to come.
    """
    registers_in_block = merge.h // ROWS
    z = split_rows(merge.z.astype(jnp.float32))
    new_dreads = list(dreads)
    new_dwrites = list(dwrites)
    # By block, what its partner's log receives.
    sent: list = [None] * (2 * len(dlog))
    for i, product in enumerate(products):
        block = i // registers_in_block
        side = new_dreads if is_later_block(i, merge.h, options.reverse) else new_dwrites
        dz_after = side[i] * merge.partners[block]
        received = z[i] * dz_after
        sent[block] = received if sent[block] is None else sent[block] + received
        side[i] = dz_after + product
    new_dlog = [dlog[block // 2] + sent[block ^ 1] for block in range(len(sent))]
    return new_dreads, new_dwrites, new_dlog
