"""The backward kernels of `attention` on GPU.

    dq        grid: (blocks of queries, query heads, batch). A program has one block of queries and
              loops over the blocks of keys that they see.
    dk, dv    grid: (blocks of keys, key heads, batch). A program has one block of keys and loops
              over the blocks of queries that see them, of every query head of the group.

Every tile is computed twice, once in each kernel, from the inputs and the statistics of rows that
the forward pass saved. In return a program owns what it adds up: the sums stay in registers, in
float32, and are written once. There are no atomic additions, so results do not vary from run to
run. Where registers do not hold both sums, dk and dv are kernels of their own.

In the kernel of dq a tile is [queries, keys]. In that of dk and dv it is transposed, [keys,
queries], so that it multiplies do and queries as it is.
"""

from functools import partial
from typing import NamedTuple

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
    loop_over_heads,
    loop_over_tiles,
)
from kernels_pallas.attention.gpu.tuning import KernelConfig
from kernels_pallas.attention.tile_ranges import reach_of_queries
from kernels_pallas.common.mesh import like


class RowGradients(NamedTuple):
    """What the kernels know of rows, that is of queries."""

    # The gradient of the ungated output, [B, T, H, V].
    do: Array
    # sum(do * output) for each output in `Normalizer.deltas`, float32 [B, H, T].
    deltas: list[Array]
    # What the normalizer saved, float32 [B, H, T] each.
    saved: list[Array]


# --- dq


