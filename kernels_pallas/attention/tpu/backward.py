"""The backward kernel of `attention` on TPU: every tile is computed once, for all gradients.

Grid: (batch, key heads, spans of keys, query heads of the key head, tiles of the span). Within a
span, the table of tiles goes through one block of queries after another.

VMEM holds, in float32, dk and dv of a whole span of keys, until the last query head of the group
has been through it, and dq of one block of queries, from its first tile of the span to its last.
So neither is ever read back from HBM. A sequence of several spans costs a partial dq in HBM for
each; they are added up afterwards.

Logits and weights are recomputed from the inputs and the statistics of rows that the forward
kernel saved. What depends on rows alone (the gate's gradient, do, sum(do o)) is computed when a
block of queries arrives, at its first tile.

Tiles are transposed, keys by queries. The saved statistics of queries then run along lanes, as
they are stored, and are broadcast over sublanes for nothing. dk and dv are products of tiles as
they are; only dq contracts over the rows.

A tile in which something is hidden looks at its numbers first: if one is NaN, infinite or so large
that products may be, the careful version of the same code runs, whose products select. The finite
case pays for the look alone: of keys and values at every such tile, of queries at their first.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention import tile as attention_tile
from kernels_pallas.attention.kernel_tile import Logits, Positions
from kernels_pallas.attention.kernels import Residuals
from kernels_pallas.attention.products import selected
from kernels_pallas.attention.tpu import tile
from kernels_pallas.attention.tpu.backward_operands import GridStep, Operands, Spans
from kernels_pallas.attention.tpu.call import Tables, call, make_tables, without_padding
from kernels_pallas.attention.tpu.forward import in_lag_order
from kernels_pallas.attention.tpu.plan import (
    DIAGONAL,
    EMPTY,
    FIRST,
    FLUSH,
    KIND_BITS,
    LAST,
    MASKED,
    KernelInputs,
    KernelOutputs,
    Plan,
    backward_tiles,
)
from kernels_pallas.common.padding import round_up
from kernels_pallas.common.tpu import Ref, as_column, sigmoid


def backward(plan: Plan, residuals: Residuals, cotangents: KernelOutputs) -> KernelInputs:
    """The gradient of every float input, in the layout of the inputs.

    Args:
      plan: the static arguments.
      residuals: the inputs; outputs float32 [B, T, H*V]; statistics float32 [B, H, 1, T].
      cotangents: the gradient of y, [B, T, H*V]; with `return_lse` (dy, dlse), dlse [B, H, 1, T].

    Returns:
      Gradients with the dtypes of the inputs; None where an input is None, and for segments.
    """
    inputs: KernelInputs = residuals.inputs
    B = inputs.q.shape[0]
    block = plan.backward.block
    padded_length = round_up(plan.T, block)
    padded_keys = round_up(plan.S, plan.backward.keys)
    dy, dlse = cotangents if isinstance(cotangents, tuple) else (cotangents, None)
    tiles, tiles_per_span, blocks_per_span = backward_tiles(plan)
    num_spans = len(tiles.flags) // tiles_per_span
    spans = Spans(num_spans, tiles_per_span, blocks_per_span)
    operands = Operands(plan, spans, padded_length, padded_keys)

    # The dtype in which the matrix unit will take do.
    do_dtype = jnp.bfloat16 if plan.rounds else jnp.float32
    keys_per_span = spans.blocks * plan.backward.keys
    scratch = _Scratch(
        dq=pltpu.VMEM((block, plan.K), jnp.float32),
        dk=pltpu.VMEM((keys_per_span, plan.K), jnp.float32),
        dv=pltpu.VMEM((keys_per_span, plan.V), jnp.float32),
        do=pltpu.VMEM((block, plan.V), do_dtype),
        deltas=pltpu.VMEM((8, block), jnp.float32),
        careful=pltpu.SMEM((1,), jnp.int32),
    )
    # Of queries and keys, of all heads and rows of the batch.
    pairs = B * plan.H * plan.pairs
    results = call(
        plan,
        partial(_kernel, plan, spans),
        make_tables(tiles, inputs, plan.backward),
        grid=(B, plan.Hk, spans.count, plan.group, spans.tiles),
        ins=operands.inputs(residuals, dy, dlse),
        outs=operands.gradients(inputs),
        scratch=list(scratch),
        name="attention_backward",
        # dk, dq and the logits are products over K; dv and dp are products over V.
        flops=2 * pairs * (3 * plan.K + 2 * plan.V),
        exponentials=pairs,
        # Spans, query heads and tiles of a key head share its sums, so they follow one another.
        parallel=2,
    )
    results = _over_spans(results, inputs)
    of_keys = {name: results.pop(name) for name in ("dk", "dv")}
    results = without_padding(results, plan.T) | without_padding(of_keys, plan.S)
    return _summed_gradients(results)


def _over_spans(results: dict[str, Array], inputs: KernelInputs) -> dict[str, Array]:
    """The results without their axis of spans: the sum of what every span of keys added."""
    summed = dict(results)
    dq = results["dq"]
    summed["dq"] = dq[0] if dq.shape[0] == 1 else dq.sum(0).astype(inputs.q.dtype)
    if "dslopes" in results:
        summed["dslopes"] = results["dslopes"].sum(0)
    return summed


def _summed_gradients(results: dict[str, Array]) -> KernelInputs:
    """Gradients as the inputs; those of numbers by head are sums over rows [B, H, 1, T]."""
    by_head = {}
    for name in ("dsinks", "dslopes"):
        if name in results:
            by_head[name] = results[name].sum((0, 2, 3))
    return KernelInputs(
        q=results["dq"],
        k=results["dk"],
        v=results["dv"],
        gate_logits=results.get("dgate"),
        sink_logits=by_head.get("dsinks"),
        alibi_slopes=by_head.get("dslopes"),
        segment_ids=None,
    )


# --- the kernel


class _Scratch(NamedTuple):
    """VMEM that stays from one grid step to the next."""

    # float32 [block, K]: of the block of queries, until its last tile.
    dq: Ref
    # float32 [keys of a span, K] and [keys of a span, V], until the last query head has passed.
    dk: Ref
    dv: Ref
    # [block, V]: the gradient of the ungated output, in the dtype of matmul operands.
    do: Ref
    # float32 [8, block]: sum(do * output) by query, along lanes; one delta a sublane.
    deltas: Ref
    # int32 [1]: whether the block of queries, or what is known of it, has large numbers.
    careful: Ref


def _kernel(
    plan: Plan,
    spans: Spans,
    tables: Tables,
    refs: dict[str, Ref],
    scratch_refs: list[Ref],
) -> None:
    """One grid step: a tile of one query head.

    Args:
      plan: the static arguments.
      spans: how the keys are cut.
      tables: what is in SMEM.
      refs: the operands by name.
      scratch_refs: in the order of `_Scratch`.
    """
    step = GridStep(
        plan,
        spans,
        b=pl.program_id(0),
        key_head=pl.program_id(1),
        s=pl.program_id(2),
        g=pl.program_id(3),
        p=pl.program_id(4),
        tiles=tables.tiles,
    )
    scratch = _Scratch(*scratch_refs)
    block = plan.backward.block
    head = step.query_head
    flags = step.flags
    q_block = step.q_block
    k_block = step.k_block

    # The first tile of the first query head of a span.
    @pl.when((step.g == 0) & (step.p == 0))
    def start_span() -> None:
        scratch.dk[...] = jnp.zeros_like(scratch.dk)
        scratch.dv[...] = jnp.zeros_like(scratch.dv)

    @pl.when(flags & FIRST != 0)
    def start_queries() -> None:
        scratch.dq[...] = jnp.zeros_like(scratch.dq)
        if "dslopes" in refs:
            # Summed up in its output block, which stays while the queries stay.
            refs["dslopes"][...] = jnp.zeros_like(refs["dslopes"])
        gate = None if plan.gate == "none" else _sigmoid_of_gate(plan, refs)
        _store_do_and_deltas(plan, refs, scratch, gate)
        scratch.careful[0] = _queries_have_large(plan, refs, scratch).astype(jnp.int32)
        # Needs the deltas, so after they are stored.
        write_by_row = partial(
            _write_gradients_by_row,
            plan,
            tables,
            refs,
            scratch,
            head,
            gate,
        )
        if spans.count == 1:
            write_by_row()
        else:
            # Every span sees the same rows; one writes.
            pl.when(step.s == 0)(write_by_row)

    # The block of keys within the span, whose sums are in VMEM.
    block_in_span = k_block - step.s * spans.blocks
    key_block = plan.backward.keys
    first_key_in_span = pl.multiple_of(block_in_span * key_block, tile.LANES)
    here = pl.ds(first_key_in_span, key_block)
    # Each kind of tile is compiled by itself. Only the kinds that the table has are.
    tiles, _, _ = backward_tiles(plan)
    kinds = set(tiles.flags & KIND_BITS) - {EMPTY}
    for kind in sorted(kinds):
        is_due = (flags & KIND_BITS) == kind
        if tables.segments is not None:
            is_due &= tables.segments.may_share_segment(
                plan,
                plan.backward,
                step.b,
                q_block,
                k_block,
            )

        add_tile = partial(
            _add_tile,
            plan,
            refs,
            scratch._replace(dk=scratch.dk.at[here], dv=scratch.dv.at[here]),
            kind=int(kind),
            slope=None if tables.alibi_slopes is None else tables.alibi_slopes[head],
            first_query=q_block * block,
            first_key=k_block * key_block,
        )

        def fast_or_careful(add_tile: Callable[..., None] = add_tile) -> None:
            careful = tile.has_large(refs["k"][0], refs["v"][0])
            careful = careful | (scratch.careful[0] != 0)
            lax.cond(careful, partial(add_tile, careful=True), add_tile)

        # Where every pair is visible, NaN goes where it belongs by itself.
        pl.when(is_due)(fast_or_careful if plan.hides(int(kind)) else add_tile)

    @pl.when(flags & LAST != 0)
    def end_queries() -> None:
        # The tiles' products lack the factor scale: once here instead of once a tile.
        dq = scratch.dq[...] * plan.scale
        refs["dq"][0, 0] = dq.astype(refs["dq"].dtype)

    # The last query head is at the last queries: dk and dv of this block have every product.
    @pl.when((flags & FLUSH != 0) & (step.g == plan.group - 1))
    def end_keys() -> None:
        # As in `end_queries`; dv has no such factor.
        dk = scratch.dk[here] * plan.scale
        refs["dk"][0] = dk.astype(refs["dk"].dtype)
        refs["dv"][0] = scratch.dv[here].astype(refs["dv"].dtype)


def _sigmoid_of_gate(plan: Plan, refs: dict[str, Ref]) -> Array:
    """sigmoid(gate_logits) of a block of queries, [R, V] or [R, 1]."""
    if plan.gate == "element":
        return sigmoid(refs["gate"][0])
    # The gate of a head runs along lanes; rows of do run down.
    return as_column(sigmoid(refs["gate"][0, 0]))


def _output(refs: dict[str, Ref], n: int) -> Array:
    """Output n of the normalizer, of a block of queries, [R, V]."""
    return refs[f"o{n}"][0].astype(jnp.float32)


def _store_do_and_deltas(
    plan: Plan,
    refs: dict[str, Ref],
    scratch: _Scratch,
    gate: Array | None,
) -> None:
    """Of a block of queries: do, and its products with the normalizer's outputs.

    Args:
      plan: the static arguments.
      refs: the operands by name.
      scratch: do and deltas are written.
      gate: sigmoid(gate_logits), or None.
    """
    do = refs["dy"][0].astype(jnp.float32)
    if gate is not None:
        do = do * gate
    scratch.do[...] = do.astype(scratch.do.dtype)
    # The deltas are of do as the matrix unit will see it. Otherwise dp - delta, which is small by
    # cancellation, would have the error of the rounding.
    do = scratch.do[...].astype(jnp.float32)
    for n, output in enumerate(plan.normalizer.deltas):
        delta = jnp.sum(
            do * _output(refs, output),
            axis=-1,
            keepdims=True,
        )
        row = tile.as_row(delta)
        if "dlse" in refs:
            # ds = p (dp - delta + dlse). Softmax has one delta.
            row = row - refs["dlse"][0, 0]
        scratch.deltas[n : n + 1] = row


def _queries_have_large(
    plan: Plan,
    refs: dict[str, Ref],
    scratch: _Scratch,
) -> Array:
    """Whether a block of queries, its do or a statistic of its rows needs careful products."""
    deltas, saved = _statistics(plan, refs, scratch, slice(None))
    return tile.has_large(refs["q"][0], scratch.do[...], *deltas, *saved)


def _write_gradients_by_row(
    plan: Plan,
    tables: Tables,
    refs: dict[str, Ref],
    scratch: _Scratch,
    head: Array,
    gate: Array | None,
) -> None:
    """The gradients of the gate and of a sink, which need no keys.

    y = o sigmoid(gate), so dgate = dy o sigmoid'(gate): nothing is divided by a gate that may be 0.

    Args:
      plan: the static arguments.
      tables: the sinks are read.
      refs: the operands by name; dgate and dsinks are written.
      scratch: the deltas are read.
      head: the query head.
      gate: sigmoid(gate_logits), or None.
    """
    if gate is not None and plan.gate == "element":
        dy = refs["dy"][0].astype(jnp.float32)
        # sigmoid' = sigmoid (1 - sigmoid)
        dgate = dy * _output(refs, 0) * gate * (1 - gate)
        refs["dgate"][0] = dgate.astype(refs["dgate"].dtype)
    elif gate is not None:
        # Along lanes, as the sums of the products will be.
        gate = sigmoid(refs["gate"][0, 0])
        products = refs["dy"][0].astype(jnp.float32) * _output(refs, 0)
        summed = tile.as_row(jnp.sum(products, axis=-1, keepdims=True))
        refs["dgate"][0, 0] = summed * gate * (1 - gate)
    if tables.sink_logits is not None:
        # A sink is a logit of every query of the head; `_summed_gradients` adds these up.
        sink = jnp.full((1, plan.backward.block), tables.sink_logits[head])
        deltas, saved = _statistics(plan, refs, scratch, slice(None))
        refs["dsinks"][0, 0] = plan.normalizer.sink_gradient(
            sink,
            deltas,
            saved,
        )


def _statistics(
    plan: Plan,
    refs: dict[str, Ref],
    scratch: _Scratch,
    queries: slice,
) -> tuple[list[Array], tuple[Array, ...]]:
    """(deltas, what the forward pass saved) of some queries of the block, [1, R] each.

    Args:
      plan: the static arguments.
      refs: the operands by name.
      scratch: the deltas.
      queries: which of the block.

    Returns:
      As `Normalizer.gradient` takes them.
    """
    # [1, R] slices of the scratch memory and of the operands.
    num_deltas = len(plan.normalizer.deltas)
    deltas = [scratch.deltas[n : n + 1, queries] for n in range(num_deltas)]
    num_saved = sum(name.startswith("saved") for name in refs)
    saved = tuple(refs[f"saved{n}"][0, 0, :, queries] for n in range(num_saved))
    return deltas, saved


def _add_tile(
    plan: Plan,
    refs: dict[str, Ref],
    scratch: _Scratch,
    *,
    kind: int,
    slope: Array | None,
    first_query: Array,
    first_key: Array,
    careful: bool = False,
) -> None:
    """Adds what a tile contributes to dq, dk, dv and dslopes, one group of keys after another.

    Args:
      plan: the static arguments.
      refs: the kernel's operands by name.
      scratch: dk and dv are those of the tile's keys; they and dq are added to.
      kind: of the tile: FULL, DIAGONAL or MASKED.
      slope: of this head, or None.
      first_query: position of the first query of the tile.
      first_key: position of the first key of the tile.
      careful: whether what is not seen may be NaN, infinite or so large that products are.
    """
    block = plan.backward.block
    rows = plan.backward.rows
    # FULL tiles need no mask of positions.
    by_position = kind in (DIAGONAL, MASKED)
    # Careful products need the mask itself.
    triangles = tile.only_triangles(plan, kind) and not careful
    starts = range(0, plan.backward.keys, rows)

    def keys_of(start: int) -> slice:
        return slice(start, start + rows)

    def queries_of(start: int) -> slice:
        # On the diagonal no query before a group's first key sees any of it.
        return slice(start if kind == DIAGONAL else 0, block)

    def positions(start: int) -> Positions:
        queries = queries_of(start)
        at = tile.positions(
            first_query + queries.start,
            block - queries.start,
            first_key + start,
            rows,
            transposed=True,
        )
        if plan.segments:
            # They are stored along lanes; rows of this tile are keys.
            key_segments = as_column(refs["key_segments"][0, :, keys_of(start)])
            query_segments = refs["query_segments"][0, :, queries]
            at = at._replace(query_segments=query_segments, key_segments=key_segments)
        return at

    def logits_and_dp(start: int) -> tuple[Logits, Array]:
        keys = keys_of(start)
        queries = queries_of(start)
        k = refs["k"][0, keys]
        q = refs["q"][0, queries]
        s = tile.logits(
            plan,
            k,
            q,
            slope,
            positions(start),
        )
        # dp = (do v^T)^T, the gradient of the weights.
        dp = tile.matmul(
            plan,
            refs["v"][0, keys],
            scratch.do[queries],
            tile.NT,
        )
        return s, dp

    def add_gradients(start: int, logits_and_dp: tuple[Logits, Array]) -> None:
        logits, dp = logits_and_dp
        at = positions(start)
        keys = keys_of(start)
        queries = queries_of(start)
        deltas, saved = _statistics(plan, refs, scratch, queries)
        mask = None
        values = logits.values
        if triangles:
            values = tile.below_diagonal(values, transposed=True)
        else:
            mask = tile.visible(plan, at, by_position)
        weights, ds = plan.normalizer.gradient(
            values,
            mask,
            at.keys,
            dp,
            deltas,
            saved,
        )
        # What the products must select by; without it they take all.
        seen = mask if careful else None
        weights = selected(weights, seen)
        ds = selected(ds, seen)
        # dv = weights^T do. The tile is transposed, so this is a plain product.
        scratch.dv[keys] += tile.selecting_product(
            plan,
            weights,
            seen,
            scratch.do[queries],
        )
        if logits.distance is not None:
            # A query's logits lose slope * distance; keys run down the rows.
            dslopes = jnp.sum(
                ds * logits.distance,
                axis=0,
                keepdims=True,
            )
            refs["dslopes"][0, 0, 0, :, queries] -= dslopes
        ds = attention_tile.through_soft_cap(ds, logits.capped, plan.logits_soft_cap)
        # The cap's slope is NaN where a logit is, seen or not.
        ds = selected(ds, seen)
        # dk = ds^T q, a plain product too; dq = ds k contracts over the rows, which are keys.
        scratch.dk[keys] += tile.selecting_product(
            plan,
            ds,
            seen,
            refs["q"][0, queries],
        )
        scratch.dq[queries] += tile.selecting_product(
            plan,
            ds,
            seen,
            refs["k"][0, keys],
            tile.TN,
        )

    in_lag_order(starts, plan.backward.lag, logits_and_dp, add_gradients)
