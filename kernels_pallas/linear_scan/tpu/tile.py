"""The mathematics of a chunk inside the TPU kernels: `tile.py` in terms of 8-row registers, and its derivative by hand.

Mosaic keeps a [C, K] float32 array as C/8 registers of 8 rows. The halving of `tile.vector_decay` reads best on those:
a merge of blocks of 8 rows or more is whole registers times whole registers, a merge below is a rotation of rows inside
one. So a chunk is a list of [8, K] arrays here, and only matmuls see it whole.

The backward pass climbs the halving again, then descends it. Going down, a merge of blocks E (earlier) and L (later)

    scores[L, E] = reads[L] writes[E]^T;  reads[L] *= total[E];  writes[E] *= total[L];  total = total[E] total[L]

sends to the log of total[E] what total's log received plus sum(reads' dreads) over L, and to the log of total[L] the
same plus sum(writes' dwrites) over E: the gate's gradient arrives at the leaves as a sum of products that meet it and
nothing else. No running sum over tokens, no difference q dq - k dk: nothing cancels.

Functions with `yield` are generators that hand back their result at the end. Each yield is a place where the schedule
may turn to another head (`staggered`): the compiler does not interleave independent heads by itself.

`reverse` swaps which of two blocks is the earlier one; nothing else changes.
"""

from collections.abc import Generator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import tpu as pltpu

ROWS = 8  # of a float32 register
Registers = list[Array]  # [8, K] each

NN, NT, TN = (((1,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((0,), (0,)), ((), ()))


class Tile(NamedTuple):
    """What of a chunk is static. All is float32 but, where so wanted, what a matmul is about to round."""

    rounds: bool  # matmuls are one pass of bfloat16: the matrix unit rounds operands
    operand: (
        jnp.dtype
    )  # of matmuls: with bfloat16 they are rounded, and kept, before they meet the matrix unit
    inclusive: bool
    reverse: bool
    stack: bool  # two levels' scores as one matmul of twice the depth, for matrix units of 256


def matmul(tile: Tile, a: Array, b: Array, dims=NN) -> Array:
    """a b (or a b^T, a^T b), summed in float32."""
    precision = lax.Precision.DEFAULT if tile.rounds else lax.Precision.HIGHEST
    a, b = a.astype(tile.operand), b.astype(tile.operand)
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def cut(x: Array) -> Registers:
    """[C, K] -> C/8 of [8, K]."""
    return [x[i : i + ROWS] for i in range(0, x.shape[0], ROWS)]


def cat(xs: Sequence[Array]) -> Array:
    return xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=0)


def staggered(heads: Sequence[Generator], lag: int | None) -> list:
    """Runs generators to their ends and returns their results.

    lag: None for one after the other; else in turns, generator i starting `lag` turns after generator i - 1, so that
    one head's matmuls stand beside another's element-wise work in the program.
    """
    results, live, turn = [None] * len(heads), list(range(len(heads))), 0
    while live:
        waiting = live[:1] if lag is None else [i for i in live if turn >= i * lag]
        for i in waiting:
            try:
                next(heads[i])
            except StopIteration as end:
                results[i] = end.value
                live.remove(i)
        turn += 1
    return results


def meeting_levels(chunk: int, reverse: bool) -> Array:
    """int32 [C, C]: l where i meets an earlier j first in a block of 2**l tokens, 0 where i is j, -1 if j is later."""
    i = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 0)
    j = lax.broadcasted_iota(jnp.int32, (chunk, chunk), 1)
    level = sum(((i ^ j) >= 1 << l).astype(jnp.int32) for l in range(chunk.bit_length() - 1))
    return jnp.where((j < i) if reverse else (j > i), -1, level)


def column(row: Array) -> Array:
    """[1, C] -> [C, 1]."""
    return jnp.transpose(jnp.broadcast_to(row, (ROWS, row.shape[1])))[:, :1]


# --- vector decay: one decay a key channel


