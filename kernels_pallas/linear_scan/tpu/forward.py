"""The forward kernel of `linear_scan` on TPU.

The grid is (B, blocks of heads, blocks of tokens), see `call.py`. In each step the kernel takes the
chunks of its block in the order of the recurrence, and the heads of a chunk interleaved. It
computes the terms of the chunk from q, k and the decays, reads the state in VMEM, and updates it.
For the backward pass it also writes the state before each chunk to HBM, and on some chips the
scores of vector decays; all else is recomputed there. NaN and Inf are multiplied like all else, and
spread to tokens that do not see them: the output "check" tells, and `again.py` sees to it.
"""

from collections.abc import Generator
from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import LANES, Ref
from kernels_pallas.linear_scan.tpu import scalar_decay, tile, vector_decay
from kernels_pallas.linear_scan.tpu.call import call, scan_cost
from kernels_pallas.linear_scan.tpu.plan import Grid, KernelInputs, Plan
from kernels_pallas.linear_scan.tpu.tokens import Tokens


def forward(plan: Plan, x: KernelInputs, save: bool) -> dict[str, Array]:
    """Runs the kernel.

    Returns:
      "o" [B, T, H*V]; "final" float32 [B, H, V, K] if asked for; "states" [B, H, chunks, V, K], the
      state before each chunk, and "scores" of `Plan.saves_scores`, if `save`; "check", see
      `Grid.check`.
    """
    grid = Grid(plan, plan.forward, is_backward=False)
    B = x.q.shape[0]
    inputs = grid.inputs(x)
    if x.state is not None:
        inputs.append(grid.state("initial", x.state))

    # Shapes that vary over the mesh axes that q varies over.
    o = like(x.q, (B, plan.T, plan.H * plan.V), plan.out_dtype)
    outputs = [grid.tokens("o", o, plan.H, plan.V), grid.check(x)]
    if plan.return_final_state:
        final_state = like(x.q, (B, plan.H, plan.V, plan.K), jnp.float32)
        outputs.append(grid.state("final", final_state))
    if save:
        num_chunks = grid.num_steps * grid.schedule.chunks
        # Where matmuls round the state anyway, half the bytes are enough.
        dtype = jnp.bfloat16 if plan.rounds else jnp.float32
        states = like(x.q, (B, plan.H, num_chunks, plan.V, plan.K), dtype)
        outputs.append(grid.of_chunks("states", states))
        if plan.saves_scores:
            shape = (B, plan.H, num_chunks, plan.chunk, plan.chunk)
            outputs.append(grid.of_chunks("scores", like(x.q, shape, jnp.bfloat16)))
    cost = partial(scan_cost, grid)
    return call(grid, _kernel, inputs, outputs, "linear_scan_forward", cost)


def _kernel(grid: Grid, refs: dict[str, Ref], state_ref: Ref) -> None:
    plan = grid.plan
    options = plan.tile_options(grid.schedule)

    check_ref = refs["check"].at[0, 0]

    # The scratch holds another block of heads' state when T begins again.
    @pl.when(pl.program_id(2) == 0)
    def _():
        if "initial" in refs:
            state_ref[...] = refs["initial"][0]
        else:
            state_ref[...] = jnp.zeros_like(state_ref)
        check_ref[...] = jnp.zeros_like(check_ref)

    # The same for all heads and chunks.
    levels = tile.merge_levels(plan.chunk, plan.reverse)

    def head(chunk: int, h: int) -> Generator:
        tokens = Tokens(grid, refs, chunk, h)
        if plan.decay == "vector":
            decays = tokens.vector_decays()
            terms = yield from vector_decay.chunk_terms(
                options,
                levels,
                decays.apply_at_reads(tokens.q),
                tokens.k,
                decays.decay,
                decays.total,
                tokens.diagonal(),
            )
        else:
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
        # Save the state before it is updated.
        if "states" in refs:
            refs["states"][0, h, chunk] = state_ref[h].astype(refs["states"].dtype)
        if "scores" in refs:
            refs["scores"][0, h, chunk] = terms.scores.astype(refs["scores"].dtype)
        o, new_state = tile.read_and_update(
            options,
            terms,
            tokens.v,
            state_ref[h],
        )
        state_ref[h] = new_state
        tokens.store("o", plan.H, plan.V, o)
        if plan.decay != "vector":
            # A product of tokens that do not see each other may overflow, and is multiplied by 0
            # only then. Vector decays multiply the queries first.
            check.add(o[:, :LANES])

    check = tile.Check()
    for chunk in grid.chunk_order():
        # One chunk after the other, as the state goes through them; heads are independent.
        heads = [head(chunk, h) for h in range(grid.schedule.heads)]
        tile.interleave(heads, grid.schedule.lag)

    check.add_to(check_ref)

    # After the last block of tokens the state is final. Every key, value and decay went into it,
    # and what is not finite stays there: a reset multiplies it by 0.
    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        check_of_state = tile.Check()
        for h in range(grid.schedule.heads):
            check_of_state.add(state_ref[h])
        check_of_state.add_to(check_ref)
        if "final" in refs:
            refs["final"][0] = state_ref[...]
