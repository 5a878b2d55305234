"""The scan kernels of `delta_scan` on GPU: through the chunks, with the state in registers.

    forward    W = T (U - erases S);       o = reads S + A_q W;    S  <- total S + writes^T W
    backward   dU = T^T (A_q^T do + writes dS);  dS <- total dS + reads^T do - erases^T dU

with T = (I + A_e)^-1, in order and in reverse. The grid is (block of V, segment, head, row of the
batch): a program has a block of V of one head of one segment, and its state [K, block_v] stays in
registers while the chunks pass by. With scalar decays reads are q, erases are k or the erase keys,
and writes are k; the tokens' factors then multiply rows of what the matrix products give or take.

A segment is an affine map of the state before it, M S + N. Where segments are scanned side by side,
the first pass scans each of them twice: from zeros for N, and without values from the identity for
M. Their composition gives the state from which each segment starts in the second pass.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float

from kernels_pallas.common.gpu import Operands, kernel_call
from kernels_pallas.common.mesh import like
from kernels_pallas.delta_scan.gpu.plan import Plan
from kernels_pallas.delta_scan.gpu.tuning import scan_block_v, scan_stages, scan_warps
from kernels_pallas.linear_scan.gpu.plan import block_rows, count_bad, load
from kernels_pallas.linear_scan.gpu.scan import decayed
from kernels_pallas.linear_scan.gpu.tile import matmul
from kernels_pallas.linear_scan.gpu.tuning import block

# What a scan is for: everything, or the two parts of the map that a segment is.
Purpose = Literal["all", "from zeros", "map"]


class Chunks(NamedTuple):
    """What the scans go through.

    Attributes:
      read_scores, below: as `intra_chunk.Terms` has them.
      values: v on the way forward, the cotangent of o on the way back.
      value_weights, value_factor: `write` or beta, on the way forward.
      total: the decay of each chunk.
      read_factor, erase_factor, write_factor: of each token, with scalar decays.
      initial: the state before each segment, or its cotangent after it.
    """

    reads: Float[Array, "B T Hx K"]
    erases: Float[Array, "B T Hy K"]
    writes: Float[Array, "B T Hz K"]
    read_scores: Float[Array, "B H T C"]
    below: Float[Array, "B H T C"]
    values: Float[Array, "B T H V"]
    value_weights: Float[Array, "B T H V"] | None
    value_factor: Float[Array, "B H N C"] | None
    total: Float[Array, "B H N K"] | Float[Array, "B H N"] | None
    read_factor: Float[Array, "B Hx N C"] | None
    erase_factor: Float[Array, "B Hy N C"] | None
    write_factor: Float[Array, "B Hz N C"] | None
    initial: Float[Array, "B H G K V"] | None


# What the scans read, beside what all of them do.
_VALUES = ("values", "value_weights", "value_factor")
_READS = ("reads", "read_factor")
_NEEDLESS = {
    (False, "from zeros"): (*_READS, "read_scores", "initial"),
    (False, "map"): (*_READS, *_VALUES, "read_scores", "initial"),
    (True, "from zeros"): ("initial",),
    (True, "map"): (*_READS, *_VALUES, "read_scores", "initial"),
}


def scan(
    p: Plan,
    x: Chunks,
    out_dtype,
    *,
    backward: bool,
    save: bool,
    final: bool,
) -> dict[str, Array]:
    """The scan over all chunks, in two passes where there are several segments.

    Args:
      out_dtype: of o, or of dU.
      backward: from the last chunk to the first.
      save: whether the state before each chunk (or its cotangent after it) is returned.
      final: whether the state after all chunks (or the cotangent before them) is.

    Returns:
      out [B, T, H, V]: o or dU.
      bad [B, H, G, blocks of V]: how many elements of the last states of the segments are not
        finite: a state keeps whatever NaN or Inf went into it.
      states [B, H, N, K, V], final [B, H, K, V] float32.
    """
    if p.segments == 1:
        initial = None if x.initial is None else x.initial[:, :, None]
        out = _call(p, x._replace(initial=initial), "all", backward, out_dtype, save, final)
        if final:
            out["final"] = out["final"][:, :, 0]
        return out
    from_zeros = _call(p, x, "from zeros", backward)["final"]
    maps = _call(p, x, "map", backward)["final"]
    initial, last = combined(maps, from_zeros, x.initial, backward)
    out = _call(p, x._replace(initial=initial), "all", backward, out_dtype, save, False)
    if final:
        out["final"] = last
    return out


def combined(
    maps: Float[Array, "B H G K K"],
    from_zeros: Float[Array, "B H G K V"],
    first: Float[Array, "B H K V"] | None,
    last_first: bool,
) -> tuple[Float[Array, "B H G K V"], Float[Array, "B H K V"]]:
    """Joins segments that were scanned alone.

    Args:
      maps: what each segment makes of the state before it.
      from_zeros: the state after each segment, had it begun with zeros.
      first: the state before all of them; None for zeros.
      last_first: whether the scan goes backward.

    Returns:
      The state before each segment, and the state after all.
    """
    num_segments = maps.shape[2]
    running = jnp.zeros_like(from_zeros[:, :, 0]) if first is None else first
    # The way back comes to the last segment first.
    order = list(range(num_segments))
    if last_first:
        order.reverse()
    before = {}
    for g in order:
        before[g] = running
        # All bits: this error would be that of everything after.
        mapped = jnp.einsum("bhij,bhjv->bhiv", maps[:, :, g], running, precision="highest")
        running = mapped + from_zeros[:, :, g]
    in_memory = [before[g] for g in range(num_segments)]
    return jnp.stack(in_memory, 2), running


# --- one call of the kernel


def _call(
    p: Plan,
    x: Chunks,
    purpose: Purpose,
    backward: bool,
    out_dtype=None,
    save: bool = False,
    final: bool = True,
) -> dict[str, Array]:
    B = x.values.shape[0]
    # The states of the map have a column for each channel of K.
    columns = p.K if purpose == "map" else p.V
    block_v = scan_block_v(p.schedule, p.K, columns)
    grid = (columns // block_v, p.segments, p.H, B)
    inputs = _inputs(p, x, _NEEDLESS.get((backward, purpose), ()), block_v)
    outputs = _outputs(p, x.values, block_v, columns, out_dtype, save, final)
    stages = scan_stages(
        p.schedule,
        math.prod(grid),
        p.chunk,
        p.K,
        block_v,
        p.operand.itemsize,
    )
    chunk_flops = 2 * p.chunk * columns * (2 * p.K + p.chunk)
    if purpose == "all" or backward:
        chunk_flops += 2 * p.chunk * columns * (p.K + p.chunk)
    direction = "backward" if backward else "forward"
    suffix = "" if purpose == "all" else "_" + purpose.replace(" ", "_")
    return kernel_call(
        partial(_kernel, p, purpose, _step_back if backward else _step, backward, block_v),
        grid,
        inputs,
        outputs,
        warps=scan_warps(p.schedule, p.K),
        stages=stages,
        flops=math.prod((B, p.H, p.chunks, chunk_flops)),
        exponentials=0,
        interpret=p.interpret,
        name=f"delta_scan_{direction}{suffix}",
    )


def _inputs(p: Plan, x: Chunks, needless: Sequence[str], block_v: int) -> Operands:
    """A program's part of each array: all tokens of one head, a block of V of values and states."""

    def of_tokens(array: Array) -> pl.BlockSpec:
        group = p.group(array.shape[2])
        return pl.BlockSpec((None, p.T, None, p.K), lambda i, g, h, b: (b, 0, h // group, 0))

    def of_head(array: Array) -> pl.BlockSpec:
        group = p.group(array.shape[1])
        zeros = [0] * (array.ndim - 2)
        shape = (None, None, *array.shape[2:])
        return pl.BlockSpec(shape, lambda i, g, h, b: (b, h // group, *zeros))

    def spec(name: str, array: Array) -> pl.BlockSpec:
        if name in ("reads", "erases", "writes"):
            return of_tokens(array)
        if name in ("values", "value_weights"):
            return _values_spec(p, block_v)
        if name == "initial":
            return _state_spec(p, block_v)
        return of_head(array)

    found: Operands = {}
    for name, array in x._asdict().items():
        if array is not None and name not in needless:
            found[name] = (array, spec(name, array))
    return found


def _values_spec(p: Plan, block_v: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, p.T, None, block_v), lambda i, g, h, b: (b, 0, h, i))


def _state_spec(p: Plan, block_v: int) -> pl.BlockSpec:
    shape = (None, None, None, p.K, block_v)
    return pl.BlockSpec(shape, lambda i, g, h, b: (b, h, g, 0, i))


def _outputs(
    p: Plan,
    values: Array,
    block_v: int,
    columns: int,
    out_dtype,
    save: bool,
    final: bool,
) -> Operands:
    """The results that are wanted, each with the block that a program writes."""
    B, H = values.shape[0], p.H
    outputs: Operands = {}
    if out_dtype is not None:
        out = like(values, (B, p.T, H, p.V), out_dtype)
        outputs["out"] = (out, _values_spec(p, block_v))
        bad = like(values, (B, H, p.segments, p.V // block_v), jnp.int32)
        outputs["bad"] = (bad, pl.BlockSpec((None,) * 4, lambda i, g, h, b: (b, h, g, i)))
    if save:
        states = like(values, (B, H, p.chunks, p.K, p.V), p.operand)
        shape = (None, None, p.chunks, p.K, block_v)
        outputs["states"] = (states, pl.BlockSpec(shape, lambda i, g, h, b: (b, h, 0, 0, i)))
    if final:
        last = like(values, (B, H, p.segments, p.K, columns), jnp.float32)
        outputs["final"] = (last, _state_spec(p, block_v))
    return outputs


# --- the kernel


class _Refs(NamedTuple):
    """The references of a program; None for what this scan does not read or write."""

    erases: Any
    writes: Any
    below: Any
    reads: Any = None
    read_scores: Any = None
    values: Any = None
    value_weights: Any = None
    value_factor: Any = None
    total: Any = None
    read_factor: Any = None
    erase_factor: Any = None
    write_factor: Any = None
    initial: Any = None
    out: Any = None
    bad: Any = None
    states: Any = None
    final: Any = None


def _kernel(
    p: Plan,
    purpose: Purpose,
    step: Callable,
    backward: bool,
    block_v: int,
    **refs,
) -> None:
    """All chunks of one segment, for one head and a block of V.

    The state is a tuple of tiles [block_k, block_v], one for each block of K: Triton has no slices,
    and a product wants its operands whole.
    """
    r = _Refs(**refs)
    first_rows = _first_rows(p)
    block_k = p.K // len(first_rows)
    chunks_in_segment = p.chunks // p.segments
    segment = pl.program_id(1)

    def chunk(m, state):
        # The m-th chunk that this program comes to.
        in_order = chunks_in_segment - 1 - m if backward else m
        n = segment * chunks_in_segment + in_order
        if r.states is not None:
            for first, S in zip(first_rows, state):
                here = (n, *_state_tile(first, block_k, block_v))
                pltriton.store(r.states.at[here], S.astype(r.states.dtype))
        return step(p, r, n, state)

    def start(first: int) -> Array:
        if purpose == "map":
            # The identity, of which this program has some columns.
            row, column = _state_tile(first, block_k, block_v)
            is_one = row == column + pl.program_id(0) * block_v
            return jnp.where(is_one, 1.0, 0.0)
        if r.initial is None:
            return jnp.zeros((block_k, block_v), jnp.float32)
        return load(r.initial, *_state_tile(first, block_k, block_v))

    state = tuple(start(first) for first in first_rows)
    state = lax.fori_loop(0, chunks_in_segment, chunk, state)
    if r.final is not None:
        for first, S in zip(first_rows, state):
            pltriton.store(r.final.at[_state_tile(first, block_k, block_v)], S)
    if r.bad is not None:
        counts = [count_bad(S) for S in state]
        r.bad[...] = sum(counts[1:], counts[0])


def _first_rows(p: Plan) -> list[int]:
    """The first row of each tile of the state."""
    block_k = block(p.schedule.scan_block_k, p.K)
    return list(range(0, p.K, block_k))


def _state_tile(first: int, block_k: int, block_v: int) -> tuple[Array, Array]:
    """The index of the state's rows from `first` on."""
    return block_rows(first + lax.iota(jnp.int32, block_k), 0, block_v)


def _rows_of(p: Plan, n) -> Array:
    """The tokens of the n-th chunk."""
    return n * p.chunk + lax.iota(jnp.int32, p.chunk)


def _scaled(p: Plan, x: Array, factor, n) -> Array:
    """Rows times their tokens' factors."""
    if factor is None:
        return x
    row = lax.iota(jnp.int32, p.chunk)
    return x.astype(jnp.float32) * pltriton.load(factor.at[n, row])[:, None]


def _square(p: Plan, ref, n) -> Array:
    """The [C, C] of the n-th chunk."""
    return pltriton.load(ref.at[block_rows(_rows_of(p, n), 0, p.chunk)])


def _times_state(p: Plan, ref, n, state: tuple[Array, ...]) -> Array:
    """[C, K] from memory times the state."""
    rows = _rows_of(p, n)
    block_k, block_v = state[0].shape
    total = jnp.zeros((p.chunk, block_v), jnp.float32)
    for first, S in zip(_first_rows(p), state):
        keys = pltriton.load(ref.at[block_rows(rows, first, block_k)])
        total += matmul(p.tile, keys, S)
    return total


def _outer(p: Plan, ref, n, x: Array, first: int, block_k: int) -> Array:
    """Rows of [C, K]^T from memory times x [C, block_v]: what a block of the state receives."""
    keys = pltriton.load(ref.at[block_rows(_rows_of(p, n), first, block_k)])
    return matmul(p.tile, keys, x, trans_a=True)


def written(p: Plan, r, n, here) -> Array:
    """U, the values of a chunk times beta or `write`."""
    values = load(r.values, *here)
    if r.value_weights is not None:
        return values * load(r.value_weights, *here)
    return _scaled(p, values, r.value_factor, n)


def _step(p: Plan, r: _Refs, n, state: tuple[Array, ...]) -> tuple[Array, ...]:
    """One chunk on the way forward."""
    block_k, block_v = state[0].shape
    here = block_rows(_rows_of(p, n), 0, block_v)
    found = _scaled(p, _times_state(p, r.erases, n, state), r.erase_factor, n)
    rest = -found if r.values is None else written(p, r, n, here) - found
    # The inverse has ones on its diagonal, which are not rounded.
    changes = rest + matmul(p.tile, _square(p, r.below, n), rest)
    if r.out is not None:
        # From the state before the chunk, and from the changes of its own tokens.
        read = _scaled(p, _times_state(p, r.reads, n, state), r.read_factor, n)
        out = read + matmul(p.tile, _square(p, r.read_scores, n), changes)
        pltriton.store(r.out.at[here], out.astype(r.out.dtype))
    changes = _scaled(p, changes, r.write_factor, n)
    new_state = []
    for first, S in zip(_first_rows(p), state):
        update = _outer(p, r.writes, n, changes, first, block_k)
        new_state.append(decayed(S, r.total, n, first) + update)
    return tuple(new_state)


def _step_back(p: Plan, r: _Refs, n, state: tuple[Array, ...]) -> tuple[Array, ...]:
    """One chunk on the way back; `state` is the cotangent of the state after it."""
    block_k, block_v = state[0].shape
    here = block_rows(_rows_of(p, n), 0, block_v)
    # A change goes into the state after the chunk, and into the outputs of its own tokens.
    dchanges = _scaled(p, _times_state(p, r.writes, n, state), r.write_factor, n)
    do = None
    if r.values is not None:
        do = pltriton.load(r.values.at[here])
        dchanges += matmul(p.tile, _square(p, r.read_scores, n), do, trans_a=True)
    dwritten = dchanges + matmul(p.tile, _square(p, r.below, n), dchanges, trans_a=True)
    if r.out is not None:
        pltriton.store(r.out.at[here], dwritten.astype(r.out.dtype))
    # Rows of what the state receives: cotangents times the factors of their tokens.
    if do is not None:
        do = _scaled(p, do, r.read_factor, n)
    dwritten = _scaled(p, dwritten, r.erase_factor, n)
    new_state = []
    for first, dS in zip(_first_rows(p), state):
        # The state before the chunk is read by erase keys, with a minus, and by queries.
        update = -_outer(p, r.erases, n, dwritten, first, block_k)
        if do is not None:
            update += _outer(p, r.reads, n, do, first, block_k)
        new_state.append(decayed(dS, r.total, n, first) + update)
    return tuple(new_state)
