"""The scores kernel of `linear_scan` on GPU, parallel over chunks.

A program makes one chunk's scores [C, C] and, for vector decays, its reads and writes: q and k as
the scan kernel multiplies them with the state and with v, so that the walk has nothing to do but
matmuls.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from kernels_pallas.common.gpu import moved
from kernels_pallas.common.mesh import like
from kernels_pallas.linear_scan.gpu import tile
from kernels_pallas.linear_scan.gpu.plan import Inputs, Plan, block_rows, load
from kernels_pallas.linear_scan.gpu.tile import SUBTOTAL, matmul
from kernels_pallas.linear_scan.gpu.tuning import block
from kernels_pallas.linear_scan.tile import LOG_ZERO


class Decays(NamedTuple):
    """What the chunk-parallel kernels read of the decays."""

    logs: Float[Array, "B T H K"] | None = None  # vector
    subtotals: Float[Array, "B T/8 H K"] | None = None  # of logs, in the order of memory
    log_total: Float[Array, "#B H N #K"] | None = None  # of a chunk
    sums: Float[Array, "#B H N 4 C"] | None = None  # scalar: see `tile.scalar_mask`
    read_factor: Float[Array, "#B H N C"] | None = None
    write_factor: Float[Array, "#B H N C"] | None = None
    starts: Float[Array, "B T"] | None = None  # vector, exclusive reads only

    @property
    def total(self) -> Float[Array, "B H N K"] | Float[Array, "#B H N"] | None:
        """As the scan kernel reads it."""
        if self.log_total is None:
            return None
        return jnp.exp(self.log_total if self.logs is not None else self.log_total[..., 0])


def operands(
    p: Plan, x: Inputs, decays: Decays, BK: int, axes, factors: bool
) -> dict[str, tuple[Array, pl.BlockSpec]]:
    """q, k, bonus and decays with their blocks. `axes`: grid indices -> (block of K, chunk, head,
    row of the batch).
    """

    def spec(*shape, where):
        return pl.BlockSpec(shape, lambda *grid: where(*axes(*grid)))

    tokens = lambda rows, head: spec(
        None, rows, None, BK, where=lambda c, n, h, b: (b, p.place(n), head(h), c)
    )
    found = {
        "q": (x.q, tokens(p.chunk, lambda h: h)),
        "k": (x.k, tokens(p.chunk, p.key_head)),
    }
    if x.bonus is not None:
        found["bonus"] = x.bonus, spec(None, BK, where=lambda c, n, h, b: (h, c))
    if decays.logs is not None:
        found["logs"] = decays.logs, tokens(p.chunk, lambda h: h)
        found["subtotals"] = decays.subtotals, tokens(p.chunk // SUBTOTAL, lambda h: h)
    if decays.starts is not None:
        found["starts"] = decays.starts, spec(None, p.chunk, where=lambda c, n, h, b: (b, n))
    for name in ("sums", "read_factor", "write_factor")[: 3 if factors else 1]:
        if (a := getattr(decays, name)) is not None:
            shape = (None, None, None, *a.shape[3:])
            found[name] = (
                a,
                spec(
                    *shape,
                    where=lambda c, n, h, b, a=a: (b * (len(a) > 1), h, n, *[0] * (a.ndim - 3)),
                ),
            )
    return found


def call(
    p: Plan, kernel, grid, ins, outs, warps: int, flops: int, exponentials: int, name: str
) -> dict[str, Array]:
    results = pl.pallas_call(
        lambda *refs: kernel(p, **dict(zip([*ins, *outs], refs))),
        grid=grid,
        in_specs=[spec for _, spec in ins.values()],
        out_specs=[spec for _, spec in outs.values()],
        out_shape=[array for array, _ in outs.values()],
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops, exponentials, moved([a for a, _ in (*ins.values(), *outs.values())])
        ),
        interpret=p.interpret,
        name=name,
    )(*(array for array, _ in ins.values()))
    return dict(zip(outs, results))


def _of_chunk(p: Plan, *shape) -> pl.BlockSpec:
    """[B, H, T, C] or [B, H, N, ...], a chunk of a head a program of grid (chunk, head, row of the
    batch).
    """
    return pl.BlockSpec((None, None, *shape), lambda n, h, b: (b, h, n, *[0] * (len(shape) - 1)))


# --- forward


def scores(p: Plan, x: Inputs, decays: Decays) -> dict[str, Array]:
    """scores [B, H, T, C]; of vector decays also reads and writes [B, T, H, K]. q's scale is in
    scores and reads.
    """
    B, C = x.q.shape[0], p.chunk
    ins = operands(p, x, decays, p.K, lambda n, h, b: (0, n, h, b), factors=False)
    outs = {"out": (like(x.q, (B, p.H, p.T, C), p.operand), _of_chunk(p, C, C))}
    if p.decay == "vector":
        tokens = pl.BlockSpec((None, C, None, p.K), lambda n, h, b: (b, p.place(n), h, 0))
        outs |= {
            name: (like(x.q, (B, p.T, p.H, p.K), p.operand), tokens) for name in ("reads", "writes")
        }
    kernel = _vector_kernel if p.decay == "vector" else _scalar_kernel
    flops = 2 * B * p.H * p.T * p.K * C * (_levels(C) if p.decay == "vector" else 1)
    exponentials = (
        B * p.H * p.T * {"vector": p.K * (_levels(C) + 2), "scalar": C, "none": 0}[p.decay]
    )
    grid = p.chunks, p.H, B
    return call(
        p,
        kernel,
        grid,
        ins,
        outs,
        p.schedule.scores_warps,
        flops,
        exponentials,
        f"linear_scan_{p.decay}_scores",
    )


def _levels(C: int) -> int:
    return C.bit_length() - 1


def _vector_kernel(
    p: Plan, q, k, logs, subtotals, out, reads, writes, bonus=None, starts=None
) -> None:
    C, BK, rows = p.chunk, block(p.schedule.scores_block_k, p.K), p.rows()

    def columns(c, carry):
        scored, own = carry
        first = c * BK
        here = block_rows(rows, first, BK)
        q_tile, k_tile = load(q, *here) * p.scale, load(k, *here)
        own += _own(p, q_tile, k_tile, bonus, first)
        of_block = logs_of(p, logs, subtotals, starts, first, BK)
        more, read, written = tile.vector_scores(p.tile, q_tile, k_tile, of_block)
        pltriton.store(reads.at[here], read.astype(reads.dtype))
        pltriton.store(writes.at[here], written.astype(writes.dtype))
        return scored + more, own

    carry = jnp.zeros((C, C), jnp.float32), jnp.zeros((C,), jnp.float32)
    scored, own = lax.fori_loop(0, p.K // BK, columns, carry) if p.K > BK else columns(0, carry)
    i, j = tile.rows_and_columns(C)
    scored = jnp.where(j < i, scored, jnp.where(j == i, own[:, None], 0.0))
    pltriton.store(out.at[block_rows(lax.iota(jnp.int32, C), 0, C)], scored.astype(out.dtype))


def logs_of(p: Plan, logs, subtotals, starts, first, BK: int) -> tile.Logs:
    C, rows = p.chunk, p.rows()
    # A row of the chunk, or of its subtotals, as it lies in memory.
    at = lambda ref, size: (
        lambda row: load(ref, *block_rows(size - 1 - row if p.reverse else row, first, BK))
    )
    if p.inclusive:
        log_read = load(logs, *block_rows(rows, first, BK))
    else:
        log_read = jnp.zeros((C, BK), jnp.float32)
        if starts is not None:
            empties = pltriton.load(starts.at[lax.iota(jnp.int32, C)])
            log_read += jnp.where(empties > 0, LOG_ZERO, 0.0)[:, None]
    return tile.Logs(log_read, at(logs, C), at(subtotals, C // SUBTOTAL))


def _own(p: Plan, q: Array, k: Array, bonus, first) -> Array:
    """[C]: each token's score with itself."""
    weight = own_weight(p, bonus, first, q.shape[1])
    return (
        jnp.zeros(q.shape[:1], jnp.float32) if weight is None else jnp.sum(q * k * weight, axis=1)
    )


