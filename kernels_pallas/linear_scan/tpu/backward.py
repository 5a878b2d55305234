"""The backward kernel of `linear_scan` on TPU.

The grid is (B, blocks of heads, blocks of tokens), see `call.py`, with tokens in the opposite order
of the forward kernel. The cotangent of the state stays in VMEM scratch. In each chunk the kernel
reads the saved state before the chunk, recomputes the chunk's terms from q, k and the decays, and
takes their derivative by hand. All gradients of a chunk come from this one pass. A step with
something that is not finite is taken once more, as in the forward kernel.
"""

from collections.abc import Callable, Generator

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common.finite import cleaned, poisoned
from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import Operand, Ref
from kernels_pallas.linear_scan import nonfinite
from kernels_pallas.linear_scan.tpu import (
    scalar_decay,
    tile,
    vector_decay,
    vector_decay_backward,
)
from kernels_pallas.linear_scan.tpu.call import call
from kernels_pallas.linear_scan.tpu.plan import Grid, KernelInputs, Plan
from kernels_pallas.linear_scan.tpu.tokens import Tokens

# A generator that returns dq, dk, dv, dscores and dlog_decay of one chunk of one head.
type _Head = Generator[None, None, tuple[Array, Array, Array, Array, Array | None]]


def backward(
    plan: Plan,
    x: KernelInputs,
    states: Array,
    do: Array,
    dfinal: Array | None,
) -> dict[str, Array]:
    """Runs the kernel.

    Args:
      plan: the static arguments.
      x: the inputs of the forward kernel.
      states: the state before each chunk, as the forward kernel saved it.
      do: the cotangent of o.
      dfinal: the cotangent of the final state, if that was returned.

    Returns:
      "dq", "dk", "dv", "ddecay", "dbonus" and "dinitial", those that there are, shaped as the
      inputs, but: where heads are shared, dk and dv are float32 with one part for each block of
      query heads. dbonus is [B, 1, H*K], one for each row. The "ddecay" of scalar decays is that of
      the logs, [B, H, N, 1, C].
    """
    grid = Grid(plan, plan.backward, is_backward=True)
    B = x.q.shape[0]
    inputs = grid.inputs(x)
    # Beside the forward kernel's inputs: the cotangents, and the states that it saved.
    inputs.append(grid.tokens("do", do, plan.H, plan.V))
    inputs.append(grid.states(states))
    if dfinal is not None:
        inputs.append(grid.state("dfinal", dfinal))

    dq = like(x.q, x.q.shape, x.q.dtype)
    outputs = [
        grid.tokens("dq", dq, plan.H, plan.K),
        _shared_heads_output(grid, "dk", x.k, x.q, plan.Hk, plan.K),
        _shared_heads_output(grid, "dv", x.v, x.q, plan.Hv, plan.V),
    ]
    if x.decay is not None and plan.decay == "vector":
        # A log for every channel: written like q.
        ddecay = like(x.q, x.decay.shape, x.decay.dtype)
        outputs.append(grid.tokens("ddecay", ddecay, plan.H, plan.K))
    elif x.decay is not None:
        num_chunks = x.decay.shape[2]
        ddecay = like(
            x.q,
            (B, plan.H, num_chunks, 1, plan.chunk),
            jnp.float32,
        )
        outputs.append(grid.running_sums("ddecay", ddecay))
    if x.bonus is not None:
        # Accumulated over all tokens of a row; the rows are summed outside.
        dbonus = like(x.q, (B, 1, plan.H * plan.K), jnp.float32)
        outputs.append(grid.bonus("dbonus", dbonus))
    if x.state is not None:
        dinitial = like(x.q, x.state.shape, jnp.float32)
        outputs.append(grid.state("dinitial", dinitial))
    # For a step that is taken once more.
    scratch = {
        "sum_of_dk": pltpu.VMEM((plan.chunk, plan.K), jnp.float32),
        "sum_of_dv": pltpu.VMEM((plan.chunk, plan.V), jnp.float32),
    }
    if x.bonus is not None:
        scratch["dbonus_before"] = pltpu.VMEM((1, 1, grid.schedule.heads * plan.K), jnp.float32)
    return call(
        grid,
        _kernel,
        inputs,
        outputs,
        "linear_scan_backward",
        scratch,
    )


