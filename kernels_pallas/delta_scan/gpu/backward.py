"""The way back through the chunks of `delta_scan` on GPU: two kernels, parallel over chunks.

The scan has left dU, the cotangent of what is written, and the cotangent of the state after each
chunk, dS; the forward pass has left the state before it, S. The first kernel makes the changes W
again, and from them

    dA_q = do W^T,  dA_e = -dU W^T,  and what v and its weights receive.

A program of the second has a block of K of one chunk. It makes

    dreads = do S^T,  derases = -dU S^T,  dwrites = W dS^T,  dlog_total = total sum_v S dS

and goes from all of these to q, k, erase keys and logs. No gradient goes through the inverse:
dU = (I + A_e)^-T dW is that of the triangular system's solution.
"""

from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.common.gpu import Operands, kernel_call
from kernels_pallas.common.mesh import like
from kernels_pallas.delta_scan.gpu import tile
from kernels_pallas.delta_scan.gpu.intra_chunk import square_spec, token_operands
from kernels_pallas.delta_scan.gpu.plan import Inputs, Plan, Rows, chunk_spec, scaled_rows
from kernels_pallas.delta_scan.gpu.scan import Chunks
from kernels_pallas.linear_scan.gpu.backward import ROW_SUMS, factor_of, total_cotangent
from kernels_pallas.linear_scan.gpu.intra_chunk import (
    exponentials_per_token,
    logs_of,
    num_levels,
    starts_of,
    sums_of,
)
from kernels_pallas.linear_scan.gpu.plan import block_rows, count_bad, load, over_blocks
from kernels_pallas.linear_scan.gpu.tile import matmul, scalar_masked, vector_dlogs
from kernels_pallas.linear_scan.gpu.tuning import block
from kernels_pallas.linear_scan.tile import LOG_ZERO


def _chunk_axes(n, h, b):
    return n, h, b


# --- the first kernel


