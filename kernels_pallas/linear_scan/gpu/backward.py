"""The way back through the chunks of `linear_scan` on GPU: two kernels, parallel over chunks.

The first makes the cotangent of the products, dA = do v^T. A program of the second has a block of K
of one chunk. From the state before the chunk, S, and the cotangent of the state after it, dS, it
makes

    dreads = do S^T,  dwrites = v dS^T,  dlog_total = total sum_v S dS

and goes from dA, dreads and dwrites to q, k and the logs. Nothing that the forward pass made is
kept but the states: the decays between tokens are made again, in registers.
"""

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from kernels_pallas.common.gpu import Operands
from kernels_pallas.common.mesh import like
from kernels_pallas.linear_scan.gpu import tile
from kernels_pallas.linear_scan.gpu.decays import Decays
from kernels_pallas.linear_scan.gpu.intra_chunk import (
    call,
    exponentials_per_token,
    logs_of,
    num_levels,
    operands,
    own_weight,
    starts_of,
    sums_of,
)
from kernels_pallas.linear_scan.gpu.plan import (
    Inputs,
    Plan,
    block_rows,
    count_bad,
    load,
    over_blocks,
)
from kernels_pallas.linear_scan.gpu.tile import matmul
from kernels_pallas.linear_scan.gpu.tuning import back_warps, block
from kernels_pallas.linear_scan.tile import LOG_ZERO

# Numbers of each token that scalar logs need, see `_kernel`: of readers, writers, writes, total.
ROW_SUMS = 4


