"""The backward kernels of `attention` on GPU: tiles are recomputed, once for dq and once for dk and dv; no atomics.

dq       a program owns a block of queries of one head, and walks the keys that it sees
dk, dv   a program owns a block of keys of one key head, and walks the queries that see it, of every query head
         of the group: nothing is added up in memory
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.attention.gpu import plan, tile
from kernels_pallas.attention.gpu.plan import Inputs, Plan
from kernels_pallas.attention.gpu.tuning import Cut
from kernels_pallas.common.mesh import like


def dq(p: Plan, x: Inputs, do: Array, saved: list[Array], deltas: list[Array]) -> dict[str, Array]:
    """dq as q; dslopes float32 [B, H, T] by row, where there are slopes."""
    B, cut, key_head = x.q.shape[0], p.schedule.dq, lambda h: h // p.group
    own = lambda a, D: (a, plan.tokens(p, p.H, lambda h: h, D))
    ins = {
        "q": own(x.q, p.K),
        "k": (x.k, plan.tokens(p, p.Hk, key_head, p.K)),
        "v": (x.v, plan.tokens(p, p.Hk, key_head, p.V)),
        "do": own(do, p.V),
        **_by_row(plan.numbers(p), saved, deltas),
        **_options(x, cut.own, cut.other),
    }
    outs = {"dq": own(like(x.q, x.q.shape, x.q.dtype), p.K)}
    if p.slopes:
        outs["dslopes"] = like(x.q, (B, p.H, p.length), jnp.float32), plan.numbers(p)
    pairs, grid = B * p.H * p.pairs, (p.length // cut.own, p.H, B)
    cost = dict(flops=2 * pairs * (2 * p.K + p.V), exponentials=pairs)
    return plan.call(p, partial(_dq, p), cut, grid, ins, outs, "attention_dq", **cost)


def dkv(p: Plan, x: Inputs, do: Array, saved: list[Array], deltas: list[Array]) -> dict[str, Array]:
    """dk and dv as k and v."""
    cuts = (
        {("dk", "dv"): p.schedule.dkv}
        if p.schedule.dv is None
        else {("dk",): p.schedule.dkv, ("dv",): p.schedule.dv}
    )
    found = {}
    for names, cut in cuts.items():
        found |= _of_keys(p, x, do, saved, deltas, names, cut)
    return found


def _of_keys(
    p: Plan, x: Inputs, do, saved, deltas, names: tuple[str, ...], cut: Cut
) -> dict[str, Array]:
    B = x.q.shape[0]
    own = lambda a, D: (a, plan.tokens(p, p.Hk, lambda h: h, D))
    group = lambda a, D: (
        a,
        pl.BlockSpec((None, p.length, p.group, D), lambda n, h, b: (b, 0, h, 0)),
    )
    rows = pl.BlockSpec((None, p.group, p.length), lambda n, h, b: (b, h, 0))
    ins = {
        "q": group(x.q, p.K),
        "k": own(x.k, p.K),
        "v": own(x.v, p.V),
        "do": group(do, p.V),
        **_by_row(rows, saved, deltas),
        **_options(x, cut.own, cut.other),
    }
    outs = {
        "dk": own(like(x.q, x.k.shape, x.k.dtype), p.K),
        "dv": own(like(x.q, x.v.shape, x.v.dtype), p.V),
    }
    outs = {name: outs[name] for name in names}
    pairs, grid = B * p.H * p.pairs, (p.length // cut.own, p.Hk, B)
    multiplied = {"dk": 2 * p.K + p.V, "dv": p.V if len(names) > 1 else p.K + p.V}
    cost = dict(flops=2 * pairs * sum(multiplied[name] for name in names), exponentials=pairs)
    return plan.call(
        p, partial(_dkv, p, cut), cut, grid, ins, outs, f"attention_{''.join(names)}", **cost
    )


def _by_row(spec: pl.BlockSpec, saved: list[Array], deltas: list[Array]) -> dict:
    named = [(f"saved{n}", a) for n, a in enumerate(saved)] + [
        (f"delta{n}", a) for n, a in enumerate(deltas)
    ]
    return {name: (a, spec) for name, a in named}


def _options(x: Inputs, own: int, other: int) -> dict:
    found = {}
    if x.slopes is not None:
        found["slopes"] = x.slopes, plan.whole(x.slopes)
    if x.segments is not None:
        spans = plan.shared_segments(x.segments, own, other)
        found |= {
            "segments": (x.segments, plan.by_batch(x.segments)),
            "spans": (spans, plan.by_batch(spans)),
        }
    return found


def _numbers(rows: dict, at) -> tuple[list[Array], tuple[Array, ...]]:
    """(deltas, saved) of some queries, [R] each."""
    take = lambda kind: [
        pltriton.load(ref.at[at]) for name, ref in rows.items() if name.startswith(kind)
    ]
    return take("delta"), tuple(take("saved"))


def _dq(
    p: Plan, q, k, v, do, dq, dslopes=None, slopes=None, segments=None, spans=None, **by_row
) -> None:
    cut, h = p.schedule.dq, pl.program_id(1)
    n = (
        p.length // cut.own - 1 - pl.program_id(0)
    )  # the last queries see most keys, and start first
    rows = plan.block(n, cut.own)
    queries, dout = plan.load(q, rows, p.K), plan.load(do, rows, p.V)
    deltas, saved = _numbers(by_row, rows)
    deltas, saved = [d[:, None] for d in deltas], tuple(a[:, None] for a in saved)
    slope = None if slopes is None else pltriton.load(slopes.at[h])
    query_segments = None if segments is None else pltriton.load(segments.at[rows])[:, None]

    def visit(masks: bool, _, j, carry):
        dq, dslopes = carry
        at = plan.block(j, cut.other)
        key_segments = None if segments is None else pltriton.load(segments.at[at])[None, :]
        places = tile.Places(rows[:, None], at[None, :], query_segments, key_segments)
        keys = plan.load(k, at, p.K)
        s = tile.logits(p, queries, keys, slope, jnp.abs(places.queries - places.keys))
        dp = tile.matmul(p, dout, plan.load(v, at, p.V), trans_y=True)
        _, ds = p.normalizer.gradient(
            s.s, tile.seen(p, places, masks), places.keys, dp, deltas, saved
        )
        if slope is not None:
            dslopes -= jnp.sum(ds * s.distance, axis=1)
        return dq + tile.matmul(p, tile.through_cap(p, s, ds), keys), dslopes

    start = (
        jnp.zeros((cut.own, p.K), jnp.float32),
        None if slope is None else jnp.zeros(cut.own, jnp.float32),
    )
    ranges = plan.visits(p, plan.of_queries(p), n, cut.own, cut.other, plan.limits(spans, n))
    total, total_slopes = plan.walked(ranges, visit, start)
    plan.store(dq, rows, total * p.scale)
    if slope is not None:
        pltriton.store(dslopes.at[rows], total_slopes)


def _dkv(
    p: Plan,
    cut: Cut,
    q,
    k,
    v,
    do,
    dk=None,
    dv=None,
    slopes=None,
    segments=None,
    spans=None,
    **by_row,
) -> None:
    h, n = pl.program_id(1), pl.program_id(0)
    at = plan.block(n, cut.own)
    keys, values = plan.load(k, at, p.K), None if dk is None else plan.load(v, at, p.V)
    key_segments = None if segments is None else pltriton.load(segments.at[at])[:, None]

    def visit(masks: bool, g, i, sums):
        rows, (sum_k, sum_v) = plan.block(i, cut.other), sums
        slope = None if slopes is None else pltriton.load(slopes.at[h * p.group + g])
        query_segments = None if segments is None else pltriton.load(segments.at[rows])[None, :]
        places = tile.Places(rows[None, :], at[:, None], query_segments, key_segments)
        queries, dout = _of_head(q, rows, g, p.K), _of_head(do, rows, g, p.V)
        deltas, saved = _numbers(by_row, (g, rows))
        deltas, saved = [d[None, :] for d in deltas], tuple(a[None, :] for a in saved)
        s = tile.logits(p, keys, queries, slope, jnp.abs(places.queries - places.keys))
        # Weights do not depend on dp.
        dp = jnp.zeros_like(s.s) if dk is None else tile.matmul(p, values, dout, trans_y=True)
        weights, ds = p.normalizer.gradient(
            s.s, tile.seen(p, places, masks), places.keys, dp, deltas, saved
        )
        sum_v = None if dv is None else sum_v + tile.matmul(p, weights, dout)
        return None if dk is None else sum_k + tile.matmul(
            p, tile.through_cap(p, s, ds), queries
        ), sum_v

    zeros = lambda ref: None if ref is None else jnp.zeros((cut.own, ref.shape[1]), jnp.float32)
    ranges = plan.visits(
        p, plan.of_queries(p).turned(), n, cut.own, cut.other, plan.limits(spans, n)
    )
    sum_k, sum_v = plan.walked(ranges, visit, (zeros(dk), zeros(dv)), p.group)
    if dk is not None:
        plan.store(dk, at, sum_k * p.scale)
    if dv is not None:
        plan.store(dv, at, sum_v)


def _of_head(ref, rows: Array, g, width: int) -> Array:
    """[rows, width] of query head g of the group."""
    return pltriton.load(ref.at[rows[:, None], g, lax.iota(jnp.int32, width)[None, :]])
