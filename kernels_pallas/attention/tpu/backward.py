"""The backward kernel: every tile is visited once, and all gradients come from that visit.

The grid walks (batch, key heads, spans of keys, query heads of it, visits). dq is summed up while a block of queries
stays; dk and dv of a whole span of keys are kept in VMEM, in float32, until the last query head has passed. Every
further span costs a partial dq in HBM. What depends on rows alone (the gate's gradient, do, sum(do o)) is computed when
a block of them arrives.

Tiles are turned over, keys by queries: what the forward pass saved of a row then lies along lanes.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tpu import tile
from kernels_pallas.attention.tpu.call import Tables, call, segment_tables
from kernels_pallas.attention.tpu.plan import (
    DIAGONAL,
    FIRST,
    FLUSH,
    LAST,
    MASKED,
    NOTHING,
    Inputs,
    Plan,
    backward_visits,
    pairs,
)
from kernels_pallas.common.mesh import like
from kernels_pallas.common.padding import padded
from kernels_pallas.common.tpu import Operand


def backward(
    plan: Plan, x: Inputs, outputs: dict[int, Array], saved: list[Array], dy: Array
) -> dict[str, Array]:
    """dq, dk, dv, dgate as the inputs; dsinks and dslopes float32 [B, H, spans or 1, T], by row.

    outputs: of the normalizer, by number, float32 [B, T, H*V]; saved: [B, H, 1, T] each.
    """
    B, block = x.q.shape[0], plan.backward.block
    length = -(-plan.T // block) * block
    visits, count, blocks = backward_visits(plan)
    spans = len(visits.rows) // count
    tables = Tables(visits, segment_tables(plan, x.segments, block, length), x.sinks, x.slopes)
    at = lambda s, p: s * count + p
    head = lambda h, g: h * plan.group + g
    pad, along = partial(padded, axis=1, size=length), partial(padded, axis=3, size=length)

    def tokens(name: str, a, D: int) -> Operand:
        return Operand(
            name, a, (1, block, D), lambda b, h, s, g, p, t: (b, t.rows[at(s, p)], head(h, g))
        )

    def keys(name: str, a, D: int) -> Operand:
        return Operand(name, a, (1, block, D), lambda b, h, s, g, p, t: (b, t.keys[at(s, p)], h))

    def numbers(name: str, a) -> Operand:
        return Operand(
            name, a, (1, 1, 1, block), lambda b, h, s, g, p, t: (b, head(h, g), 0, t.rows[at(s, p)])
        )

    def once(o: Operand) -> Operand:
        """An output by rows that the first span writes; the others leave the last block where it is."""

        def index(b, h, s, g, p, t):
            end = o.index(b, h, 0, plan.group - 1, count - 1, t)
            return tuple(jnp.where(s == 0, x, y) for x, y in zip(o.index(b, h, s, g, p, t), end))

        return o._replace(index=index) if spans > 1 else o

    def by_span(name: str, a, D: int) -> Operand:
        return Operand(
            name, a, (1, 1, block, D), lambda b, h, s, g, p, t: (s, b, t.rows[at(s, p)], head(h, g))
        )

    def flushed(name: str, a, D: int) -> Operand:
        """Written while the last query head's last rows pass; before that, the span's first block is waiting."""

        def index(b, h, s, g, p, t):
            now = (t.what[at(s, p)] & FLUSH != 0) & (g == plan.group - 1)
            return b, jnp.where(now, t.keys[at(s, p)], s * blocks), h

        return Operand(name, a, (1, block, D), index)

    ins = [tokens("q", pad(x.q), plan.K), keys("k", pad(x.k), plan.K), keys("v", pad(x.v), plan.V)]
    ins += [tokens("dy", pad(dy), plan.V)]
    ins += [tokens(f"o{n}", pad(o), plan.V) for n, o in outputs.items()]
    ins += [numbers(f"saved{n}", along(a)) for n, a in enumerate(saved)]
    if plan.gate == "element":
        ins.append(tokens("gate", pad(x.gate), plan.V))
    elif plan.gate == "head":
        ins.append(numbers("gate", along(x.gate)))
    if plan.segments:
        ids = padded(x.segments, 2, length, mode="edge")
        ins.append(
            Operand(
                "query_segments",
                ids,
                (1, 1, block),
                lambda b, h, s, g, p, t: (b, 0, t.rows[at(s, p)]),
            )
        )
        ins.append(
            Operand(
                "key_segments",
                ids,
                (1, 1, block),
                lambda b, h, s, g, p, t: (b, 0, t.keys[at(s, p)]),
            )
        )
    wide = lambda heads, D: (B, length, heads * D)
    dq_dtype = x.q.dtype if spans == 1 else jnp.float32
    outs = [
        by_span("dq", like(x.q, (spans, *wide(plan.H, plan.K)), dq_dtype), plan.K),
        flushed("dk", like(x.q, wide(plan.Hk, plan.K), x.k.dtype), plan.K),
        flushed("dv", like(x.q, wide(plan.Hk, plan.V), x.v.dtype), plan.V),
    ]
    rows = like(x.q, (B, plan.H, 1, length), jnp.float32)
    if plan.gate == "element":
        outs.append(once(tokens("dgate", like(x.q, wide(plan.H, plan.V), x.gate.dtype), plan.V)))
    elif plan.gate == "head":
        outs.append(once(numbers("dgate", rows)))
    if x.sinks is not None:
        outs.append(once(numbers("dsinks", rows)))
    if x.slopes is not None:
        of_span = like(x.q, (spans, *rows.shape), jnp.float32)
        row = lambda b, h, s, g, p, t: (s, b, head(h, g), 0, t.rows[at(s, p)])
        outs.append(Operand("dslopes", of_span, (1, 1, 1, 1, block), row))
    operand = jnp.bfloat16 if plan.rounds else jnp.float32
    scratch = [
        pltpu.VMEM((block, plan.K), jnp.float32),
        pltpu.VMEM((blocks * block, plan.K), jnp.float32),
        pltpu.VMEM((blocks * block, plan.V), jnp.float32),
        pltpu.VMEM((block, plan.V), operand),
        pltpu.VMEM((8, block), jnp.float32),
    ]
    kernel = partial(_kernel, plan, count, blocks, spans)
    results = call(
        plan,
        kernel,
        tables,
        (B, plan.Hk, spans, plan.group, count),
        ins,
        outs,
        scratch,
        "attention_backward",
        flops=2 * B * plan.H * pairs(plan) * (3 * plan.K + 2 * plan.V),
        exponentials=B * plan.H * pairs(plan),
        parallel=2,
    )
    dq = results["dq"]
    results["dq"] = dq[0] if spans == 1 else dq.sum(0).astype(x.q.dtype)
    if "dslopes" in results:
        results["dslopes"] = results["dslopes"].sum(0)
    return {
        name: a[:, : plan.T] if a.ndim == 3 else a[..., : plan.T] for name, a in results.items()
    }


def _kernel(
    plan: Plan, count: int, blocks: int, spans: int, tables: Tables, refs: dict, scratch: list
) -> None:
    b, h, s, g, p = (pl.program_id(n) for n in range(5))
    dq_ref, dk_ref, dv_ref, do_ref, deltas_ref = scratch
    block, step, head = plan.backward.block, s * count + p, h * plan.group + g
    what, i, j = tables.visits.what[step], tables.visits.rows[step], tables.visits.keys[step]

    @pl.when((g == 0) & (p == 0))
    def _():
        dk_ref[...] = jnp.zeros_like(dk_ref)
        dv_ref[...] = jnp.zeros_like(dv_ref)

    @pl.when(what & FIRST != 0)
    def _():
        dq_ref[...] = jnp.zeros_like(dq_ref)
        if "dslopes" in refs:
            refs["dslopes"][...] = jnp.zeros_like(refs["dslopes"])
        opened = None if plan.gate == "none" else _opened(plan, refs)
        _arrival(plan, refs, do_ref, deltas_ref, opened)
        by_row = partial(_gradients_by_row, plan, tables, refs, deltas_ref, head, opened)
        if spans == 1:
            by_row()
        else:
            pl.when(s == 0)(by_row)

    here = pl.ds(pl.multiple_of((j - s * blocks) * block, tile.LANES), block)
    for kind in sorted(set(backward_visits(plan)[0].what & 3) - {NOTHING}):
        due = (what & 3) == kind
        if plan.segments:
            due &= tables.segments.may_meet(b, i, j)
        sums = dq_ref, dk_ref.at[here], dv_ref.at[here]
        pl.when(due)(
            partial(_tile, plan, tables, refs, sums, do_ref, deltas_ref, int(kind), head, i, j)
        )

    @pl.when(what & LAST != 0)
    def _():
        refs["dq"][0, 0] = (dq_ref[...] * plan.scale).astype(refs["dq"].dtype)

    @pl.when((what & FLUSH != 0) & (g == plan.group - 1))
    def _():
        refs["dk"][0] = (dk_ref[here] * plan.scale).astype(refs["dk"].dtype)
        refs["dv"][0] = dv_ref[here].astype(refs["dv"].dtype)


def _arrival(plan: Plan, refs: dict, do_ref, deltas_ref, opened: Array | None) -> None:
    """What a block of queries brings along: do, and its products with the normalizer's outputs."""
    do = refs["dy"][0].astype(jnp.float32)
    if opened is not None:
        do = do * opened
    do_ref[...] = do.astype(do_ref.dtype)
    # Of do as the matrix unit will see it, or dp - delta has an error that does not cancel.
    do = do_ref[...].astype(jnp.float32)
    for n, of in enumerate(plan.normalizer.deltas):
        deltas_ref[n : n + 1] = tile.as_row(jnp.sum(do * _output(refs, of), axis=-1, keepdims=True))


