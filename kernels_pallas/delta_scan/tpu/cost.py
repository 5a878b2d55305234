"""What the TPU kernels of `delta_scan` tell XLA that they cost."""

from jax.experimental import pallas as pl

from kernels_pallas.common.cost import moved
from kernels_pallas.common.tpu import Operand
from kernels_pallas.delta_scan.tpu.plan import Grid, Plan


def scan_cost(
    plan: Plan,
    grid: Grid,
    operands: list[Operand],
) -> pl.CostEstimate:
    """Every operand moves once. FLOPs as the matrix unit does them, unused scores included."""
    C = plan.chunk
    span = C if grid.is_backward else C // plan.forward_spans
    # Matmuls of a token. Both scores, in every merge of the halving, and the inverse in three
    # passes; the scores and the inverse with values; reads, erases and writes with the state.
    num_merges = span.bit_length() - 1
    merges = num_merges if plan.decay == "vector" else 1
    scores = 2 * merges * C * plan.K + 6 * C * span
    through_scores = 4 * C * plan.V
    through_state = 6 * plan.K * plan.V
    flops_of_token = scores + through_scores + through_state
    if grid.is_backward:
        # Most of what the forward kernel made of scores is not made again.
        flops_of_token = 2 * scores + 3 * through_scores + 3 * through_state
    # Exponentials of a token: of its logs, or of its row of the mask.
    exponentials = {"vector": plan.K, "scalar": C, "none": 0}

    B = operands[0].array.shape[0]
    num_tokens = B * plan.H * plan.T
    return pl.CostEstimate(
        flops=num_tokens * flops_of_token,
        transcendentals=num_tokens * exponentials[plan.decay],
        bytes_accessed=moved(operand.array for operand in operands),
    )
