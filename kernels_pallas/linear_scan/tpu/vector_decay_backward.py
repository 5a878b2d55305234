"""The derivative of the halving of `vector_decay.py`, by hand.

The backward kernel goes up the halving again, then down. A merge of blocks E (earlier) and L
(later)

    scores[L, E] = reads[L] writes[E]^T
    reads[L] *= total[E]
    writes[E] *= total[L]
    total = total[E] total[L]

sends to the log of total[E] what total's log received plus sum(reads' dreads) over L, and to the
log of total[L] the same plus sum(writes' dwrites) over E. So the gate's gradient arrives at the
single tokens as a sum of exactly the products that contain it: no running sum over tokens, no
difference q dq - k dk, nothing that cancels.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.linear_scan.tpu.tile import (
    ROWS,
    ChunkCotangents,
    ChunkTerms,
    Registers,
    TileOptions,
    join_rows,
    matmul,
    split_rows,
)
from kernels_pallas.linear_scan.tpu.vector_decay import (
    Merge,
    is_later_block,
    pack_pairs,
    row_has_bit,
    swap_partners,
    unpack_pairs,
)


class _PairCotangents(NamedTuple):
    """The cotangents of the scores and of their transpose, with the level of every element."""

    levels: Registers
    levels_transposed: Registers
    dscores: Registers
    dscores_transposed: Registers


def backward(
    options: TileOptions,
    levels: Int[Array, "C C"],
    levels_transposed: Int[Array, "C C"],
    merges: list[Merge],
    terms: ChunkTerms,
    cotangents: ChunkCotangents,
    dscores_transposed: Float[Array, "C C"],
) -> Generator[None, None, tuple[Array, Array, Array]]:
    """The derivative of `chunk_terms` (a generator).

    Args:
      options: the static arguments.
      levels: of `merge_levels`.
      levels_transposed: of `merge_levels` with the other `reverse`.
      merges: of `chunk_terms_and_merges`.
      terms: of the chunk.
      cotangents: those of the terms.
      dscores_transposed: the transpose of the scores' cotangent.

    Returns:
      dreads and dwrites of single tokens, before any merge, and dlog_decay without what the token's
      own read sees; [C, K] each.
    """
    # Everything as registers; each merge takes its own part of the scores' cotangents.
    pairs = _PairCotangents(
        levels=split_rows(levels),
        levels_transposed=split_rows(levels_transposed),
        dscores=split_rows(cotangents.dscores),
        dscores_transposed=split_rows(dscores_transposed),
    )
    dreads = split_rows(cotangents.dreads)
    dwrites = split_rows(cotangents.dwrites)
    # One block, the whole chunk: its log is that of the total.
    dlog = [cotangents.dlog_total]
    # The results of a merge are the operands of the next one, rounded as the matmuls saw them.
    results = [(merge.reads, merge.writes) for merge in merges[1:]]
    results.append((terms.reads, terms.writes))
    for merge, (reads_after, writes_after) in zip(reversed(merges), reversed(results)):
        yield
        reads = split_rows(reads_after.astype(jnp.float32))
        writes = split_rows(writes_after.astype(jnp.float32))
        if merge.h < ROWS:
            dlog = _split_dlog_in_registers(
                options,
                merge,
                dlog,
                reads,
                writes,
                dreads,
                dwrites,
            )
            dreads, dwrites = _unmerge_in_registers(
                options,
                merge,
                pairs,
                dreads,
                dwrites,
            )
        else:
            dlog = _split_dlog_of_blocks(
                options,
                merge,
                dlog,
                reads,
                writes,
                dreads,
                dwrites,
            )
            dreads, dwrites = _unmerge_blocks(
                options,
                merge,
                pairs,
                dreads,
                dwrites,
            )
    return join_rows(dreads), join_rows(dwrites), join_rows(dlog)


def _split_dlog_in_registers(
    options: TileOptions,
    merge: Merge,
    dlog: Registers,
    reads: Registers,
    writes: Registers,
    dreads: Registers,
    dwrites: Registers,
) -> Registers:
    """`dlog` of blocks of 2h < 16 rows -> of blocks of h rows. reads to dwrites: after the merge.

    A block's total is part of the reads of a later partner, and of the writes of an earlier one:
    its log receives these times their cotangents. The rows of a block are still to be summed, so
    every row adds what its partner has.
    """
    # Each row's reads if its block is the later one, its writes if it is the earlier one: what the
    # total of the partner's block was multiplied by.
    is_later = row_has_bit(merge.h, reads[0]) != options.reverse
    products = []
    for read, write, dread, dwrite in zip(reads, writes, dreads, dwrites):
        x = jnp.where(is_later, read, write)
        dx = jnp.where(is_later, dread, dwrite)
        products.append(x * dx)
    return [d + swap_partners(d + x, merge.h) for d, x in zip(dlog, products)]


def _split_dlog_of_blocks(
    options: TileOptions,
    merge: Merge,
    dlog: Registers,
    reads: Registers,
    writes: Registers,
    dreads: Registers,
    dwrites: Registers,
) -> Registers:
    """`dlog` of blocks of 2h >= 16 rows -> of blocks of h rows, one register [8, K] for a block.

    As `_split_dlog_in_registers`; the sums over these 8 rows are still to come.
    """
    # dlog has one register for each block of 2h rows, and gets one for each of h.
    registers_in_block = merge.h // ROWS
    split = []
    for block in range(2 * len(dlog)):
        partner = block ^ 1
        # A block with the bit set is the later one (the earlier one with `reverse`). An earlier
        # block's total is part of its partner's reads, a later block's of its partner's writes.
        is_earlier = bool(block & 1) == options.reverse
        x = reads if is_earlier else writes
        dx = dreads if is_earlier else dwrites
        # The registers of the partner block's reads or writes.
        first = partner * registers_in_block
        registers = range(first, first + registers_in_block)
        received = sum(x[i] * dx[i] for i in registers)
        split.append(dlog[block // 2] + received)
    return split


def _unmerge_in_registers(
    options: TileOptions,
    merge: Merge,
    pairs: _PairCotangents,
    dreads: Registers,
    dwrites: Registers,
) -> tuple[Registers, Registers]:
    """(dreads, dwrites) after a merge of blocks of h < 8 rows -> before it."""
    h = merge.h
    later_bit = not options.reverse

    def multiply(
        dscores: Registers,
        levels: Registers,
        bit: bool,
        operand: Array,
    ) -> Registers:
        """This merge's part of dscores times reads or writes, for rows whose bit h is `bit`."""
        of_merge = []
        for level, dscore in zip(levels, dscores):
            of_merge.append(jnp.where(level == h.bit_length(), dscore, 0.0))
        # Half of the rows are needed: two registers' rows go through the matmul as one.
        packed = join_rows(pack_pairs(of_merge, h, bit))
        products = split_rows(matmul(options, packed, operand))
        return unpack_pairs(products, h, bit)

    # scores[L, E] = reads[L] writes[E]^T, so dreads[L] = dscores writes and
    # dwrites[E] = dscores^T reads.
    from_writes = multiply(
        pairs.dscores,
        pairs.levels,
        later_bit,
        merge.writes,
    )
    from_reads = multiply(
        pairs.dscores_transposed,
        pairs.levels_transposed,
        not later_bit,
        merge.reads,
    )
    # The merge multiplied later reads and earlier writes with their partner's total.
    is_later = row_has_bit(h, dreads[0]) == later_bit
    new_dreads = []
    for dread, partner, product in zip(dreads, merge.partners, from_writes):
        new_dreads.append(jnp.where(is_later, dread * partner + product, dread))
    new_dwrites = []
    for dwrite, partner, product in zip(dwrites, merge.partners, from_reads):
        new_dwrites.append(jnp.where(is_later, dwrite, dwrite * partner + product))
    return new_dreads, new_dwrites


