"""How the GPU kernels of `attention` are called, and how a program finds its data.

The grid of every kernel is (blocks, heads, batch). A program's block specification is a whole
sequence of its head, which costs nothing on a GPU: it is a pointer. The program then loads the
blocks that it wants.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.attention.gpu.plan import Plan, Ref, segment_spans
from kernels_pallas.attention.gpu.tuning import KernelConfig
from kernels_pallas.attention.kernels import Shaped
from kernels_pallas.common.cost import moved

# kernel(references by name)
Kernel = Callable[[dict[str, Ref]], None]


class Operand(NamedTuple):
    """One array of a kernel, and which part of it a program sees."""

    array: Shaped
    # None in its block shape is an axis that the program does not see.
    spec: pl.BlockSpec


# --- operands. Grid indices: n block, h head, b row of the batch.


def by_head(
    plan: Plan,
    array: Shaped,
    heads_per_key_head: int = 1,
) -> Operand:
    """Of [B, T, heads, width]: all tokens of a program's head.

    Args:
      plan: the static arguments.
      array: the whole array.
      heads_per_key_head: so many heads of the grid use one head of the array.

    Returns:
      [T, width] to the program.
    """
    width = array.shape[3]

    def index(n: Array, h: Array, b: Array) -> tuple:
        # Consecutive query heads share a key head.
        head = h if heads_per_key_head == 1 else h // heads_per_key_head
        return b, 0, head, 0

    return Operand(array, pl.BlockSpec((None, plan.length, None, width), index))


def number_by_head(plan: Plan, array: Shaped) -> Operand:
    """Of [B, H, T]: a number for every token, of a program's head."""

    def index(n: Array, h: Array, b: Array) -> tuple:
        return b, h, 0

    return Operand(array, pl.BlockSpec((None, None, plan.length), index))


def by_row(array: Array) -> Operand:
    """Of [B, ...]: all of a program's row of the batch."""
    other_axes = array.ndim - 1

    def index(n: Array, h: Array, b: Array) -> tuple:
        return b, *[0] * other_axes

    return Operand(array, pl.BlockSpec((None, *array.shape[1:]), index))


def whole(array: Array) -> Operand:
    """All of it, for every program."""

    def index(n: Array, h: Array, b: Array) -> tuple:
        return (0,) * array.ndim

    return Operand(array, pl.BlockSpec(array.shape, index))


def segment_operands(
    segment_ids: Array | None,
    block: int,
    other_block: int,
) -> dict[str, Operand]:
    """The ids of a program's row, and the spans of blocks that share a segment; {} without ids."""
    if segment_ids is None:
        return {}
    spans = segment_spans(segment_ids, block, other_block)
    return {"segments": by_row(segment_ids), "spans": by_row(spans)}


# --- inside a kernel


def block_positions(n: Array, block: int) -> Array:
    """The positions of the tokens of block n, [block]."""
    return n * block + lax.iota(jnp.int32, block)


def load(ref: Ref, rows: Array, width: int) -> Array:
    """Some rows of [T, width]."""
    # Triton loads from a pointer for each element: [rows, 1] and [1, width] broadcast.
    columns = lax.iota(jnp.int32, width)
    return pltriton.load(ref.at[rows[:, None], columns[None, :]])


def store(ref: Ref, rows: Array, x: Array) -> None:
    """Writes some rows of [T, width], in the dtype of the reference."""
    columns = lax.iota(jnp.int32, x.shape[1])
    pltriton.store(
        ref.at[rows[:, None], columns[None, :]],
        x.astype(ref.dtype),
    )


def load_segments(refs: dict[str, Ref], positions: Array) -> Array | None:
    """The segment ids of some tokens; None without segments."""
    if "segments" not in refs:
        return None
    return pltriton.load(refs["segments"].at[positions])


# --- the call


def call(
    plan: Plan,
    kernel: Kernel,
    config: KernelConfig,
    grid: tuple[int, int, int],
    ins: dict[str, Operand],
    outs: dict[str, Operand],
    name: str,
    *,
    flops: int,
    exponentials: int,
) -> dict[str, Array]:
    """Runs a kernel over a grid.

    Args:
      plan: the static arguments.
      kernel: called as kernel(references by name).
      config: its warps and stages.
      grid: (blocks, heads, batch).
      ins: inputs by name.
      outs: outputs by name.
      name: of the kernel, in profiles.
      flops: of matrix products.
      exponentials: how many there are.

    Returns:
      The outputs by name.
    """
    names = [*ins, *outs]
    arrays = [operand.array for operand in ins.values()]
    results = [operand.array for operand in outs.values()]

    # Pallas passes references by position; the kernels want them by name, for some are optional.
    def body(*refs: Ref) -> None:
        kernel(dict(zip(names, refs)))

    computed = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[operand.spec for operand in ins.values()],
        out_specs=[operand.spec for operand in outs.values()],
        out_shape=results,
        # Without these parameters jax would choose another lowering than Triton.
        compiler_params=pltriton.CompilerParams(
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        ),
        cost_estimate=pl.CostEstimate(flops, exponentials, moved([*arrays, *results])),
        interpret=plan.interpret,
        name=name,
    )(*arrays)
    return dict(zip(outs, computed))
