"""The `pallas_call` of the TPU kernels of `linear_scan` and of `delta_scan`.

The grid is (B, blocks of heads, blocks of tokens). The state of a block of heads (in the backward
kernel its cotangent) stays in VMEM scratch while its tokens pass; every input and output moves
between HBM and VMEM once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common.cost import moved
from kernels_pallas.common.tpu import VMEM_LIMIT, Operand, in_hbm
from kernels_pallas.linear_scan.tpu.plan import Grid


def call(
    grid: Grid,
    kernel: Callable,
    inputs: list[Operand],
    outputs: list[Operand],
    name: str,
    cost: Callable[[list[Operand]], pl.CostEstimate],
    scratch: Sequence[Any] = (),
) -> dict[str, Array]:
    """Runs a kernel.

    Args:
      grid: of the kernel.
      kernel: called as kernel(grid, refs, state_ref) in each grid step: the blocks by name, and the
        scratch [heads, V, K] that lives through all steps along T.
      inputs: arrays.
      outputs: shapes.
      name: of the kernel in a profile.
      cost: what it costs, from all of its operands.
      scratch: more memory for the kernel, whose references follow state_ref.

    Returns:
      The outputs by name.
    """
    plan = grid.plan
    heads = grid.schedule.heads
    B = inputs[0].array.shape[0]
    operand_names = [operand.name for operand in (*inputs, *outputs)]

    def body(*refs):
        # Inputs, outputs, then the scratch.
        operand_refs = refs[: len(operand_names)]
        scratch_refs = refs[len(operand_names) :]
        kernel(grid, dict(zip(operand_names, operand_refs)), *scratch_refs)

    def spec(operand: Operand) -> pl.BlockSpec:
        return pl.BlockSpec(operand.block, operand.index)

    def input_array(operand: Operand) -> Array:
        # Only outputs are mere shapes.
        assert isinstance(operand.array, Array)
        return in_hbm(operand.array, plan.interpret)

    compiler_params = pltpu.CompilerParams(
        # The state goes from one step along T to the next, so these steps stay in order.
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=VMEM_LIMIT,
    )
    run = pl.pallas_call(
        body,
        grid=(B, plan.H // heads, grid.num_steps),
        in_specs=[spec(operand) for operand in inputs],
        out_specs=[spec(operand) for operand in outputs],
        out_shape=[operand.array for operand in outputs],
        scratch_shapes=[pltpu.VMEM((heads, plan.V, plan.K), jnp.float32), *scratch],
        compiler_params=compiler_params,
        cost_estimate=cost([*inputs, *outputs]),
        interpret=plan.interpret,
        name=name,
    )
    results = run(*(input_array(operand) for operand in inputs))
    output_names = [operand.name for operand in outputs]
    return dict(zip(output_names, results))


def scan_cost(grid: Grid, operands: list[Operand]) -> pl.CostEstimate:
    """Of a kernel of `linear_scan`, whose operands all move once.

    FLOPs as the matrix unit does them, unused scores included.
    """
    plan = grid.plan
    C = plan.chunk
    # Matmuls of a token: with the chunk's keys, once in every merge of the halving; of its scores
    # with the values; and with the state.
    num_merges = C.bit_length() - 1
    levels = num_merges if plan.decay == "vector" else 2
    scores = levels * C * plan.K
    through_scores = 2 * C * plan.V
    through_state = 2 * plan.K * plan.V
    if grid.is_backward:
        through_keys = (2 if plan.saves_scores else 3) * scores
        flops_of_token = through_keys + 2 * through_scores + 5 * through_state
    else:
        flops_of_token = scores + through_scores + 2 * through_state
    # Exponentials of a token: of its logs, or of its row of the mask.
    exponentials = {"vector": plan.K, "scalar": C, "none": 0}

    B = operands[0].array.shape[0]
    num_tokens = B * plan.H * plan.T
    return pl.CostEstimate(
        flops=num_tokens * flops_of_token,
        transcendentals=num_tokens * exponentials[plan.decay],
        bytes_accessed=moved(operand.array for operand in operands),
    )
