"""The scan kernel of `linear_scan` on GPU: through the chunks, with the state in registers.

    forward    o_n  = A_n v_n + reads_n S;       S  <- total_n S + writes_n^T v_n    in order
    backward   dv_n = A_n^T do_n + writes_n dS;  dS <- total_n dS + reads_n^T do_n   in reverse

are one loop, with reads and writes, v and do exchanged. The grid is (block of V, segment, head, row
of the batch): a program has a block of V of one head of one segment, and its state [K, block_v]
stays in registers while the chunks pass by; a chunk's products, reads, writes and values are loaded
from memory once. With scalar decays reads are q and writes are k, and the tokens' factors multiply
rows of what the matrix products give or take.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from kernels_pallas.common.gpu import moved
from kernels_pallas.common.mesh import like
from kernels_pallas.linear_scan.gpu.plan import Plan, block_rows, count_bad, load
from kernels_pallas.linear_scan.gpu.tile import matmul
from kernels_pallas.linear_scan.gpu.tuning import block, scan_block_v, scan_stages


class Chunks(NamedTuple):
    """What the scan goes through. In the backward pass `reads` holds the writes, and so on.

    Attributes:
      products: None where no o is wanted, only the final state.
      total: the decay of each chunk.
      initial: the state before each segment.
    """

    reads: Float[Array, "B T Hx K"] | None
    writes: Float[Array, "B T Hy K"]
    products: Float[Array, "B H T C"] | None
    values: Float[Array, "B T Hz V"]
    total: Float[Array, "_ H N K"] | Float[Array, "_ H N"] | None
    read_factor: Float[Array, "_ H N C"] | None
    write_factor: Float[Array, "_ H N C"] | None
    initial: Float[Array, "B H G K V"] | None


def scan(
    p: Plan, x: Chunks, out_dtype, *, backward: bool, save: bool, final: bool
) -> dict[str, Array]:
    """Runs the scan kernel once.

    Args:
      out_dtype: of o.
      backward: from the last chunk to the first, with the products transposed.
      save: whether the state before each chunk is returned.
      final: whether the state after each segment is returned.

    Returns:
      o [B, T, H, V] and bad [B, H, G, blocks of V] where there are products; states
      [B, H, N, K, V]; final [B, H, G, K, V], float32. `bad` is how many elements of the final
      states are not finite: a state keeps whatever NaN or Inf went into it.
    """
    s = p.schedule
    block_v = scan_block_v(s, p.K, p.V)
    grid = (p.V // block_v, p.segments, p.H, x.values.shape[0])
    if x.products is None:
        # Nothing is read from the state: only what writes to it is needed.
        x = x._replace(reads=None, read_factor=None)
    specs = _specs(p, x, block_v)
    given = [name for name in Chunks._fields if getattr(x, name) is not None]
    arrays = [getattr(x, name) for name in given]
    outputs = _outputs(p, x, block_v, out_dtype, save, final)
    results = [array for array, _ in outputs.values()]
    names = [*given, *outputs]

    def body(*refs):
        _kernel(p, backward, **dict(zip(names, refs)))

    direction = "backward" if backward else "forward"
    suffix = "_summaries" if x.products is None else ""
    programs = math.prod(grid)
    stages = scan_stages(s, programs, p.chunk, p.K, block_v, p.operand.itemsize)
    made = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[specs[name] for name in given],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=results,
        compiler_params=pltriton.CompilerParams(num_warps=s.scan_warps, num_stages=stages),
        cost_estimate=_cost(p, x, [*arrays, *results]),
        interpret=p.interpret,
        name=f"linear_scan_{direction}{suffix}",
    )(*arrays)
    return dict(zip(outputs, made))


def _specs(p: Plan, x: Chunks, block_v: int) -> dict[str, pl.BlockSpec]:
    """A program's part of each array: all tokens of one head, a block of V of values and states."""

    def of_tokens(array: Array) -> pl.BlockSpec:
        heads_per_head = p.H // array.shape[2]
        shape = (None, p.T, None, p.K)
        return pl.BlockSpec(shape, lambda i, g, h, b: (b, 0, h // heads_per_head, 0))

    def of_head(array: Array) -> pl.BlockSpec:
        # Index 0 in every row of the batch where one row serves them all.
        per_row = 1 if array.shape[0] > 1 else 0
        zeros = [0] * (array.ndim - 2)
        shape = (None, None, *array.shape[2:])
        return pl.BlockSpec(shape, lambda i, g, h, b: (b * per_row, h, *zeros))

    specs = {"writes": of_tokens(x.writes), "values": _values_spec(p, x.values.shape[2], block_v)}
    if x.reads is not None:
        specs["reads"] = of_tokens(x.reads)
    if x.products is not None:
        shape = (None, None, p.T, p.chunk)
        specs["products"] = pl.BlockSpec(shape, lambda i, g, h, b: (b, h, 0, 0))
    for name in ("total", "read_factor", "write_factor"):
        array = getattr(x, name)
        if array is not None:
            specs[name] = of_head(array)
    if x.initial is not None:
        specs["initial"] = _state_spec(p, block_v)
    return specs


def _values_spec(p: Plan, heads: int, block_v: int) -> pl.BlockSpec:
    heads_per_head = p.H // heads
    shape = (None, p.T, None, block_v)
    return pl.BlockSpec(shape, lambda i, g, h, b: (b, 0, h // heads_per_head, i))


def _state_spec(p: Plan, block_v: int) -> pl.BlockSpec:
    shape = (None, None, None, p.K, block_v)
    return pl.BlockSpec(shape, lambda i, g, h, b: (b, h, g, 0, i))


def _outputs(
    p: Plan, x: Chunks, block_v: int, out_dtype, save: bool, final: bool
) -> dict[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]]:
    """The results that are wanted, each with the block that a program writes."""
    B, H = x.values.shape[0], p.H
    outputs = {}
    if x.products is not None:
        o = like(x.values, (B, p.T, H, p.V), out_dtype)
        outputs["o"] = (o, _values_spec(p, H, block_v))
        blocks = p.V // block_v
        bad = like(x.values, (B, H, p.segments, blocks), jnp.int32)
        outputs["bad"] = (bad, pl.BlockSpec((None,) * 4, lambda i, g, h, b: (b, h, g, i)))
    if save:
        states = like(x.values, (B, H, p.chunks, p.K, p.V), p.operand)
        shape = (None, None, p.chunks, p.K, block_v)
        outputs["states"] = (states, pl.BlockSpec(shape, lambda i, g, h, b: (b, h, 0, 0, i)))
    if final:
        last = like(x.values, (B, H, p.segments, p.K, p.V), jnp.float32)
        outputs["final"] = (last, _state_spec(p, block_v))
    return outputs


def _kernel(
    p: Plan,
    backward: bool,
    writes,
    values,
    reads=None,
    products=None,
    total=None,
    read_factor=None,
    write_factor=None,
    initial=None,
    o=None,
    bad=None,
    states=None,
    final=None,
):
    """All chunks of one segment, for one head and a block of V.

    The state is a tuple of tiles [block_k, block_v], one for each block of K: Triton has no slices,
    and a product wants its operands whole.
    """
    C = p.chunk
    block_v = values.shape[1]
    block_k = block(p.schedule.scan_block_k, p.K)
    first_rows = [c * block_k for c in range(p.K // block_k)]
    # q carries the scale. The products and vector reads have it already.
    q_scale = p.scale if p.decay != "vector" else None
    read_scale = None if backward else q_scale
    write_scale = q_scale if backward else None
    chunks_in_segment = p.chunks // p.segments
    segment = pl.program_id(1)
    row = lax.iota(jnp.int32, C)

    def state_tile(first: int) -> tuple[Array, Array]:
        """The index of the state's rows from `first` on."""
        rows = first + lax.iota(jnp.int32, block_k)
        columns = lax.iota(jnp.int32, block_v)
        return rows[:, None], columns[None, :]

    late = p.schedule.scan_stores_late

    def store_states(n, state):
        """The state before the n-th chunk, where it is wanted."""
        if states is None:
            return
        for first, S in zip(first_rows, state):
            pltriton.store(states.at[(n, *state_tile(first))], S.astype(states.dtype))

    def chunk(m, state):
        # The m-th chunk that this program comes to.
        in_order = chunks_in_segment - 1 - m if backward else m
        n = segment * chunks_in_segment + in_order
        rows = p.place(n) * C + p.rows()
        here = block_rows(rows, 0, block_v)
        v = pltriton.load(values.at[here])
        if not late:
            store_states(n, state)
        if o is not None:
            assert products is not None and reads is not None
            of_chunk = pltriton.load(products.at[block_rows(n * C + row, 0, C)])
            inside = matmul(p.tile, of_chunk, v, trans_a=backward)
            read = jnp.zeros((C, block_v), jnp.float32)
            for first, S in zip(first_rows, state):
                reads_tile = pltriton.load(reads.at[block_rows(rows, first, block_k)])
                read += matmul(p.tile, reads_tile, S)
            out = inside + _scaled(read, read_factor, read_scale, n, row)
            pltriton.store(o.at[here], out.astype(o.dtype))
        if late:
            store_states(n, state)
        v = _scaled(v, write_factor, write_scale, n, row)
        new_state = []
        for first, S in zip(first_rows, state):
            writes_tile = pltriton.load(writes.at[block_rows(rows, first, block_k)])
            written = matmul(p.tile, writes_tile, v, trans_a=True)
            new_state.append(decayed(S, total, n, first) + written)
        return tuple(new_state)

    def start(first: int) -> Array:
        if initial is None:
            return jnp.zeros((block_k, block_v), jnp.float32)
        return load(initial, *state_tile(first))

    state = tuple(start(first) for first in first_rows)
    state = lax.fori_loop(0, chunks_in_segment, chunk, state)
    if final is not None:
        for first, S in zip(first_rows, state):
            pltriton.store(final.at[state_tile(first)], S)
    if bad is not None:
        counts = [count_bad(S) for S in state]
        bad[...] = sum(counts)


def _scaled(x: Array, factor, scale: float | None, n, row: Array) -> Array:
    """Rows times the tokens' factors, where decays are scalar, and times the scale."""
    if factor is not None:
        of_rows = pltriton.load(factor.at[n, row])
        if scale is not None:
            of_rows = of_rows * scale
        return x.astype(jnp.float32) * of_rows[:, None]
    if scale is None:
        return x
    return x.astype(jnp.float32) * scale


def decayed(S: Array, total, n, first: int) -> Array:
    """The state's rows from `first` on, decayed by the n-th chunk."""
    if total is None:
        return S
    if len(total.shape) == 1:
        return S * pltriton.load(total.at[n])
    rows = first + lax.iota(jnp.int32, S.shape[0])
    return S * pltriton.load(total.at[n, rows])[:, None]


def _cost(p: Plan, x: Chunks, arrays: list) -> pl.CostEstimate:
    """Every array moves once, as far as programs of the same head share the cache."""
    chunk_flops = 2 * p.chunk * p.K * p.V
    if x.products is not None:
        chunk_flops = 2 * chunk_flops + 2 * p.chunk**2 * p.V
    programs = x.values.shape[0] * p.H * p.chunks
    return pl.CostEstimate(programs * chunk_flops, 0, moved(arrays))


def combined(
    log_totals: Float[Array, "_ H G _"] | None,
    summaries: Float[Array, "B H G K V"],
    first: Array | None,
    last_first: bool,
) -> tuple[Float[Array, "B H G K V"], Float[Array, "B H K V"]]:
    """Joins segments that were scanned alone.

    Args:
      log_totals: the log decay of each segment.
      summaries: the state after each segment, had it begun with zeros.
      first: the state before all of them [B, H, K, V]; None for zeros.
      last_first: whether the scan goes backward.

    Returns:
      The state before each segment, and the state after all.
    """
    num_segments = summaries.shape[2]
    running = jnp.zeros_like(summaries[:, :, 0]) if first is None else first
    order = list(range(num_segments))
    if last_first:
        order.reverse()
    before = {}
    for g in order:
        before[g] = running
        if log_totals is not None:
            running = jnp.exp(log_totals[:, :, g, :, None]) * running
        running = running + summaries[:, :, g]
    in_memory = [before[g] for g in range(num_segments)]
    return jnp.stack(in_memory, 2), running
