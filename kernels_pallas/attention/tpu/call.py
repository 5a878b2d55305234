"""How the TPU kernels of `attention` are called: operands by name, tables in SMEM, costs."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.tpu.plan import KernelInputs, Plan, Schedule, TileTable
from kernels_pallas.common.cost import moved
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import padded, round_up
from kernels_pallas.common.tpu import VMEM_LIMIT, Operand, Ref, in_hbm

# kernel(tables, references by name, scratch memory)
Kernel = Callable[["Tables", dict[str, Ref], list[Ref]], None]


class SegmentBounds(NamedTuple):
    """The least and the largest segment id in every block of tokens, [B * blocks].

    Those of keys are None where keys are of the queries' tokens.
    """

    least: Array
    most: Array
    least_key: Array | None = None
    most_key: Array | None = None

    def may_share_segment(
        self,
        plan: Plan,
        schedule: Schedule,
        b: Array,
        q_block: Array,
        k_block: Array,
    ) -> Array:
        """Whether a query of one block and a key of another can be of one segment.

        Args:
          plan: the static arguments.
          schedule: that of the kernel.
          b: the row of the batch.
          q_block: the block of queries.
          k_block: the block of keys.

        Returns:
          False only if no such pair is of one segment, whatever the order of the ids.
        """
        i = b * -(-plan.T // schedule.block) + q_block
        j = b * -(-plan.S // schedule.keys) + k_block
        least_key = self.least if self.least_key is None else self.least_key
        most_key = self.most if self.most_key is None else self.most_key
        # Two ranges overlap if each begins before the other ends.
        return (self.least[i] <= most_key[j]) & (least_key[j] <= self.most[i])


class Tables(NamedTuple):
    """What a kernel reads from SMEM: arrays outside of it, references inside."""

    tiles: TileTable
    segments: SegmentBounds | None
    sink_logits: Array | None
    alibi_slopes: Array | None


def make_tables(
    tiles: TileTable,
    inputs: KernelInputs,
    schedule: Schedule,
) -> Tables:
    """The tables of a call.

    Args:
      tiles: the tiles in the order of the grid.
      inputs: the arrays of the call.
      schedule: that of the kernel.

    Returns:
      Arrays for SMEM.
    """

    def bounds(segment_ids: Array, block: int) -> tuple[Array, Array]:
        # They are a running count, which libtpu keeps as [B, T // 128, 128]. A reshape of that to
        # blocks it does not compile in every loop over micro-batches.
        segment_ids = jax.lax.optimization_barrier(segment_ids)
        padded_length = round_up(segment_ids.shape[2], block)
        ids = padded(segment_ids, 2, padded_length, mode="edge")
        # [B, blocks, block]
        blocks = ids.reshape(
            ids.shape[0],
            -1,
            block,
        )
        return blocks.min(2).reshape(-1), blocks.max(2).reshape(-1)

    segments = None
    if inputs.segment_ids is not None:
        segments = SegmentBounds(*bounds(inputs.segment_ids, schedule.block))
    if segments is not None and inputs.key_segment_ids is not None:
        least, most = bounds(inputs.key_segment_ids, schedule.keys)
        segments = segments._replace(least_key=least, most_key=most)
    return Tables(tiles, segments, inputs.sink_logits, inputs.alibi_slopes)


def without_padding(results: dict[str, Array], T: int) -> dict[str, Array]:
    """The first T tokens of every result: of [B, T, width], or of [..., T]."""
    trimmed = {}
    for name, array in results.items():
        trimmed[name] = array[:, :T] if array.ndim == 3 else array[..., :T]
    return trimmed


def call(
    plan: Plan,
    kernel: Kernel,
    tables: Tables,
    grid: tuple[int, ...],
    ins: list[Operand],
    outs: list[Operand],
    scratch: list[Any],
    name: str,
    *,
    flops: int,
    exponentials: int,
    parallel: int,
) -> dict[str, Array]:
    """Runs a kernel over a grid.

    Args:
      plan: the static arguments.
      kernel: called as kernel(tables, references by name, scratch).
      tables: what the kernel and the index maps read from SMEM.
      grid: its size along every axis.
      ins: inputs; their index maps get the grid's indices and the table of tiles.
      outs: outputs, likewise.
      scratch: memory that a kernel keeps from one grid step to the next.
      name: of the kernel, in profiles.
      flops: of matrix products.
      exponentials: how many there are.
      parallel: how many leading axes of the grid may be split over cores.

    Returns:
      The outputs by name.
    """
    # The tables are arguments of the call, one after another; the kernel gets them as they were.
    scalars, tree = jax.tree.flatten(tables)
    num_scalars = len(scalars)
    names = [operand.name for operand in (*ins, *outs)]

    def body(*refs: Ref) -> None:
        tables_in_smem = jax.tree.unflatten(tree, refs[:num_scalars])
        # Then inputs, outputs and scratch memory.
        rest = refs[num_scalars:]
        by_name = dict(zip(names, rest))
        kernel(
            tables_in_smem,
            by_name,
            list(rest[len(names) :]),
        )

    def block_spec(operand: Operand) -> pl.BlockSpec:
        def index(*indices: Any) -> tuple[Any, ...]:
            # The scalars of `PrefetchScalarGridSpec` follow the grid's indices.
            grid_indices = indices[: len(grid)]
            tables_in_smem = jax.tree.unflatten(tree, indices[len(grid) :])
            return operand.index(*grid_indices, tables_in_smem.tiles)

        return pl.BlockSpec(operand.block, index)

    # Every array once: a block that is fetched again for another tile is not counted again.
    bytes_moved = moved(operand.array for operand in (*ins, *outs))
    # The other axes carry sums from one step to the next, so their order matters.
    sequential = len(grid) - parallel
    # Only outputs are shapes without values.
    arrays = [cast(Array, operand.array) for operand in ins]
    results = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=num_scalars,
            grid=grid,
            in_specs=[block_spec(operand) for operand in ins],
            out_specs=[block_spec(operand) for operand in outs],
            scratch_shapes=scratch,
        ),
        out_shape=[operand.array for operand in outs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * sequential,
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(flops, exponentials, bytes_moved),
        interpret=plan.interpret,
        name=name,
    )(
        # Inside `shard_map` every argument must vary over the same mesh axes.
        *[varying_like(jnp.asarray(x), arrays[0]) for x in scalars],
        *[in_hbm(array, plan.interpret) for array in arrays],
    )
    return dict(zip((operand.name for operand in outs), results))
