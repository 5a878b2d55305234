"""The backward kernel of `delta_scan` on TPU.

The grid is (B, blocks of heads, blocks of tokens), see `call.py`, with tokens in the opposite order
of the forward kernel. The cotangent of the state stays in VMEM scratch. In each chunk the kernel
reads the saved state before the chunk, recomputes the chunk's terms, makes the inverse of its
triangular system from those of the forward kernel's spans, and takes their derivative by hand. All
gradients of a chunk come from this one pass.
"""

from collections.abc import Generator
from functools import partial

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import Operand, Ref
from kernels_pallas.delta_scan.tpu import scalar_decay, tile, vector_decay_backward
from kernels_pallas.delta_scan.tpu.cost import scan_cost
from kernels_pallas.delta_scan.tpu.forward import chunk_terms, flags_output, store_flags
from kernels_pallas.delta_scan.tpu.plan import Grid, KernelInputs, Plan, Saved, grid_of
from kernels_pallas.delta_scan.tpu.tokens import Tokens
from kernels_pallas.linear_scan.tpu.backward import shared_heads_output
from kernels_pallas.linear_scan.tpu.call import call
from kernels_pallas.linear_scan.tpu.tile import interleave, merge_levels


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
      "dq", "dk", "dv", "ddecay", "derase", "dwrite" and "dinitial", those that there are, shaped as
      the inputs, but: where heads are shared, dq and dk are float32 with one part for each block of
      states. "dbeta" and "dlog", of scalar decays, are [B, H, N, 1, C]. "flags" as of the forward
      kernel, of the last dstate.
    """
    grid = grid_of(plan, plan.backward, is_backward=True)
    inputs = grid.delta_inputs(plan, x)
    # Beside the forward kernel's inputs: the cotangents, and what it saved.
    inputs.append(grid.tokens("do", do, plan.H, plan.V))
    for name, array in saved._asdict().items():
        if array is not None:
            inputs.append(grid.of_chunks(name, array))
    if dfinal is not None:
        inputs.append(grid.state("dfinal", dfinal))
    return call(
        grid,
        partial(_kernel, plan),
        inputs,
        _outputs(plan, grid, x),
        "delta_scan_backward",
        partial(scan_cost, plan, grid),
    )


def _outputs(plan: Plan, grid: Grid, x: KernelInputs) -> list[Operand]:
    B = x.q.shape[0]

    def tokens_output(name: str, array: Array, D: int) -> Operand:
        out = like(x.q, array.shape, array.dtype)
        return grid.tokens(name, out, plan.H, D)

    outputs = [
        shared_heads_output(grid, "dq", x.q, x.q, plan.Hq, plan.K),
        shared_heads_output(grid, "dk", x.k, x.q, plan.Hk, plan.K),
        tokens_output("dv", x.v, plan.V),
        flags_output(plan, grid, x),
    ]
    if x.decay is not None:
        outputs.append(tokens_output("ddecay", x.decay, plan.K))
    if x.erase is not None:
        outputs.append(tokens_output("derase", x.erase, plan.K))
    if x.write is not None:
        outputs.append(tokens_output("dwrite", x.write, plan.V))
    rows = {"dbeta": "beta" in plan.rows, "dlog": plan.decay == "scalar"}
    for name, is_wanted in rows.items():
        if is_wanted:
            assert x.rows is not None
            shape = (B, plan.H, x.rows.shape[2], 1, plan.chunk)
            outputs.append(grid.running_sums(name, like(x.q, shape, jnp.float32)))
    if x.state is not None:
        dinitial = like(x.q, x.state.shape, jnp.float32)
        outputs.append(grid.state("dinitial", dinitial))
    return outputs


def _kernel(
    plan: Plan,
    grid: Grid,
    refs: dict[str, Ref],
    dstate_ref: Ref,
) -> None:
    options = plan.tile_options(grid.schedule)

    # Step 0 is where the recurrence ended. The scratch still holds another block of heads.
    @pl.when(pl.program_id(2) == 0)
    def _():
        if "dfinal" in refs:
            dstate_ref[...] = refs["dfinal"][0]
        else:
            dstate_ref[...] = jnp.zeros_like(dstate_ref)

    # The same for all heads and chunks.
    levels = merge_levels(plan.chunk, reverse=False)
    levels_transposed = merge_levels(plan.chunk, reverse=True)

    def head(tokens: Tokens, sums: dict) -> Generator:
        chunk = tokens.chunk
        h = tokens.head
        solved = tile.Solved(
            inverses=refs["inverses"][0, h, chunk],
            read_scores=refs["scores"][0, h, chunk] if "scores" in refs else None,
        )
        terms, saved, decays = yield from chunk_terms(plan, options, levels, tokens, solved)
        yield
        inverse_matrix = yield from tile.inverse(options, terms, solved.inverses)
        yield
        # The state before the chunk, and the cotangent of the one after it.
        cotangents = yield from tile.read_and_update_backward(
            options,
            levels,
            terms,
            inverse_matrix,
            tokens.written,
            tokens.do,
            refs["states"][0, h, chunk],
            dstate_ref[h],
        )
        # The next chunk, or grid step, goes on from here.
        dstate_ref[h] = cotangents.dstate
        yield
        if plan.decay == "vector":
            dreads, derases, dk, dlog_decay = vector_decay_backward.backward(
                options,
                levels,
                levels_transposed,
                saved,
                terms,
                cotangents,
            )
            yield
            # reads = q * decay, and so the erase keys.
            dq = dreads * decays.decay
            derase = derases * decays.decay
            dlog_decay += dq * tokens.q + derase * tokens.erase
            tokens.store("ddecay", plan.H, plan.K, dlog_decay)
            # What a query reads of its own token's write is no part of the halving.
            on_diagonal = jnp.where(levels == 0, cotangents.dread_scores, 0.0)
            ddiagonal = jnp.sum(on_diagonal, axis=1, keepdims=True)
            dq = dq + ddiagonal * tokens.k
            dk = dk + ddiagonal * tokens.q
        else:
            dq, derase, dk = scalar_decay.backward(
                options,
                tokens.q,
                tokens.erase,
                tokens.k,
                decays,
                cotangents,
            )
            yield
            if plan.decay == "scalar":
                row = scalar_decay.dlog_decay(options, levels, terms, saved, cotangents)
                tokens.store_row("dlog", row)
        yield
        store_gradients(tokens, dq, derase, dk, cotangents.dwritten, sums)

    def store_gradients(
        tokens: Tokens,
        dq: Array,
        derase: Array,
        dk: Array,
        dwritten: Array,
        sums: dict,
    ) -> None:
        """From erase = -beta k and written = beta v, or weights of their own, to the inputs."""
        dweights = tokens.v * dwritten
        dbeta = jnp.zeros((plan.chunk, 1), jnp.float32)
        if "derase" in refs:
            tokens.store("derase", plan.H, plan.K, -derase)
        else:
            dk = dk + tokens.column("minus_beta") * derase
            dbeta -= jnp.sum(tokens.k * derase, axis=1, keepdims=True)
        if "dwrite" in refs:
            tokens.store("dwrite", plan.H, plan.V, dweights)
        else:
            dbeta += jnp.sum(dweights, axis=1, keepdims=True)
        if "dbeta" in refs:
            tokens.store_column("dbeta", dbeta)
        tokens.store("dv", plan.H, plan.V, tokens.write_weight * dwritten)
        tokens.store_sum("dq", plan.Hq, tokens.unnormalized_dq(dq), sums)
        tokens.store_sum("dk", plan.Hk, tokens.unnormalized_dk(dk), sums)

    for chunk in grid.chunk_order():
        # Parts of dq and dk, of states that share a query or key head.
        sums: dict = {}
        tokens = [Tokens(plan, grid, refs, chunk, h) for h in range(grid.schedule.heads)]
        Tokens.transpose_rows(tokens)
        heads = [head(tokens_of_head, sums) for tokens_of_head in tokens]
        interleave(heads, grid.schedule.lag)

    # The last step is the beginning of the recurrence.
    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        store_flags(refs, dstate_ref)
        if "dinitial" in refs:
            refs["dinitial"][0] = dstate_ref[...]