def own_weight(p: Plan, bonus, first, BK: int):
    """1, the bonus [1, BK], or None where a token does not read itself."""
    if p.inclusive:
        return 1.0
    return None if bonus is None else load(bonus, first + lax.iota(jnp.int32, BK))[None, :]


def _scalar_kernel(p: Plan, q, k, out, sums=None, bonus=None) -> None:
    C, BK, rows = p.chunk, block(p.schedule.scores_block_k, p.K), p.rows()

    def columns(c, carry):
        scored, own = carry
        here = block_rows(rows, c * BK, BK)
        q_tile, k_tile = pltriton.load(q.at[here]), pltriton.load(k.at[here])
        own += _own(p, q_tile.astype(jnp.float32), k_tile.astype(jnp.float32), bonus, c * BK)
        return scored + matmul(p.tile, q_tile, k_tile, trans_b=True), own

    carry = jnp.zeros((C, C), jnp.float32), jnp.zeros((C,), jnp.float32)
    scored, own = lax.fori_loop(0, p.K // BK, columns, carry) if p.K > BK else columns(0, carry)
    scored = scored * tile.scalar_mask(C, sums_of(sums, C)) + tile.diagonal(own)
    pltriton.store(
        out.at[block_rows(lax.iota(jnp.int32, C), 0, C)], (scored * p.scale).astype(out.dtype)
    )


def sums_of(sums, C: int):
    return (
        None
        if sums is None
        else [pltriton.load(sums.at[r, lax.iota(jnp.int32, C)]) for r in range(4)]
    )
