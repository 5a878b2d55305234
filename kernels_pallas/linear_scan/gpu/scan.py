"""The scan kernel of `linear_scan` on GPU: walks the chunks with the state in registers, forward
and backward.

    forward    o_n  = A_n v_n + reads_n S;      S  <- total_n S + writes_n^T v_n           chunks in order
    backward   dv_n = A_n^T do_n + writes_n dS; dS <- total_n dS + reads_n^T do_n          chunks in the other order

are one walk, with reads and writes, v and do exchanged. A program owns a block of V of one head of
one segment. With scalar decays reads are q and writes k, and the tokens' factors multiply rows of
what the matmuls give or take.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from kernels_pallas.common.gpu import moved
from kernels_pallas.common.mesh import like
from kernels_pallas.linear_scan.gpu.plan import Plan, block_rows, load
from kernels_pallas.linear_scan.gpu.tile import matmul
from kernels_pallas.linear_scan.gpu.tuning import block, scan_block_v, scan_stages


class Walk(NamedTuple):
    """What is walked over. Backward, what `reads` names is writes, and so on."""

    reads: Float[Array, "B T Hx K"]
    writes: Float[Array, "B T Hy K"]
    scores: Float[Array, "B H T C"] | None  # None: no o is wanted
    values: Float[Array, "B T Hz V"]
    total: Float[Array, "B H N K"] | Float[Array, "#B H N"] | None
    read_factor: Float[Array, "#B H N C"] | None
    write_factor: Float[Array, "#B H N C"] | None
    initial: Float[Array, "B H G K V"] | None


def scan(
    plan: Plan, x: Walk, dtype, *, backward: bool, save: bool, final: bool
) -> dict[str, Array]:
    """o [B, T, H, V] in `dtype`, states [B, H, N, K, V] before each chunk, final float32 [B, H, G,
    K, V].
    """
    p, s = plan, plan.schedule
    BV = scan_block_v(s, p.K, p.V)
    grid = p.V // BV, p.segments, p.H, len(x.values)
    stages = scan_stages(s, math.prod(grid), p.chunk, p.K, BV, p.operand.itemsize)
    specs, outs = _specs(p, x, BV), _outputs(p, x, BV, dtype, save, final)
    if x.scores is None:
        x = x._replace(reads=None, read_factor=None)
    given = [name for name in Walk._fields if getattr(x, name) is not None]

    def kernel(*refs):
        _kernel(p, backward, **dict(zip([*given, *outs], refs)))

    arrays = [getattr(x, name) for name in given]
    results = pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[getattr(specs, name) for name in given],
        out_specs=[spec for _, spec in outs.values()],
        out_shape=[array for array, _ in outs.values()],
        compiler_params=pltriton.CompilerParams(num_warps=s.scan_warps, num_stages=stages),
        cost_estimate=_cost(p, x, [*arrays, *(array for array, _ in outs.values())]),
        interpret=p.interpret,
        name=f"linear_scan_{'backward' if backward else 'forward'}{'_summaries' if x.scores is None else ''}",
    )(*arrays)
    return dict(zip(outs, results))


def _specs(p: Plan, x: Walk, BV: int) -> Walk:
    """Blocks: all tokens of one head, a block of V of values and states."""
    tokens = lambda a: pl.BlockSpec(
        (None, p.T, None, p.K), lambda i, g, h, b: (b, 0, h // (p.H // a.shape[2]), 0)
    )

    def small(a):
        every = 0 if a.shape[0] == 1 else 1
        return pl.BlockSpec(
            (None, None, *a.shape[2:]), lambda i, g, h, b: (b * every, h, *[0] * (a.ndim - 2))
        )

    return Walk(
        reads=tokens(x.reads),
        writes=tokens(x.writes),
        scores=pl.BlockSpec((None, None, p.T, p.chunk), lambda i, g, h, b: (b, h, 0, 0)),
        values=_values(p, x.values.shape[2], BV),
        total=None if x.total is None else small(x.total),
        read_factor=None if x.read_factor is None else small(x.read_factor),
        write_factor=None if x.write_factor is None else small(x.write_factor),
        initial=_state(p, BV),
    )


def _values(p: Plan, heads: int, BV: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, p.T, None, BV), lambda i, g, h, b: (b, 0, h // (p.H // heads), i))


def _state(p: Plan, BV: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, None, p.K, BV), lambda i, g, h, b: (b, h, g, 0, i))


def _outputs(p: Plan, x: Walk, BV: int, dtype, save: bool, final: bool) -> dict[str, tuple]:
    """name -> (array, its block)."""
    B, H, outs = len(x.values), p.H, {}
    if x.scores is not None:
        outs["o"] = like(x.values, (B, p.T, H, p.V), dtype), _values(p, H, BV)
    if save:
        every_chunk = pl.BlockSpec(
            (None, None, p.chunks, p.K, BV), lambda i, g, h, b: (b, h, 0, 0, i)
        )
        outs["states"] = like(x.values, (B, H, p.chunks, p.K, p.V), p.operand), every_chunk
    if final:
        outs["final"] = like(x.values, (B, H, p.segments, p.K, p.V), jnp.float32), _state(p, BV)
    return outs


def _kernel(
    p: Plan,
    backward: bool,
    writes,
    values,
    reads=None,
    scores=None,
    total=None,
    read_factor=None,
    write_factor=None,
    initial=None,
    o=None,
    states=None,
    final=None,
):
    BV, BK, C = values.shape[1], block(p.schedule.scan_block_k, p.K), p.chunk
    columns = [k * BK for k in range(p.K // BK)]
    # q carries the scale: in scores and vector reads it is already there.
    q_scale = p.scale if p.decay != "vector" else None
    read_scale, write_scale = (None, q_scale) if backward else (q_scale, None)
    in_segment = p.chunks // p.segments
    # The walk's own order: backward, the last segment's last chunk comes first.
    segment, row = pl.program_id(1), lax.iota(jnp.int32, C)

    def chunk(m, state):
        n = segment * in_segment + m
        n = segment * in_segment + (in_segment - 1 - m) if backward else n
        rows = p.place(n) * C + p.rows()
        tile = block_rows(rows, 0, BV)
        v = pltriton.load(values.at[tile])
        if states is not None:
            for first, S in zip(columns, state):
                here = (
                    n,
                    first + lax.iota(jnp.int32, BK)[:, None],
                    lax.iota(jnp.int32, BV)[None, :],
                )
                pltriton.store(states.at[here], S.astype(states.dtype))
        if o is not None:
            scored = matmul(
                p.tile, pltriton.load(scores.at[block_rows(n * C + row, 0, C)]), v, trans_a=backward
            )
            read = jnp.zeros((C, BV), jnp.float32)
            for first, S in zip(columns, state):
                read += matmul(p.tile, pltriton.load(reads.at[block_rows(rows, first, BK)]), S)
            out = scored + _scaled(read, read_factor, read_scale, n, row)
            pltriton.store(o.at[tile], out.astype(o.dtype))
        v, new = _scaled(v, write_factor, write_scale, n, row), []
        for first, S in zip(columns, state):
            written = matmul(
                p.tile, pltriton.load(writes.at[block_rows(rows, first, BK)]), v, trans_a=True
            )
            new.append(_decayed(S, total, n, first) + written)
        return tuple(new)

    block_of = lambda first: (
        first + lax.iota(jnp.int32, BK)[:, None],
        lax.iota(jnp.int32, BV)[None, :],
    )
    start = lambda first: (
        jnp.zeros((BK, BV), jnp.float32) if initial is None else load(initial, *block_of(first))
    )
    state = lax.fori_loop(0, in_segment, chunk, tuple(start(first) for first in columns))
    if final is not None:
        for first, S in zip(columns, state):
            pltriton.store(final.at[block_of(first)], S)


def _scaled(x: Array, factor, scale: float | None, n, row: Array) -> Array:
    """Rows times the tokens' factors."""
    if factor is not None:
        rows = pltriton.load(factor.at[n, row])
        return x.astype(jnp.float32) * (rows if scale is None else rows * scale)[:, None]
    return x if scale is None else x.astype(jnp.float32) * scale


