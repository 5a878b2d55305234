"""One chunk with one decay per key channel inside the TPU kernels: multiplicative halving.

This is `../tile.py:vector_decay` in terms of 8-row registers. A merge of blocks of 8 rows or more
is whole registers times whole registers; a merge of smaller blocks is a rotation of rows inside
one.

The backward kernel needs the operands of every merge, and keeps them: `halve_and_keep`. The
derivative is in `vector_decay_backward.py`.

A block's partner is the block that it is merged with. A row's partner is the row at the same place
in the partner of its block: row r ^ h for blocks of h rows.
"""

from collections.abc import Generator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Bool, Float, Int

from kernels_pallas.linear_scan.tpu.tile import (
    NT,
    ROWS,
    ChunkTerms,
    Registers,
    TileOptions,
    join_rows,
    matmul,
    split_rows,
)

# What a merge multiplies and what it leaves, see `exchange_sides`.
type Sides = tuple[Registers, Registers]

# --- rows inside a register


def row_has_bit(h: int, x: Array) -> Bool[Array, "8 lanes"]:
    """Whether bit h of a row's number is set; h is a power of two below 8."""
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return (row & h) != 0


def swap_partners(x: Float[Array, "8 lanes"], h: int) -> Float[Array, "8 lanes"]:
    """Row r of the result is row r ^ h of x."""
    # One permutation of sublanes, where rotations take two and a select.
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.take_along_axis(x, row ^ h, axis=0)


def exchange_sides(sides: Sides, h: int, next_h: int, reverse: bool) -> Sides:
    """The rows of the sides of one merge, as the sides of another.

    The sides of a merge of blocks of h < 8 rows are the rows that it multiplies (reads of later
    blocks, writes of earlier ones) and those that it leaves. Those of other merges, and of none
    (h = 0), are reads and writes. Two selects a merge; by way of reads and writes it takes three.

    Args:
      sides: of the merge of blocks of h rows.
      h, next_h: rows of a block before the one merge, and before the other.
      reverse: as in `TileOptions`.

    Returns:
      The sides of the merge of blocks of next_h rows.
    """
    xs, ys = sides
    inside = [bit for bit in (h, next_h) if 0 < bit < ROWS]
    if len(inside) == 1:
        stays = row_has_bit(inside[0], xs[0]) != reverse
    else:
        # A row that is in the later block of both merges, or of neither, stays on its side.
        stays = row_has_bit(h, xs[0]) == row_has_bit(next_h, xs[0])
    new_xs = [jnp.where(stays, x, y) for x, y in zip(xs, ys)]
    new_ys = [jnp.where(stays, y, x) for x, y in zip(xs, ys)]
    return new_xs, new_ys


def pack_pairs(xs: Registers, h: int, bit: bool) -> Registers:
    """The rows whose bit h is `bit`, those of two registers in one: half the rows for a matmul.

    Those of the second register are moved into the rows of the other bit.
    """
    # Up by h if the rows with the bit are kept, down by h if those without it are.
    shift = ROWS - h if bit else h
    packed = []
    for first, second in zip(xs[::2], xs[1::2]):
        keeps_first = row_has_bit(h, first) == bit
        packed.append(jnp.where(keeps_first, first, pltpu.roll(second, shift, 0)))
    return packed


def unpack_pairs(xs: Registers, h: int, bit: bool) -> Registers:
    """The inverse of `pack_pairs`; rows of the other bit hold values of no meaning."""
    # Back where they came from.
    shift = h if bit else ROWS - h
    unpacked = []
    for x in xs:
        unpacked.append(x)
        unpacked.append(pltpu.roll(x, shift, 0))
    return unpacked


# --- blocks of whole registers