def _has_bit(h: int, like: Array) -> Array:
    return (lax.broadcasted_iota(jnp.int32, like.shape, 0) & h) != 0


def _swap(x: Array, h: int) -> Array:
    """Row r of a register from row r ^ h."""
    down = pltpu.roll(x, h, 0)
    return down if h == ROWS // 2 else jnp.where(_has_bit(h, x), down, pltpu.roll(x, ROWS - h, 0))


def _pack(xs: Registers, h: int, bit: bool) -> Registers:
    """The rows whose bit h is `bit`, of two registers in one: those of the second move into the other rows."""
    shift = ROWS - h if bit else h
    return [
        jnp.where(_has_bit(h, a) == bit, a, pltpu.roll(b, shift, 0))
        for a, b in zip(xs[::2], xs[1::2])
    ]


def _unpack(xs: Registers, h: int, bit: bool) -> Registers:
    """The inverse of `_pack`; rows of the other bit hold rubbish."""
    shift = h if bit else ROWS - h
    return [y for x in xs for y in (x, pltpu.roll(x, shift, 0))]


def _is_later(register: int, h: int, reverse: bool) -> bool:
    return bool(register & h // ROWS) != reverse


def _partners(totals: Registers, h: int) -> Registers:
    """For every register the total of the block that its own block is merged with."""
    return (
        [_swap(t, h) for t in totals] if h < ROWS else [totals[b ^ 1] for b in range(len(totals))]
    )


def _merge(
    h: int,
    reads: Registers,
    writes: Registers,
    totals: Registers,
    partners: Registers,
    reverse: bool,
):
    """Blocks of h tokens in pairs. `totals` is one register a block of h >= 8 tokens, else one per 8 tokens."""
    if h < ROWS:
        later = _has_bit(h, reads[0]) != reverse
        reads = [jnp.where(later, r * p, r) for r, p in zip(reads, partners)]
        writes = [jnp.where(later, w, w * p) for w, p in zip(writes, partners)]
        return reads, writes, [t * p for t, p in zip(totals, partners)]
    block = lambda i: i // (h // ROWS)
    reads = [r * partners[block(i)] if _is_later(i, h, reverse) else r for i, r in enumerate(reads)]
    writes = [
        w if _is_later(i, h, reverse) else w * partners[block(i)] for i, w in enumerate(writes)
    ]
    return reads, writes, [a * b for a, b in zip(totals[::2], totals[1::2])]


def _place(
    scores: Registers, new: Registers, h: int, levels: Registers, reverse: bool
) -> Registers:
    """The scores of one level, of later rows only (unpacked, for h < 8), into the rows of `scores`.

    From h = 8 on, a row takes everything on the earlier side of its block: what is too early for this level is
    overwritten by the level where it belongs, as levels come in order.
    """
    if h < ROWS:
        return [jnp.where(l == h.bit_length(), x, s) for s, x, l in zip(scores, new, levels)]
    lane = lax.broadcasted_iota(jnp.int32, levels[0].shape, 1)
    out, new = list(scores), iter(new)
    for i in range(len(scores)):
        if _is_later(i, h, reverse):
            start = i * ROWS // h * h
            out[i] = jnp.where(lane < start + h if reverse else lane >= start, scores[i], next(new))
    return out


def _own(own: Array | None, levels: Registers) -> Registers:
    """Scores [8, C] that hold nothing but each token's score with itself."""
    if own is None:
        return [jnp.zeros(l.shape, jnp.float32) for l in levels]
    return [jnp.where(l == 0, s, 0.0) for l, s in zip(levels, cut(own))]


class Scored(NamedTuple):
    """As `tile.py` defines them, but total is [1, K]: scores [C, C] with the own ones, reads and writes [C, K]."""

    scores: Array
    reads: Array
    writes: Array
    total: Array


def vector_scores(
    tile: Tile, levels: Array, reads: Array, k: Array, decay: Array, total: Array, own: Array | None
):
    """Generator -> Scored.

    Args:
      levels: of `meeting_levels`.
      reads: q [C, K] times what the token's own read meets.
      decay: [C, K].
      total: [1, K], of the whole chunk: the exponential of the sum of logs, because the product that the halving
        leaves is rounded at every level (benchmarks/NOTES.md).
      own: [C, 1], a token's score with itself, or None.
    """
    levels, writes, reads, totals = cut(levels), cut(k), cut(reads), cut(decay)
    scores = _own(own, levels)
    waiting, h = [], 1
    while h < k.shape[0]:
        yield
        later = (
            [r for i, r in enumerate(reads) if _is_later(i, h, tile.reverse)]
            if h >= ROWS
            else reads
        )
        later = _pack(reads, h, not tile.reverse) if h < ROWS else later
        waiting.append((h, cat(later).astype(tile.operand), cat(writes).astype(tile.operand)))
        reads, writes, totals = _merge(h, reads, writes, totals, _partners(totals, h), tile.reverse)
        h *= 2
    products = {}
    while waiting:
        yield
        pair = [waiting.pop(0) for _ in range(min(len(waiting), 1 + tile.stack))]
        products.update(_products(tile, *pair))
    for h, product in products.items():
        yield
        new = cut(product)
        scores = _place(
            scores, _unpack(new, h, not tile.reverse) if h < ROWS else new, h, levels, tile.reverse
        )
    return Scored(cat(scores), cat(reads), cat(writes), total)


def _products(tile: Tile, first, second=None) -> dict[int, Array]:
    """later writes^T of one level, or of two with their depths side by side (blocks of zeros between)."""
    if second is None:
        h, later, writes = first
        return {h: matmul(tile, later, writes, NT)}
    (h, a, x), (h2, b, y) = first, second
    left = (
        jnp.concatenate([a, jnp.zeros_like(a)], axis=1),
        jnp.concatenate([jnp.zeros_like(b), b], axis=1),
    )
    product = matmul(tile, cat(left), jnp.concatenate([x, y], axis=1), NT)
    return {h: product[: a.shape[0]], h2: product[a.shape[0] :]}


class Level(NamedTuple):
    """What the descent needs of one merge: its operands before it, in the operand dtype, and its partners."""

    h: int
    reads: Array
    writes: Array
    partners: Registers


def vector_climb(
    tile: Tile, levels: Array, reads: Array, k: Array, decay: Array, total: Array, own: Array | None
):
    """Generator -> (Scored, list of Level): `vector_scores` with what its derivative needs."""
    writes, reads, totals = cut(k), cut(reads), cut(decay)
    climbed, h = [], 1
    while h < k.shape[0]:
        yield
        partners = _partners(totals, h)
        climbed.append(
            Level(h, cat(reads).astype(tile.operand), cat(writes).astype(tile.operand), partners)
        )
        reads, writes, totals = _merge(h, reads, writes, totals, partners, tile.reverse)
        h *= 2
    levels = cut(levels)
    scores = _own(own, levels)
    for level in climbed:
        yield
        later = (
            level.reads
            if level.h < ROWS
            else cat(_registers(level.reads, level.h, not tile.reverse))
        )
        scores = _place(
            scores, cut(matmul(tile, later, level.writes, NT)), level.h, levels, tile.reverse
        )
    return Scored(cat(scores), cat(reads), cat(writes), total), climbed


def _registers(x: Array, h: int, bit: bool) -> list[Array]:
    """The blocks of h >= 8 rows whose bit is `bit`."""
    return [x[start : start + h] for start in range(h if bit else 0, x.shape[0], 2 * h)]


def vector_descend(
    tile: Tile,
    levels: Array,
    levels_back: Array,
    climbed: list[Level],
    scored: Scored,
    dscores: Array,
    dscores_back: Array,
    dreads: Array,
    dwrites: Array,
    dlog_total: Array,
):
    """Generator -> (dreads and dwrites at the leaves, dlog_decay without what the read itself meets), [C, K] each.

    Args:
      levels_back: of `meeting_levels` the other way round.
      dscores, dscores_back: the scores' cotangent and its transpose, [C, C].
      dlog_total: [8, K], whose sum over rows is total times its cotangent.
    """
    levels, levels_back = cut(levels), cut(levels_back)
    ds, ds_back = cut(dscores), cut(dscores_back)
    dreads, dwrites, dlog = cut(dreads), cut(dwrites), [dlog_total]
    # The operands of the level above are this merge's results, rounded as the matmuls saw them.
    after = [(level.reads, level.writes) for level in climbed[1:]] + [(scored.reads, scored.writes)]
    for level, merged in zip(reversed(climbed), reversed(after)):
        yield
        reads, writes = (cut(x.astype(jnp.float32)) for x in merged)
        if level.h < ROWS:
            dlog = _meets_of_rows(tile, level, dlog, reads, writes, dreads, dwrites)
            dreads, dwrites = _unmerge_rows(
                tile, level, levels, levels_back, ds, ds_back, dreads, dwrites
            )
        else:
            dlog = _meets_of_blocks(tile, level, dlog, reads, writes, dreads, dwrites)
            dreads, dwrites = _unmerge_blocks(tile, level, ds, ds_back, dreads, dwrites)
    return cat(dreads), cat(dwrites), cat(dlog)


def _meets_of_rows(
    tile: Tile, level: Level, dlog: Registers, reads, writes, dreads, dwrites
) -> Registers:
    """`dlog` of blocks of 2h < 16 rows -> of blocks of h: a row adds its partner's part and what that one meets."""
    later = _has_bit(level.h, reads[0]) != tile.reverse
    meets = [
        jnp.where(later, r, w) * jnp.where(later, dr, dw)
        for r, w, dr, dw in zip(reads, writes, dreads, dwrites)
    ]
    return [d + _swap(d + m, level.h) for d, m in zip(dlog, meets)]


def _unmerge_rows(tile: Tile, level: Level, levels, levels_back, ds, ds_back, dreads, dwrites):
    """(dreads, dwrites) after a merge of h < 8 rows -> before it. Two registers' rows go through a matmul as one."""
    h, later_bit = level.h, not tile.reverse
    here = lambda xs, ls: [jnp.where(l == h.bit_length(), x, 0.0) for x, l in zip(xs, ls)]
    through = lambda xs, bit, other: _unpack(
        cut(matmul(tile, cat(_pack(xs, h, bit)), other)), h, bit
    )
    from_writes = through(here(ds, levels), later_bit, level.writes)
    from_reads = through(here(ds_back, levels_back), not later_bit, level.reads)
    later = _has_bit(h, dreads[0]) == later_bit
    return (
        [jnp.where(later, d * p + x, d) for d, p, x in zip(dreads, level.partners, from_writes)],
        [jnp.where(later, d, d * p + x) for d, p, x in zip(dwrites, level.partners, from_reads)],
    )


def _unmerge_blocks(tile: Tile, level: Level, ds, ds_back, dreads, dwrites):
    """(dreads, dwrites) after a merge of blocks of h >= 8 rows -> before it."""
    h = level.h
    is_later = [_is_later(i, h, tile.reverse) for i in range(len(dreads))]
    of = lambda xs, which: cat(
        [_sibling_lanes(x, i, h) for i, x in enumerate(xs) if is_later[i] == which]
    )
    from_writes = iter(cut(matmul(tile, of(ds, True), level.writes)))
    from_reads = iter(cut(matmul(tile, of(ds_back, False), level.reads)))
    total = lambda i: level.partners[i * ROWS // h]
    return (
        [d * total(i) + next(from_writes) if is_later[i] else d for i, d in enumerate(dreads)],
        [d if is_later[i] else d * total(i) + next(from_reads) for i, d in enumerate(dwrites)],
    )


def _meets_of_blocks(
    tile: Tile, level: Level, dlog: Registers, reads, writes, dreads, dwrites
) -> Registers:
    """`dlog`, [8, K] a block of 2h >= 16 rows -> [8, K] a block of h; the sums over these 8 rows are still to come."""
    m, out = level.h // ROWS, []
    for b in range(2 * len(dlog)):  # the block that receives; it is met by its sibling's tokens
        sibling = range((b ^ 1) * m, (b ^ 1) * m + m)
        x, dx = (reads, dreads) if bool(b & 1) == tile.reverse else (writes, dwrites)
        out.append(dlog[b // 2] + sum(x[i] * dx[i] for i in sibling))
    return out


def _sibling_lanes(x: Array, register: int, h: int) -> Array:
    """[8, C] with zeros outside the block that is merged with the one of `register`."""
    start = (register * ROWS // h ^ 1) * h
    lane = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= start) & (lane < start + h), x, 0.0)


# --- scalar decay, or none: one mask


class Sums(NamedTuple):
    """Running sums of logs in a chunk, of `tile.running_sums`: two parts, as columns [C, 1] or rows [1, C]."""

    coarse: Array
    fine: Array


def scalar_mask(tile: Tile, levels: Array, read_sums: Sums, sums: Sums) -> Array:
    """Decays j -> i [C, C], 0 where j is later, and where j is i 1 for inclusive reads. Columns i, rows j."""
    between = (read_sums.coarse - sums.coarse) + (read_sums.fine - sums.fine)
    mask = jnp.where(levels > 0, jnp.exp(jnp.where(levels > 0, between, 0.0)), 0.0)
    return jnp.where(levels == 0, 1.0, mask) if tile.inclusive else mask


def straddling_sums(
    tile: Tile, levels: Array, weights: Array, of_reads: Array, of_writes: Array
) -> Array:
    """[1, C]: what each token's log decay receives from the pairs, reads and writes that meet it.

    A pair (i, j) meets the logs after j up to i (exclusive: before i), a read those up to it, a write those after it.

    Args:
      weights: [C, C], scores times their cotangents, 0 where j is later than i.
      of_reads, of_writes: [C, 1], reads and writes times their cotangents, summed over K.
    """
    row, t = (lax.broadcasted_iota(jnp.int32, levels.shape, axis) for axis in (0, 1))
    after_row = ((t < row) if tile.reverse else (t > row)).astype(jnp.float32)
    met = matmul(tile, weights, after_row) + of_reads
    met = jnp.where(levels >= 0 if tile.inclusive else levels > 0, met, 0.0) + after_row * of_writes
    return jnp.sum(met, axis=0, keepdims=True)


# --- the state


def read_and_update(tile: Tile, scored: Scored, v: Array, state: Array) -> tuple[Array, Array]:
    """o [C, V], and the state [V, K] after the chunk. The state is transposed so that a decay is a row."""
    o = matmul(tile, scored.scores, v) + matmul(tile, scored.reads, state, NT)
    return o, state * scored.total + matmul(tile, v, scored.writes, TN)


class FromState(NamedTuple):
    """Cotangents of what a chunk shows to the rest, shapes as in `Scored`. The rows of dlog_total [8, K] add up."""

    dv: Array
    dscores: Array
    dreads: Array
    dwrites: Array
    dlog_total: Array
    dstate: Array


def from_state(tile: Tile, scored: Scored, v: Array, do: Array, state: Array, dstate: Array):
    """Generator -> FromState. state [V, K] is the one before the chunk, dstate the cotangent of the one after it."""
    dv = matmul(tile, scored.scores, do, TN) + matmul(tile, scored.writes, dstate, NT)
    yield
    dscores = matmul(tile, do, v, NT)
    yield
    dreads, dwrites = matmul(tile, do, state), matmul(tile, v, dstate)
    dlog_total = sum(cut(state.astype(jnp.float32) * dstate)) * scored.total
    before = dstate * scored.total + matmul(tile, do, scored.reads, TN)
    return FromState(dv, dscores, dreads, dwrites, dlog_total, before)