def _gradients_by_row(
    plan: Plan, tables: Tables, refs: dict, deltas_ref, head, opened: Array | None
) -> None:
    """Those of the gate and of a sink: nothing is divided by a gate that may be 0."""
    if plan.gate == "element":
        dgate = refs["dy"][0].astype(jnp.float32) * _output(refs, 0) * opened * (1 - opened)
        refs["dgate"][0] = dgate.astype(refs["dgate"].dtype)
    elif plan.gate == "head":
        opened = tile.open_gate(refs["gate"][0, 0])  # along lanes, as the products' sums will be
        products = refs["dy"][0].astype(jnp.float32) * _output(refs, 0)
        refs["dgate"][0, 0] = (
            tile.as_row(jnp.sum(products, axis=-1, keepdims=True)) * opened * (1 - opened)
        )
    if "dsinks" in refs:
        sink = jnp.full((1, plan.backward.block), tables.sinks[head])
        refs["dsinks"][0, 0] = plan.normalizer.sink_gradient(
            sink, *_numbers(plan, refs, deltas_ref, slice(None))
        )


def _opened(plan: Plan, refs: dict) -> Array:
    """The open gate, [R, V] or [R, 1]."""
    if plan.gate == "element":
        return tile.open_gate(refs["gate"][0])
    return tile.as_column(tile.open_gate(refs["gate"][0, 0]))


