"""The products inside chunks of `linear_scan` on GPU, parallel over chunks.

A program of the kernels here makes the products [C, C] of one chunk: q_i k_j, decayed from j to i.
For vector decays it also makes reads and writes, which are q decayed from the chunk's start and k
decayed to its end, as the scan kernel multiplies them with the state and with v. So that kernel,
which has to go through the chunks one after another, has nothing to do but matrix products.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Bool, Float

from kernels_pallas.common.gpu import Operands, kernel_call
from kernels_pallas.common.mesh import like
from kernels_pallas.linear_scan.gpu import tile
from kernels_pallas.linear_scan.gpu.decays import Decays, clamped_logs
from kernels_pallas.linear_scan.gpu.plan import Inputs, Plan, block_rows, load, over_blocks
from kernels_pallas.linear_scan.gpu.tile import SUBTOTAL, matmul
from kernels_pallas.linear_scan.gpu.tuning import block
from kernels_pallas.linear_scan.tile import LOG_ZERO


def operands(
    p: Plan, x: Inputs, decays: Decays, block_k: int, axes: Callable, factors: bool
) -> Operands:
    """q, k, the bonus and the decays, each with the block that a program gets.

    Args:
      block_k: channels in a block.
      axes: grid indices -> (block of K, chunk, head, row of the batch).
      factors: whether the kernel reads the tokens' factors too.
    """

    def spec(shape: tuple, where: Callable) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *grid: where(*axes(*grid)))

    def own_head(h):
        return h

    def of_tokens(rows: int, head: Callable) -> pl.BlockSpec:
        """`rows` rows of one chunk and head, from an array [B, T, H, K]."""
        shape = (None, rows, None, block_k)
        return spec(shape, lambda c, n, h, b: (b, p.place(n), head(h), c))

    def of_chunk(array: Array) -> pl.BlockSpec:
        """All of one chunk and head, from an array [B or 1, H, N, ...]."""
        trailing = array.shape[3:]
        # An index of 0 in every row of the batch where the array has one row for all of them.
        per_row = 1 if array.shape[0] > 1 else 0
        zeros = [0] * len(trailing)
        shape = (None, None, None, *trailing)
        return spec(shape, lambda c, n, h, b: (b * per_row, h, n, *zeros))

    found: Operands = {
        "q": (x.q, of_tokens(p.chunk, own_head)),
        "k": (x.k, of_tokens(p.chunk, p.key_head)),
    }
    if x.bonus is not None:
        found["bonus"] = (x.bonus, spec((None, block_k), lambda c, n, h, b: (h, c)))
    if decays.logs is not None:
        found["logs"] = (decays.logs, of_tokens(p.chunk, own_head))
        found["subtotals"] = (decays.subtotals, of_tokens(p.chunk // SUBTOTAL, own_head))
    if decays.starts is not None:
        found["starts"] = (decays.starts, spec((None, p.chunk), lambda c, n, h, b: (b, n)))
    if decays.sums is not None:
        found["sums"] = (decays.sums, of_chunk(decays.sums))
    if factors and decays.read_factor is not None:
        found["read_factor"] = (decays.read_factor, of_chunk(decays.read_factor))
    if factors and decays.write_factor is not None:
        found["write_factor"] = (decays.write_factor, of_chunk(decays.write_factor))
    return found


def call(
    p: Plan,
    kernel: Callable,
    grid: tuple[int, ...],
    inputs: Operands,
    outputs: Operands,
    *,
    warps: int,
    flops: int,
    exponentials: int,
    name: str,
) -> dict[str, Array]:
    """Runs `kernel(p, **refs)`, whose references have the names of `inputs` and `outputs`.

    Args:
      flops, exponentials: declared to XLA, beside the bytes of all arrays.
      name: of the kernel in profiles.
    """
    return kernel_call(
        partial(kernel, p),
        grid,
        inputs,
        outputs,
        warps=warps,
        flops=flops,
        exponentials=exponentials,
        interpret=p.interpret,
        name=name,
    )


# --- forward


def products(p: Plan, x: Inputs, decays: Decays) -> dict[str, Array]:
    """The products of all chunks.

    Returns:
      out [B, H, T, C]: row t has the products of token t with the tokens of its chunk.
      reads, writes [B, T, H, K]: vector decays only.
      q's scale is in `out` and in `reads`.
    """
    B, C = x.q.shape[0], p.chunk
    is_vector = p.decay == "vector"

    def axes(n, h, b):
        return 0, n, h, b

    inputs = operands(p, x, decays, p.K, axes, factors=False)
    of_chunk = pl.BlockSpec((None, None, C, C), lambda n, h, b: (b, h, n, 0))
    outputs = {"out": (like(x.q, (B, p.H, p.T, C), p.operand), of_chunk)}
    if is_vector:
        tokens = pl.BlockSpec((None, C, None, p.K), lambda n, h, b: (b, p.place(n), h, 0))
        shape = (B, p.T, p.H, p.K)
        outputs["reads"] = (like(x.q, shape, p.operand), tokens)
        outputs["writes"] = (like(x.q, shape, p.operand), tokens)
    tokens_of_heads = B * p.H * p.T
    matmuls = num_levels(C) if is_vector else 1
    return call(
        p,
        _vector_kernel if is_vector else _scalar_kernel,
        (p.chunks, p.H, B),
        inputs,
        outputs,
        warps=p.schedule.intra_warps,
        flops=2 * tokens_of_heads * p.K * C * matmuls,
        exponentials=tokens_of_heads * exponentials_per_token(p),
        name=f"linear_scan_{p.decay}_products",
    )


def num_levels(C: int) -> int:
    """Levels of the halving of a chunk of C tokens, a power of two."""
    return C.bit_length() - 1


def exponentials_per_token(p: Plan) -> int:
    """How many exponentials a kernel over chunks takes for a token of a head."""
    per_token = {"vector": p.K * (num_levels(p.chunk) + 2), "scalar": p.chunk, "none": 0}
    return per_token[p.decay]


def _vector_kernel(
    p: Plan, q, k, logs, subtotals, out, reads, writes, bonus=None, starts=None
) -> None:
    """One chunk of one head with a decay a channel.

    Blocks of K one after another: a block's factors stay in registers, the products of all blocks
    are accumulated in a [C, C] tile, and each block's reads and writes leave at once.
    """
    C = p.chunk
    block_k = block(p.schedule.intra_block_k, p.K)
    rows = p.rows()

    def of_block(c, carry):
        total, own = carry
        first = c * block_k
        here = block_rows(rows, first, block_k)
        q_tile = load(q, *here) * p.scale
        k_tile = load(k, *here)
        own += _own_products(p, q_tile, k_tile, bonus, first)
        block_logs = logs_of(p, logs, subtotals, starts, first, block_k)
        more, read, written = tile.vector_products(p.tile, q_tile, k_tile, block_logs)
        pltriton.store(reads.at[here], read.astype(reads.dtype))
        pltriton.store(writes.at[here], written.astype(writes.dtype))
        return total + more, own

    zeros = (jnp.zeros((C, C), jnp.float32), jnp.zeros((C,), jnp.float32))
    total, own = over_blocks(p.K // block_k, of_block, zeros)
    # `vector_products` leaves the diagonal out and the upper triangle undefined.
    i, j = tile.rows_and_columns(C)
    lower_or_zero = jnp.where(j == i, own[:, None], 0.0)
    result = jnp.where(j < i, total, lower_or_zero)
    _store_products(out, result)


def _scalar_kernel(p: Plan, q, k, out, sums=None, bonus=None) -> None:
    """One chunk of one head with a decay a token, or none: plain products times a mask."""
    C = p.chunk
    block_k = block(p.schedule.intra_block_k, p.K)
    rows = p.rows()

    def of_block(c, carry):
        total, own = carry
        here = block_rows(rows, c * block_k, block_k)
        # Not widened: 16-bit operands go to the tensor core as they are.
        q_tile = pltriton.load(q.at[here])
        k_tile = pltriton.load(k.at[here])
        q_wide = q_tile.astype(jnp.float32)
        k_wide = k_tile.astype(jnp.float32)
        own += _own_products(p, q_wide, k_wide, bonus, c * block_k)
        return total + matmul(p.tile, q_tile, k_tile, trans_b=True), own

    zeros = (jnp.zeros((C, C), jnp.float32), jnp.zeros((C,), jnp.float32))
    total, own = over_blocks(p.K // block_k, of_block, zeros)
    masked = tile.scalar_masked(p.tile, total, sums_of(sums, C)) + tile.diagonal(own)
    _store_products(out, masked * p.scale)


def _store_products(out, products: Array) -> None:
    """Rows in the order of the recurrence, also where the recurrence runs in reverse."""
    C = products.shape[0]
    here = block_rows(lax.iota(jnp.int32, C), 0, C)
    pltriton.store(out.at[here], products.astype(out.dtype))


def logs_of(
    p: Plan,
    logs,
    subtotals,
    starts,
    first,
    block_k: int,
) -> tile.Logs:
    """The logs of a program's chunk, for the channels from `first` on."""
    C = p.chunk

    def in_memory(row: Array, size: int) -> tuple[Array, Array]:
        """The index of rows of the chunk, or of its subtotals."""
        at = size - 1 - row if p.reverse else row
        return block_rows(at, first, block_k)

    def log_at(row: Array) -> Array:
        is_start = None if starts is None else starts_of(starts, row)
        return clamped_logs(load(logs, *in_memory(row, C)), is_start)

    def subtotal_at(row: Array) -> Array:
        return load(subtotals, *in_memory(row, C // SUBTOTAL))

    rows = lax.iota(jnp.int32, C)
    if p.inclusive:
        log_read = log_at(rows)
    else:
        log_read = jnp.zeros((C, block_k), jnp.float32)
        if starts is not None:
            # An exclusive read of a segment's first token finds an empty state.
            log_zero = jnp.asarray(LOG_ZERO, jnp.float32)
            log_read = jnp.where(starts_of(starts, rows), log_zero, log_read)
    return tile.Logs(log_read, log_at, subtotal_at)


def starts_of(starts, row: Array) -> Bool[Array, "C 1"]:
    """Whether the state is reset before these tokens of the chunk."""
    return (pltriton.load(starts.at[row]) > 0)[:, None]


def _own_products(
    p: Plan,
    q: Array,
    k: Array,
    bonus,
    first,
) -> Float[Array, "C"]:
    """What each token reads of its own write."""
    weight = own_weight(p, bonus, first, q.shape[1])
    if weight is None:
        return jnp.zeros(q.shape[:1], jnp.float32)
    return jnp.sum(q * k * weight, axis=1)


def own_weight(p: Plan, bonus, first, block_k: int):
    """1, the bonus [1, block_k], or None where a token does not read its own write."""
    if p.inclusive:
        return 1.0
    if bonus is None:
        return None
    return load(bonus, first + lax.iota(jnp.int32, block_k))[None, :]


def sums_of(sums, C: int) -> tuple[Array, ...] | None:
    """The four rows of sums that `tile.scalar_mask` takes."""
    if sums is None:
        return None
    row = lax.iota(jnp.int32, C)
    return tuple(pltriton.load(sums.at[r, row]) for r in range(4))