def through_products(
    p: Plan, x: Inputs, decays: Decays, do: Array, states: Array, dstates: Array
) -> dict[str, Array]:
    """From the cotangents of o and of the states to those of the inputs.

    Args:
      do: [B, T, H, V].
      states, dstates: [B, H, N, K, V], the state before each chunk and the cotangent of the state
        after it.

    Returns:
      dq [B, T, H, K] in q's dtype; dk likewise, but float32 where heads share a key;
      bad [B, H, N, blocks]: how many elements of these are not finite;
      dbonus [B, H, N, K] float32, if there is a bonus;
      dlogs [B, T, H, K] of vector decays, or of scalar ones rows [B, H, N, blocks, ROW_SUMS, C].
    """
    B, C = x.q.shape[0], p.chunk
    block_k = block(p.schedule.back_block_k, p.K)

    def axes(c, n, h, b):
        return c, n, h, b

    inputs = operands(p, x, decays, block_k, axes, factors=True)
    inputs |= _cotangent_operands(p, x, decays, do, states, dstates, block_k)
    levels = num_levels(C) if p.decay == "vector" else 2
    tokens_of_heads = B * p.H * p.T
    return call(
        p,
        _kernel,
        (p.K // block_k, p.chunks, p.H, B),
        inputs,
        _outputs(p, x, block_k),
        warps=back_warps(p.schedule, p.V),
        flops=2 * tokens_of_heads * p.K * (C * levels + 2 * p.V),
        exponentials=tokens_of_heads * exponentials_per_token(p),
        name=f"linear_scan_{p.decay}_backward_products",
    )


def _cotangent_operands(
    p: Plan, x: Inputs, decays: Decays, do: Array, states: Array, dstates: Array, block_k: int
) -> Operands:
    """What the way back reads besides q, k and the decays. Grid: (block of K, chunk, head, row)."""
    C = p.chunk
    v_spec = pl.BlockSpec(
        (None, C, None, p.V), lambda c, n, h, b: (b, p.place(n), p.value_head(h), 0)
    )
    do_spec = pl.BlockSpec((None, C, None, p.V), lambda c, n, h, b: (b, p.place(n), h, 0))
    state_spec = pl.BlockSpec((None, None, None, block_k, p.V), lambda c, n, h, b: (b, h, n, c, 0))
    products_spec = pl.BlockSpec((None, None, C, C), lambda c, n, h, b: (b, h, n, 0))
    found = {
        "v": (x.v, v_spec),
        "do": (do, do_spec),
        "states": (states, state_spec),
        "dstates": (dstates, state_spec),
        "dproducts": (_dproducts(p, x.v, do), products_spec),
    }
    if decays.log_total is not None:
        rows, _, _, width = decays.log_total.shape
        # One row for the whole batch, or one number for all channels: index 0 there.
        per_row = 1 if rows > 1 else 0
        per_block = 1 if width > 1 else 0
        spec = pl.BlockSpec(
            (None, None, None, min(block_k, width)),
            lambda c, n, h, b: (b * per_row, h, n, c * per_block),
        )
        found["log_total"] = (decays.log_total, spec)
    return found


def _outputs(p: Plan, x: Inputs, block_k: int) -> Operands:
    """The results of `_kernel`, each with the block that a program writes."""
    B, C = x.q.shape[0], p.chunk
    tokens = pl.BlockSpec((None, C, None, block_k), lambda c, n, h, b: (b, p.place(n), h, c))
    # Query heads that share a key add up their parts afterwards: in float32.
    dk_dtype = x.k.dtype if p.Hk == p.H else jnp.float32
    blocks = p.K // block_k
    outputs = {
        "dq": (like(x.q, x.q.shape, x.q.dtype), tokens),
        "dk": (like(x.q, x.q.shape, dk_dtype), tokens),
        "bad": (
            like(x.q, (B, p.H, p.chunks, blocks), jnp.int32),
            pl.BlockSpec((None,) * 4, lambda c, n, h, b: (b, h, n, c)),
        ),
    }
    if p.decay == "vector":
        assert x.logs is not None
        outputs["dlogs"] = (like(x.q, x.logs.shape, x.logs.dtype), tokens)
    elif p.decay == "scalar":
        shape = (B, p.H, p.chunks, blocks, ROW_SUMS, C)
        spec = pl.BlockSpec(
            (None, None, None, None, ROW_SUMS, C), lambda c, n, h, b: (b, h, n, c, 0, 0)
        )
        outputs["rows"] = (like(x.q, shape, jnp.float32), spec)
    if x.bonus is not None:
        shape = (B, p.H, p.chunks, p.K)
        spec = pl.BlockSpec((None, None, None, block_k), lambda c, n, h, b: (b, h, n, c))
        outputs["dbonus"] = (like(x.q, shape, jnp.float32), spec)
    return outputs


def _dproducts(p: Plan, v: Array, do: Array) -> Float[Array, "B H T C"]:
    """do v^T of every chunk."""
    B, C = do.shape[0], p.chunk
    shape = (None, C, None, p.V)
    v_spec = pl.BlockSpec(shape, lambda n, h, b: (b, p.place(n), p.value_head(h), 0))
    do_spec = pl.BlockSpec(shape, lambda n, h, b: (b, p.place(n), h, 0))
    out_spec = pl.BlockSpec((None, None, C, C), lambda n, h, b: (b, h, n, 0))
    made = call(
        p,
        _dproducts_kernel,
        (p.chunks, p.H, B),
        {"v": (v, v_spec), "do": (do, do_spec)},
        {"dproducts": (like(do, (B, p.H, p.T, C), p.operand), out_spec)},
        warps=p.schedule.dproducts_warps,
        flops=2 * B * p.H * p.T * C * p.V,
        exponentials=0,
        name="linear_scan_dproducts",
    )
    return made["dproducts"]


def _dproducts_kernel(p: Plan, v, do, dproducts) -> None:
    """One chunk of one head, accumulated over blocks of V in a [C, C] tile."""
    C = p.chunk
    block_v = block(p.schedule.back_block_v, p.V)

    def of_block(c, total):
        here = block_rows(p.rows(), c * block_v, block_v)
        do_tile = pltriton.load(do.at[here])
        v_tile = pltriton.load(v.at[here])
        return total + matmul(p.tile, do_tile, v_tile, trans_b=True)

    total = over_blocks(p.V // block_v, of_block, jnp.zeros((C, C), jnp.float32))
    here = block_rows(lax.iota(jnp.int32, C), 0, C)
    pltriton.store(dproducts.at[here], total.astype(dproducts.dtype))


def _kernel(
    p: Plan,
    q,
    k,
    v,
    do,
    states,
    dstates,
    dproducts,
    dq,
    dk,
    bad,
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
    """A block of K of one chunk and head. The whole of V passes by, in blocks.

    The total's cotangent comes first, while few registers are taken; dreads and dwrites, two tiles
    of [C, block_k], come as late as the decay allows.
    """
    C = p.chunk
    block_k = q.shape[1]
    here = block_rows(p.rows(), 0, block_k)
    row = lax.iota(jnp.int32, C)
    dlog_total = None
    if log_total is not None:
        block_v = block(p.schedule.back_block_v, p.V)
        dlog_total = total_cotangent(p.V, block_v, block_k, states, dstates, log_total)
    q_tile = load(q, *here) * p.scale
    k_tile = load(k, *here)
    i, j = tile.rows_and_columns(C)

    def from_states() -> tuple[Array, Array]:
        return _from_states(p, v, do, states, dstates, block_k)

    if p.decay == "vector":
        assert dlog_total is not None and dlogs is not None
        block_logs = logs_of(p, logs, subtotals, starts, 0, block_k)
        # The lower triangle, mirrored: each level takes both orders of a pair of rows.
        mirrored = pltriton.load(dproducts.at[jnp.maximum(i, j), jnp.minimum(i, j)])
        c = tile.vector_cotangents(p.tile, q_tile, k_tile, block_logs, mirrored, from_states)
        dlogs_tile = tile.vector_dlogs(p.tile, c, dlog_total)
        # A log that the kernels have replaced receives nothing.
        is_replaced = load(logs, *here) < LOG_ZERO
        if starts is not None:
            is_replaced = is_replaced | starts_of(starts, row)
        dlogs_tile = jnp.where(is_replaced, jnp.zeros_like(dlogs_tile), dlogs_tile)
        # NaN and Inf stay what they are in a sum.
        seen = dlogs_tile
        pltriton.store(dlogs.at[here], dlogs_tile.astype(dlogs.dtype))
    else:
        dreads, dwrites = from_states()
        masked = tile.scalar_masked(p.tile, load(dproducts, i, j), sums_of(sums, C))
        dread_q = factor_of(read_factor, row) * dreads
        dwrite_k = factor_of(write_factor, row) * dwrites
        c = tile.scalar_cotangents(p.tile, q_tile, k_tile, masked, dread_q, dwrite_k)
        seen = c.of_writes
        if rows is not None:
            assert dlog_total is not None
            # A scalar log receives sums over channels; over tokens `op.dlogs_of` sums them.
            pltriton.store(rows.at[0, row], jnp.sum(c.of_readers, axis=1))
            pltriton.store(rows.at[1, row], jnp.sum(c.of_writers, axis=1))
            pltriton.store(rows.at[2, row], jnp.sum(c.of_writes, axis=1))
            pltriton.store(rows.at[3, row], jnp.zeros((C,), jnp.float32) + jnp.sum(dlog_total))
    dq_tile = c.dq
    dk_tile = c.dk
    weight = own_weight(p, bonus, 0, block_k)
    if weight is not None:
        # A token's read of its own write: the diagonal of the products.
        d_own = load(dproducts, row, row)[:, None]
        dq_tile = dq_tile + d_own * weight * k_tile
        dk_tile = dk_tile + d_own * weight * q_tile
        if dbonus is not None:
            column = lax.iota(jnp.int32, block_k)
            pltriton.store(dbonus.at[column], jnp.sum(d_own * q_tile * k_tile, axis=0))
    bad[...] = count_bad(seen + dq_tile + dk_tile)
    pltriton.store(dq.at[here], (dq_tile * p.scale).astype(dq.dtype))
    pltriton.store(dk.at[here], dk_tile.astype(dk.dtype))


def factor_of(factor, row: Array) -> Array | float:
    """A factor of each token [C, 1], or 1."""
    if factor is None:
        return 1.0
    return pltriton.load(factor.at[row])[:, None]


def _from_states(
    p: Plan,
    v,
    do,
    states,
    dstates,
    block_k: int,
) -> tuple[Array, Array]:
    """dreads = do S^T and dwrites = v dS^T, [C, block_k] each."""
    C = p.chunk
    block_v = block(p.schedule.back_block_v, p.V)

    def of_block(c, carry):
        dreads, dwrites = carry
        here = block_rows(p.rows(), c * block_v, block_v)
        of_state = block_rows(lax.iota(jnp.int32, block_k), c * block_v, block_v)
        S = pltriton.load(states.at[of_state])
        dS = pltriton.load(dstates.at[of_state])
        dreads += matmul(
            p.tile,
            pltriton.load(do.at[here]),
            S,
            trans_b=True,
        )
        dwrites += matmul(
            p.tile,
            pltriton.load(v.at[here]),
            dS,
            trans_b=True,
        )
        return dreads, dwrites

    zeros = jnp.zeros((C, block_k), jnp.float32)
    return over_blocks(p.V // block_v, of_block, (zeros, zeros))


def total_cotangent(
    V: int,
    block_v: int,
    block_k: int,
    states,
    dstates,
    log_total,
) -> Float[Array, "K"]:
    """total sum_v S dS of a program's `block_k` channels, in one pass over both states."""

    def of_block(c, total):
        of_state = block_rows(lax.iota(jnp.int32, block_k), c * block_v, block_v)
        S = load(states, *of_state)
        dS = load(dstates, *of_state)
        return total + jnp.sum(S * dS, axis=1)

    total = over_blocks(V // block_v, of_block, jnp.zeros((block_k,), jnp.float32))
    # One log for all channels, or one each.
    column = lax.iota(jnp.int32, log_total.shape[0])
    return total * jnp.exp(pltriton.load(log_total.at[column]))