def _output(refs: dict, n: int) -> Array:
    return refs[f"o{n}"][0].astype(jnp.float32)


def _numbers(
    plan: Plan, refs: dict, deltas_ref, queries: slice
) -> tuple[list[Array], tuple[Array, ...]]:
    """(deltas, saved) of some queries, [1, R] each."""
    deltas = [deltas_ref[n : n + 1, queries] for n in range(len(plan.normalizer.deltas))]
    names = sorted(
        (name for name in refs if name.startswith("saved")), key=lambda name: int(name[5:])
    )
    return deltas, tuple(refs[name][0, 0, :, queries] for name in names)


def _tile(
    plan: Plan, tables: Tables, refs: dict, sums: tuple, do_ref, deltas_ref, kind: int, head, i, j
) -> None:
    """A block of keys meets a block of queries, a group of keys after another."""
    block, rows, normalizer = plan.backward.block, plan.backward.rows, plan.normalizer
    slope = None if tables.slopes is None else tables.slopes[head]
    dq_ref, dk_ref, dv_ref = sums
    starts = range(0, block, rows)

    def queries(n: int) -> slice:
        return slice(starts[n] if kind == DIAGONAL else 0, block)

    def own(n: int) -> slice:
        return slice(starts[n], starts[n] + rows)

    def place(n: int) -> tile.Positions:
        first = queries(n).start
        at = tile.positions(
            i * block + first, block - first, j * block + starts[n], rows, turned=True
        )
        if plan.segments:
            column = tile.as_column(refs["key_segments"][0, :, own(n)])
            at = at._replace(
                query_segments=refs["query_segments"][0, :, queries(n)], key_segments=column
            )
        return at

    def products(n: int) -> tuple[tile.Logits, Array]:
        s = tile.logits(plan, refs["k"][0, own(n)], refs["q"][0, queries(n)], slope, place(n))
        return s, tile.matmul(plan, refs["v"][0, own(n)], do_ref[queries(n)], tile.NT)

    def gradients(n: int, s: tile.Logits, dp: Array) -> None:
        at = place(n)
        deltas, saved = _numbers(plan, refs, deltas_ref, queries(n))
        mask = tile.seen(plan, at, kind in (DIAGONAL, MASKED))
        weights, ds = normalizer.gradient(s.s, mask, at.keys, dp, deltas, saved)
        dv_ref[own(n)] += tile.matmul(plan, weights, do_ref[queries(n)])
        if slope is not None:
            refs["dslopes"][0, 0, 0, :, queries(n)] -= jnp.sum(
                ds * s.distance, axis=0, keepdims=True
            )
        if plan.logits_soft_cap is not None:
            ds = ds * (1 - (s.capped * (1 / plan.logits_soft_cap)) ** 2)
        dk_ref[own(n)] += tile.matmul(plan, ds, refs["q"][0, queries(n)])
        dq_ref[queries(n)] += tile.matmul(plan, ds, refs["k"][0, own(n)], tile.TN)

    ahead = {}
    for turn in range(len(starts) + plan.backward.lag):
        if turn < len(starts):
            ahead[turn] = products(turn)
        if turn >= plan.backward.lag:
            gradients(turn - plan.backward.lag, *ahead.pop(turn - plan.backward.lag))