def _decayed(S: Array, total, n, first: int) -> Array:
    if total is None:
        return S
    if len(total.shape) == 1:
        return S * pltriton.load(total.at[n])
    return S * pltriton.load(total.at[n, first + lax.iota(jnp.int32, S.shape[0])])[:, None]


def _cost(p: Plan, x: Walk, arrays: list) -> pl.CostEstimate:
    """Every array moves once, as far as programs of the same head share the cache."""
    a_chunk = 2 * p.chunk * p.K * p.V * (1 if x.scores is None else 2) + 2 * p.chunk**2 * p.V * (
        x.scores is not None
    )
    return pl.CostEstimate(len(x.values) * p.H * p.chunks * a_chunk, 0, moved(arrays))


def combined(
    log_totals: Float[Array, "B H G #K"] | None,
    summaries: Float[Array, "B H G K V"],
    first: Array | None,
    last_first: bool,
) -> tuple[Array, Array]:
    """(the state before each segment [B, H, G, K, V], the state after all). `last_first`: the walk
    goes backward.
    """
    G, running = summaries.shape[2], jnp.zeros_like(summaries[:, :, 0]) if first is None else first
    before = [None] * G
    for g in range(G)[:: -1 if last_first else 1]:
        before[g] = running
        decayed = running if log_totals is None else jnp.exp(log_totals[:, :, g, :, None]) * running
        running = decayed + summaries[:, :, g]
    return jnp.stack(before, 2), running
