"""The kernels of `block_mask.py`: a program has some blocks of queries, and a head's keys.

Several blocks of queries are computed side by side (`block_lists.GROUP`), each with a chunk of its
own list: all their logits stand before the first exponential in program order, which is what lets
the compiler overlap products with the rest.
"""

import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jaxtyping import Bool

from kernels_pallas.attention import tile as attention_tile
from kernels_pallas.attention.inputs import MASK_BLOCK
from kernels_pallas.attention.products import selected
from kernels_pallas.attention.tpu import block_lists, tile
from kernels_pallas.attention.tpu.plan import LANES, Plan
from kernels_pallas.common.tpu import Ref, as_column


class _Queries(NamedTuple):
    """A block of queries of a program."""

    # Its first row in the program's.
    first: Array
    # How many blocks of keys are on.
    count: Array
    # Where their list begins in the program's.
    entry: Array

    @property
    def rows(self) -> Any:
        return pl.ds(self.first, MASK_BLOCK)


def _by_group(
    plan: Plan,
    program: Array,
    counts: Ref,
    body: Callable[[list[_Queries]], None],
) -> None:
    """body(group) for every group of blocks of queries of a program."""
    blocks = plan.forward.block // MASK_BLOCK
    size = math.gcd(blocks, block_lists.GROUP)

    def step(i: Array, _: None) -> None:
        group = []
        for n in range(size):
            block = i * size + n
            first = pl.multiple_of(block * MASK_BLOCK, MASK_BLOCK)
            count = counts[program * blocks + block]
            group.append(_Queries(first, count, block * block_lists.list_stride(plan)))
        body(group)

    lax.fori_loop(0, blocks // size, step, None)


def _num_chunks(group: list[_Queries]) -> Array:
    """Of the longest list of a group."""
    count = functools.reduce(jnp.maximum, [queries.count for queries in group])
    return lax.div(count + (block_lists.CHUNK - 1), jnp.int32(block_lists.CHUNK))


def _key_blocks(lists: Ref, queries: _Queries, chunk: Array) -> list[Any]:
    """The rows of k and v of every block of keys of a chunk; past the end of the list, of any."""
    blocks = []
    for n in range(block_lists.CHUNK):
        entry = queries.entry + chunk * block_lists.CHUNK + n
        first = pl.multiple_of(lists[entry] * MASK_BLOCK, MASK_BLOCK)
        blocks.append(pl.ds(first, MASK_BLOCK))
    return blocks


def _gathered(ref: Ref, blocks: list[Any]) -> Array:
    """The blocks of k or v as one matrix, [block_lists.CHUNK * MASK_BLOCK, D]."""
    return jnp.concatenate([ref[0, block] for block in blocks], axis=0)


def _mask(
    plan: Plan,
    first_query: Array,
    blocks: list[Any],
    left: Array,
) -> Bool[Array, "R C"]:
    """Which keys of a chunk the queries of a block may see.

    Args:
      plan: the static arguments.
      first_query: the position of the first query.
      blocks: the rows of the chunk's keys, by block.
      left: how many of the blocks are on: those after are past the end of the list.

    Returns:
      The mask.
    """
    columns = lax.broadcasted_iota(jnp.int32, (1, block_lists.CHUNK * MASK_BLOCK), 1)
    # The position of every column's key.
    keys = columns + blocks[0].start
    for n in range(1, block_lists.CHUNK):
        of_block = columns + (blocks[n].start - n * MASK_BLOCK)
        keys = jnp.where(columns >= n * MASK_BLOCK, of_block, keys)
    queries = first_query + lax.broadcasted_iota(jnp.int32, (MASK_BLOCK, 1), 0)
    shape = (MASK_BLOCK, block_lists.CHUNK * MASK_BLOCK)
    mask = jnp.broadcast_to(columns < left * MASK_BLOCK, shape)
    by_position = attention_tile.visible_pairs(
        queries,
        keys,
        length=plan.S if plan.S % MASK_BLOCK else None,
        causal=plan.causal,
        window=plan.window,
    )
    if by_position is not None:
        mask = mask & by_position
    if plan.T % MASK_BLOCK:
        # Queries of padding must see nothing: their 0 times an infinite key is NaN.
        mask = mask & jnp.broadcast_to(queries < plan.T, shape)
    return mask


def _fast_and_careful(large: Ref, run: Callable[[bool], None]) -> None:
    """run(careful), with products that select only where some number asks for it."""
    lax.cond(large[0] != 0, partial(run, True), partial(run, False))


def forward_kernel(
    plan: Plan,
    large: Ref,
    counts: Ref,
    lists: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    o: Ref,
    lse: Ref,
    lse_columns: Ref,
) -> None:
    """A program: some blocks of queries of one head."""
    normalizer = plan.normalizer
    t = pl.program_id(2)
    program = (pl.program_id(0) * plan.H + pl.program_id(1)) * block_lists.num_programs(plan) + t
    first_of_program = t * plan.forward.block

    def attend(careful: bool, group: list[_Queries]) -> None:
        def logits(c: Array, queries: _Queries) -> tuple[Array, list[Any]]:
            blocks = _key_blocks(lists, queries, c)
            s = tile.matmul(plan, q[0, queries.rows], _gathered(k, blocks), tile.NT)
            return attention_tile.soft_capped(s * plan.scale, plan.logits_soft_cap), blocks

        def add_values(
            c: Array,
            queries: _Queries,
            carry: tuple,
            s: Array,
            blocks: list[Any],
        ) -> tuple:
            row, weighted_sum, sees = carry
            left = queries.count - c * block_lists.CHUNK
            mask = _mask(plan, first_of_program + queries.first, blocks, left)
            # Softmax does not ask which key is which.
            added = normalizer.add(row, s, mask, s[:1])
            product = tile.selecting_product(
                plan,
                added.weights[0],
                mask if careful else None,
                _gathered(v, blocks),
            )
            assert added.keep is not None
            weighted_sum = tile.across(added.keep, plan.V) * weighted_sum + product
            if careful:
                seen = jnp.max(mask.astype(jnp.float32), axis=-1, keepdims=True)
                sees = jnp.maximum(sees, seen)
            return added.row, weighted_sum, sees

        def chunk(c: Array, carries: list[tuple]) -> list[tuple]:
            # All products before the first exponential: in this order they overlap.
            of_group = [logits(c, queries) for queries in group]
            return [
                add_values(c, queries, carry, *of_queries)
                for queries, carry, of_queries in zip(group, carries, of_group)
            ]

        zero = jnp.zeros((MASK_BLOCK, LANES), jnp.float32)
        no_sum = jnp.zeros((MASK_BLOCK, plan.V), jnp.float32)
        start = (normalizer.start(zero), no_sum, zero[:, :1])
        ends = lax.fori_loop(0, _num_chunks(group), chunk, [start] * len(group))
        for queries, (row, weighted_sum, sees) in zip(group, ends):
            (output,), (statistic,) = normalizer.finish(row, [weighted_sum])
            if careful:
                # Of logits of -inf alone: 0 / 0.
                undefined = (row[0][:, :1] == -jnp.inf) & (sees > 0)
                output = jnp.where(undefined, jnp.nan, output)
                statistic = jnp.where(undefined, jnp.nan, statistic)
            o[0, queries.rows] = output
            lse_columns[queries.rows] = jnp.broadcast_to(statistic, (MASK_BLOCK, LANES))

    def run(careful: bool) -> None:
        _by_group(plan, program, counts, partial(attend, careful))

    _fast_and_careful(large, run)
    # A column in HBM would fill 128 lanes for each number.
    lse[0, 0] = tile.as_row(lse_columns[:, :1])


def backward_kernel(
    plan: Plan,
    large: Ref,
    counts: Ref,
    lists: Ref,
    q: Ref,
    k: Ref,
    v: Ref,
    do: Ref,
    lse: Ref,
    delta: Ref,
    dq: Ref,
    dk: Ref,
    dv: Ref,
    lse_columns: Ref,
    delta_columns: Ref,
) -> None:
    """A program: some blocks of queries of one head. dk and dv stay in VMEM for the key head."""
    t = pl.program_id(3)
    head = pl.program_id(1) * plan.group + pl.program_id(2)
    program = (pl.program_id(0) * plan.H + head) * block_lists.num_programs(plan) + t
    first_of_program = t * plan.backward.block

    @pl.when((pl.program_id(2) == 0) & (t == 0))
    def start_keys() -> None:
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    lse_columns[...] = as_column(lse[0, 0])
    delta_columns[...] = as_column(delta[0, 0])

    def add_gradients(careful: bool, group: list[_Queries]) -> None:
        def logits_and_dp(c: Array, queries: _Queries) -> tuple[Array, Array, list[Any]]:
            blocks = _key_blocks(lists, queries, c)
            s = tile.matmul(plan, q[0, queries.rows], _gathered(k, blocks), tile.NT)
            capped = attention_tile.soft_capped(s * plan.scale, plan.logits_soft_cap)
            dp = tile.matmul(plan, do[0, queries.rows], _gathered(v, blocks), tile.NT)
            return capped, dp, blocks

        def add_products(
            c: Array,
            queries: _Queries,
            dq_rows: Array,
            capped: Array,
            dp: Array,
            blocks: list[Any],
        ) -> Array:
            rows = queries.rows
            left = queries.count - c * block_lists.CHUNK
            mask = _mask(plan, first_of_program + queries.first, blocks, left)
            weights, ds = plan.normalizer.gradient(
                capped,
                mask,
                capped[:1],
                dp,
                [delta_columns[rows]],
                (lse_columns[rows],),
            )
            # 0 times a dp that overflowed, or of a row whose statistics are NaN.
            ds = attention_tile.through_soft_cap(ds, capped, plan.logits_soft_cap)
            weights = selected(weights, mask)
            ds = selected(ds, mask)
            product = partial(tile.selecting_product, plan)
            seen = mask if careful else None
            dv_chunk = product(weights, seen, do[0, rows], tile.TN)
            # The products lack the factor scale: here, and at the end for dq.
            dk_chunk = product(ds, seen, q[0, rows], tile.TN) * plan.scale
            for n, block in enumerate(blocks):
                of_block = slice(n * MASK_BLOCK, (n + 1) * MASK_BLOCK)
                dk[0, block] += dk_chunk[of_block]
                dv[0, block] += dv_chunk[of_block]
            return dq_rows + product(ds, seen, _gathered(k, blocks))

        def chunk(c: Array, sums: list[Array]) -> list[Array]:
            of_group = [logits_and_dp(c, queries) for queries in group]
            return [
                add_products(c, queries, dq_rows, *of_queries)
                for queries, dq_rows, of_queries in zip(group, sums, of_group)
            ]

        no_sum = jnp.zeros((MASK_BLOCK, plan.K), jnp.float32)
        ends = lax.fori_loop(0, _num_chunks(group), chunk, [no_sum] * len(group))
        for queries, dq_rows in zip(group, ends):
            dq[0, queries.rows] = (dq_rows * plan.scale).astype(dq.dtype)

    def run(careful: bool) -> None:
        _by_group(plan, program, counts, partial(add_gradients, careful))

    _fast_and_careful(large, run)
