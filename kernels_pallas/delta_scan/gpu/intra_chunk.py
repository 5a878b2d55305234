"""What the scan of `delta_scan` on GPU finds ready for every chunk, made parallel over chunks.

The first kernel makes the scores of a chunk (see `delta_scan.tile`): A_q, what queries read of the
chunk's own writes, and A_e, what erase keys find of them. For vector decays it also makes reads,
erases and writes, which are q, e and k decayed from the chunk's start or to its end, as the scan
multiplies them with the state. With scalar decays those are q, e and k, times a factor of each
token. The second kernel inverts I + A_e. It is a kernel of its own because Triton cannot slice: the
blocks of A_e that it wants come from memory.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from kernels_pallas.common.gpu import Operands, kernel_call
from kernels_pallas.common.mesh import like
from kernels_pallas.delta_scan.gpu import tile
from kernels_pallas.delta_scan.gpu.plan import Inputs, Plan, Rows, chunk_spec, scaled_rows
from kernels_pallas.linear_scan.gpu.intra_chunk import (
    exponentials_per_token,
    logs_of,
    num_levels,
    sums_of,
)
from kernels_pallas.linear_scan.gpu.plan import block_rows, load, over_blocks
from kernels_pallas.linear_scan.gpu.tile import SUBTOTAL, matmul, rows_and_columns, scalar_masked
from kernels_pallas.linear_scan.gpu.tuning import block


class Terms(NamedTuple):
    """What the kernels here make of every chunk.

    Attributes:
      read_scores: A_q with its diagonal: row t has the scores of token t with those of its chunk.
      below: (I + A_e)^-1 below its diagonal of ones.
      reads, erases, writes: for vector decays only.
    """

    read_scores: Float[Array, "B H T C"]
    below: Float[Array, "B H T C"]
    reads: Float[Array, "B T H K"] | None
    erases: Float[Array, "B T H K"] | None
    writes: Float[Array, "B T H K"] | None


def terms(p: Plan, x: Inputs, rows: Rows) -> Terms:
    """Runs both kernels."""
    made = _scores(p, x, rows)
    return Terms(
        read_scores=made["read_scores"],
        below=_inverses(p, made["erase_scores"]),
        reads=made.get("reads"),
        erases=made.get("erases"),
        writes=made.get("writes"),
    )


# --- scores


def token_operands(p: Plan, x: Inputs, rows: Rows, block_k: int, axes) -> Operands:
    """q, k, erase keys, the numbers of each token and the decays, with a program's blocks of them.

    Args:
      block_k: channels in a block.
      axes: grid indices -> (block of K, chunk, head of the state, row of the batch).
    """

    def of_tokens(array: Array, count: int) -> pl.BlockSpec:
        """`count` rows of one chunk and head, from an array [B, T, heads, K]."""
        group = p.group(array.shape[2])

        def index(*grid):
            c, n, h, b = axes(*grid)
            return b, n, h // group, c

        return pl.BlockSpec((None, count, None, block_k), index)

    def of_starts(*grid):
        _, n, _, b = axes(*grid)
        return b, n

    def chunk_axes(*grid):
        _, n, h, b = axes(*grid)
        return n, h, b

    decays = rows.decays
    found: Operands = {"q": (x.q, of_tokens(x.q, p.chunk)), "k": (x.k, of_tokens(x.k, p.chunk))}
    if x.erase is not None:
        found["erase"] = (x.erase, of_tokens(x.erase, p.chunk))
    if decays.logs is not None and decays.subtotals is not None:
        found["logs"] = (decays.logs, of_tokens(decays.logs, p.chunk))
        found["subtotals"] = (decays.subtotals, of_tokens(decays.subtotals, p.chunk // SUBTOTAL))
    if decays.starts is not None:
        found["starts"] = (decays.starts, pl.BlockSpec((None, p.chunk), of_starts))
    of_chunk = {
        "q_factor": rows.q_factor,
        "k_factor": rows.k_factor,
        # The weight of k in its erase key.
        "beta": rows.beta if x.erase is None else None,
        "sums": decays.sums,
    }
    for name, array in of_chunk.items():
        if array is not None:
            found[name] = (array, chunk_spec(p, array, chunk_axes))
    return found


def square_spec(p: Plan, axes) -> pl.BlockSpec:
    """The block [C, C] of a program, from an array [B, H, T, C]; `axes` as `chunk_spec` has it."""

    def index(*grid):
        n, h, b = axes(*grid)
        return b, h, n, 0

    return pl.BlockSpec((None, None, p.chunk, p.chunk), index)


def _chunk_axes(n, h, b):
    return n, h, b


def _scores(p: Plan, x: Inputs, rows: Rows) -> dict[str, Array]:
    B, C = x.q.shape[0], p.chunk
    is_vector = p.decay == "vector"

    def axes(n, h, b):
        return 0, n, h, b

    inputs = token_operands(p, x, rows, p.K, axes)
    squares = (B, p.H, p.T, C)
    spec = square_spec(p, _chunk_axes)
    outputs: Operands = {
        "read_scores": (like(x.q, squares, p.operand), spec),
        # The inverse magnifies errors: all bits.
        "erase_scores": (like(x.q, squares, jnp.float32), spec),
    }
    if is_vector:
        tokens = pl.BlockSpec((None, C, None, p.K), lambda n, h, b: (b, n, h, 0))
        for name in ("reads", "erases", "writes"):
            outputs[name] = (like(x.q, (B, p.T, p.H, p.K), p.operand), tokens)
    tokens_of_heads = B * p.H * p.T
    # One for queries, one for erase keys; with vector decays at every level of the halving.
    matmuls = 2 * (num_levels(C) if is_vector else 1)
    return kernel_call(
        partial(_vector_kernel if is_vector else _scalar_kernel, p),
        (p.chunks, p.H, B),
        inputs,
        outputs,
        warps=p.schedule.intra_warps,
        flops=2 * tokens_of_heads * p.K * C * matmuls,
        exponentials=tokens_of_heads * exponentials_per_token(p.of_decays),
        interpret=p.interpret,
        name=f"delta_scan_{p.decay}_scores",
    )


def _vector_kernel(
    p: Plan,
    q,
    k,
    logs,
    subtotals,
    q_factor,
    read_scores,
    erase_scores,
    reads,
    erases,
    writes,
    k_factor=None,
    beta=None,
    erase=None,
    starts=None,
) -> None:
    """One chunk of one head with a decay a channel.

    Blocks of K one after another: a block's factors stay in registers, both scores of all blocks
    are accumulated in [C, C] tiles, and each block's reads, erases and writes leave at once.
    """
    C = p.chunk
    block_k = block(p.schedule.intra_block_k, p.K)
    row = lax.iota(jnp.int32, C)

    def of_block(c, carry):
        scores, own = carry
        first = c * block_k
        here = block_rows(row, first, block_k)
        # float32 until the tensor core takes them: decays multiply them first.
        q_tile = scaled_rows(load(q, *here), q_factor)
        k_tile = scaled_rows(load(k, *here), k_factor)
        erase_tile = None if erase is None else load(erase, *here)
        own += jnp.sum(q_tile * k_tile, axis=1)
        block_logs = logs_of(p.of_decays, logs, subtotals, starts, first, block_k)
        scores, (read_decay, write_decay) = tile.vector_scores(
            p.tile,
            q_tile,
            erase_tile,
            k_tile,
            block_logs,
            scores,
        )
        erased = scaled_rows(k_tile, beta) if erase_tile is None else erase_tile
        pltriton.store(reads.at[here], (q_tile * read_decay).astype(reads.dtype))
        pltriton.store(erases.at[here], (erased * read_decay).astype(erases.dtype))
        pltriton.store(writes.at[here], (k_tile * write_decay).astype(writes.dtype))
        return scores, own

    zeros = jnp.zeros((C, C), jnp.float32)
    own = jnp.zeros((C,), jnp.float32)
    (of_queries, of_erases), own = over_blocks(p.K // block_k, of_block, ((zeros, zeros), own))
    i, j = rows_and_columns(C)
    # `vector_scores` leaves the diagonal out and the upper triangle undefined.
    of_queries = jnp.where(j < i, of_queries, jnp.where(j == i, own[:, None], 0.0))
    of_erases = jnp.where(j < i, scaled_rows(of_erases, beta), 0.0)
    whole = block_rows(row, 0, C)
    pltriton.store(read_scores.at[whole], of_queries.astype(read_scores.dtype))
    pltriton.store(erase_scores.at[whole], of_erases)


def _scalar_kernel(
    p: Plan,
    q,
    k,
    q_factor,
    read_scores,
    erase_scores,
    k_factor=None,
    beta=None,
    erase=None,
    sums=None,
) -> None:
    """One chunk of one head with a decay a token, or none: plain products times a mask."""
    C = p.chunk
    block_k = block(p.schedule.intra_block_k, p.K)
    row = lax.iota(jnp.int32, C)

    def of_block(c, carry):
        of_queries, of_erases, own = carry
        here = block_rows(row, c * block_k, block_k)
        # Not widened: 16-bit operands go to the tensor core as they are.
        q_tile = pltriton.load(q.at[here])
        k_tile = pltriton.load(k.at[here])
        erase_tile = k_tile if erase is None else pltriton.load(erase.at[here])
        own += jnp.sum(q_tile.astype(jnp.float32) * k_tile.astype(jnp.float32), axis=1)
        of_queries += matmul(p.tile, q_tile, k_tile, trans_b=True)
        of_erases += matmul(p.tile, erase_tile, k_tile, trans_b=True)
        return of_queries, of_erases, own

    zeros = jnp.zeros((C, C), jnp.float32)
    own = jnp.zeros((C,), jnp.float32)
    carry = over_blocks(p.K // block_k, of_block, (zeros, zeros, own))
    of_queries, of_erases, own = carry
    # Rows are queries and erase keys, columns are keys.
    of_queries = scaled_rows(of_queries + _diagonal_only(own, of_queries), q_factor)
    # Erase keys of their own have no such factors.
    if erase is None:
        of_erases = scaled_rows(scaled_rows(of_erases, k_factor), beta)
    if k_factor is not None:
        of_keys = load(k_factor, row)[None, :]
        of_queries = of_queries * of_keys
        of_erases = of_erases * of_keys
    i, j = rows_and_columns(C)
    all_sums = sums_of(sums, C)
    masked = scalar_masked(p.tile, of_queries, all_sums)
    masked = jnp.where(i == j, of_queries, masked)
    whole = block_rows(row, 0, C)
    pltriton.store(read_scores.at[whole], masked.astype(read_scores.dtype))
    pltriton.store(erase_scores.at[whole], scalar_masked(p.tile, of_erases, all_sums))


def _diagonal_only(values: Float[Array, "C"], of: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """What makes `values` the diagonal of `of`: those are products without any rounding."""
    i, j = rows_and_columns(values.shape[0])
    return jnp.where(i == j, values[:, None] - of, 0.0)


# --- the inverses


def _inverses(p: Plan, erase_scores: Float[Array, "B H T C"]) -> Float[Array, "B H T C"]:
    B = erase_scores.shape[0]
    C = p.chunk
    spec = square_spec(p, _chunk_axes)
    made = kernel_call(
        partial(_inverse_kernel, p),
        (p.chunks, p.H, B),
        {"erase_scores": (erase_scores, spec)},
        {"below": (like(erase_scores, erase_scores.shape, p.operand), spec)},
        warps=p.schedule.inverse_warps,
        # Two products for each block and level.
        flops=2 * B * p.H * p.T * C * C // 3,
        exponentials=0,
        interpret=p.interpret,
        name="delta_scan_inverse",
    )
    return made["below"]


def _inverse_kernel(p: Plan, erase_scores, below) -> None:
    """One chunk of one head: blocks of 16 rows, then pairs of blocks, then pairs of pairs."""
    size = tile.BLOCK
    count = p.chunk // size
    of_block = lax.iota(jnp.int32, size)

    def place(row, column) -> tuple[Array, Array]:
        return block_rows(row * size + of_block, column * size, size)

    def scores_at(row, column) -> Array:
        return pltriton.load(erase_scores.at[place(row, column)])

    def of_diagonal(n, inverses: tuple[Array, ...]) -> tuple[Array, ...]:
        made = tile.inverse_of_block(scores_at(n, n), p.precision_of_inverse)
        return tuple(jnp.where(n == m, made, other) for m, other in enumerate(inverses))

    # A loop, or the compiler has all blocks in registers at once.
    zeros = jnp.zeros((size, size), jnp.float32)
    inverses = lax.fori_loop(0, count, of_diagonal, (zeros,) * count)
    found = tile.merged_inverse(inverses, scores_at, p.precision_of_inverse)
    i, j = rows_and_columns(size)
    # Blocks above the diagonal are written too: the scan multiplies whole tiles.
    for row in range(count):
        for column in range(count):
            result = found.get((row, column), zeros)
            if row == column:
                result = jnp.where(j < i, result, jnp.zeros_like(result))
            pltriton.store(below.at[place(row, column)], result.astype(below.dtype))
