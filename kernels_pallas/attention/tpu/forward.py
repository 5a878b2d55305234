"""The forward kernel: a block of queries stays in VMEM while the key blocks that it sees pass by.

The grid walks (batch, heads, visits); which tile a visit is about stands in tables in SMEM, so what the mask hides
entirely is not even a grid step. A block's rows are worked on in groups: while one's weights are computed, the matrix
unit is given the logits of the next. On the diagonal a group stops at its last visible key.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tpu import tile
from kernels_pallas.attention.tpu.call import Tables, call, segment_tables
from kernels_pallas.attention.tpu.plan import (
    DIAGONAL,
    FIRST,
    LAST,
    MASKED,
    Inputs,
    Plan,
    forward_visits,
    pairs,
)
from kernels_pallas.common.mesh import like
from kernels_pallas.common.padding import padded
from kernels_pallas.common.tpu import Operand


def forward(plan: Plan, x: Inputs, save: bool) -> dict[str, Array]:
    """y [B, T, H*V]; if `save`, what the normalizer needs: float32 outputs [B, T, H*V], rows of numbers [B, H, 1, T]."""
    B, normalizer, block = x.q.shape[0], plan.normalizer, plan.forward.block
    length = -(-plan.T // block) * block
    visits = forward_visits(plan)
    tables = Tables(visits, segment_tables(plan, x.segments, block, length), x.sinks, x.slopes)
    tokens = lambda name, a, D, head: Operand(
        name, a, (1, block, D), lambda b, h, p, t: (b, t.rows[p], head(h))
    )
    keys = lambda name, a, D: Operand(
        name, a, (1, block, D), lambda b, h, p, t: (b, t.keys[p], h // plan.group)
    )
    numbers = lambda name, a: Operand(
        name, a, (1, 1, 1, block), lambda b, h, p, t: (b, h, 0, t.rows[p])
    )
    pad = partial(padded, axis=1, size=length)
    own = lambda h: h
    ins = [
        tokens("q", pad(x.q), plan.K, own),
        keys("k", pad(x.k), plan.K),
        keys("v", pad(x.v), plan.V),
    ]
    if plan.gate == "element":
        ins.append(tokens("gate", pad(x.gate), plan.V, own))
    elif plan.gate == "head":
        ins.append(numbers("gate", padded(x.gate, 3, length)))
    if plan.segments:
        along = padded(x.segments, 2, length, mode="edge")
        ins.append(
            Operand("query_segments", along, (1, 1, block), lambda b, h, p, t: (b, 0, t.rows[p]))
        )
        ins.append(
            Operand("key_segments", along, (1, 1, block), lambda b, h, p, t: (b, 0, t.keys[p]))
        )
    wide = like(x.q, (B, length, plan.H * plan.V), jnp.float32)
    outs = [tokens("y", like(x.q, wide.shape, plan.out_dtype), plan.V, own)]
    if save:
        outs += [tokens(f"o{n}", wide, plan.V, own) for n in kept_outputs(plan)]
        count = saved_numbers(normalizer)
        outs += [
            numbers(f"saved{n}", like(x.q, (B, plan.H, 1, length), jnp.float32))
            for n in range(count)
        ]
    statistics = len(_statistics(normalizer))
    scratch = [pltpu.VMEM((block, plan.V), jnp.float32)] * normalizer.sums
    scratch += [pltpu.VMEM((block, tile.lanes(normalizer)), jnp.float32)] * statistics
    multiplied = 2 * B * plan.H * pairs(plan) * (plan.K + normalizer.sums * plan.V)
    results = call(
        plan,
        partial(_kernel, plan),
        tables,
        (B, plan.H, len(visits.rows)),
        ins,
        outs,
        scratch,
        "attention_forward",
        flops=multiplied,
        exponentials=B * plan.H * pairs(plan),
        parallel=2,
    )
    return {
        name: a[:, : plan.T] if a.ndim == 3 else a[..., : plan.T] for name, a in results.items()
    }


def kept_outputs(plan: Plan) -> list[int]:
    """Which outputs of the normalizer the backward pass needs; not o where y is o, unrounded."""
    kept = sorted({*plan.normalizer.deltas, *([0] if plan.keeps_o else [])})
    return [n for n in kept if n or plan.gate != "none" or plan.out_dtype != jnp.float32]


def _statistics(normalizer) -> tuple:
    return jax.eval_shape(
        normalizer.start, jax.ShapeDtypeStruct((8, tile.lanes(normalizer)), jnp.float32)
    )


def saved_numbers(normalizer) -> int:
    """How many numbers of a row the normalizer saves."""
    column, wide = (jax.ShapeDtypeStruct((8, n), jnp.float32) for n in (1, 8))
    return len(
        jax.eval_shape(
            normalizer.finish,
            tuple(column for _ in _statistics(normalizer)),
            [wide] * normalizer.sums,
        )[1]
    )


def _kernel(plan: Plan, tables: Tables, refs: dict, scratch: list) -> None:
    normalizer, (b, h, p) = plan.normalizer, (pl.program_id(n) for n in range(3))
    sums, row = scratch[: normalizer.sums], scratch[normalizer.sums :]
    what, i, j = tables.visits.what[p], tables.visits.rows[p], tables.visits.keys[p]

    @pl.when(what & FIRST != 0)
    def _():
        zero = jnp.zeros((plan.forward.block, tile.lanes(normalizer)), jnp.float32)
        sink = None if tables.sinks is None else zero + tables.sinks[h]
        for ref, x in zip(row, normalizer.start(zero, (), sink)):
            ref[...] = x
        for ref in sums:
            ref[...] = jnp.zeros_like(ref)

    for kind in sorted(set(forward_visits(plan).what & 3)):
        due = (what & 3) == kind
        if plan.segments:
            due &= tables.segments.may_meet(b, i, j)
        pl.when(due)(partial(_tile, plan, tables, refs, sums, row, int(kind), h, i, j))

    @pl.when(what & LAST != 0)
    def _():
        outputs, saved = normalizer.finish(
            tuple(ref[...] for ref in row), [ref[...] for ref in sums]
        )
        y = outputs[0]
        if plan.gate == "element":
            y = y * tile.open_gate(refs["gate"][0])
        elif plan.gate == "head":
            y = y * tile.as_column(tile.open_gate(refs["gate"][0, 0]))
        refs["y"][0] = y.astype(plan.out_dtype)
        for n, o in enumerate(outputs):
            if f"o{n}" in refs:
                refs[f"o{n}"][0] = o
        for n, column in enumerate(saved):
            if f"saved{n}" in refs:
                refs[f"saved{n}"][0, 0] = tile.as_row(column)


def _tile(
    plan: Plan, tables: Tables, refs: dict, sums: list, row: list, kind: int, h, i, j
) -> None:
    """A block of queries meets a block of keys."""
    normalizer, block, rows = plan.normalizer, plan.forward.block, plan.forward.rows
    slope = None if tables.slopes is None else tables.slopes[h]
    groups = range(0, block, rows)
    ends = [start + rows if kind == DIAGONAL else block for start in groups]

    def place(start: int, end: int) -> tile.Positions:
        at = tile.positions(i * block + start, rows, j * block, end, turned=False)
        if plan.segments:
            own = tile.as_column(refs["query_segments"][0, :, start : start + rows])
            at = at._replace(query_segments=own, key_segments=refs["key_segments"][0, :, :end])
        return at

    def logits(n: int) -> Array:
        start, end = groups[n], ends[n]
        at = place(start, end)
        return tile.logits(
            plan, refs["q"][0, start : start + rows], refs["k"][0, :end], slope, at
        ).s

    def weigh(n: int, s: Array) -> None:
        start, end = groups[n], ends[n]
        at, own = place(start, end), slice(start, start + rows)
        added = normalizer.add(
            tuple(ref[own] for ref in row),
            s,
            tile.seen(plan, at, kind in (DIAGONAL, MASKED)),
            at.keys,
        )
        for ref, x in zip(row, added.row):
            ref[own] = x
        for ref, weights in zip(sums, added.weights):
            product = tile.matmul(plan, weights, refs["v"][0, :end])
            kept = ref[own] if added.keep is None else tile.across(added.keep, plan.V) * ref[own]
            ref[own] = kept + product

    ahead = {}
    for turn in range(len(groups) + plan.forward.lag):
        if turn < len(groups):
            ahead[turn] = logits(turn)
        if turn >= plan.forward.lag:
            weigh(turn - plan.forward.lag, ahead.pop(turn - plan.forward.lag))
