"""The forward kernel of `attention` on GPU.

Grid: (blocks of queries, heads, batch). A program has one block of queries of one head, loads it
once, and loops over the blocks of keys and values that it sees (`plan.tile_ranges`). The running
sums of weighted values and what the normalizer keeps of a row are the carry of that loop: they
stay in registers, in float32. Keys and values come through shared memory, `num_stages` blocks of
them in flight. After the loop the program ends the rows, multiplies by sigmoid(gate) and writes y.
Nothing is recomputed here; the backward pass recomputes logits and weights from what is saved.
Where a sum ends as NaN or infinite, the program starts over, key by key: see
`tile.write_or_repeat`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.attention import tile as attention_tile
from kernels_pallas.attention.gpu import tile
from kernels_pallas.attention.gpu.call import (
    Operand,
    block_positions,
    by_head,
    call,
    load,
    load_segments,
    number_by_head,
    segment_operands,
    store,
    whole,
)
from kernels_pallas.attention.gpu.plan import (
    KernelInputs,
    Plan,
    Ref,
    few_rows_at_a_time,
    loop_over_tiles,
    reach_of_queries,
)
from kernels_pallas.attention.gpu.tile import Rows
from kernels_pallas.attention.kernels import (
    ForwardResult,
    forward_result,
    saved_statistics,
)
from kernels_pallas.attention.normalizers.base import undefined_as_nan
from kernels_pallas.common.mesh import like


def forward(plan: Plan, inputs: KernelInputs, save: bool) -> ForwardResult:
    """y [B, T, H, V], and with `save` what the backward kernels need.

    Outputs are float32 [B, T, H, V], statistics of rows float32 [B, H, T].
    """
    B = inputs.q.shape[0]
    config = plan.schedule.forward
    # Of queries and keys, of all heads and rows of the batch.
    pairs = B * plan.H * plan.pairs
    results = call(
        plan,
        partial(_kernel, plan),
        config,
        grid=(plan.length // config.block_q, plan.H, B),
        ins=_inputs(plan, inputs),
        outs=_outputs(plan, inputs, save),
        name="attention_forward",
        # Logits are products over K, every sum of values one over V.
        flops=2 * pairs * (plan.K + plan.normalizer.sums * plan.V),
        exponentials=pairs,
    )
    return forward_result(results)


def _inputs(plan: Plan, inputs: KernelInputs) -> dict[str, Operand]:
    config = plan.schedule.forward
    operands = {
        "q": by_head(plan, inputs.q),
        "k": by_head(plan, inputs.k, plan.group),
        "v": by_head(plan, inputs.v, plan.group),
    }
    if inputs.gate_logits is not None and plan.gate == "head":
        operands["gate"] = number_by_head(plan, inputs.gate_logits)
    elif inputs.gate_logits is not None:
        operands["gate"] = by_head(plan, inputs.gate_logits)
    if inputs.sink_logits is not None:
        operands["sinks"] = whole(inputs.sink_logits)
    if inputs.alibi_slopes is not None:
        operands["slopes"] = whole(inputs.alibi_slopes)
    segments = segment_operands(inputs.segment_ids, config.block_q, config.block_k)
    return operands | segments


def _outputs(plan: Plan, inputs: KernelInputs, save: bool) -> dict[str, Operand]:
    q = inputs.q
    B = q.shape[0]
    by_token = (B, plan.length, plan.H, plan.V)
    y = like(q, by_token, plan.out_dtype)
    operands = {"y": by_head(plan, y)}
    if not save:
        return operands
    # In float32: rounded to 16 bits, the output would bring most of the error of dq.
    output = like(q, by_token, jnp.float32)
    for n in plan.saved_outputs:
        operands[f"o{n}"] = by_head(plan, output)
    statistic = like(q, (B, plan.H, plan.length), jnp.float32)
    for n in range(saved_statistics(plan.normalizer)):
        operands[f"saved{n}"] = number_by_head(plan, statistic)
    return operands


def _kernel(plan: Plan, refs: dict[str, Ref]) -> None:
    """One program: a block of queries of one head."""
    normalizer = plan.normalizer
    config = plan.schedule.forward
    head = pl.program_id(1)
    # Where attention is causal, the last queries see most keys. They start first, so that no long
    # program is left over when the others have ended.
    n = plan.length // config.block_q - 1 - pl.program_id(0)
    rows = block_positions(n, config.block_q)
    queries = load(refs["q"], rows, plan.K)
    slope = tile.slope_of_head(plan, refs, head)
    query_segments = load_segments(refs, rows)
    product = partial(tile.matmul, plan)

    def add_tile(
        by_position: bool,
        _: Array,
        k_block: Array,
        carry: Rows,
    ) -> Rows:
        # Positions [R, 1] and [1, C], so that they broadcast to the tile.
        keys = block_positions(k_block, config.block_k)
        key_segments = load_segments(refs, keys)
        at = tile.positions(rows, keys, query_segments, key_segments)
        k = load(refs["k"], keys, plan.K)
        logits = tile.logits(
            plan,
            queries,
            k,
            slope,
            at.distance(),
        )
        mask = tile.visible(plan, at, by_position)
        added = normalizer.add(
            carry.statistics,
            logits.values,
            mask,
            at.keys,
        )
        # Loaded where they are used, so that fewer registers are live before.
        values = load(refs["v"], keys, plan.V)
        sums = attention_tile.accumulate(carry.sums, added, values, product)
        return Rows(added.row, sums)

    end = loop_over_tiles(
        plan,
        reach_of_queries(plan),
        n,
        config.block_q,
        config.block_k,
        refs.get("spans"),
        add_tile,
        _start(plan, refs, rows, head),
    )
    tile.write_or_repeat(
        plan,
        end.sums,
        write=lambda: _write(plan, refs, rows, end),
        repeat=lambda: _repeat(plan, refs, n, head),
    )


def _start(
    plan: Plan,
    refs: dict[str, Ref],
    rows: Array,
    head: Array,
) -> Rows:
    """Rows that have seen nothing."""
    zero = jnp.zeros((*rows.shape, 1), jnp.float32)
    sink = None
    if "sinks" in refs:
        # One logit for every row of the block.
        sink = zero + plan.unit * pltriton.load(refs["sinks"].at[head])
    zeros = jnp.zeros((*rows.shape, plan.V), jnp.float32)
    return Rows(
        statistics=plan.normalizer.start(zero, (), sink),
        sums=[zeros] * plan.normalizer.sums,
    )


def _repeat(
    plan: Plan,
    refs: dict[str, Ref],
    n: Array,
    head: Array,
) -> None:
    """The program again, key by key, for `tile.write_or_repeat`."""
    config = plan.schedule.forward
    slope = tile.slope_of_head(plan, refs, head)

    def attend(rows: Array, first: Array, end: Array) -> None:
        queries = load(refs["q"], rows, plan.K)
        query_segments = load_segments(refs, rows)

        def add_key(position: Array, carry: Rows) -> Rows:
            # As `add_tile` of `_kernel`: a tile [R, 1].
            key = block_positions(position, 1)
            at = tile.positions(rows, key, query_segments, load_segments(refs, key))
            k = load(refs["k"], key, plan.K)
            logits = tile.logits_of_token(
                plan,
                queries,
                k,
                slope,
                at.distance(),
            )
            mask = tile.visible(plan, at, by_position=True)
            added = plan.normalizer.add(
                carry.statistics,
                logits.values,
                mask,
                at.keys,
            )
            value = load(refs["v"], key, plan.V)
            product = partial(tile.product_if_seen, mask)
            sums = attention_tile.accumulate(carry.sums, added, value, product)
            return Rows(added.row, sums)

        start = _start(plan, refs, rows, head)
        _write(plan, refs, rows, lax.fori_loop(first, end, add_key, start))

    few_rows_at_a_time(
        plan,
        config,
        reach_of_queries(plan),
        n,
        config.block_q,
        config.block_k,
        refs.get("spans"),
        attend,
    )


def _write(
    plan: Plan,
    refs: dict[str, Ref],
    rows: Array,
    end: Rows,
) -> None:
    """Ends some rows and writes them."""
    # outputs[0] is the ungated output. Only what `_outputs` asked for is there to be written.
    # Every token sees itself.
    sums = undefined_as_nan(plan.normalizer, end.statistics, end.sums)
    outputs, saved = plan.normalizer.finish(end.statistics, sums)
    for i, output in enumerate(outputs):
        if f"o{i}" in refs:
            store(refs[f"o{i}"], rows, output)
    for i, statistic in enumerate(saved):
        if f"saved{i}" in refs:
            # [R, 1] -> [R]
            by_query = statistic.reshape(rows.shape)
            pltriton.store(refs[f"saved{i}"].at[rows], by_query)
    y = _gated(plan, outputs[0], refs, rows)
    store(refs["y"], rows, y)


def _gated(
    plan: Plan,
    output: Array,
    refs: dict[str, Ref],
    rows: Array,
) -> Array:
    """The output times sigmoid(gate), of some rows."""
    if plan.gate == "none":
        return output
    if plan.gate == "element":
        gate_logits = load(refs["gate"], rows, plan.V)
    else:
        # One number a query: a column beside the channels of the output.
        by_query = pltriton.load(refs["gate"].at[rows])
        gate_logits = tile.as_column(by_query)
    gate = jax.nn.sigmoid(gate_logits.astype(jnp.float32))
    return output * gate
