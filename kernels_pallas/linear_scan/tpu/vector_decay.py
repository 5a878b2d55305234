"""One chunk with one decay per key channel inside the TPU kernels: halving, and its derivative.

This is `../tile.py:vector_decay` in terms of 8-row registers. A merge of blocks of 8 rows or more
is whole registers times whole registers; a merge of smaller blocks is a rotation of rows inside
one.

The backward pass goes up the halving again, then down. A merge of blocks E (earlier) and L (later)

    scores[L, E] = reads[L] writes[E]^T
    reads[L] *= total[E]
    writes[E] *= total[L]
    total = total[E] total[L]

sends to the log of total[E] what total's log received plus sum(reads' dreads) over L, and to the
log of total[L] the same plus sum(writes' dwrites) over E. So the gate's gradient arrives at the
single tokens as a sum of exactly the products that contain it: no running sum over tokens, no
difference q dq - k dk, nothing that cancels.

A block's partner is the block that it is merged with. A row's partner is the row at the same place
in the partner of its block: row r ^ h for blocks of h rows.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from kernels_pallas.linear_scan.tpu.tile import (
    NT,
    ROWS,
    ChunkCotangents,
    ChunkTerms,
    Registers,
    TileOptions,
    join_rows,
    matmul,
    split_rows,
)

# --- rows inside a register


def _row_has_bit(h: int, x: Array) -> Bool[Array, "8 lanes"]:
    """Whether bit h of a row's number is set; h is a power of two below 8."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return (row & h) != 0


def _swap_partners(x: Float[Array, "8 lanes"], h: int) -> Float[Array, "8 lanes"]:
    """Row r of the result is row r ^ h of x."""
    from_above = pltpu.roll(x, h, 0)
    if h == ROWS // 2:
        # Half a turn is the same in both directions.
        return from_above
    from_below = pltpu.roll(x, ROWS - h, 0)
    return jnp.where(_row_has_bit(h, x), from_above, from_below)


def _pack_pairs(xs: Registers, h: int, bit: bool) -> Registers:
    """The rows whose bit h is `bit`, those of two registers in one: half the rows for a matmul.

    Those of the second register are moved into the rows of the other bit.
    """
    shift = ROWS - h if bit else h
    packed = []
    for first, second in zip(xs[::2], xs[1::2]):
        keeps_first = _row_has_bit(h, first) == bit
        packed.append(jnp.where(keeps_first, first, pltpu.roll(second, shift, 0)))
    return packed


def _unpack_pairs(xs: Registers, h: int, bit: bool) -> Registers:
    """The inverse of `_pack_pairs`; rows of the other bit hold values of no meaning."""
    shift = h if bit else ROWS - h
    unpacked = []
    for x in xs:
        unpacked.append(x)
        unpacked.append(pltpu.roll(x, shift, 0))
    return unpacked


# --- blocks of whole registers