def _unmerge_blocks(
    options: TileOptions,
    merge: Merge,
    pairs: _PairCotangents,
    dreads: Registers,
    dwrites: Registers,
) -> tuple[Registers, Registers]:
    """(dreads, dwrites) after a merge of blocks of h >= 8 rows -> before it."""
    h = merge.h
    is_later = [is_later_block(i, h, options.reverse) for i in range(len(dreads))]

    def multiply(
        dscores: Registers,
        rows_are_later: bool,
        operand: Array,
    ) -> Iterator[Array]:
        """This merge's part of dscores times reads or writes, for the rows of one kind of block."""
        rows = []
        for i, dscore in enumerate(dscores):
            if is_later[i] == rows_are_later:
                rows.append(partner_lanes(dscore, i, h))
        return iter(split_rows(matmul(options, join_rows(rows), operand)))

    # scores[L, E] = reads[L] writes[E]^T, as in `_unmerge_in_registers`.
    from_writes = multiply(pairs.dscores, True, merge.writes)
    from_reads = multiply(pairs.dscores_transposed, False, merge.reads)
    new_dreads = list(dreads)
    new_dwrites = list(dwrites)
    for i in range(len(dreads)):
        if is_later[i]:
            # The total that the merge multiplied these reads by.
            partner = merge.partners[i * ROWS // h]
            new_dreads[i] = dreads[i] * partner + next(from_writes)
    for i in range(len(dwrites)):
        if not is_later[i]:
            partner = merge.partners[i * ROWS // h]
            new_dwrites[i] = dwrites[i] * partner + next(from_reads)
    return new_dreads, new_dwrites


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
