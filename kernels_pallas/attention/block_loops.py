"""The loops of the xla backend over tiles: the forward pass, and the gradients of its inputs.

Queries, keys and values are cut into blocks (`blocks.py`). The outer loop goes over query blocks,
the inner one over the key blocks that some row of the query block may see: its bounds come from
`causal` and `window`, so a tile that is fully masked costs nothing; one that the block mask hides
in every row and head costs a look. The backward pass loops over the same tiles and recomputes them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention import blocks, products, tile
from kernels_pallas.attention.blocks import KeyBlocks, Plan, QueryBlocks, UngatedInputs
from kernels_pallas.attention.normalizers.base import AddTile, Row, masked, row_max
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.opaque import opaque

# The forward pass.


class _Carry(NamedTuple):
    """What the rows of a query block know after some key blocks."""

    # The normalizer's statistics.
    row: Row
    # Of weighted values.
    sums: list[Array]
    # The largest logit or sink [B, Hk, R, 1]; None if the normalizer does without.
    largest: Array | None
    # Whether the row sees a key; None if it sees itself.
    sees: Array | None


def forward(plan: Plan, inputs: UngatedInputs) -> tuple[tuple[Array, ...], Row]:
    """The normalizer's ungated outputs [B, T, H, V], and what it saves [Nq, B, Hk, R, 1].

    They are not rounded to 16 bits. Kept in bfloat16, o would bring most of the error of dq,
    through deltas, and half of that of the gate's gradient.
    """
    # Keys or values that are a broadcast would meet a fault of XLA on CPUs: see `opaque`.
    inputs = opaque(inputs)
    normalizer = plan.normalizer
    T = inputs.q.shape[1]
    num_keys = inputs.k.shape[1]
    V = inputs.v.shape[-1]
    query_blocks = blocks.cut_queries(plan, inputs)
    key_blocks = blocks.cut_keys(plan, inputs)
    constants = blocks.row_constants(plan, inputs)
    dtype = constants.zero.dtype
    product = partial(products.matmul, "...rc,...cv->...rv", dtype=dtype)
    # A single query's product is smaller than the values of all keys, and shows what is in them.
    any_special = products.has_special if T == 1 else products.has_special(inputs.v)
    empty_sum = jnp.broadcast_to(constants.zero, (*constants.zero.shape[:-1], V))

    def attend(_: None, rows: QueryBlocks):
        """One query block against every key block that it sees."""
        first_query = blocks.first_position(plan, inputs, rows.number)
        first, end = blocks.key_range(plan, num_keys, first_query)

        def masked_logits(j, keys: KeyBlocks) -> tuple[Array, Array | None, Array]:
            mask = blocks.tile_mask(plan, inputs, constants, rows, j, keys)
            logits = tile.logits(
                rows.q,
                keys.k,
                mask.alibi,
                scale=plan.scale,
                logits_soft_cap=plan.logits_soft_cap,
                dtype=dtype,
            )
            return logits.s, mask.seen, mask.keys

        def pass_over_keys(start: Row, add: AddTile) -> Row:
            """A pass that computes logits only, for `Normalizer.prepare`."""

            def add_block(j, row: Row) -> Row:
                return add(row, *masked_logits(j, blocks.take(key_blocks, j)))

            return blocks.loop(first, end, partial(_where_on, rows, add_block), start)

        def add_block(j, carry: _Carry) -> _Carry:
            row, sums, largest, sees = carry
            keys = blocks.take(key_blocks, j)
            s, seen, positions = masked_logits(j, keys)
            added = normalizer.add(row, s, seen, positions)
            # The values are multiplied by weights that are not normalized yet.
            sums = tile.accumulate(sums, added, keys.v, product, seen, any_special)
            if largest is not None:
                # Softmax takes this maximum anyway, and XLA takes it once.
                largest = jnp.maximum(largest, row_max(masked(s, seen)))
            if sees is not None and seen is not None:
                sees = sees | jnp.any(seen, axis=-1, keepdims=True)
            return _Carry(added.row, sums, largest, sees)

        def is_undefined(end: _Carry) -> Array | None:
            """The rows that see something, but no logit above -inf: 0 / 0. None if none can be."""
            if end.largest is None:
                return None
            undefined = end.largest == -jnp.inf
            if end.sees is not None:
                undefined = undefined & end.sees
            if T % plan.block_q:
                undefined = undefined & blocks.is_no_padding(plan, inputs, rows)
            return undefined

        # Most normalizers know nothing before, and make no other pass.
        known = normalizer.prepare(pass_over_keys, constants.zero, constants.parameters)
        row = normalizer.start(constants.zero, known, constants.sink)
        sums = [empty_sum] * normalizer.sums
        largest = None
        sees = None
        if normalizer.from_maximum:
            largest = constants.zero - jnp.inf if constants.sink is None else constants.sink
            sees = None if plan.sees_itself else constants.zero > 0
        start = _Carry(row, sums, largest, sees)
        last = blocks.loop(first, end, partial(_where_on, rows, add_block), start)
        outputs, saved = normalizer.finish(last.row, last.sums)
        undefined = is_undefined(last)
        if undefined is not None:
            outputs = tuple(jnp.where(undefined, jnp.nan, o) for o in outputs)
            saved = tuple(jnp.where(undefined, jnp.nan, x) for x in saved)
        # o, and what the backward pass multiplies by do.
        kept = [o for n, o in enumerate(outputs) if n == 0 or n in normalizer.deltas]
        return None, (kept, saved)

    # Query blocks do not depend on each other: nothing is carried.
    _, (outputs, saved) = blocks.scan_blocks(attend, None, query_blocks)
    outputs = tuple(blocks.join(o, plan.block_q, T) for o in outputs)
    return outputs, saved


def _where_on[Carry](
    rows: QueryBlocks,
    add: Callable[[int | Array, Carry], Carry],
    j: int | Array,
    carry: Carry,
) -> Carry:
    """add(j, carry), if the block mask leaves anything of the tile.

    Args:
      rows: the tile's block of queries.
      add: adds the tile of one block of keys.
      j: the number of that block.
      carry: what is known of the rows.

    Returns:
      What is known after the tile.
    """
    is_on = blocks.tile_is_on(rows, j)
    if is_on is None:
        return add(j, carry)
    return jax.lax.cond(is_on, partial(add, j), lambda carry: carry, carry)


# The backward pass.


def input_gradients(
    plan: Plan,
    inputs: UngatedInputs,
    row: tile.RowGradient,
) -> UngatedInputs:
    """The gradients of `inputs`. Each tile is computed once; dk and dv are added up in place."""
    num_keys = inputs.k.shape[1]
    query_blocks = blocks.cut_queries(plan, inputs)
    key_blocks = blocks.cut_keys(plan, inputs)
    constants = blocks.row_constants(plan, inputs)
    dtype = constants.zero.dtype
    any_special = products.has_special(inputs.q, inputs.k, row.do)
    no_dslopes = None if constants.slopes is None else constants.zero

    def zeros_like(x: Array) -> Array:
        return varying_like(jnp.zeros(x.shape, dtype), x)

    def query_block(dkv: tuple[Array, Array], xs: tuple[QueryBlocks, tile.RowGradient]):
        """One query block: its dq, and what it adds to the dk and dv of all keys."""
        rows, row = xs

        def add_block(j, carry):
            dq, dslopes, dk, dv = carry
            keys = blocks.take(key_blocks, j)
            new = tile.gradients(
                plan.normalizer,
                rows.q,
                keys.k,
                keys.v,
                row,
                blocks.tile_mask(plan, inputs, constants, rows, j, keys),
                any_special,
                scale=plan.scale,
                logits_soft_cap=plan.logits_soft_cap,
                dtype=dtype,
            )
            if dslopes is not None:
                dslopes = dslopes + new.dslopes
            # A loop over query blocks carries dk and dv, so that XLA updates them in place.
            dk = blocks.add_at(dk, j, new.dk)
            dv = blocks.add_at(dv, j, new.dv)
            return dq + new.dq, dslopes, dk, dv

        # The tiles of the forward pass, and no others.
        first_query = blocks.first_position(plan, inputs, rows.number)
        first, end = blocks.key_range(plan, num_keys, first_query)
        start = (zeros_like(rows.q), no_dslopes, *dkv)
        dq, dslopes, dk, dv = blocks.loop(first, end, partial(_where_on, rows, add_block), start)
        dq = (plan.scale * dq).astype(rows.q.dtype)
        return (dk, dv), (dq, dslopes)

    # Sums over query blocks and over the heads of a group, in the statistics' dtype.
    no_dkv = (zeros_like(key_blocks.k), zeros_like(key_blocks.v))
    dkv, by_row = blocks.scan_blocks(query_block, no_dkv, (query_blocks, row))
    dk, dv = dkv
    dq, dslopes = by_row

    dsink = None
    if inputs.sink_logits is not None:
        assert constants.sink is not None
        # By row, of all blocks; the rows of a head share its sink.
        sink = constants.sink[None]
        dsink = plan.normalizer.sink_gradient(sink, row.deltas, row.saved)
        dsink = blocks.sum_by_head(dsink, plan.block_q).astype(inputs.sink_logits.dtype)
    if inputs.alibi_slopes is not None:
        dslopes = blocks.sum_by_head(dslopes, plan.block_q).astype(inputs.alibi_slopes.dtype)

    dparameters = None
    if inputs.normalizer_parameters is not None:
        by_row = plan.normalizer.parameter_gradients(row.deltas, row.saved)
        by_head = [blocks.sum_by_head(x, plan.block_q) for x in by_row]
        dparameters = jnp.stack(by_head).astype(inputs.normalizer_parameters.dtype)

    # Tiles leave the scale out: see `tile.TileGradients`. Integer inputs have no gradient (None).
    dk = blocks.join(plan.scale * dk, plan.block_k, num_keys)
    dv = blocks.join(dv, plan.block_k, num_keys)
    return UngatedInputs(
        q=blocks.join(dq, plan.block_q, inputs.q.shape[1]),
        k=dk.astype(inputs.k.dtype),
        v=dv.astype(inputs.v.dtype),
        sink_logits=dsink,
        alibi_slopes=dslopes,
        normalizer_parameters=dparameters,
    )
