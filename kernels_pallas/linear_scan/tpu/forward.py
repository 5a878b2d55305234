"""The forward kernel of `linear_scan` on TPU.

The grid is (B, blocks of heads, blocks of tokens), see `call.py`. In each step the kernel takes the
chunks of its block in the order of the recurrence, and the heads of a chunk interleaved. It
computes the terms of the chunk from q, k and the decays, reads the state in VMEM, and updates it.
For the backward pass it also writes the state before each chunk to HBM; all else is recomputed
there. A step whose state is not finite afterwards is taken once more, by a loop that lets NaN and
Inf reach only what sees them (`../nonfinite.py`).
"""

from collections.abc import Generator

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels_pallas.common.finite import cleaned, poisoned
from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import Ref
from kernels_pallas.linear_scan import nonfinite
from kernels_pallas.linear_scan.tpu import scalar_decay, tile, vector_decay
from kernels_pallas.linear_scan.tpu.call import call
from kernels_pallas.linear_scan.tpu.plan import Grid, KernelInputs, Plan
from kernels_pallas.linear_scan.tpu.tokens import Tokens


def forward(plan: Plan, x: KernelInputs, save: bool) -> dict[str, Array]:
    """Runs the kernel.

    Returns:
      "o" [B, T, H*V]; "final" float32 [B, H, V, K] if asked for; "states" [B, H, chunks, V, K], the
      state before each chunk, if `save`.
    """
    grid = Grid(plan, plan.forward, is_backward=False)
    B = x.q.shape[0]
    inputs = grid.inputs(x)
    if x.state is not None:
        inputs.append(grid.state("initial", x.state))

    # Shapes that vary over the mesh axes that q varies over.
    o = like(x.q, (B, plan.T, plan.H * plan.V), plan.out_dtype)
    outputs = [grid.tokens("o", o, plan.H, plan.V)]
    if plan.return_final_state:
        final_state = like(x.q, (B, plan.H, plan.V, plan.K), jnp.float32)
        outputs.append(grid.state("final", final_state))
    if save:
        num_chunks = grid.num_steps * grid.schedule.chunks
        # Where matmuls round the state anyway, half the bytes are enough.
        dtype = jnp.bfloat16 if plan.rounds else jnp.float32
        states = like(x.q, (B, plan.H, num_chunks, plan.V, plan.K), dtype)
        outputs.append(grid.states(states))
    return call(grid, _kernel, inputs, outputs, "linear_scan_forward")


def _kernel(grid: Grid, refs: dict[str, Ref], state_ref: Ref) -> None:
    plan = grid.plan
    options = plan.tile_options(grid.schedule)
    # The state before the step stays, in case the step has to be taken once more.
    # Asked for once: inside a condition the interpreter does not know it.
    step = pl.program_id(2)
    half = jax.lax.rem(step, jnp.int32(2))
    before_ref = state_ref.at[half]
    after_ref = state_ref.at[1 - half]

    # The scratch holds another block of heads' state when T begins again.
    @pl.when(step == 0)
    def _():
        if "initial" in refs:
            before_ref[...] = refs["initial"][0]
        else:
            before_ref[...] = jnp.zeros_like(before_ref)

    # The same for all heads and chunks.
    levels = tile.merge_levels(plan.chunk, plan.reverse)

    def chunk_terms(tokens: Tokens) -> Generator[None, None, tile.ChunkTerms]:
        if plan.decay == "vector":
            decays = tokens.vector_decays()
            return (
                yield from vector_decay.chunk_terms(
                    options,
                    levels,
                    decays.apply_at_reads(tokens.q),
                    tokens.k,
                    decays.decay,
                    decays.total,
                    tokens.diagonal(),
                )
            )
        factors = tokens.scalar_factors(options, levels)
        yield
        return scalar_decay.chunk_terms(
            options,
            levels,
            tokens.q,
            tokens.k,
            factors,
            tokens.scalar_diagonal(),
        )

    def head(chunk: int, h: int, from_ref: Ref) -> Generator:
        tokens = Tokens(grid, refs, step, chunk, h)
        terms = yield from chunk_terms(tokens)
        yield
        # Save the state before it is updated.
        if "states" in refs:
            refs["states"][0, h, chunk] = from_ref[h].astype(refs["states"].dtype)
        o, new_state = tile.read_and_update(
            options,
            terms,
            tokens.v,
            from_ref[h],
        )
        after_ref[h] = new_state
        if chunk == chunks[-1]:
            check.add(new_state)
        tokens.store("o", plan.H, plan.V, o)

    def head_with_nan(chunk: Array, h: Array) -> Generator:
        tokens = Tokens(grid, refs, step, chunk, h, clean=True)
        state = after_ref[h]
        if "states" in refs:
            refs["states"][0, h, chunk] = state.astype(refs["states"].dtype)
        segments = tokens.segments()
        terms = yield from chunk_terms(tokens)
        o, new_state = tile.read_and_update(
            options,
            tile.visible(terms, segments),
            tokens.v,
            cleaned(state),
        )
        is_bad = nonfinite.forward(segments, tokens.bad(state), plan.inclusive)
        after_ref[h] = poisoned(tile.column(is_bad.state) > 0, new_state)
        tokens.store("o", plan.H, plan.V, poisoned(is_bad.o > 0, o))

    from_ref = before_ref
    chunks = grid.chunk_order()
    check = tile.Check()
    for chunk in chunks:
        # One chunk after the other, as the state goes through them; heads are independent.
        heads = [head(chunk, h, from_ref) for h in range(grid.schedule.heads)]
        tile.interleave(heads, grid.schedule.lag)
        from_ref = after_ref

    # Every key, value and decay went into the state, and NaN and Inf stay there.
    total = check.total() + grid.sum_of_events(refs)

    @tile.unless_finite(total)
    def _():
        after_ref[...] = before_ref[...]
        grid.for_each_chunk_and_head(head_with_nan)

    # After the last block of tokens the state is final.
    if "final" in refs:

        @pl.when(step == pl.num_programs(2) - 1)
        def _():
            refs["final"][0] = after_ref[...]