def dq(plan: Plan, inputs: KernelInputs, rows: RowGradients) -> tuple[Array, Array | None]:
    """(dq as q; the gradient of the slopes by row, float32 [B, H, T], or None without slopes)."""
    B = inputs.q.shape[0]
    config = plan.schedule.dq
    ins = {
        "q": by_head(plan, inputs.q),
        "k": by_head(plan, inputs.k, plan.group),
        "v": by_head(plan, inputs.v, plan.group),
        "do": by_head(plan, rows.do),
    }
    for name, array in _numbers_by_name(rows).items():
        ins[name] = number_by_head(plan, array)
    ins |= _slopes_and_segments(inputs, config.block_q, config.block_k)

    gradient = like(inputs.q, inputs.q.shape, inputs.q.dtype)
    outs = {"dq": by_head(plan, gradient)}
    if plan.slopes:
        # By row: `op.py` adds them up.
        dslopes = like(inputs.q, (B, plan.H, plan.length), jnp.float32)
        outs["dslopes"] = number_by_head(plan, dslopes)
    # Of queries and keys, of all heads and rows of the batch.
    pairs = B * plan.H * plan.pairs
    results = call(
        plan,
        partial(_dq_kernel, plan),
        config,
        grid=(plan.length // config.block_q, plan.H, B),
        ins=ins,
        outs=outs,
        name="attention_dq",
        # Logits and dq are products over K; dp is one over V.
        flops=2 * pairs * (2 * plan.K + plan.V),
        exponentials=pairs,
    )
    return results["dq"], results.get("dslopes")


class _QuerySums(NamedTuple):
    """The carry of the loop over keys."""

    # float32 [R, K]
    dq: Array
    # float32 [R]
    dslopes: Array | None


def _dq_kernel(plan: Plan, refs: dict[str, Ref]) -> None:
    """One program: a block of queries of one head."""
    config = plan.schedule.dq
    head = pl.program_id(1)
    # The last queries see most keys, and start first.
    n = plan.length // config.block_q - 1 - pl.program_id(0)
    rows = block_positions(n, config.block_q)
    queries = load(refs["q"], rows, plan.K)
    do = load(refs["do"], rows, plan.V)
    # The numbers of a query run down, [R, 1], as the queries do.
    deltas_of_rows = _load_numbers(refs, "delta", rows)
    saved_of_rows = _load_numbers(refs, "saved", rows)
    deltas = [tile.as_column(x) for x in deltas_of_rows]
    saved = tuple(tile.as_column(x) for x in saved_of_rows)
    slope = tile.slope_of_head(plan, refs, head)
    query_segments = load_segments(refs, rows)

    def add_tile(
        by_position: bool,
        _: Array,
        k_block: Array,
        sums: _QuerySums,
    ) -> _QuerySums:
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
        # dp = do v^T, the gradient of the weights.
        v = load(refs["v"], keys, plan.V)
        dp = tile.matmul(plan, do, v, trans_y=True)
        mask = tile.visible(plan, at, by_position)
        _, ds = plan.normalizer.gradient(
            logits.values,
            mask,
            at.keys,
            dp,
            deltas,
            saved,
        )
        dslopes = sums.dslopes
        if dslopes is not None and logits.distance is not None:
            # Logits lose slope * distance.
            dslopes = dslopes - jnp.sum(ds * logits.distance, axis=1)
        # From here on, of the logits before the soft cap.
        ds = attention_tile.through_soft_cap(ds, logits.capped, plan.logits_soft_cap)
        dq = sums.dq + tile.matmul(plan, ds, k)
        return _QuerySums(dq, dslopes)

    end = loop_over_tiles(
        plan,
        reach_of_queries(plan),
        n,
        config.block_q,
        config.block_k,
        refs.get("spans"),
        add_tile,
        _start_of_queries(plan, rows),
    )
    tile.write_or_repeat(
        plan,
        [end.dq],
        write=lambda: _write_dq(plan, refs, rows, end),
        repeat=lambda: _repeat_dq(plan, refs, n, head),
    )


def _start_of_queries(plan: Plan, rows: Array) -> _QuerySums:
    return _QuerySums(
        dq=jnp.zeros((*rows.shape, plan.K), jnp.float32),
        dslopes=jnp.zeros(rows.shape, jnp.float32) if plan.slopes else None,
    )


def _write_dq(
    plan: Plan,
    refs: dict[str, Ref],
    rows: Array,
    sums: _QuerySums,
) -> None:
    # The tiles' products lack the factor scale: once here instead of once a tile.
    store(refs["dq"], rows, sums.dq * plan.scale)
    if sums.dslopes is not None:
        pltriton.store(refs["dslopes"].at[rows], sums.dslopes)


def _repeat_dq(
    plan: Plan,
    refs: dict[str, Ref],
    n: Array,
    head: Array,
) -> None:
    """The program again, key by key, for `tile.write_or_repeat`."""
    config = plan.schedule.dq
    slope = tile.slope_of_head(plan, refs, head)

    def compute(rows: Array, first: Array, end: Array) -> None:
        queries = load(refs["q"], rows, plan.K)
        do = load(refs["do"], rows, plan.V)
        deltas = [tile.as_column(x) for x in _load_numbers(refs, "delta", rows)]
        saved = tuple(tile.as_column(x) for x in _load_numbers(refs, "saved", rows))
        query_segments = load_segments(refs, rows)

        def add_key(position: Array, sums: _QuerySums) -> _QuerySums:
            # As `add_tile` of `_dq_kernel`: a tile [R, 1].
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
            v = load(refs["v"], key, plan.V)
            dp = tile.products_with(do, v)
            mask = tile.visible(plan, at, by_position=True)
            _, ds = plan.normalizer.gradient(
                logits.values,
                mask,
                at.keys,
                dp,
                deltas,
                saved,
            )
            # dp of a key that is not seen may be NaN.
            ds = tile.if_seen(mask, ds)
            dslopes = sums.dslopes
            if dslopes is not None and logits.distance is not None:
                dslopes = dslopes - jnp.sum(ds * logits.distance, axis=1)
            ds = attention_tile.through_soft_cap(ds, logits.capped, plan.logits_soft_cap)
            dq = sums.dq + tile.product_if_seen(mask, ds, k)
            return _QuerySums(dq, dslopes)

        sums = lax.fori_loop(first, end, add_key, _start_of_queries(plan, rows))
        _write_dq(plan, refs, rows, sums)

    few_rows_at_a_time(
        plan,
        config,
        reach_of_queries(plan),
        n,
        config.block_q,
        config.block_k,
        refs.get("spans"),
        compute,
    )


# --- dk and dv


def dkv(plan: Plan, inputs: KernelInputs, rows: RowGradients) -> tuple[Array, Array]:
    """(dk as k, dv as v)."""
    if plan.schedule.dv is None:
        # Registers hold both sums.
        results = _gradients_of_keys(
            plan,
            inputs,
            rows,
            ["dk", "dv"],
            plan.schedule.dkv,
        )
        return results["dk"], results["dv"]
    dk = _gradients_of_keys(
        plan,
        inputs,
        rows,
        ["dk"],
        plan.schedule.dkv,
    )
    dv = _gradients_of_keys(
        plan,
        inputs,
        rows,
        ["dv"],
        plan.schedule.dv,
    )
    return dk["dk"], dv["dv"]


def _gradients_of_keys(
    plan: Plan,
    inputs: KernelInputs,
    rows: RowGradients,
    names: list[str],
    config: KernelConfig,
) -> dict[str, Array]:
    """Those of dk and dv that `names` has, from one kernel.

    Args:
      plan: the static arguments.
      inputs: the arrays of the call.
      rows: what is known of queries.
      names: "dk", "dv" or both.
      config: blocks and warps of the kernel.

    Returns:
      Gradients by name, as k and v.
    """
    B = inputs.q.shape[0]
    ins = {
        "q": _by_group(plan, inputs.q),
        "k": by_head(plan, inputs.k),
        "v": by_head(plan, inputs.v),
        "do": _by_group(plan, rows.do),
    }
    for name, array in _numbers_by_name(rows).items():
        ins[name] = _number_by_group(plan, array)
    ins |= _slopes_and_segments(inputs, config.block_k, config.block_q)

    outs = {}
    if "dk" in names:
        dk = like(inputs.q, inputs.k.shape, inputs.k.dtype)
        outs["dk"] = by_head(plan, dk)
    if "dv" in names:
        dv = like(inputs.q, inputs.v.shape, inputs.v.dtype)
        outs["dv"] = by_head(plan, dv)
    pairs = B * plan.H * plan.pairs
    return call(
        plan,
        partial(_dkv_kernel, plan, config),
        config,
        grid=(plan.length // config.block_k, plan.Hk, B),
        ins=ins,
        outs=outs,
        name="attention_" + "".join(names),
        flops=2 * pairs * _multiplications(plan, names),
        exponentials=pairs,
    )


def _multiplications(plan: Plan, names: list[str]) -> int:
    """Of a pair of a query and a key, in the kernel that computes `names`."""
    # Logits in every kernel.
    total = plan.K
    if "dk" in names:
        # dp over V, then dk over K.
        total += plan.V + plan.K
    if "dv" in names:
        total += plan.V
    return total


def _by_group(plan: Plan, array: Array) -> Operand:
    """Of [B, T, H, width]: all tokens of the query heads of a program's key head."""
    width = array.shape[3]

    def index(n: Array, h: Array, b: Array) -> tuple:
        return b, 0, h, 0

    spec = pl.BlockSpec((None, plan.length, plan.group, width), index)
    return Operand(array, spec)


def _number_by_group(plan: Plan, array: Array) -> Operand:
    """Of [B, H, T]: a number for every token, of the query heads of a program's key head."""

    def index(n: Array, h: Array, b: Array) -> tuple:
        return b, h, 0

    spec = pl.BlockSpec((None, plan.group, plan.length), index)
    return Operand(array, spec)


class _KeySums(NamedTuple):
    """The carry of the loop over queries; None for what another kernel computes."""

    # float32 [C, K] and [C, V], for C keys.
    dk: Array | None
    dv: Array | None


def _dkv_kernel(plan: Plan, config: KernelConfig, refs: dict[str, Ref]) -> None:
    """One program: a block of keys of one key head."""
    key_head = pl.program_id(1)
    # The first keys are seen by most queries, and start first.
    n = pl.program_id(0)
    keys = block_positions(n, config.block_k)
    k = load(refs["k"], keys, plan.K)
    # Only dk needs dp, and so the values.
    v = load(refs["v"], keys, plan.V) if "dk" in refs else None
    key_segments = load_segments(refs, keys)

    def add_tile(
        by_position: bool,
        g: Array,
        q_block: Array,
        sums: _KeySums,
    ) -> _KeySums:
        # g is the query head within the group.
        rows = block_positions(q_block, config.block_q)
        slope = tile.slope_of_head(plan, refs, key_head * plan.group + g)
        query_segments = load_segments(refs, rows)
        at = tile.positions(
            rows,
            keys,
            query_segments,
            key_segments,
            transposed=True,
        )
        queries = _load_of_head(refs["q"], rows, g, plan.K)
        do = _load_of_head(refs["do"], rows, g, plan.V)
        # The numbers of a query run along a row, [1, R], as the queries do.
        deltas_of_rows = _load_numbers(refs, "delta", (g, rows))
        saved_of_rows = _load_numbers(refs, "saved", (g, rows))
        deltas = [tile.as_row(x) for x in deltas_of_rows]
        saved = tuple(tile.as_row(x) for x in saved_of_rows)
        logits = tile.logits(
            plan,
            k,
            queries,
            slope,
            at.distance(),
        )
        if v is None:
            # Only dv is computed, and weights do not depend on dp.
            dp = jnp.zeros_like(logits.values)
        else:
            # dp = (do v^T)^T, the gradient of the weights.
            dp = tile.matmul(plan, v, do, trans_y=True)
        mask = tile.visible(plan, at, by_position)
        weights, ds = plan.normalizer.gradient(
            logits.values,
            mask,
            at.keys,
            dp,
            deltas,
            saved,
        )

        dk = sums.dk
        dv = sums.dv
        if dv is not None:
            # dv = weights^T do; the tile is transposed already.
            dv = dv + tile.matmul(plan, weights, do)
        if dk is not None:
            ds = attention_tile.through_soft_cap(ds, logits.capped, plan.logits_soft_cap)
            # dk = ds^T q; likewise.
            dk = dk + tile.matmul(plan, ds, queries)
        return _KeySums(dk, dv)

    end = loop_over_tiles(
        plan,
        reach_of_queries(plan).transposed(),
        n,
        config.block_k,
        config.block_q,
        refs.get("spans"),
        add_tile,
        _start_of_keys(plan, refs, keys),
        heads=plan.group,
    )
    tile.write_or_repeat(
        plan,
        [x for x in end if x is not None],
        write=lambda: _write_dkv(plan, refs, keys, end),
        repeat=lambda: _repeat_dkv(plan, config, refs, n, key_head),
    )


def _start_of_keys(plan: Plan, refs: dict[str, Ref], keys: Array) -> _KeySums:
    return _KeySums(
        dk=jnp.zeros((*keys.shape, plan.K), jnp.float32) if "dk" in refs else None,
        dv=jnp.zeros((*keys.shape, plan.V), jnp.float32) if "dv" in refs else None,
    )


def _write_dkv(
    plan: Plan,
    refs: dict[str, Ref],
    keys: Array,
    sums: _KeySums,
) -> None:
    if sums.dk is not None:
        # The factor scale, as in dq; dv has none.
        store(refs["dk"], keys, sums.dk * plan.scale)
    if sums.dv is not None:
        store(refs["dv"], keys, sums.dv)


def _repeat_dkv(
    plan: Plan,
    config: KernelConfig,
    refs: dict[str, Ref],
    n: Array,
    key_head: Array,
) -> None:
    """The program again, query by query, for `tile.write_or_repeat`."""

    def compute(keys: Array, first: Array, end: Array) -> None:
        k = load(refs["k"], keys, plan.K)
        v = load(refs["v"], keys, plan.V) if "dk" in refs else None
        key_segments = load_segments(refs, keys)

        def add_query(g: Array, position: Array, sums: _KeySums) -> _KeySums:
            # As `add_tile` of `_dkv_kernel`: a tile [C, 1].
            query = block_positions(position, 1)
            slope = tile.slope_of_head(plan, refs, key_head * plan.group + g)
            at = tile.positions(
                query,
                keys,
                load_segments(refs, query),
                key_segments,
                transposed=True,
            )
            q = _load_of_head(refs["q"], query, g, plan.K)
            do = _load_of_head(refs["do"], query, g, plan.V)
            deltas = [tile.as_row(x) for x in _load_numbers(refs, "delta", (g, query))]
            saved = tuple(tile.as_row(x) for x in _load_numbers(refs, "saved", (g, query)))
            logits = tile.logits_of_token(
                plan,
                k,
                q,
                slope,
                at.distance(),
            )
            if v is None:
                dp = jnp.zeros_like(logits.values)
            else:
                dp = tile.products_with(v, do)
            mask = tile.visible(plan, at, by_position=True)
            weights, ds = plan.normalizer.gradient(
                logits.values,
                mask,
                at.keys,
                dp,
                deltas,
                saved,
            )
            dk = sums.dk
            dv = sums.dv
            if dv is not None:
                dv = dv + tile.product_if_seen(mask, weights, do)
            if dk is not None:
                ds = attention_tile.through_soft_cap(ds, logits.capped, plan.logits_soft_cap)
                dk = dk + tile.product_if_seen(mask, ds, q)
            return _KeySums(dk, dv)

        sums = loop_over_heads(
            plan.group,
            first,
            end,
            add_query,
            _start_of_keys(plan, refs, keys),
        )
        _write_dkv(plan, refs, keys, sums)

    few_rows_at_a_time(
        plan,
        config,
        reach_of_queries(plan).transposed(),
        n,
        config.block_k,
        config.block_q,
        refs.get("spans"),
        compute,
    )


def _load_of_head(
    ref: Ref,
    rows: Array,
    g: Array,
    width: int,
) -> Array:
    """Some rows of query head g of the group, [rows, width]."""
    # Of [T, group, width], the middle axis is one number: g is known only in the loop.
    columns = lax.iota(jnp.int32, width)
    return pltriton.load(ref.at[rows[:, None], g, columns[None, :]])


# --- what both have


def _numbers_by_name(rows: RowGradients) -> dict[str, Array]:
    named = {}
    for n, array in enumerate(rows.saved):
        named[f"saved{n}"] = array
    for n, array in enumerate(rows.deltas):
        named[f"delta{n}"] = array
    return named


def _load_numbers(
    refs: dict[str, Ref],
    kind: str,
    at: Array | tuple[Array, Array],
) -> list[Array]:
    """The deltas, or what was saved, of some queries: [R] each."""
    # In the order of `_numbers_by_name`, which is that of the operands.
    of_kind = [ref for name, ref in refs.items() if name.startswith(kind)]
    return [pltriton.load(ref.at[at]) for ref in of_kind]


def _slopes_and_segments(
    inputs: KernelInputs,
    block: int,
    other_block: int,
) -> dict[str, Operand]:
    """The operands that a call may lack, for a program with one `block` of tokens."""
    operands = segment_operands(inputs.segment_ids, block, other_block)
    if inputs.alibi_slopes is not None:
        operands["slopes"] = whole(inputs.alibi_slopes)
    return operands