def _is_later(register: int, h: int, reverse: bool) -> bool:
    """Whether a register lies in the later block of its pair, for blocks of h >= 8 rows."""
    has_bit = bool(register & h // ROWS)
    return has_bit != reverse


def _blocks_with_bit(x: Array, h: int, bit: bool) -> list[Array]:
    """The blocks of h >= 8 rows whose bit is `bit`: every second one."""
    first = h if bit else 0
    return [x[start : start + h] for start in range(first, x.shape[0], 2 * h)]


# --- up the halving


def _partner_totals(totals: Registers, h: int) -> Registers:
    """For every register of totals that of its block's partner. See `_merge` for their number."""
    if h < ROWS:
        return [_swap_partners(total, h) for total in totals]
    return [totals[block ^ 1] for block in range(len(totals))]


def _merge(
    h: int,
    reads: Registers,
    writes: Registers,
    totals: Registers,
    partners: Registers,
    reverse: bool,
) -> tuple[Registers, Registers, Registers]:
    """Merges blocks of h tokens in pairs.

    Args:
      h: rows of a block before the merge.
      reads, writes: one register for 8 tokens.
      totals: one register for a block of h >= 8 tokens, else one for 8 tokens.
      partners: of `_partner_totals`.
      reverse: as in `TileOptions`.

    Returns:
      reads, writes and totals after the merge.
    """
    if h < ROWS:
        is_later = _row_has_bit(h, reads[0]) != reverse
        reads = [jnp.where(is_later, r * p, r) for r, p in zip(reads, partners)]
        writes = [jnp.where(is_later, w, w * p) for w, p in zip(writes, partners)]
        totals = [t * p for t, p in zip(totals, partners)]
        return reads, writes, totals

    registers_in_block = h // ROWS
    reads = list(reads)
    for i, read in enumerate(reads):
        if _is_later(i, h, reverse):
            reads[i] = read * partners[i // registers_in_block]
    writes = list(writes)
    for i, write in enumerate(writes):
        if not _is_later(i, h, reverse):
            writes[i] = write * partners[i // registers_in_block]
    totals = [a * b for a, b in zip(totals[::2], totals[1::2])]
    return reads, writes, totals


def _diagonal_scores(diagonal: Array | None, levels: Registers) -> Registers:
    """Scores [8, C] that hold nothing but each token's score with itself."""
    if diagonal is None:
        return [jnp.zeros(level.shape, jnp.float32) for level in levels]
    return [jnp.where(l == 0, d, 0.0) for l, d in zip(levels, split_rows(diagonal))]


def _place_scores(
    scores: Registers,
    new: Registers,
    h: int,
    levels: Registers,
    reverse: bool,
) -> Registers:
    """Writes the scores of one merge into the scores of the chunk.

    From h = 8 on, a row takes everything on the earlier side of its block. What is too early for
    this merge is overwritten by the merge where it belongs, as they come in order.

    Args:
      scores: of the chunk, from the merges of smaller blocks.
      new: rows of this merge against all columns: all rows for h < 8, else those of later blocks.
      h: rows of a block before the merge.
      levels: of `merge_levels`.
      reverse: as in `TileOptions`.

    Returns:
      The scores of the chunk, registers [8, C].
    """
    if h < ROWS:
        level_of_merge = h.bit_length()
        placed = []
        for score, new_score, level in zip(scores, new, levels):
            placed.append(jnp.where(level == level_of_merge, new_score, score))
        return placed

    lane = lax.broadcasted_iota(jnp.int32, levels[0].shape, 1)
    placed = list(scores)
    new_rows = iter(new)
    for i in range(len(scores)):
        if _is_later(i, h, reverse):
            block_start = i * ROWS // h * h
            # Columns of the row's own block, and those after it, stay as they are.
            stays = lane < block_start + h if reverse else lane >= block_start
            placed[i] = jnp.where(stays, scores[i], next(new_rows))
    return placed


class _Operands(NamedTuple):
    """The operands of one merge's scores: rows of the later blocks, and all writes."""

    h: int
    later_reads: Array
    writes: Array


def chunk_terms(
    options: TileOptions,
    levels: Int[Array, "C C"],
    reads: Float[Array, "C K"],
    k: Float[Array, "C K"],
    decay: Float[Array, "C K"],
    total: Float[Array, "1 K"],
    diagonal: Float[Array, "C 1"] | None,
) -> Generator[None, None, ChunkTerms]:
    """The terms of a chunk, for the forward pass (a generator).

    Args:
      options: the static arguments.
      levels: of `merge_levels`.
      reads: q times the decay that the token's own read sees.
      k: the keys.
      decay: of each token and channel.
      total: the decay of the whole chunk, as the exponential of the sum of logs, because the
        product that the halving leaves is rounded at every merge (benchmarks/NOTES.md).
      diagonal: a token's score with itself, or None.

    Returns:
      The terms.
    """
    level_rows = split_rows(levels)
    write_rows = split_rows(k)
    read_rows = split_rows(reads)
    totals = split_rows(decay)
    scores = _diagonal_scores(diagonal, level_rows)
    later_bit = not options.reverse

    # Element-wise work first: reads and writes of every merge.
    pending = []
    h = 1
    while h < k.shape[0]:
        yield
        if h < ROWS:
            later_rows = _pack_pairs(read_rows, h, later_bit)
        else:
            later_rows = []
            for i, read in enumerate(read_rows):
                if _is_later(i, h, options.reverse):
                    later_rows.append(read)
        later_reads = join_rows(later_rows).astype(options.operand)
        writes = join_rows(write_rows).astype(options.operand)
        pending.append(_Operands(h, later_reads, writes))
        partners = _partner_totals(totals, h)
        read_rows, write_rows, totals = _merge(
            h,
            read_rows,
            write_rows,
            totals,
            partners,
            options.reverse,
        )
        h *= 2

    # Then the matmuls, of one merge or of two at a time.
    products = {}
    matmuls_at_once = 2 if options.stack else 1
    while pending:
        yield
        operands = pending[:matmuls_at_once]
        pending = pending[matmuls_at_once:]
        products.update(_products(options, *operands))

    # Then their places in the scores of the chunk.
    for h, product in products.items():
        yield
        new = split_rows(product)
        if h < ROWS:
            new = _unpack_pairs(new, h, later_bit)
        scores = _place_scores(scores, new, h, level_rows, options.reverse)
    return ChunkTerms(join_rows(scores), join_rows(read_rows), join_rows(write_rows), total)


def _products(
    options: TileOptions,
    first: _Operands,
    second: _Operands | None = None,
) -> dict[int, Array]:
    """later_reads writes^T of one merge, or of two in one matmul; by h."""
    if second is None:
        return {first.h: matmul(options, first.later_reads, first.writes, NT)}
    # Side by side in the depth, with zeros between: [a 0; 0 b] [x y]^T = [a x^T; b y^T].
    a = first.later_reads
    b = second.later_reads
    upper = jnp.concatenate([a, jnp.zeros_like(a)], axis=1)
    lower = jnp.concatenate([jnp.zeros_like(b), b], axis=1)
    writes = jnp.concatenate([first.writes, second.writes], axis=1)
    product = matmul(options, join_rows((upper, lower)), writes, NT)
    num_rows = a.shape[0]
    return {first.h: product[:num_rows], second.h: product[num_rows:]}


class Merge(NamedTuple):
    """What the derivative of one merge needs.

    Attributes:
      h: rows of a block before the merge.
      reads, writes: before the merge, in the dtype of a matmul's operands.
      partners: of `_partner_totals`.
    """

    h: int
    reads: Float[Array, "C K"]
    writes: Float[Array, "C K"]
    partners: Registers


def chunk_terms_and_merges(
    options: TileOptions,
    levels: Int[Array, "C C"],
    reads: Float[Array, "C K"],
    k: Float[Array, "C K"],
    decay: Float[Array, "C K"],
    total: Float[Array, "1 K"],
    diagonal: Float[Array, "C 1"] | None,
) -> Generator[None, None, tuple[ChunkTerms, list[Merge]]]:
    """`chunk_terms` for the backward pass, with what the derivative needs (a generator).

    Args:
      options, levels, reads, k, decay, total, diagonal: as in `chunk_terms`.

    Returns:
      The terms, and the merges in order.
    """
    write_rows = split_rows(k)
    read_rows = split_rows(reads)
    totals = split_rows(decay)
    merges = []
    h = 1
    while h < k.shape[0]:
        yield
        partners = _partner_totals(totals, h)
        merge = Merge(
            h=h,
            reads=join_rows(read_rows).astype(options.operand),
            writes=join_rows(write_rows).astype(options.operand),
            partners=partners,
        )
        merges.append(merge)
        read_rows, write_rows, totals = _merge(
            h,
            read_rows,
            write_rows,
            totals,
            partners,
            options.reverse,
        )
        h *= 2

    level_rows = split_rows(levels)
    scores = _diagonal_scores(diagonal, level_rows)
    for merge in merges:
        yield
        later_reads = merge.reads
        if merge.h >= ROWS:
            later_bit = not options.reverse
            later_reads = join_rows(_blocks_with_bit(merge.reads, merge.h, later_bit))
        product = matmul(options, later_reads, merge.writes, NT)
        scores = _place_scores(scores, split_rows(product), merge.h, level_rows, options.reverse)
    terms = ChunkTerms(join_rows(scores), join_rows(read_rows), join_rows(write_rows), total)
    return terms, merges


# --- down the halving


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
    pairs = _PairCotangents(
        levels=split_rows(levels),
        levels_transposed=split_rows(levels_transposed),
        dscores=split_rows(cotangents.dscores),
        dscores_transposed=split_rows(dscores_transposed),
    )
    dreads = split_rows(cotangents.dreads)
    dwrites = split_rows(cotangents.dwrites)
    dlog = [cotangents.dlog_total]
    # What a merge leaves are the operands of the next one, rounded as the matmuls saw them.
    results = [(merge.reads, merge.writes) for merge in merges[1:]]
    results.append((terms.reads, terms.writes))
    for merge, (reads_after, writes_after) in zip(reversed(merges), reversed(results)):
        yield
        reads = split_rows(reads_after.astype(jnp.float32))
        writes = split_rows(writes_after.astype(jnp.float32))
        if merge.h < ROWS:
            dlog = _split_dlog_in_registers(options, merge, dlog, reads, writes, dreads, dwrites)
            dreads, dwrites = _unmerge_in_registers(options, merge, pairs, dreads, dwrites)
        else:
            dlog = _split_dlog_of_blocks(options, merge, dlog, reads, writes, dreads, dwrites)
            dreads, dwrites = _unmerge_blocks(options, merge, pairs, dreads, dwrites)
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
    is_later = _row_has_bit(merge.h, reads[0]) != options.reverse
    products = []
    for read, write, dread, dwrite in zip(reads, writes, dreads, dwrites):
        x = jnp.where(is_later, read, write)
        dx = jnp.where(is_later, dread, dwrite)
        products.append(x * dx)
    return [d + _swap_partners(d + x, merge.h) for d, x in zip(dlog, products)]


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
    registers_in_block = merge.h // ROWS
    split = []
    for block in range(2 * len(dlog)):
        partner = block ^ 1
        # A block with the bit set is the later one (the earlier one with `reverse`). An earlier
        # block's total is part of its partner's reads, a later block's of its partner's writes.
        is_earlier = bool(block & 1) == options.reverse
        x = reads if is_earlier else writes
        dx = dreads if is_earlier else dwrites
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

    def multiply(dscores: Registers, levels: Registers, bit: bool, operand: Array) -> Registers:
        """This merge's part of dscores times reads or writes, for rows whose bit h is `bit`."""
        of_merge = []
        for level, dscore in zip(levels, dscores):
            of_merge.append(jnp.where(level == h.bit_length(), dscore, 0.0))
        # Half of the rows are needed: two registers' rows go through the matmul as one.
        packed = join_rows(_pack_pairs(of_merge, h, bit))
        return _unpack_pairs(split_rows(matmul(options, packed, operand)), h, bit)

    from_writes = multiply(pairs.dscores, pairs.levels, later_bit, merge.writes)
    from_reads = multiply(
        pairs.dscores_transposed,
        pairs.levels_transposed,
        not later_bit,
        merge.reads,
    )
    is_later = _row_has_bit(h, dreads[0]) == later_bit
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
    is_later = [_is_later(i, h, options.reverse) for i in range(len(dreads))]

    def multiply(dscores: Registers, rows_are_later: bool, operand: Array) -> Iterator[Array]:
        """This merge's part of dscores times reads or writes, for the rows of one kind of block."""
        rows = []
        for i, dscore in enumerate(dscores):
            if is_later[i] == rows_are_later:
                rows.append(_partner_lanes(dscore, i, h))
        return iter(split_rows(matmul(options, join_rows(rows), operand)))

    from_writes = multiply(pairs.dscores, True, merge.writes)
    from_reads = multiply(pairs.dscores_transposed, False, merge.reads)
    new_dreads = list(dreads)
    new_dwrites = list(dwrites)
    for i in range(len(dreads)):
        if is_later[i]:
            partner = merge.partners[i * ROWS // h]
            new_dreads[i] = dreads[i] * partner + next(from_writes)
    for i in range(len(dwrites)):
        if not is_later[i]:
            partner = merge.partners[i * ROWS // h]
            new_dwrites[i] = dwrites[i] * partner + next(from_reads)
    return new_dreads, new_dwrites


def _partner_lanes(x: Float[Array, "8 C"], register: int, h: int) -> Float[Array, "8 C"]:
    """Rows of dscores with zeros outside the columns of the partner of the register's block."""
    block = register * ROWS // h
    start = (block ^ 1) * h
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    is_partner = (lane >= start) & (lane < start + h)
    return jnp.where(is_partner, x, 0.0)
