"""The derivative of the halving of `vector_decay.py`, by hand.

As `linear_scan/tpu/vector_decay_backward.py`, which has the argument, with two sets of rows that
read. A merge of blocks E (earlier) and L (later)

    scores[L, E] = reads[L] writes[E]^T
    reads[L] *= total[E]
    writes[E] *= total[L]
    total = total[E] total[L]

sends to the log of total[E] what total's log received plus sum(reads' dreads) over L, of queries
and erase keys, and to the log of total[L] the same plus sum(writes' dwrites) over E.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.delta_scan.tpu.tile import (
    ChunkCotangents,
    ChunkTerms,
    earlier_registers,
    later_registers,
)
from kernels_pallas.delta_scan.tpu.vector_decay import Merge
from kernels_pallas.linear_scan.tpu.tile import (
    ROWS,
    Registers,
    TileOptions,
    join_rows,
    matmul,
    split_rows,
)
from kernels_pallas.linear_scan.tpu.vector_decay import (
    is_later_block,
    pack_pairs,
    row_has_bit,
    swap_partners,
    unpack_pairs,
)


class _Rows(NamedTuple):
    """Queries, erase keys and keys of a chunk, or their cotangents."""

    reads: Registers
    erases: Registers
    writes: Registers


class _Scores(NamedTuple):
    """The cotangents of both scores, those of their transposes, and the level of every element."""

    levels: Registers
    levels_transposed: Registers
    reads: Registers
    erases: Registers
    reads_transposed: Registers
    erases_transposed: Registers


def backward(
    options: TileOptions,
    levels: Int[Array, "C C"],
    levels_transposed: Int[Array, "C C"],
    merges: list[Merge],
    terms: ChunkTerms,
    cotangents: ChunkCotangents,
) -> tuple[Array, Array, Array, Array]:
    """The derivative of `chunk_terms`.

    Args:
      options: the static arguments.
      levels: of `merge_levels`.
      levels_transposed: of `merge_levels` in reverse.
      merges: of `chunk_terms`.
      terms: of the chunk.
      cotangents: those of the terms.

    Returns:
      dreads, derases and dwrites of single tokens, before any merge, and dlog_decay without what
      the token's own reads see; [C, K] each.
    """
    scores = _Scores(
        levels=split_rows(levels),
        levels_transposed=split_rows(levels_transposed),
        reads=split_rows(cotangents.dread_scores),
        erases=split_rows(cotangents.derase_scores),
        # Rows of the cotangents are used for dreads, columns for dwrites.
        reads_transposed=split_rows(jnp.transpose(cotangents.dread_scores)),
        erases_transposed=split_rows(jnp.transpose(cotangents.derase_scores)),
    )
    drows = _Rows(
        reads=split_rows(cotangents.dreads),
        erases=split_rows(cotangents.derases),
        writes=split_rows(cotangents.dwrites),
    )
    # One block, the whole chunk: its log is that of the total.
    dlog = [cotangents.dlog_total]
    # The results of a merge are the operands of the next one, rounded as the matmuls saw them.
    results = [(merge.reads, merge.erases, merge.writes) for merge in merges[1:]]
    results.append((terms.reads, terms.erases, terms.writes))
    for merge, results_of_merge in zip(reversed(merges), reversed(results)):
        rows = _Rows._make(split_rows(x.astype(jnp.float32)) for x in results_of_merge)
        if merge.h < ROWS:
            dlog = _split_dlog_in_registers(merge.h, dlog, rows, drows)
            drows = _unmerge_in_registers(options, merge, scores, drows)
        else:
            dlog = _split_dlog_of_blocks(merge.h, dlog, rows, drows)
            drows = _unmerge_blocks(options, merge, scores, drows)
    return (
        join_rows(drows.reads),
        join_rows(drows.erases),
        join_rows(drows.writes),
        join_rows(dlog),
    )


def _split_dlog_in_registers(
    h: int,
    dlog: Registers,
    rows: _Rows,
    drows: _Rows,
) -> Registers:
    """`dlog` of blocks of 2h < 16 rows -> of blocks of h rows; the rows are those after the merge.

    The rows of a block are still to be summed, so every row adds what its partner has.
    """
    # What the total of the partner's block was multiplied by: a later block's reads and erases, an
    # earlier block's writes.
    is_later = row_has_bit(h, dlog[0])
    split = []
    for i, received in enumerate(dlog):
        of_reads = rows.reads[i] * drows.reads[i] + rows.erases[i] * drows.erases[i]
        of_writes = rows.writes[i] * drows.writes[i]
        products = jnp.where(is_later, of_reads, of_writes)
        split.append(received + swap_partners(received + products, h))
    return split


def _split_dlog_of_blocks(
    h: int,
    dlog: Registers,
    rows: _Rows,
    drows: _Rows,
) -> Registers:
    """`dlog` of blocks of 2h >= 16 rows -> of blocks of h rows, one register [8, K] for a block."""
    # dlog has one register for each block of 2h rows, and gets one for each of h.
    registers_in_block = h // ROWS
    split = []
    for block in range(2 * len(dlog)):
        # The registers of the partner block.
        first = (block ^ 1) * registers_in_block
        products = []
        for i in range(first, first + registers_in_block):
            if block & 1:
                # A later block's total is part of its partner's writes,
                products.append(rows.writes[i] * drows.writes[i])
            else:
                # an earlier block's of its partner's reads and erases.
                products.append(rows.reads[i] * drows.reads[i])
                products.append(rows.erases[i] * drows.erases[i])
        split.append(sum(products, dlog[block // 2]))
    return split


def _unmerge_in_registers(
    options: TileOptions,
    merge: Merge,
    scores: _Scores,
    drows: _Rows,
) -> _Rows:
    """The cotangents after a merge of blocks of h < 8 rows -> before it."""
    h = merge.h

    def of_merge(dscores: Registers, levels: Registers) -> Registers:
        level_of_merge = h.bit_length()
        return [jnp.where(level == level_of_merge, d, 0.0) for d, level in zip(dscores, levels)]

    # scores[L, E] = reads[L] writes[E]^T. Half of the rows of each register are needed: a query's
    # and an erase key's go through the matmul as one.
    of_reads = of_merge(scores.reads, scores.levels)
    of_erases = of_merge(scores.erases, scores.levels)
    alternating = [x for pair in zip(of_reads, of_erases) for x in pair]
    packed = join_rows(pack_pairs(alternating, h, True))
    from_writes = unpack_pairs(split_rows(matmul(options, packed, merge.writes)), h, True)
    # Side by side in the depth: dwrites[E] = dread_scores^T reads + derase_scores^T erases.
    of_reads = of_merge(scores.reads_transposed, scores.levels_transposed)
    of_erases = of_merge(scores.erases_transposed, scores.levels_transposed)
    from_reads = _times_both(
        options,
        merge,
        pack_pairs(of_reads, h, False),
        pack_pairs(of_erases, h, False),
    )
    from_reads = unpack_pairs(from_reads, h, False)
    # The merge multiplied later reads and earlier writes with their partner's total.
    is_later = row_has_bit(h, drows.reads[0])
    dreads = []
    derases = []
    dwrites = []
    for i, partner in enumerate(merge.partners):
        dread = drows.reads[i]
        derase = drows.erases[i]
        dwrite = drows.writes[i]
        dreads.append(jnp.where(is_later, dread * partner + from_writes[2 * i], dread))
        derases.append(jnp.where(is_later, derase * partner + from_writes[2 * i + 1], derase))
        dwrites.append(jnp.where(is_later, dwrite, dwrite * partner + from_reads[i]))
    return _Rows(dreads, derases, dwrites)


def _unmerge_blocks(
    options: TileOptions,
    merge: Merge,
    scores: _Scores,
    drows: _Rows,
) -> _Rows:
    """The cotangents after a merge of blocks of h >= 8 rows -> before it."""
    h = merge.h

    def of_merge(dscores: Registers) -> Registers:
        return [partner_lanes(x, i, h) for i, x in enumerate(dscores)]

    # scores[L, E] = reads[L] writes[E]^T, as in `_unmerge_in_registers`.
    of_reads = later_registers(of_merge(scores.reads), h)
    of_erases = later_registers(of_merge(scores.erases), h)
    from_writes = split_rows(matmul(options, join_rows(of_reads + of_erases), merge.writes))
    from_reads = _times_both(
        options,
        merge,
        earlier_registers(of_merge(scores.reads_transposed), h),
        earlier_registers(of_merge(scores.erases_transposed), h),
    )
    half = len(from_writes) // 2
    to_reads = iter(from_writes[:half])
    to_erases = iter(from_writes[half:])
    to_writes = iter(from_reads)
    dreads = list(drows.reads)
    derases = list(drows.erases)
    dwrites = list(drows.writes)
    for i in range(len(dreads)):
        # The total that the merge multiplied these rows by.
        partner = merge.partners[i * ROWS // h]
        if is_later_block(i, h, False):
            dreads[i] = dreads[i] * partner + next(to_reads)
            derases[i] = derases[i] * partner + next(to_erases)
        else:
            dwrites[i] = dwrites[i] * partner + next(to_writes)
    return _Rows(dreads, derases, dwrites)


def _times_both(
    options: TileOptions,
    merge: Merge,
    of_reads: Registers,
    of_erases: Registers,
) -> Registers:
    """of_reads reads + of_erases erases, of one merge, as one matmul of twice the depth."""
    left = jnp.concatenate([join_rows(of_reads), join_rows(of_erases)], axis=1)
    right = join_rows((merge.reads, merge.erases))
    return split_rows(matmul(options, left, right))


def partner_lanes(
    x: Float[Array, "8 C"],
    register: int,
    h: int,
) -> Float[Array, "8 C"]:
    """Rows of dscores with zeros outside the columns of the partner of the register's block."""
    # Block b and its partner b ^ 1 hold h tokens each: h columns.
    block = register * ROWS // h
    start = (block ^ 1) * h
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    is_partner = (lane >= start) & (lane < start + h)
    return jnp.where(is_partner, x, 0.0)