def is_later_block(register: int, h: int, reverse: bool) -> bool:
    """Whether a register lies in the later block of its pair, for blocks of h >= 8 rows."""
    # Register i holds rows 8 i to 8 i + 7, so bit h of a row is bit h / 8 of i.
    has_bit = bool(register & h // ROWS)
    return has_bit != reverse


def blocks_with_bit(x: Array, h: int, bit: bool) -> list[Array]:
    """The blocks of h >= 8 rows whose bit is `bit`: every second one."""
    # Blocks alternate: without the bit, with the bit.
    first = h if bit else 0
    return [x[start : start + h] for start in range(first, x.shape[0], 2 * h)]


# --- up the halving


def partner_totals(totals: Registers, h: int) -> Registers:
    """For every register of totals that of its block's partner. See `_merge` for their number."""
    if h < ROWS:
        return [swap_partners(total, h) for total in totals]
    # One register for each block: partners are neighbors.
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
      partners: of `partner_totals`.
      reverse: as in `TileOptions`.

    Returns:
      reads, writes and totals after the merge.
    """
    if h < ROWS:
        # Rows of both blocks of a pair are in one register: select.
        is_later = row_has_bit(h, reads[0]) != reverse
        reads = [jnp.where(is_later, r * p, r) for r, p in zip(reads, partners)]
        writes = [jnp.where(is_later, w, w * p) for w, p in zip(writes, partners)]
        totals = [t * p for t, p in zip(totals, partners)]
        return reads, writes, totals

    # Whole registers: those of the other block are not touched.
    registers_in_block = h // ROWS
    reads = list(reads)
    for i, read in enumerate(reads):
        if is_later_block(i, h, reverse):
            reads[i] = read * partners[i // registers_in_block]
    writes = list(writes)
    for i, write in enumerate(writes):
        if not is_later_block(i, h, reverse):
            writes[i] = write * partners[i // registers_in_block]
    # One total for the merged block.
    totals = [a * b for a, b in zip(totals[::2], totals[1::2])]
    return reads, writes, totals


def diagonal_scores(diagonal: Array | None, levels: Registers) -> Registers:
    """Scores [8, C] that hold nothing but each token's score with itself."""
    if diagonal is None:
        return [jnp.zeros(level.shape, jnp.float32) for level in levels]
    return [jnp.where(l == 0, d, 0.0) for l, d in zip(levels, split_rows(diagonal))]


def place_scores(
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
        # Blocks of 2h = 2**level tokens come out of this merge.
        level_of_merge = h.bit_length()
        placed = []
        for score, new_score, level in zip(scores, new, levels):
            placed.append(jnp.where(level == level_of_merge, new_score, score))
        return placed

    lane = lax.broadcasted_iota(jnp.int32, levels[0].shape, 1)
    placed = list(scores)
    new_rows = iter(new)
    for i in range(len(scores)):
        if is_later_block(i, h, reverse):
            # The first column of the block that holds row i * 8.
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
    # A block of one token: its read counts from its own start, its write to its own end.
    write_rows = split_rows(k)
    read_rows = split_rows(reads)
    totals = split_rows(decay)
    scores = diagonal_scores(diagonal, level_rows)
    later_bit = not options.reverse

    # Element-wise work first: reads and writes of every merge.
    pending = []
    h = 1
    while h < k.shape[0]:
        yield
        if h < ROWS:
            # Half of the rows of each register are read: pack two into one.
            later_rows = pack_pairs(read_rows, h, later_bit)
        else:
            later_rows = []
            for i, read in enumerate(read_rows):
                if is_later_block(i, h, options.reverse):
                    later_rows.append(read)
        later_reads = join_rows(later_rows).astype(options.operand)
        writes = join_rows(write_rows).astype(options.operand)
        pending.append(_Operands(h, later_reads, writes))
        # After the operands are kept, the merge itself.
        partners = partner_totals(totals, h)
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
        # In order of h: larger blocks overwrite what is not theirs.
        new = split_rows(product)
        if h < ROWS:
            new = unpack_pairs(new, h, later_bit)
        scores = place_scores(scores, new, h, level_rows, options.reverse)
    return ChunkTerms(
        join_rows(scores),
        join_rows(read_rows),
        join_rows(write_rows),
        total,
    )


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
      z: before the merge, the reads of later blocks and the writes of earlier ones, in the dtype of
        a matmul's operands.
      partners: of `partner_totals`.
    """

    h: int
    z: Float[Array, "C K"]
    partners: Registers


def _merge_and_keep(
    options: TileOptions,
    h: int,
    sides: Sides,
    totals: Registers,
) -> tuple[Merge, Sides, Registers]:
    """As `_merge`, and what is to be kept of it.

    The forward kernel goes by way of reads and writes: it keeps no z, and making it costs 5 % on
    v5p.

    Args:
      options: the static arguments.
      h: rows of a block before the merge.
      sides: of this merge.
      totals: as in `_merge`.

    Returns:
      The merge; the sides of the next one, and totals, after it.
    """
    partners = partner_totals(totals, h)
    reverse = options.reverse
    if h < ROWS:
        z, rest = sides
        after = [x * p for x, p in zip(z, partners)]
        sides = exchange_sides((after, rest), h, 2 * h, reverse)
        totals = [t * p for t, p in zip(totals, partners)]
    else:
        reads, writes = sides
        z = []
        for i, (read, write) in enumerate(zip(reads, writes)):
            z.append(read if is_later_block(i, h, reverse) else write)
        reads, writes, totals = _merge(h, reads, writes, totals, partners, reverse)
        sides = (reads, writes)
    return Merge(h, join_rows(z).astype(options.operand), partners), sides, totals


class Halving(NamedTuple):
    """What the backward pass needs of a chunk's halving.

    Attributes:
      merges: in order.
      reads, writes: after the last one, of the whole chunk.
    """

    merges: list[Merge]
    reads: Float[Array, "C K"]
    writes: Float[Array, "C K"]


def halve_and_keep(
    options: TileOptions,
    reads: Float[Array, "C K"],
    k: Float[Array, "C K"],
    decay: Float[Array, "C K"],
) -> Generator[None, None, Halving]:
    """The halving of `chunk_terms`, with what the derivative needs (a generator).

    Args:
      options, reads, k, decay: as in `chunk_terms`.

    Returns:
      All but scores.
    """
    reads_and_writes = (split_rows(reads), split_rows(k))
    sides = exchange_sides(reads_and_writes, 0, 1, options.reverse)
    totals = split_rows(decay)
    merges = []
    h = 1
    while h < k.shape[0]:
        yield
        merge, sides, totals = _merge_and_keep(options, h, sides, totals)
        merges.append(merge)
        h *= 2
    reads_at_end, writes_at_end = sides
    return Halving(merges, join_rows(reads_at_end), join_rows(writes_at_end))


def transposed_scores(
    options: TileOptions,
    transposed_levels: Int[Array, "C C"],
    merges: list[Merge],
    diagonal: Float[Array, "C 1"] | None,
) -> Generator[None, None, Float[Array, "C C"]]:
    """The scores of a chunk once more, from what was kept of its merges (a generator).

    Args:
      options, diagonal: as in `chunk_terms`.
      transposed_levels: of `merge_levels` with `reverse` the other way.
      merges: of `halve_and_keep`.

    Returns:
      The scores; row j, column i.
    """
    level_rows = split_rows(transposed_levels)
    scores = diagonal_scores(diagonal, level_rows)
    for merge in merges:
        yield
        # For h < 8 all rows, as packing would cost more than it saves here.
        earlier_writes = merge.z
        if merge.h >= ROWS:
            earlier_writes = join_rows(blocks_with_bit(merge.z, merge.h, options.reverse))
        # Right where an earlier write meets a later read; `place_scores` takes no more. Seen from
        # the writes, what is later comes first.
        product = matmul(options, earlier_writes, merge.z, NT)
        scores = place_scores(
            scores,
            split_rows(product),
            merge.h,
            level_rows,
            not options.reverse,
        )
    return join_rows(scores)
