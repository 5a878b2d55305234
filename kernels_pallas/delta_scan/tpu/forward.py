"""The forward kernel of `delta_scan` on TPU.

The grid is (B, blocks of heads, blocks of tokens), see `call.py`. In each step the kernel takes the
chunks of its block in order, and the heads of a chunk interleaved. It computes the terms of the
chunk and the inverses of its triangular systems, one for each span of 64 tokens, reads the state in
VMEM, and updates it, once a span. For the backward pass it also writes to HBM the state before each
chunk, the inverses, and the scores of vector decays; all else is recomputed there.
"""

from collections.abc import Generator
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import Operand, Ref
from kernels_pallas.delta_scan.tpu import scalar_decay, strided, strided_halving, tile, vector_decay
from kernels_pallas.delta_scan.tpu.cost import scan_cost
from kernels_pallas.delta_scan.tpu.plan import Grid, KernelInputs, Plan, grid_of
from kernels_pallas.delta_scan.tpu.strided import StridedTokens
from kernels_pallas.delta_scan.tpu.tokens import Tokens
from kernels_pallas.linear_scan.tpu.call import call
from kernels_pallas.linear_scan.tpu.tile import TileOptions, interleave, merge_levels


def forward(plan: Plan, x: KernelInputs, save: bool) -> dict[str, Array]:
    """Runs the kernel.

    Returns:
      "o" [B, T, H*V]; "flags" float32 [B, blocks of heads, 8, 128], not 0 where the final state has
      a number that is not finite; "final" float32 [B, H, V, K] if asked for; if `save`, "states",
      "inverses" and "scores" of `Saved`.
    """
    grid = grid_of(plan, plan.forward, is_backward=False)
    B = x.q.shape[0]
    inputs = grid.delta_inputs(plan, x)
    if x.state is not None:
        inputs.append(grid.state("initial", x.state))

    # Shapes that vary over the mesh axes that q varies over.
    o = like(x.q, (B, plan.T, plan.H * plan.V), plan.out_dtype)
    outputs = [grid.tokens("o", o, plan.H, plan.V), flags_output(plan, grid, x)]
    if plan.return_final_state:
        final_state = like(x.q, (B, plan.H, plan.V, plan.K), jnp.float32)
        outputs.append(grid.state("final", final_state))
    if save:
        num_chunks = grid.num_steps * grid.schedule.chunks
        # Where matmuls round the state anyway, half the bytes are enough.
        rounded = jnp.bfloat16 if plan.rounds else jnp.float32
        # The inverses go into larger ones, which is where rounding would be seen.
        saved = {
            "states": (plan.V, plan.K, rounded),
            "inverses": (plan.chunk // plan.forward_spans, plan.chunk, jnp.float32),
        }
        if plan.decay == "vector":
            saved["scores"] = (plan.chunk, plan.chunk, rounded)
        for name, (rows, columns, dtype) in saved.items():
            shape = (B, plan.H, num_chunks, rows, columns)
            outputs.append(grid.of_chunks(name, like(x.q, shape, dtype)))
    scratch = []
    if _is_strided(plan):
        shape = strided.scratch_shape(grid.schedule.heads, plan.K)
        scratch.append(pltpu.VMEM(shape, jnp.float32))
    return call(
        grid,
        partial(_kernel, plan),
        inputs,
        outputs,
        "delta_scan_forward",
        partial(scan_cost, plan, grid),
        scratch,
    )


def flags_output(plan: Plan, grid: Grid, x: KernelInputs) -> Operand:
    """One register for each block of heads: whether its last state is finite."""
    shape = (x.q.shape[0], plan.H // grid.schedule.heads, 8, 128)
    return grid.flags(like(x.q, shape, jnp.float32))


def store_flags(refs: dict[str, Ref], state_ref: Ref) -> None:
    """Writes 1 to "flags" if a state is not finite, else 0.

    Whatever goes into a state and is not finite stays there, so the last state tells of all tokens.
    """
    state = state_ref[...]
    # NaN compares as false.
    is_bad = jnp.where(jnp.abs(state) < jnp.inf, 0.0, 1.0)
    refs["flags"][...] = jnp.full((1, 1, 8, 128), jnp.max(is_bad))


def chunk_terms(
    plan: Plan,
    options: TileOptions,
    levels: Array,
    tokens: Tokens,
    solved: tile.Solved | None = None,
) -> Generator[None, None, tuple[tile.ChunkTerms, Any, Any]]:
    """The terms of a chunk, by the kind of decay, with what their derivative needs.

    Args:
      plan, options: the static arguments.
      levels: of `merge_levels`.
      tokens: of the chunk.
      solved: what is known already.

    Returns:
      (terms, merges of a vector decay or erase scores of a scalar one, decays or factors): a
      generator.
    """
    if plan.decay == "vector":
        decays = tokens.vector_decays()
        (total,) = decays.totals
        terms, merges = yield from vector_decay.chunk_terms(
            options,
            levels,
            tokens.q * decays.decay,
            tokens.erase * decays.decay,
            tokens.k,
            decays.decay,
            total,
            tokens.diagonal(),
            solved,
        )
        return terms, merges, decays
    yield
    factors = tokens.scalar_factors(levels)
    yield
    terms, erase_scores = yield from scalar_decay.chunk_terms(
        options,
        levels,
        tokens.q,
        tokens.erase,
        tokens.k,
        factors,
        solved,
    )
    return terms, erase_scores, factors


def _is_strided(plan: Plan) -> bool:
    """Whether the halving takes tokens in the order of `strided.py`."""
    return plan.decay == "vector" and plan.chunk == strided.CHUNK


def _kernel(
    plan: Plan,
    grid: Grid,
    refs: dict[str, Ref],
    state_ref: Ref,
    *scratch_refs: Ref,
) -> None:
    options = plan.tile_options(grid.schedule)
    num_spans = plan.forward_spans

    # The scratch holds another block of heads' state when T begins again.
    @pl.when(pl.program_id(2) == 0)
    def _():
        if "initial" in refs:
            state_ref[...] = refs["initial"][0]
        else:
            state_ref[...] = jnp.zeros_like(state_ref)

    # The same for all heads and chunks.
    levels = merge_levels(plan.chunk, reverse=False)

    def head(tokens: Tokens, strided_tokens: StridedTokens | None) -> Generator:
        chunk = tokens.chunk
        h = tokens.head
        if strided_tokens is not None:
            decays = strided_tokens.vector_decays()
            terms = yield from strided_halving.chunk_terms(
                options,
                strided_tokens.q * decays.decay,
                strided_tokens.erase * decays.decay,
                strided_tokens.k,
                decays.decay,
                decays.totals,
                strided_tokens.diagonal(),
                scratch_refs[0],
                h,
            )
        else:
            terms, _, _ = yield from chunk_terms(plan, options, levels, tokens)
        yield
        inverses = yield from tile.inverse(options, terms)
        yield
        # Save the state before it is updated.
        if "states" in refs:
            refs["states"][0, h, chunk] = state_ref[h].astype(refs["states"].dtype)
            refs["inverses"][0, h, chunk] = inverses
        if "scores" in refs:
            refs["scores"][0, h, chunk] = terms.read_scores.astype(refs["scores"].dtype)
        o, new_state = yield from tile.read_and_update(
            options,
            terms,
            inverses,
            lambda: tokens.written,
            state_ref[h],
        )
        state_ref[h] = new_state
        tokens.store("o", plan.H, plan.V, o)

    for chunk in grid.chunk_order():
        # One chunk after the other, as the state goes through them; heads are independent.
        block = range(grid.schedule.heads)
        tokens = [Tokens(plan, grid, refs, chunk, h, num_spans) for h in block]
        Tokens.transpose_rows(tokens)
        strided_tokens: list[StridedTokens] | list[None] = [None] * len(tokens)
        if _is_strided(plan):
            strided_tokens = [
                StridedTokens(plan, grid, refs, chunk, h, num_spans, scratch_refs[0]) for h in block
            ]
            StridedTokens.transpose_rows(strided_tokens)
        interleave(list(map(head, tokens, strided_tokens)), grid.schedule.lag)

    # After the last block of tokens the state is final.
    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        store_flags(refs, state_ref)
        if "final" in refs:
            refs["final"][0] = state_ref[...]