def through_changes(
    p: Plan,
    x: Inputs,
    chunks: Chunks,
    do: Array,
    dwritten: Array,
    states: Array,
) -> dict[str, Array]:
    """From the cotangents of o and of what is written to those of the scores and of v.

    Args:
      do, dwritten: [B, T, H, V].
      states: [B, H, N, K, V], the state before each chunk.

    Returns:
      changes [B, T, H, V]: W.
      dread_scores, derase_scores [B, H, T, C]: meaningless above the diagonal.
      dv [B, T, H, V], dwrite likewise if there are such weights, else dbeta [B, H, N, C].
    """
    B, C = x.q.shape[0], p.chunk
    tokens = pl.BlockSpec((None, C, None, p.V), lambda n, h, b: (b, n, h, 0))

    def keys_spec(array: Array) -> pl.BlockSpec:
        group = p.group(array.shape[2])
        return pl.BlockSpec((None, C, None, p.K), lambda n, h, b: (b, n, h // group, 0))

    square = square_spec(p, _chunk_axes)
    inputs: Operands = {
        "values": (x.v, tokens),
        "do": (do, tokens),
        "dwritten": (dwritten, tokens),
        "erases": (chunks.erases, keys_spec(chunks.erases)),
        "below": (chunks.below, square),
        "states": (states, chunk_spec(p, states, _chunk_axes)),
    }
    if x.write is not None:
        inputs["value_weights"] = (x.write, tokens)
    for name in ("value_factor", "erase_factor"):
        array = getattr(chunks, name)
        if array is not None:
            inputs[name] = (array, chunk_spec(p, array, _chunk_axes))

    values = (B, p.T, p.H, p.V)
    squares = (B, p.H, p.T, C)
    outputs: Operands = {
        "changes": (like(x.q, values, p.operand), tokens),
        "dread_scores": (like(x.q, squares, p.operand), square),
        "derase_scores": (like(x.q, squares, p.operand), square),
        "dv": (like(x.q, values, x.v.dtype), tokens),
    }
    if x.write is not None:
        outputs["dwrite"] = (like(x.q, values, x.write.dtype), tokens)
    else:
        dbeta = like(x.q, (B, p.H, p.chunks, C), jnp.float32)
        outputs["dbeta"] = (dbeta, pl.BlockSpec((None,) * 3 + (C,), lambda n, h, b: (b, h, n, 0)))
    return kernel_call(
        partial(_changes_kernel, p),
        (p.chunks, p.H, B),
        inputs,
        outputs,
        warps=p.schedule.changes_warps,
        flops=2 * B * p.H * p.T * p.V * (p.K + 3 * C),
        exponentials=0,
        interpret=p.interpret,
        name="delta_scan_backward_changes",
    )


def _changes_kernel(
    p: Plan,
    values,
    do,
    dwritten,
    erases,
    below,
    states,
    changes,
    dread_scores,
    derase_scores,
    dv,
    value_weights=None,
    value_factor=None,
    erase_factor=None,
    dwrite=None,
    dbeta=None,
) -> None:
    """One chunk of one head. Blocks of V pass by; the scores' cotangents are accumulated."""
    C = p.chunk
    block_v = block(p.schedule.changes_block_v, p.V)
    block_k = block(p.schedule.changes_block_k, p.K)
    row = lax.iota(jnp.int32, C)
    whole = block_rows(row, 0, C)

    def found_in_state(first_v) -> Array:
        def of_block(c, total):
            keys = pltriton.load(erases.at[block_rows(row, c * block_k, block_k)])
            of_state = block_rows(c * block_k + lax.iota(jnp.int32, block_k), first_v, block_v)
            return total + matmul(p.tile, keys, pltriton.load(states.at[of_state]))

        zeros = jnp.zeros((C, block_v), jnp.float32)
        return over_blocks(p.K // block_k, of_block, zeros)

    def of_block(c, carry):
        dread, derase, of_beta = carry
        here = block_rows(row, c * block_v, block_v)
        v_tile = load(values, *here)
        weights = None if value_weights is None else load(value_weights, *here)
        weighted = scaled_rows(v_tile, value_factor) if weights is None else v_tile * weights
        rest = weighted - scaled_rows(found_in_state(c * block_v), erase_factor)
        change = rest + matmul(p.tile, pltriton.load(below.at[whole]), rest)
        # Rounded once: the scores and the next kernel see the same numbers.
        change = change.astype(p.operand)
        pltriton.store(changes.at[here], change)
        do_tile = pltriton.load(do.at[here])
        du_tile = pltriton.load(dwritten.at[here])
        dread += matmul(p.tile, do_tile, change, trans_b=True)
        derase -= matmul(p.tile, du_tile, change, trans_b=True)
        # What is written is v times beta, or times weights of its own.
        du_tile = du_tile.astype(jnp.float32)
        if weights is None:
            of_beta += jnp.sum(du_tile * v_tile, axis=1)
            dv_tile = scaled_rows(du_tile, value_factor)
        else:
            assert dwrite is not None
            pltriton.store(dwrite.at[here], (du_tile * v_tile).astype(dwrite.dtype))
            dv_tile = du_tile * weights
        pltriton.store(dv.at[here], dv_tile.astype(dv.dtype))
        return dread, derase, of_beta

    zeros = jnp.zeros((C, C), jnp.float32)
    carry = (zeros, zeros, jnp.zeros((C,), jnp.float32))
    dread, derase, of_beta = over_blocks(p.V // block_v, of_block, carry)
    pltriton.store(dread_scores.at[whole], dread.astype(dread_scores.dtype))
    pltriton.store(derase_scores.at[whole], derase.astype(derase_scores.dtype))
    if dbeta is not None:
        pltriton.store(dbeta.at[row], of_beta)


# --- the second kernel


def through_terms(
    p: Plan,
    x: Inputs,
    rows: Rows,
    do: Array,
    dwritten: Array,
    of_changes: dict[str, Array],
    states: Array,
    dstates: Array,
) -> dict[str, Array]:
    """From the cotangents of scores, o and states to those of q, k, erase keys and logs.

    Args:
      do, dwritten: [B, T, H, V].
      of_changes: what the first kernel returned.
      states, dstates: [B, H, N, K, V], the state before each chunk and the cotangent of the state
        after it.

    Returns:
      dq [B, T, H, K], in q's dtype, but float32 where states share a query head; dk likewise;
      both as if the factors of q and k were constants.
      bad [B, H, N, blocks]: how many elements of the results are not finite.
      derase [B, T, H, K], or dbeta [B, H, N, blocks, C] in its place.
      dlogs [B, T, H, K] of vector decays, or of scalar ones rows [B, H, N, blocks, ROW_SUMS, C].
    """
    B, C = x.q.shape[0], p.chunk
    block_k = block(p.schedule.back_block_k, p.K)

    def axes(c, n, h, b):
        return c, n, h, b

    def chunk_axes(c, n, h, b):
        return n, h, b

    inputs = token_operands(p, x, rows, block_k, axes)
    tokens_v = pl.BlockSpec((None, C, None, p.V), lambda c, n, h, b: (b, n, h, 0))
    state_spec = pl.BlockSpec((None, None, None, block_k, p.V), lambda c, n, h, b: (b, h, n, c, 0))
    square = square_spec(p, chunk_axes)
    inputs |= {
        "do": (do, tokens_v),
        "dwritten": (dwritten, tokens_v),
        "changes": (of_changes["changes"], tokens_v),
        "states": (states, state_spec),
        "dstates": (dstates, state_spec),
        "dread_scores": (of_changes["dread_scores"], square),
        "derase_scores": (of_changes["derase_scores"], square),
    }
    inputs |= _decay_operands(p, rows, block_k)
    levels = num_levels(C) if p.decay == "vector" else 1
    tokens_of_heads = B * p.H * p.T
    return kernel_call(
        partial(_terms_kernel, p),
        (p.K // block_k, p.chunks, p.H, B),
        inputs,
        _outputs(p, x, block_k),
        warps=p.schedule.back_warps,
        flops=2 * tokens_of_heads * p.K * (4 * C * levels + 3 * p.V),
        exponentials=tokens_of_heads * exponentials_per_token(p.of_decays),
        interpret=p.interpret,
        name=f"delta_scan_{p.decay}_backward_terms",
    )


def _decay_operands(p: Plan, rows: Rows, block_k: int) -> Operands:
    """The chunks' decays, and with scalar ones those between a token and the chunk's two ends."""
    decays = rows.decays
    found: Operands = {}
    factors = {"read_decay": decays.read_factor, "write_decay": decays.write_factor}
    for name, array in factors.items():
        if array is not None:
            found[name] = (array, chunk_spec(p, array, lambda c, n, h, b: (n, h, b)))
    if decays.log_total is not None:
        width = decays.log_total.shape[3]
        # One number for all channels, or one each.
        per_block = 1 if width > 1 else 0
        spec = pl.BlockSpec(
            (None, None, None, min(block_k, width)),
            lambda c, n, h, b: (b, h, n, c * per_block),
        )
        found["log_total"] = (decays.log_total, spec)
    return found


def _outputs(p: Plan, x: Inputs, block_k: int) -> Operands:
    """The results of `_terms_kernel`, each with the block that a program writes."""
    B, C = x.q.shape[0], p.chunk
    tokens = pl.BlockSpec((None, C, None, block_k), lambda c, n, h, b: (b, n, h, c))
    shape = (B, p.T, p.H, p.K)
    # States that share a head add up their parts afterwards: in float32.
    dq_dtype = x.q.dtype if p.Hq == p.H else jnp.float32
    dk_dtype = x.k.dtype if p.Hk == p.H else jnp.float32
    per_block = (B, p.H, p.chunks, p.K // block_k)

    def row_spec(*trailing: int) -> pl.BlockSpec:
        zeros = [0] * len(trailing)
        return pl.BlockSpec((None,) * 4 + trailing, lambda c, n, h, b: (b, h, n, c, *zeros))

    outputs: Operands = {
        "dq": (like(x.q, shape, dq_dtype), tokens),
        "dk": (like(x.q, shape, dk_dtype), tokens),
        "bad": (like(x.q, per_block, jnp.int32), row_spec()),
    }
    if x.erase is not None:
        outputs["derase"] = (like(x.q, shape, x.erase.dtype), tokens)
    else:
        outputs["dbeta"] = (like(x.q, (*per_block, C), jnp.float32), row_spec(C))
    if p.decay == "vector":
        assert x.logs is not None
        outputs["dlogs"] = (like(x.q, x.logs.shape, x.logs.dtype), tokens)
    elif p.decay == "scalar":
        sums = like(x.q, (*per_block, ROW_SUMS, C), jnp.float32)
        outputs["rows"] = (sums, row_spec(ROW_SUMS, C))
    return outputs


def _terms_kernel(
    p: Plan,
    q,
    k,
    q_factor,
    do,
    dwritten,
    changes,
    states,
    dstates,
    dread_scores,
    derase_scores,
    dq,
    dk,
    bad,
    k_factor=None,
    beta=None,
    erase=None,
    logs=None,
    subtotals=None,
    starts=None,
    sums=None,
    read_decay=None,
    write_decay=None,
    log_total=None,
    derase=None,
    dbeta=None,
    dlogs=None,
    rows=None,
) -> None:
    """A block of K of one chunk and head. The whole of V passes by, in blocks."""
    C = p.chunk
    block_k = q.shape[1]
    row = lax.iota(jnp.int32, C)
    here = block_rows(row, 0, block_k)
    whole = block_rows(row, 0, C)
    dlog_total = None
    if log_total is not None:
        block_v = block(p.schedule.back_block_v, p.V)
        dlog_total = total_cotangent(p.V, block_v, block_k, states, dstates, log_total)
    q_tile = scaled_rows(load(q, *here), q_factor)
    k_tile = scaled_rows(load(k, *here), k_factor)
    erase_tile = scaled_rows(k_tile, beta) if erase is None else load(erase, *here)

    def dscores() -> tuple[Array, Array]:
        return pltriton.load(dread_scores.at[whole]), pltriton.load(derase_scores.at[whole])

    def from_states() -> tile.FromStates:
        return _from_states(p, do, dwritten, changes, states, dstates, block_k)

    if p.decay == "vector":
        assert dlog_total is not None and dlogs is not None
        block_logs = logs_of(p.of_decays, logs, subtotals, starts, 0, block_k)
        c = tile.vector_cotangents(
            p.tile,
            q_tile,
            erase_tile,
            k_tile,
            block_logs,
            dscores,
            from_states,
        )
        dlogs_tile = vector_dlogs(p.tile, c.of_logs, dlog_total)
        # A log that the kernels have replaced receives nothing.
        is_replaced = load(logs, *here) < LOG_ZERO
        if starts is not None:
            is_replaced = is_replaced | starts_of(starts, row)
        dlogs_tile = jnp.where(is_replaced, jnp.zeros_like(dlogs_tile), dlogs_tile)
        # NaN and Inf stay what they are in a sum.
        seen = dlogs_tile
        pltriton.store(dlogs.at[here], dlogs_tile.astype(dlogs.dtype))
    else:
        # Undecayed products times the mask of the decays, as on the way forward.
        all_sums = sums_of(sums, C)
        dread, dfound = dscores()
        of_pairs = tile.scalar_cotangents(
            p.tile,
            q_tile,
            erase_tile,
            k_tile,
            scalar_masked(p.tile, dread.astype(jnp.float32), all_sums),
            scalar_masked(p.tile, dfound.astype(jnp.float32), all_sums),
        )
        of_reads = factor_of(read_decay, row)
        of_writes = factor_of(write_decay, row)
        c = tile.joined(q_tile, erase_tile, k_tile, of_pairs, from_states(), of_reads, of_writes)
        seen = c.of_logs.of_writes
        if rows is not None:
            assert dlog_total is not None
            # A scalar log receives sums over channels; over tokens XLA sums them.
            pltriton.store(rows.at[0, row], jnp.sum(c.of_logs.of_readers, axis=1))
            pltriton.store(rows.at[1, row], jnp.sum(c.of_logs.of_writers, axis=1))
            pltriton.store(rows.at[2, row], jnp.sum(c.of_logs.of_writes, axis=1))
            pltriton.store(rows.at[3, row], jnp.zeros((C,), jnp.float32) + jnp.sum(dlog_total))
    # A token's read of its own write: the diagonal of the scores.
    d_own = load(dread_scores, row, row)[:, None]
    dq_tile = c.dq + d_own * k_tile
    dk_tile = c.dk + d_own * q_tile
    if erase is None:
        # The erase key is beta k.
        assert dbeta is not None
        pltriton.store(dbeta.at[row], jnp.sum(k_tile * c.derase, axis=1))
        dk_tile += scaled_rows(c.derase, beta)
    else:
        assert derase is not None
        pltriton.store(derase.at[here], c.derase.astype(derase.dtype))
        seen += c.derase
    bad[...] = count_bad(seen + dq_tile + dk_tile)
    # So far those of the scaled q and k.
    pltriton.store(dq.at[here], scaled_rows(dq_tile, q_factor).astype(dq.dtype))
    pltriton.store(dk.at[here], scaled_rows(dk_tile, k_factor).astype(dk.dtype))


def _from_states(
    p: Plan,
    do,
    dwritten,
    changes,
    states,
    dstates,
    block_k: int,
) -> tile.FromStates:
    """dreads = do S^T, derases = -dU S^T and dwrites = W dS^T, [C, block_k] each."""
    C = p.chunk
    block_v = block(p.schedule.back_block_v, p.V)

    def of_block(c, carry):
        dreads, derases, dwrites = carry
        here = block_rows(lax.iota(jnp.int32, C), c * block_v, block_v)
        of_state = block_rows(lax.iota(jnp.int32, block_k), c * block_v, block_v)
        S = pltriton.load(states.at[of_state])
        dreads += matmul(p.tile, pltriton.load(do.at[here]), S, trans_b=True)
        derases -= matmul(p.tile, pltriton.load(dwritten.at[here]), S, trans_b=True)
        dS = pltriton.load(dstates.at[of_state])
        dwrites += matmul(p.tile, pltriton.load(changes.at[here]), dS, trans_b=True)
        return dreads, derases, dwrites

    zeros = jnp.zeros((C, block_k), jnp.float32)
    found = over_blocks(p.V // block_v, of_block, (zeros, zeros, zeros))
    return tile.FromStates(*found)
