"""One chunk with one decay per key channel inside the TPU kernels: multiplicative halving.

This is `../tile.py:vector_decay` in terms of 8-row registers: the halving of
`linear_scan/tpu/vector_decay.py` with two sets of rows that read, queries and erase keys. The
derivative is in `vector_decay_backward.py`.
"""

from collections.abc import Generator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.delta_scan.tpu.tile import (
    ChunkTerms,
    Solved,
    later_registers,
    pack_diagonal,
    unpack_diagonal,
)
from kernels_pallas.linear_scan.tpu.tile import (
    NT,
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
    partner_totals,
    place_scores,
    row_has_bit,
    unpack_pairs,
)


class Merge(NamedTuple):
    """The operands of one merge, in the dtype of a matmul's operands.

    Attributes:
      h: rows of a block before the merge.
      later_reads: the rows of later blocks that read, queries and erase keys, see
        `_later_reads`.
      writes: all keys.
      reads, erases: all rows, which only the derivative needs.
      partners: of `partner_totals`.
    """

    h: int
    later_reads: Float[Array, "C K"]
    writes: Float[Array, "C K"]
    reads: Float[Array, "C K"]
    erases: Float[Array, "C K"]
    partners: Registers


def chunk_terms(
    options: TileOptions,
    levels: Int[Array, "C C"],
    reads: Float[Array, "C K"],
    erases: Float[Array, "C K"],
    k: Float[Array, "C K"],
    decay: Float[Array, "C K"],
    total: Float[Array, "1 K"],
    diagonal: Float[Array, "C 1"],
    solved: Solved | None = None,
) -> Generator[None, None, tuple[ChunkTerms, list[Merge]]]:
    """The terms of a chunk (a generator).

    Args:
      options: the static arguments.
      levels: of `merge_levels`.
      reads, erases: q and -e times the decay of their own token.
      k: the keys.
      decay: of each token and channel.
      total: the decay of the whole chunk, as the exponential of the sum of logs.
      diagonal: what each query reads of its own token's write.
      solved: with scores. Then no product is made inside of its blocks.

    Returns:
      The terms, and the merges in order.
    """
    # A block of one token: its read counts from its own start, its write to its own end.
    read_rows = split_rows(reads)
    erase_rows = split_rows(erases)
    write_rows = split_rows(k)
    totals = split_rows(decay)

    def operand(rows: Registers) -> Array:
        return join_rows(rows).astype(options.operand)

    C = k.shape[0]
    level_rows = split_rows(levels)
    # Scores inside of 8 rows, side by side in one register, then all others.
    block_levels = pack_diagonal(level_rows, C)
    on_diagonal = pack_diagonal(split_rows(diagonal), C)
    read_blocks = jnp.where(block_levels == 0, on_diagonal, 0.0)
    erase_blocks = jnp.zeros_like(read_blocks)
    read_scores = []
    rows_of_erases = []
    first_block = 1
    if solved is not None:
        assert solved.read_scores is not None
        read_scores = split_rows(solved.read_scores.astype(jnp.float32))
        # Larger blocks hold tokens of several solved ones.
        first_block = solved.block

    def place(product: Array, h: int) -> None:
        """In order of h: larger blocks overwrite what is not theirs."""
        nonlocal read_blocks, erase_blocks, read_scores
        rows = split_rows(product)
        if h < ROWS:
            of_reads, of_erases = unpack_pairs([pack_diagonal(rows, C)], h, True)
            is_of_merge = block_levels == h.bit_length()
            read_blocks = jnp.where(is_of_merge, of_reads, read_blocks)
            erase_blocks = jnp.where(is_of_merge, of_erases, erase_blocks)
            if 2 * h == ROWS:
                read_scores = unpack_diagonal(read_blocks)
            return
        half = len(rows) // 2
        read_scores = place_scores(read_scores, rows[:half], h, level_rows, False)
        rows_of_erases.append(rows[half:])

    merges = []
    # The product of the merge before, which is placed while the next one is multiplied.
    pending = None
    h = 1
    while h < C:
        partners = partner_totals(totals, h)
        merge = Merge(
            h=h,
            later_reads=operand(_later_reads(read_rows, erase_rows, h)),
            writes=operand(write_rows),
            reads=operand(read_rows),
            erases=operand(erase_rows),
            partners=partners,
        )
        merges.append(merge)
        product = None
        if h >= first_block:
            product = matmul(options, merge.later_reads, merge.writes, NT)
        of_reads, of_writes = _factors(partners, h, len(read_rows))
        read_rows = _multiplied(read_rows, of_reads)
        erase_rows = _multiplied(erase_rows, of_reads)
        write_rows = _multiplied(write_rows, of_writes)
        if h < ROWS:
            totals = [t * p for t, p in zip(totals, partners)]
        else:
            totals = [a * b for a, b in zip(totals[::2], totals[1::2])]
        if pending is not None:
            place(*pending)
        pending = None if product is None else (product, h)
        h *= 2
    if pending is not None:
        place(*pending)
    yield
    terms = ChunkTerms(
        # Kept as matmuls see them, half as large: until the inverse is there they only wait.
        read_scores=operand(read_scores),
        erase_blocks=erase_blocks if solved is None else None,
        erase_rows=tuple(rows_of_erases),
        reads=operand(read_rows),
        erases=operand(erase_rows),
        writes=operand(write_rows),
        totals=(total,),
    )
    return terms, merges


def _factors(
    partners: Registers,
    h: int,
    num_registers: int,
) -> tuple[list[Array | None], list[Array | None]]:
    """What a merge multiplies reads (and erases) and writes by, for each register; None for 1.

    Rows of later blocks read through the partner's decay; rows of earlier ones write through it.
    """
    of_reads: list[Array | None] = []
    of_writes: list[Array | None] = []
    if h < ROWS:
        is_later = row_has_bit(h, partners[0])
        for partner in partners:
            of_reads.append(jnp.where(is_later, partner, 1.0))
            of_writes.append(jnp.where(is_later, 1.0, partner))
        return of_reads, of_writes
    for i in range(num_registers):
        partner = partners[i * ROWS // h]
        is_later_register = is_later_block(i, h, False)
        of_reads.append(partner if is_later_register else None)
        of_writes.append(None if is_later_register else partner)
    return of_reads, of_writes


def _multiplied(rows: Registers, factors: list[Array | None]) -> Registers:
    """Row by row; None stands for 1."""
    return [x if factor is None else x * factor for x, factor in zip(rows, factors)]


def _later_reads(reads: Registers, erases: Registers, h: int) -> Registers:
    """The rows of later blocks of both: C rows."""
    if h < ROWS:
        # Half of the rows of each register: a query's and an erase key's fill one.
        alternating = [x for pair in zip(reads, erases) for x in pair]
        return pack_pairs(alternating, h, True)
    return later_registers(reads, h) + later_registers(erases, h)
