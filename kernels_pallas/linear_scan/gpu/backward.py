"""The way back through the scores on GPU: two kernels, parallel over chunks.

The first makes the scores' cotangent dA = do v^T. The second owns a block of K of one chunk: with
the state before the chunk, S, and the cotangent of the one after it, dS,

    dreads = do S^T,  dwrites = v dS^T,  dlog_total = total sum_v S dS

and goes through dA, dreads and dwrites to q, k and the logs.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.common.mesh import like
from kernels_pallas.linear_scan.gpu import tile
from kernels_pallas.linear_scan.gpu.plan import Inputs, Plan, block_rows, load
from kernels_pallas.linear_scan.gpu.scores import (
    Decays,
    call,
    logs_of,
    operands,
    own_weight,
    sums_of,
)
from kernels_pallas.linear_scan.gpu.tile import matmul
from kernels_pallas.linear_scan.gpu.tuning import block

ROW_SUMS = 4  # of each token, for the cotangent of scalar logs: see `_store_row_sums`


def through_scores(
    p: Plan, x: Inputs, decays: Decays, do: Array, states: Array, dstates: Array
) -> dict[str, Array]:
    """dq [B, T, H, K] in q's dtype; dk likewise, but float32 where key heads are shared; dbonus [B,
    H, N, K] float32.

    dlogs [B, T, H, K] of vector decays; of scalar ones rows [B, H, N, blocks, ROW_SUMS, C].
    """
    B, C, s = x.q.shape[0], p.chunk, p.schedule
    BK = block(s.back_block_k, p.K)
    dscores = _dscores(p, x.v, do)
    ins = operands(p, x, decays, BK, lambda c, n, h, b: (c, n, h, b), factors=True)
    values = lambda head: pl.BlockSpec(
        (None, C, None, p.V), lambda c, n, h, b: (b, p.place(n), head(h), 0)
    )
    state = pl.BlockSpec((None, None, None, BK, p.V), lambda c, n, h, b: (b, h, n, c, 0))
    ins |= {
        "v": (x.v, values(p.value_head)),
        "do": (do, values(lambda h: h)),
        "states": (states, state),
        "dstates": (dstates, state),
        "dscores": (dscores, pl.BlockSpec((None, None, C, C), lambda c, n, h, b: (b, h, n, 0))),
    }
    if decays.log_total is not None:
        width, every = decays.log_total.shape[3], len(decays.log_total) > 1
        where = lambda c, n, h, b: (b * every, h, n, c if width > 1 else 0)
        ins["log_total"] = decays.log_total, pl.BlockSpec((None, None, None, min(BK, width)), where)
    tokens = pl.BlockSpec((None, C, None, BK), lambda c, n, h, b: (b, p.place(n), h, c))
    outs = {
        "dq": (like(x.q, x.q.shape, x.q.dtype), tokens),
        "dk": (like(x.q, x.q.shape, x.k.dtype if p.Hk == p.H else jnp.float32), tokens),
    }
    if p.decay == "vector":
        outs["dlogs"] = like(x.q, x.logs.shape, x.logs.dtype), tokens
    elif p.decay == "scalar":
        where = lambda c, n, h, b: (b, h, n, c, 0, 0)
        shape = (B, p.H, p.chunks, p.K // BK, ROW_SUMS, C)
        outs["rows"] = (
            like(x.q, shape, jnp.float32),
            pl.BlockSpec((None, None, None, None, ROW_SUMS, C), where),
        )
    if x.bonus is not None:
        of_chunk = pl.BlockSpec((None, None, None, BK), lambda c, n, h, b: (b, h, n, c))
        outs["dbonus"] = like(x.q, (B, p.H, p.chunks, p.K), jnp.float32), of_chunk
    levels = C.bit_length() - 1 if p.decay == "vector" else 2
    flops = 2 * B * p.H * p.T * p.K * (C * levels + 2 * p.V)
    exponentials = B * p.H * p.T * {"vector": p.K * (levels + 2), "scalar": C, "none": 0}[p.decay]
    grid = p.K // BK, p.chunks, p.H, B
    return call(
        p,
        _kernel,
        grid,
        ins,
        outs,
        s.back_warps,
        flops,
        exponentials,
        f"linear_scan_{p.decay}_backward_scores",
    )


def _dscores(p: Plan, v: Array, do: Array) -> Array:
    """do v^T of every chunk, [B, H, T, C]."""
    B, C = do.shape[0], p.chunk
    values = lambda head: pl.BlockSpec(
        (None, C, None, p.V), lambda n, h, b: (b, p.place(n), head(h), 0)
    )
    ins = {"v": (v, values(p.value_head)), "do": (do, values(lambda h: h))}
    out = pl.BlockSpec((None, None, C, C), lambda n, h, b: (b, h, n, 0))
    outs = {"dscores": (like(do, (B, p.H, p.T, C), p.operand), out)}
    grid, flops = (p.chunks, p.H, B), 2 * B * p.H * p.T * C * p.V
    return call(
        p,
        _dscores_kernel,
        grid,
        ins,
        outs,
        p.schedule.dscores_warps,
        flops,
        0,
        "linear_scan_dscores",
    )["dscores"]


def _dscores_kernel(p: Plan, v, do, dscores) -> None:
    C, BV = p.chunk, block(p.schedule.back_block_v, p.V)

    def columns(c, total):
        here = block_rows(p.rows(), c * BV, BV)
        return total + matmul(
            p.tile, pltriton.load(do.at[here]), pltriton.load(v.at[here]), trans_b=True
        )

    total = _over(p.V // BV, columns, jnp.zeros((C, C), jnp.float32))
    pltriton.store(
        dscores.at[block_rows(lax.iota(jnp.int32, C), 0, C)], total.astype(dscores.dtype)
    )


def _over(count: int, body, carry):
    return lax.fori_loop(0, count, body, carry) if count > 1 else body(0, carry)


def _kernel(
    p: Plan,
    q,
    k,
    v,
    do,
    states,
    dstates,
    dscores,
    dq,
    dk,
    logs=None,
    subtotals=None,
    starts=None,
    sums=None,
    read_factor=None,
    write_factor=None,
    log_total=None,
    bonus=None,
    dlogs=None,
    rows=None,
    dbonus=None,
) -> None:
    C, BK = p.chunk, q.shape[1]
    here, row = block_rows(p.rows(), 0, BK), lax.iota(jnp.int32, C)
    from_states = lambda: _from_states(p, v, do, states, dstates, BK)[:2]
    dlog_total = None if log_total is None else _dlog_total(p, states, dstates, log_total, BK)
    q_tile, k_tile = load(q, *here) * p.scale, load(k, *here)
    i, j = tile.rows_and_columns(C)
    if p.decay == "vector":
        of_block = logs_of(p, logs, subtotals, starts, 0, BK)
        both = pltriton.load(dscores.at[jnp.maximum(i, j), jnp.minimum(i, j)])
        c = tile.vector_cotangents(p.tile, q_tile, k_tile, of_block, both, from_states)
        pltriton.store(dlogs.at[here], tile.vector_dlogs(p.tile, c, dlog_total).astype(dlogs.dtype))
    else:
        dreads, dwrites = from_states()
        passed = load(dscores, i, j) * tile.scalar_mask(C, sums_of(sums, C))
        factors = [
            1.0 if f is None else pltriton.load(f.at[row])[:, None]
            for f in (read_factor, write_factor)
        ]
        c = tile.scalar_cotangents(
            p.tile, q_tile, k_tile, passed, factors[0] * dreads, factors[1] * dwrites
        )
        if rows is not None:
            for r, x in enumerate((c.of_readers, c.of_writers, c.of_writes)):
                pltriton.store(rows.at[r, row], jnp.sum(x, axis=1))
            pltriton.store(rows.at[3, row], jnp.zeros((C,), jnp.float32) + jnp.sum(dlog_total))
    dq_tile, dk_tile = c.dq, c.dk
    weight = own_weight(p, bonus, 0, BK)
    if weight is not None:
        down = load(dscores, row, row)[:, None]
        dq_tile, dk_tile = dq_tile + down * weight * k_tile, dk_tile + down * weight * q_tile
        if dbonus is not None:
            pltriton.store(
                dbonus.at[lax.iota(jnp.int32, BK)], jnp.sum(down * q_tile * k_tile, axis=0)
            )
    pltriton.store(dq.at[here], (dq_tile * p.scale).astype(dq.dtype))
    pltriton.store(dk.at[here], dk_tile.astype(dk.dtype))


def _from_states(p: Plan, v, do, states, dstates, BK: int) -> tuple[Array, Array]:
    """dreads and dwrites, [C, K] each."""
    C, BV = p.chunk, block(p.schedule.back_block_v, p.V)

    def columns(c, carry):
        dreads, dwrites = carry
        here = block_rows(p.rows(), c * BV, BV)
        of_state = block_rows(lax.iota(jnp.int32, BK), c * BV, BV)
        S, dS = pltriton.load(states.at[of_state]), pltriton.load(dstates.at[of_state])
        dreads += matmul(p.tile, pltriton.load(do.at[here]), S, trans_b=True)
        dwrites += matmul(p.tile, pltriton.load(v.at[here]), dS, trans_b=True)
        return dreads, dwrites

    zeros = jnp.zeros((C, BK), jnp.float32)
    return _over(p.V // BV, columns, (zeros, zeros))


def _dlog_total(p: Plan, states, dstates, log_total, BK: int) -> Array:
    """[K], from one pass over S and dS."""
    BV = block(p.schedule.back_block_v, p.V)

    def columns(c, met):
        of_state = block_rows(lax.iota(jnp.int32, BK), c * BV, BV)
        return met + jnp.sum(load(states, *of_state) * load(dstates, *of_state), axis=1)

    met = _over(p.V // BV, columns, jnp.zeros((BK,), jnp.float32))
    return met * jnp.exp(pltriton.load(log_total.at[lax.iota(jnp.int32, log_total.shape[0])]))
