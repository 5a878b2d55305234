"""The two TPU kernels of `linear_scan`: what moves between HBM and VMEM, and the order of the work.

The grid walks (batch, blocks of heads, blocks of tokens); the state of a block of heads stays in VMEM scratch while its
tokens pass, and every input and output is moved once. The forward pass can leave the state before each chunk in HBM;
the backward pass walks the other way, reads those, and carries the state's cotangent. All else is recomputed.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import VMEM_LIMIT, Operand, in_hbm
from kernels_pallas.linear_scan.tpu import tile as tpu_tile
from kernels_pallas.linear_scan.tpu.plan import Inputs, Plan, Walk
from kernels_pallas.linear_scan.tpu.tile import Scored, Tile
from kernels_pallas.linear_scan.tpu.tokens import Tokens


def forward(plan: Plan, x: Inputs, save: bool) -> dict[str, Array]:
    """o [B, T, H*V]; final_state float32 [B, H, V, K] if asked for; states [B, H, chunks, V, K] if `save`."""
    walk = Walk(plan, plan.forward, backward=False)
    B = x.q.shape[0]
    ins = walk.inputs(x) + ([] if x.state is None else [walk.state("initial", x.state)])
    outs = [
        walk.tokens("o", like(x.q, (B, plan.T, plan.H * plan.V), plan.out_dtype), plan.H, plan.V)
    ]
    if plan.return_final_state:
        outs.append(walk.state("final", like(x.q, (B, plan.H, plan.V, plan.K), jnp.float32)))
    if save:
        shape = (B, plan.H, walk.steps * walk.schedule.chunks, plan.V, plan.K)
        outs.append(walk.states(like(x.q, shape, jnp.bfloat16 if plan.rounds else jnp.float32)))
    return _call(walk, _forward_kernel, ins, outs, "linear_scan_forward", B)


def backward(
    plan: Plan, x: Inputs, states: Array, do: Array, dfinal: Array | None
) -> dict[str, Array]:
    """The cotangents dq, dk, dv, ddecay, dbonus, dinitial: as the inputs, but float32 parts where heads are shared.

    dk and dv have one part for each block of query heads, dbonus [B, 1, H*K] one for each row; a scalar ddecay is that
    of the logs, [B, H, N, 1, C].
    """
    walk = Walk(plan, plan.backward, backward=True)
    p, B = plan, x.q.shape[0]
    ins = [*walk.inputs(x), walk.tokens("do", do, p.H, p.V), walk.states(states)]
    ins += [] if dfinal is None else [walk.state("dfinal", dfinal)]
    outs = [walk.tokens("dq", like(x.q, x.q.shape, x.q.dtype), p.H, p.K)]
    for name, array, heads, D in (("dk", x.k, p.Hk, p.K), ("dv", x.v, p.Hv, p.V)):
        shared = walk.group(heads) > walk.schedule.heads
        width = p.H // walk.schedule.heads * walk.slots(heads) * D
        out = like(x.q, (B, p.T, width), jnp.float32 if shared else array.dtype)
        outs.append(walk.tokens(name, out, heads, D, partial=True))
    if p.decay == "vector":
        outs.append(walk.tokens("ddecay", like(x.q, x.decay.shape, x.decay.dtype), p.H, p.K))
    elif p.decay == "scalar":
        outs.append(
            walk.sums("ddecay", like(x.q, (B, p.H, x.decay.shape[2], 1, p.chunk), jnp.float32))
        )
    if x.bonus is not None:
        outs.append(walk.bonus("dbonus", like(x.q, (B, 1, p.H * p.K), jnp.float32)))
    if x.state is not None:
        outs.append(walk.state("dinitial", like(x.q, x.state.shape, jnp.float32)))
    return _call(walk, _backward_kernel, ins, outs, "linear_scan_backward", B)


def _call(
    walk: Walk, kernel, ins: list[Operand], outs: list[Operand], name: str, B: int
) -> dict[str, Array]:
    names = [o.name for o in (*ins, *outs)]

    def body(*refs):
        kernel(walk, dict(zip(names, refs)), refs[-1])

    heads, V, K = walk.schedule.heads, walk.plan.V, walk.plan.K
    spec = lambda o: pl.BlockSpec(o.block, o.index)
    results = pl.pallas_call(
        body,
        grid=(B, walk.plan.H // heads, walk.steps),
        in_specs=[spec(o) for o in ins],
        out_specs=[spec(o) for o in outs],
        out_shape=[o.array for o in outs],
        scratch_shapes=[pltpu.VMEM((heads, V, K), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(walk, [*ins, *outs], B),
        interpret=walk.plan.interpret,
        name=name,
    )(*(in_hbm(o.array, walk.plan.interpret) for o in ins))
    return dict(zip((o.name for o in outs), results))


def _cost(walk: Walk, operands: list[Operand], B: int) -> pl.CostEstimate:
    """Every operand moves once. FLOPs as the matrix unit does them, unused halves of scores included."""
    p = walk.plan
    levels = p.chunk.bit_length() - 1 if p.decay == "vector" else 2
    scores, through_scores, through_state = levels * p.chunk * p.K, 2 * p.chunk * p.V, 2 * p.K * p.V
    forward = scores + through_scores + 2 * through_state
    backward = 3 * scores + 2 * through_scores + 5 * through_state
    tokens = B * p.H * p.T
    exponentials = {"vector": p.K, "scalar": p.chunk, "none": 0}[p.decay]
    moved = sum(o.array.size * jnp.dtype(o.array.dtype).itemsize for o in operands)
    return pl.CostEstimate(
        tokens * (backward if walk.backward else forward), tokens * exponentials, moved
    )


# --- what runs on the core


def _forward_kernel(walk: Walk, refs: dict, state_ref) -> None:
    plan, tile = walk.plan, walk.plan.tile(walk.schedule)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = refs["initial"][0] if "initial" in refs else jnp.zeros_like(state_ref)

    levels = tpu_tile.meeting_levels(plan.chunk, plan.reverse)

    def head(chunk: int, h: int):
        tokens = Tokens(walk, refs, chunk, h)
        if plan.decay == "vector":
            scored = yield from tpu_tile.vector_scores(tile, levels, *tokens.vector(levels))
        else:
            scored, *_ = yield from tokens.scalar(tile, levels)
        yield
        if "states" in refs:
            refs["states"][0, h, chunk] = state_ref[h].astype(refs["states"].dtype)
        o, state_ref[h] = tpu_tile.read_and_update(tile, scored, tokens.v, state_ref[h])
        tokens.put("o", plan.H, plan.V, o)

    for chunk in walk.chunks():
        tpu_tile.staggered([head(chunk, h) for h in range(walk.schedule.heads)], walk.schedule.lag)
    if "final" in refs:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            refs["final"][0] = state_ref[...]


def _backward_kernel(walk: Walk, refs: dict, dstate_ref) -> None:
    plan, tile = walk.plan, walk.plan.tile(walk.schedule)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = refs["dfinal"][0] if "dfinal" in refs else jnp.zeros_like(dstate_ref)
        if "dbonus" in refs:
            refs["dbonus"][...] = jnp.zeros_like(refs["dbonus"])

    levels = tpu_tile.meeting_levels(plan.chunk, plan.reverse)
    levels_back = tpu_tile.meeting_levels(plan.chunk, not plan.reverse)

    def head(chunk: int, h: int, shared: dict):
        tokens = Tokens(walk, refs, chunk, h)
        state, dstate, do = refs["states"][0, h, chunk], dstate_ref[h], tokens.do
        if plan.decay == "vector":
            scored, climbed = yield from tpu_tile.vector_climb(tile, levels, *tokens.vector(levels))
        else:
            scored, mask, read, write = yield from tokens.scalar(tile, levels)
        yield
        d = yield from tpu_tile.from_state(tile, scored, tokens.v, do, state, dstate)
        dstate_ref[h] = d.dstate
        yield
        if plan.decay == "vector":
            transposed = walk.schedule.transpose
            back = (
                jnp.transpose(d.dscores)
                if transposed
                else tpu_tile.matmul(tile, tokens.v, do, tpu_tile.NT)
            )
            dreads, dk, ddecay = yield from tpu_tile.vector_descend(
                tile,
                levels,
                levels_back,
                climbed,
                scored,
                d.dscores,
                back,
                d.dreads,
                d.dwrites,
                d.dlog_total,
            )
            dq = tokens.dq_of_reads(dreads)
            if plan.inclusive:
                ddecay += dq * tokens.q
            tokens.put("ddecay", plan.H, plan.K, ddecay)
        else:
            dmasked = d.dscores * mask
            dq = tpu_tile.matmul(tile, dmasked, tokens.k) + d.dreads * read
            dk = tpu_tile.matmul(tile, dmasked, tokens.q, tpu_tile.TN) + d.dwrites * write
            if plan.decay == "scalar":
                tokens.put_ddecay(_scalar_ddecay(tile, levels, scored, d))
        dq, dk = tokens.add_own(levels, d.dscores, dq, dk)
        tokens.put("dq", plan.H, plan.K, dq * plan.scale)
        tokens.share("dk", plan.Hk, plan.K, dk, shared)
        tokens.share("dv", plan.Hv, plan.V, d.dv, shared)

    for chunk in walk.chunks():
        shared = {}
        tpu_tile.staggered(
            [head(chunk, h, shared) for h in range(walk.schedule.heads)], walk.schedule.lag
        )
    if "dinitial" in refs:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            refs["dinitial"][0] = dstate_ref[...]


def _scalar_ddecay(tile: Tile, levels: Array, scored: Scored, d: tpu_tile.FromState) -> Array:
    """[1, C]."""
    over_keys = lambda x, dx: jnp.sum(x * dx, axis=1, keepdims=True)
    met = tpu_tile.straddling_sums(
        tile,
        levels,
        d.dscores * scored.scores,
        over_keys(scored.reads, d.dreads),
        over_keys(scored.writes, d.dwrites),
    )
    return met + jnp.sum(jnp.sum(d.dlog_total, axis=0, keepdims=True), axis=1, keepdims=True)
