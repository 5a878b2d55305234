"""The backward kernel of `linear_scan` on TPU.

The grid is (B, blocks of heads, blocks of tokens), see `call.py`, with tokens in the opposite order
of the forward kernel. The cotangent of the state stays in VMEM scratch. In each chunk the kernel
reads the saved state before the chunk, recomputes the chunk's terms from q, k and the decays (but
for scores that were saved), and takes their derivative by hand. All gradients of a chunk come from
this one pass. A "check" tells of NaN and Inf, as in the forward kernel.
"""

from collections.abc import Generator
from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import Operand, Ref
from kernels_pallas.linear_scan.tpu import (
    scalar_decay,
    tile,
    vector_decay,
    vector_decay_backward,
)
from kernels_pallas.linear_scan.tpu.call import call, scan_cost
from kernels_pallas.linear_scan.tpu.plan import Grid, KernelInputs, Plan, Saved
from kernels_pallas.linear_scan.tpu.tokens import Tokens

# A generator that returns dq, dk, dv and dscores of one chunk of one head.
type _Head = Generator[None, None, tuple[Array, Array, Array, Array]]


def backward(
    plan: Plan,
    x: KernelInputs,
    saved: Saved,
    do: Array,
    dfinal: Array | None,
) -> dict[str, Array]:
    """Runs the kernel.

    Args:
      plan: the static arguments.
      x: the inputs of the forward kernel.
      saved: by the forward kernel.
      do: the cotangent of o.
      dfinal: the cotangent of the final state, if that was returned.

    Returns:
      "dq", "dk", "dv", "ddecay", "dbonus" and "dinitial", those that there are, shaped as the
      inputs, and "check", see `Grid.check`. But: where heads are shared, dk and dv are float32 with
      one part for each block of query heads. dbonus is [B, 1, H*K], one for each row. The "ddecay"
      of scalar decays is that of the logs, [B, H, N, 1, C].
    """
    grid = Grid(plan, plan.backward, is_backward=True)
    B = x.q.shape[0]
    inputs = grid.inputs(x)
    # Beside the forward kernel's inputs: the cotangents, and what it saved.
    inputs.append(grid.tokens("do", do, plan.H, plan.V))
    inputs.append(grid.of_chunks("states", saved.states))
    if saved.scores is not None:
        inputs.append(grid.of_chunks("scores", saved.scores))
    if dfinal is not None:
        inputs.append(grid.state("dfinal", dfinal))

    dq = like(x.q, x.q.shape, x.q.dtype)
    outputs = [
        grid.tokens("dq", dq, plan.H, plan.K),
        shared_heads_output(grid, "dk", x.k, x.q, plan.Hk, plan.K),
        shared_heads_output(grid, "dv", x.v, x.q, plan.Hv, plan.V),
        grid.check(x),
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
    cost = partial(scan_cost, grid)
    return call(grid, _kernel, inputs, outputs, "linear_scan_backward", cost)


def shared_heads_output(
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
    check_ref = refs["check"].at[0, 0]

    # Step 0 is where the recurrence ended. The scratch still holds another block of heads.
    @pl.when(pl.program_id(2) == 0)
    def _():
        if "dfinal" in refs:
            dstate_ref[...] = refs["dfinal"][0]
        else:
            dstate_ref[...] = jnp.zeros_like(dstate_ref)
        if "dbonus" in refs:
            refs["dbonus"][...] = jnp.zeros_like(refs["dbonus"])
        check_ref[...] = jnp.zeros_like(check_ref)

    # The same for all heads and chunks.
    levels = tile.merge_levels(plan.chunk, plan.reverse)
    # Row j, column i.
    transposed_levels = tile.merge_levels(plan.chunk, not plan.reverse)
    bits = vector_decay_backward.pair_bits(options, plan.chunk)

    def head(chunk: int, h: int, sums: dict) -> Generator:
        tokens = Tokens(grid, refs, chunk, h)
        # The state before the chunk, and the cotangent of the one after it.
        state = refs["states"][0, h, chunk]
        dstate = dstate_ref[h]
        do = tokens.do
        run = vector_head if plan.decay == "vector" else scalar_head
        dq, dk, dv, dscores = yield from run(tokens, h, state, dstate, do)
        # What a token reads of its own write is no part of the halving.
        dq, dk = tokens.add_diagonal_backward(levels, dscores, dq, dk)
        if plan.decay == "none" or not plan.inclusive:
            # What no log sees: without decay a later token, else the first token's read.
            check.add(dq)
        # Tokens.q is scaled, so its cotangent is that of q times the scale.
        tokens.store("dq", plan.H, plan.K, dq * plan.scale)
        tokens.store_sum("dk", plan.Hk, plan.K, dk, sums)
        tokens.store_sum("dv", plan.Hv, plan.V, dv, sums)

    def vector_head(
        tokens: Tokens,
        h: int,
        state: Array,
        dstate: Array,
        do: Array,
    ) -> _Head:
        # Up the halving, keeping the operands of every merge.
        decays = tokens.vector_decays()
        halving = yield from vector_decay.halve_and_keep(
            options,
            decays.apply_at_reads(tokens.q),
            tokens.k,
            decays.decay,
        )
        scores = tokens.saved_scores
        # Made again they come as the values' cotangents need them. To save them so is no faster.
        is_transposed = scores is None
        if scores is None:
            scores = yield from vector_decay.transposed_scores(
                options,
                transposed_levels,
                halving.merges,
                tokens.diagonal(),
            )
        terms = tile.ChunkTerms(scores, halving.reads, halving.writes, decays.total)
        yield
        # v, do and the saved state come in bfloat16, and stay so for the matrix unit.
        cotangents = yield from tile.read_and_update_backward(
            options.rounded_early(),
            terms,
            tokens.v,
            do,
            state,
            dstate,
            is_transposed,
        )
        # The next chunk, or grid step, goes on from here.
        dstate_ref[h] = cotangents.dstate
        yield
        # Down the halving rows of dscores are used for dreads, columns for dwrites.
        if grid.schedule.transpose:
            dscores_transposed = jnp.transpose(cotangents.dscores)
        else:
            # (do v^T)^T = v do^T: a second matmul in place of a transposition.
            dscores_transposed = tile.matmul(options, tokens.v, do, tile.NT)
        dreads, dk, dlog_decay = yield from vector_decay_backward.backward(
            options,
            bits,
            halving.merges,
            cotangents,
            dscores_transposed,
        )
        # reads = q * at_reads, so dq = dreads * at_reads.
        dq = decays.apply_at_reads(dreads)
        if plan.inclusive:
            # The token's own read sees its decay too.
            dlog_decay += dq * tokens.q
        tokens.store("ddecay", plan.H, plan.K, dlog_decay)
        # Everything that a decay of 0 hides is multiplied by 0 on its way to the logs: cotangents
        # of reads, writes and states that overflowed are NaN here.
        check.add(dlog_decay)
        return dq, dk, cotangents.dv, cotangents.dscores

    def scalar_head(
        tokens: Tokens,
        h: int,
        state: Array,
        dstate: Array,
        do: Array,
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
        yield
        cotangents = yield from tile.read_and_update_backward(
            options,
            terms,
            tokens.v,
            do,
            state,
            dstate,
        )
        dstate_ref[h] = cotangents.dstate
        yield
        dq, dk = scalar_decay.backward(
            options,
            tokens.q,
            tokens.k,
            factors,
            cotangents,
        )
        if plan.decay == "scalar":
            row = scalar_decay.dlog_decay(options, levels, terms, cotangents)
            tokens.store_scalar_dlog_decay(row)
            # As in `vector_head`.
            check.add(row)
        return dq, dk, cotangents.dv, cotangents.dscores

    check = tile.Check()
    heads = []
    for chunk in grid.chunk_order():
        # Parts of dk and dv, of query heads that share a key or value head.
        sums: dict = {}
        heads += [head(chunk, h, sums) for h in range(grid.schedule.heads)]
    tile.interleave(heads, grid.schedule.lag, grid.schedule.heads)
    check.add_to(check_ref)

    # The last step is the beginning of the recurrence. Every query, cotangent and decay went into
    # the state's cotangent, and what is not finite stays there.
    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        check_of_dstate = tile.Check()
        for h in range(grid.schedule.heads):
            check_of_dstate.add(dstate_ref[h])
        check_of_dstate.add_to(check_ref)
        if "dinitial" in refs:
            refs["dinitial"][0] = dstate_ref[...]
