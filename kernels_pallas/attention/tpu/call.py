"""How the TPU kernels of `attention` are called: operands by name, tables in SMEM, costs."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tpu.plan import Plan, Visits
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import padded
from kernels_pallas.common.tpu import VMEM_LIMIT, Operand, in_hbm


class SegmentTables(NamedTuple):
    """The least and the largest segment id in every block of tokens, [B * blocks]."""

    least: Array
    most: Array
    blocks: int

    def may_meet(self, b, i, j):
        """False only if no query of block i and no key of block j are of one segment."""
        i, j = b * self.blocks + i, b * self.blocks + j
        return (self.least[i] <= self.most[j]) & (self.least[j] <= self.most[i])


class Tables(NamedTuple):
    """What a kernel reads from SMEM; arrays outside, refs inside."""

    visits: Visits
    segments: SegmentTables | None
    sinks: Array | None
    slopes: Array | None


def segment_tables(
    plan: Plan, segments: Array | None, block: int, length: int
) -> SegmentTables | None:
    if not plan.segments:
        return None
    blocks = padded(segments, 2, length, mode="edge").reshape(segments.shape[0], -1, block)
    return SegmentTables(blocks.min(2).reshape(-1), blocks.max(2).reshape(-1), blocks.shape[1])


def call(
    plan: Plan,
    kernel: Callable,
    tables: Tables,
    grid: tuple[int, ...],
    ins: list[Operand],
    outs: list[Operand],
    scratch: list,
    name: str,
    *,
    flops: int,
    exponentials: int,
    parallel: int,
) -> dict[str, Array]:
    """Runs kernel(tables, refs by name, scratch) over the grid."""
    static_blocks = None if tables.segments is None else tables.segments.blocks
    arrays = (
        tables if tables.segments is None else tables._replace(segments=tuple(tables.segments[:2]))
    )
    scalars, tree = jax.tree.flatten(arrays)
    names = [o.name for o in (*ins, *outs)]

    def rebuilt(refs) -> Tables:
        found = jax.tree.unflatten(tree, refs)
        if static_blocks is None:
            return found
        return found._replace(segments=SegmentTables(*found.segments, static_blocks))

    def body(*refs):
        given, rest = refs[: len(scalars)], refs[len(scalars) :]
        kernel(rebuilt(given), dict(zip(names, rest)), list(rest[len(names) :]))

    def spec(o: Operand) -> pl.BlockSpec:
        return pl.BlockSpec(
            o.block, lambda *at: o.index(*at[: len(grid)], rebuilt(at[len(grid) :]).visits)
        )

    semantics = ("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel)
    moved = sum(o.array.size * jnp.dtype(o.array.dtype).itemsize for o in (*ins, *outs))
    scalars = [varying_like(jnp.asarray(x), ins[0].array) for x in scalars]
    results = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=grid,
            in_specs=[spec(o) for o in ins],
            out_specs=[spec(o) for o in outs],
            scratch_shapes=scratch,
        ),
        out_shape=[o.array for o in outs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(flops, exponentials, moved),
        interpret=plan.interpret,
        name=name,
    )(*scalars, *(in_hbm(o.array, plan.interpret) for o in ins))
    return dict(zip((o.name for o in outs), results))