def _shared_heads_output(
    grid: Grid,
    name: str,
    array: Array,
    q: Array,
    num_heads: int,
    D: int,
) -> Operand:
    """dk or dv: one part for each block of query heads, in float32 if parts are to be summed."""
    plan = grid.plan
    num_head_blocks = plan.H // grid.schedule.heads
    # Every block of query heads writes all the heads that it uses.
    width = num_head_blocks * grid.num_slots(num_heads) * D
    has_parts = grid.group_size(num_heads) > grid.schedule.heads
    dtype = jnp.float32 if has_parts else array.dtype
    out = like(q, (q.shape[0], plan.T, width), dtype)
    return grid.tokens(name, out, num_heads, D, is_partial=True)


def _kernel(grid: Grid, refs: dict[str, Ref], dstate_ref: Ref) -> None:
    plan = grid.plan
    options = plan.tile_options(grid.schedule)
    # As in the forward kernel: the cotangent after the step stays, in case it is taken once more.
    # Asked for once: inside a condition the interpreter does not know it.
    step = pl.program_id(2)
    half = jax.lax.rem(step, jnp.int32(2))
    before_ref = dstate_ref.at[half]
    after_ref = dstate_ref.at[1 - half]

    # Step 0 is where the recurrence ended. The scratch still holds another block of heads.
    @pl.when(step == 0)
    def _():
        if "dfinal" in refs:
            before_ref[...] = refs["dfinal"][0]
        else:
            before_ref[...] = jnp.zeros_like(before_ref)
        if "dbonus" in refs:
            refs["dbonus"][...] = jnp.zeros_like(refs["dbonus"])

    if "dbonus" in refs:
        refs["dbonus_before"][...] = refs["dbonus"][...]

    # The same for all heads and chunks.
    levels = tile.merge_levels(plan.chunk, plan.reverse)
    levels_transposed = tile.merge_levels(plan.chunk, not plan.reverse)

    def gradients(
        tokens: Tokens,
        state: Array,
        dstate: Array,
        keep_dstate: Callable[[Array], None],
        segments: nonfinite.Segments | None = None,
    ) -> Generator[None, None, tuple[Array, Array, Array, Array | None]]:
        # `segments` are given where something is not finite.
        run = vector_head if plan.decay == "vector" else scalar_head
        do = tokens.do
        dq, dk, dv, dscores, dlog_decay = yield from run(
            tokens,
            state,
            dstate,
            do,
            keep_dstate,
            segments,
        )
        # What a token reads of its own write is no part of the halving.
        dq, dk = tokens.add_diagonal_backward(levels, dscores, dq, dk)
        # Tokens.q is scaled, so its cotangent is that of q times the scale.
        return dq * plan.scale, dk, dv, dlog_decay

    def vector_head(
        tokens: Tokens,
        state: Array,
        dstate: Array,
        do: Array,
        keep_dstate: Callable[[Array], None],
        segments: nonfinite.Segments | None,
    ) -> _Head:
        # Up the halving, keeping the operands of every merge.
        decays = tokens.vector_decays()
        terms, merges = yield from vector_decay.chunk_terms_and_merges(
            options,
            levels,
            decays.apply_at_reads(tokens.q),
            tokens.k,
            decays.decay,
            decays.total,
            tokens.diagonal(),
        )
        if segments is not None:
            terms = tile.visible(terms, segments)
        yield
        cotangents = yield from tile.read_and_update_backward(
            options,
            terms,
            tokens.v,
            do,
            state,
            dstate,
            segments,
        )
        # The next chunk, or grid step, goes on from here.
        keep_dstate(cotangents.dstate)
        yield
        # Down the halving rows of dscores are used for dreads, columns for dwrites.
        if grid.schedule.transpose or segments is not None:
            dscores_transposed = jnp.transpose(cotangents.dscores)
        else:
            # (do v^T)^T = v do^T: a second matmul in place of a transposition.
            dscores_transposed = tile.matmul(options, tokens.v, do, tile.NT)
        dreads, dk, dlog_decay = yield from vector_decay_backward.backward(
            options,
            levels,
            levels_transposed,
            merges,
            terms,
            cotangents,
            dscores_transposed,
        )
        # reads = q * at_reads, so dq = dreads * at_reads.
        dq = decays.apply_at_reads(dreads)
        if plan.inclusive:
            # The token's own read sees its decay too.
            dlog_decay += dq * tokens.q
        return dq, dk, cotangents.dv, cotangents.dscores, dlog_decay

    def scalar_head(
        tokens: Tokens,
        state: Array,
        dstate: Array,
        do: Array,
        keep_dstate: Callable[[Array], None],
        segments: nonfinite.Segments | None,
    ) -> _Head:
        factors = tokens.scalar_factors(options, levels)
        yield
        terms = scalar_decay.chunk_terms(
            options,
            levels,
            tokens.q,
            tokens.k,
            factors,
            tokens.scalar_diagonal(),
        )
        if segments is not None:
            terms = tile.visible(terms, segments)
        yield
        cotangents = yield from tile.read_and_update_backward(
            options,
            terms,
            tokens.v,
            do,
            state,
            dstate,
            segments,
        )
        keep_dstate(cotangents.dstate)
        yield
        dq, dk = scalar_decay.backward(
            options,
            tokens.q,
            tokens.k,
            factors,
            cotangents,
        )
        dlog_decay = None
        if plan.decay == "scalar":
            dlog_decay = scalar_decay.dlog_decay(
                options,
                levels,
                terms,
                cotangents,
                careful=segments is not None,
            )
        return dq, dk, cotangents.dv, cotangents.dscores, dlog_decay

    def store(
        tokens: Tokens,
        dq: Array,
        dk: Array,
        dv: Array,
        dlog_decay: Array | None,
        sums: dict,
    ) -> None:
        tokens.store("dq", plan.H, plan.K, dq)
        tokens.store_sum("dk", plan.Hk, plan.K, dk, sums)
        tokens.store_sum("dv", plan.Hv, plan.V, dv, sums)
        if dlog_decay is None:
            return
        if plan.decay == "vector":
            tokens.store("ddecay", plan.H, plan.K, dlog_decay)
        else:
            tokens.store_scalar_dlog_decay(dlog_decay)

    def head(chunk: int, h: int, from_ref: Ref, sums: dict) -> Generator:
        tokens = Tokens(grid, refs, step, chunk, h)

        def keep_dstate(dstate: Array) -> None:
            after_ref[h] = dstate
            if chunk == chunks[-1]:
                check.add(dstate)

        # The state before the chunk, and the cotangent of the one after it.
        state = refs["states"][0, h, chunk]
        dq, dk, dv, dlog_decay = yield from gradients(
            tokens,
            state,
            from_ref[h],
            keep_dstate,
        )
        store(tokens, dq, dk, dv, dlog_decay, sums)
        # Queries, cotangents and decays go into dstate and stay there; keys and values into dq, or
        # only into the decays' gradient.
        check.add(dq)
        if plan.decay == "scalar" and dlog_decay is not None:
            check_of_decays.add(dlog_decay)

    def head_with_nan(chunk: Array, h: Array) -> Generator:
        tokens = Tokens(grid, refs, step, chunk, h, clean=True)
        state = refs["states"][0, h, chunk]
        dstate = after_ref[h]
        segments = tokens.segments()
        bad = tokens.bad_with_cotangents(state, dstate)
        is_bad = nonfinite.backward(segments, bad, plan.inclusive)

        def keep_dstate(new_dstate: Array) -> None:
            after_ref[h] = poisoned(tile.column(is_bad.dstate) > 0, new_dstate)

        dq, dk, dv, dlog_decay = yield from gradients(
            tokens,
            cleaned(state),
            cleaned(dstate),
            keep_dstate,
            segments,
        )
        dq = poisoned(is_bad.dq > 0, dq)
        dk = poisoned(is_bad.dk > 0, dk)
        dv = poisoned(is_bad.dv > 0, dv)
        if dlog_decay is not None and plan.decay == "vector":
            dlog_decay = poisoned(is_bad.dlog_decay > 0, dlog_decay)
        elif dlog_decay is not None:
            dlog_decay = poisoned(tile.row(is_bad.dlog_decay) > 0, dlog_decay)
        store(tokens, dq, dk, dv, dlog_decay, {})
        if "dbonus" in refs:
            tokens.poison_dbonus(is_bad.dbonus)

    from_ref = before_ref
    chunks = grid.chunk_order()
    check = tile.Check()
    check_of_decays = tile.Check()
    for chunk in chunks:
        # Parts of dk and dv, of query heads that share a key or value head.
        sums: dict = {}
        heads = [head(chunk, h, from_ref, sums) for h in range(grid.schedule.heads)]
        tile.interleave(heads, grid.schedule.lag)
        from_ref = after_ref

    total = check.total() + check_of_decays.total() + grid.sum_of_events(refs)

    @tile.unless_finite(total)
    def _():
        after_ref[...] = before_ref[...]
        if "dbonus" in refs:
            refs["dbonus"][...] = refs["dbonus_before"][...]
        grid.for_each_chunk_and_head(head_with_nan)

    # The last step is the beginning of the recurrence.
    if "dinitial" in refs:

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            refs["dinitial"][0] = after_ref[...]
