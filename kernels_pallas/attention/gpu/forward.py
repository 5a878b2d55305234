"""The forward kernel of `attention` on GPU: a program owns a block of queries of one head and walks the keys it sees.

The running sums and what the normalizer keeps of a row stay in registers; the output gate is the last step. Tiles that the
mask hides entirely are not visited, and only those that it cuts look at positions.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.attention.gpu import plan, tile
from kernels_pallas.attention.gpu.plan import Inputs, Plan
from kernels_pallas.common.mesh import like


def forward(p: Plan, x: Inputs, save: bool) -> dict[str, Array]:
    """y [B, T, H, V]; if `save`, what the normalizer needs: float32 outputs [B, T, H, V], rows of numbers [B, H, T]."""
    B, cut = x.q.shape[0], p.schedule.forward
    own, key_head = (lambda h: h), (lambda h: h // p.group)
    spans = None if x.segments is None else plan.shared_segments(x.segments, cut.own, cut.other)
    by_batch = lambda a: (a, None if a is None else plan.by_batch(a))
    whole = lambda a: (a, None if a is None else plan.whole(a))
    ins = {
        "q": (x.q, plan.tokens(p, p.H, own, p.K)),
        "k": (x.k, plan.tokens(p, p.Hk, key_head, p.K)),
        "v": (x.v, plan.tokens(p, p.Hk, key_head, p.V)),
        "gate": (x.gate, plan.numbers(p) if p.gate == "head" else plan.tokens(p, p.H, own, p.V)),
        "sinks": whole(x.sinks),
        "slopes": whole(x.slopes),
        "segments": by_batch(x.segments),
        "spans": by_batch(spans),
    }
    wide = lambda dtype: (like(x.q, (B, p.length, p.H, p.V), dtype), plan.tokens(p, p.H, own, p.V))
    outs = {"y": wide(p.out_dtype)}
    if save:
        outs |= {f"o{n}": wide(jnp.float32) for n in p.kept_outputs}
        row = like(x.q, (B, p.H, p.length), jnp.float32), plan.numbers(p)
        outs |= {f"saved{n}": row for n in range(saved_numbers(p.normalizer))}
    pairs, grid = B * p.H * p.pairs, (p.length // cut.own, p.H, B)
    cost = dict(flops=2 * pairs * (p.K + p.normalizer.sums * p.V), exponentials=pairs)
    return plan.call(p, partial(_kernel, p), cut, grid, ins, outs, "attention_forward", **cost)


def saved_numbers(normalizer) -> int:
    """How many numbers of a row the normalizer saves."""
    column, wide = (jax.ShapeDtypeStruct((8, n), jnp.float32) for n in (1, 8))
    row = jax.eval_shape(normalizer.start, column)
    return len(jax.eval_shape(normalizer.finish, row, [wide] * normalizer.sums)[1])


def _kernel(
    p: Plan, q, k, v, y, gate=None, sinks=None, slopes=None, segments=None, spans=None, **saved
) -> None:
    normalizer, cut, h = p.normalizer, p.schedule.forward, pl.program_id(1)
    # The last queries see most keys, and start first.
    n = p.length // cut.own - 1 - pl.program_id(0)
    rows, zero = plan.block(n, cut.own), jnp.zeros((cut.own, 1), jnp.float32)
    queries = plan.load(q, rows, p.K)
    slope = None if slopes is None else pltriton.load(slopes.at[h])
    query_segments = None if segments is None else pltriton.load(segments.at[rows])[:, None]

    def visit(masks: bool, _, j, carry):
        row, sums = carry
        at = plan.block(j, cut.other)
        key_segments = None if segments is None else pltriton.load(segments.at[at])[None, :]
        places = tile.Places(rows[:, None], at[None, :], query_segments, key_segments)
        s = tile.logits(
            p, queries, plan.load(k, at, p.K), slope, jnp.abs(places.queries - places.keys)
        ).s
        row, keep, weights = normalizer.add(row, s, tile.seen(p, places, masks), places.keys)
        values = plan.load(v, at, p.V)
        kept = sums if keep is None else [keep * x for x in sums]
        return row, [x + tile.matmul(p, w, values) for x, w in zip(kept, weights)]

    sink = None if sinks is None else zero + pltriton.load(sinks.at[h])
    start = (
        normalizer.start(zero, (), sink),
        [jnp.zeros((cut.own, p.V), jnp.float32)] * normalizer.sums,
    )
    ranges = plan.visits(p, plan.of_queries(p), n, cut.own, cut.other, plan.limits(spans, n))
    outputs, numbers = normalizer.finish(*plan.walked(ranges, visit, start))
    for name, ref in saved.items():
        if name.startswith("saved"):
            pltriton.store(ref.at[rows], numbers[int(name[5:])].reshape(cut.own))
        else:
            plan.store(ref, rows, outputs[int(name[1:])])
    plan.store(y, rows, _gated(p, outputs[0], gate, rows))


def _gated(p: Plan, o: Array, gate, rows: Array) -> Array:
    if gate is None:
        return o
    pre = (
        plan.load(gate, rows, p.V) if p.gate == "element" else pltriton.load(gate.at[rows])[:, None]
    )
    return o * jax.nn.sigmoid(pre.astype(jnp.float32))
