"""What the TPU kernels of `delta_scan` are told: static arguments, arrays, and the grid.

Layouts are those of `linear_scan/tpu/plan.py`: views [B, T, heads * D], and states [V, K], so that
a decay of the keys is a row. What a token has one number of for each head (beta, a scalar decay,
the start of a document) is packed into rows of C numbers for each chunk.
"""

from typing import Any, NamedTuple, cast

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.common.tpu import Interpret, Operand
from kernels_pallas.linear_scan.tpu import plan as scan_plan
from kernels_pallas.linear_scan.tpu.plan import ArrayOrShape, Schedule
from kernels_pallas.linear_scan.tpu.tile import TileOptions

# Tokens between two updates of the state in the forward kernel. The inverse of a longer span costs
# more than another update, and two spans side by side fill the lanes of registers.
SPAN = 64


class Plan(NamedTuple):
    """The static arguments of both kernels.

    Attributes:
      T: the length of the arrays.
      H: states, and heads of v.
      K, V: channels, padded to whole registers.
      decay: "vector", "scalar" or "none".
      rows: what the rows of `KernelInputs.rows` are, in order, of "beta", "coarse" and "fine" (the
        running sums of a scalar decay's logs), and "start" (1 where a document starts).
      chunk: tokens in a chunk.
      rounds: whether the matrix unit rounds operands to bfloat16, see `op.py`. The states that are
        saved are then kept in bfloat16, as it will see them.
      forward, backward: the schedules of the two kernels.
      interpret: as `pallas_call` takes it.
    """

    T: int
    H: int
    Hq: int
    Hk: int
    K: int
    V: int
    decay: str
    rows: tuple[str, ...]
    scale: float
    l2_norm: bool
    chunk: int
    rounds: bool
    out_dtype: jnp.dtype
    return_final_state: bool
    forward: Schedule
    backward: Schedule
    interpret: Interpret

    @property
    def reverse(self) -> bool:
        """Tokens come in order; `linear_scan` can run the other way."""
        return False

    @property
    def forward_spans(self) -> int:
        """How often a chunk updates the state in the forward kernel."""
        return max(1, self.chunk // SPAN)

    def tile_options(self, schedule: Schedule) -> TileOptions:
        """The static arguments of a chunk."""
        # Where matmuls keep all bits there is nothing to round.
        rounds_early = self.rounds and schedule.round_early
        operand = jnp.bfloat16 if rounds_early else jnp.float32
        return TileOptions(
            rounds=self.rounds,
            operand=jnp.dtype(operand),
            inclusive=True,
            reverse=False,
            stack=schedule.stack,
        )


class KernelInputs(NamedTuple):
    """The arrays of a kernel, as views that fill registers.

    Attributes:
      decay: logs of vector decays.
      rows: R rows for each of N chunks, see `Plan.rows`.
    """

    q: Float[Array, "B T Hq*K"]
    k: Float[Array, "B T Hk*K"]
    v: Float[Array, "B T H*V"]
    decay: Float[Array, "B T H*K"] | None
    erase: Float[Array, "B T H*K"] | None
    write: Float[Array, "B T H*V"] | None
    rows: Float[Array, "B H N R C"] | None
    state: Float[Array, "B H V K"] | None


class Saved(NamedTuple):
    """What the forward kernel saves for the backward kernel, beside its inputs.

    Attributes:
      states: the state before each chunk.
      inverses: of the spans of each chunk, see `tile.inverse`.
      scores: what queries read of each chunk, as `tile.ChunkTerms` has it; of vector decays only,
        since those of scalar ones are one product.
    """

    states: Float[Array, "B H N V K"]
    inverses: Float[Array, "B H N S C"]
    scores: Float[Array, "B H N C C"] | None


class Grid(scan_plan.Grid):
    """The grid of one kernel: (B, blocks of heads, blocks of tokens).

    Which block of an array a grid step sees is as in `linear_scan`; its query heads are the states
    here, and q and k the arrays whose heads may be shared.
    """

    def flags(self, array: ArrayOrShape) -> Operand:
        """[B, blocks of heads, 8, 128]: one register for all grid steps along T."""
        return Operand(
            "flags",
            array,
            (1, 1, 8, 128),
            lambda b, h, t: (b, h, 0, 0),
        )

    def delta_inputs(self, plan: Plan, x: KernelInputs) -> list[Operand]:
        """What both kernels read: all of `x` but the state."""
        # The order of the kernel's arguments; it finds them by name.
        operands = [
            self.tokens("q", x.q, plan.Hq, plan.K),
            self.tokens("k", x.k, plan.Hk, plan.K),
            self.tokens("v", x.v, plan.H, plan.V),
        ]
        if x.decay is not None:
            operands.append(self.tokens("decay", x.decay, plan.H, plan.K))
        if x.erase is not None:
            operands.append(self.tokens("erase", x.erase, plan.H, plan.K))
        if x.write is not None:
            operands.append(self.tokens("write", x.write, plan.H, plan.V))
        if x.rows is not None:
            operands.append(self.running_sums("rows", x.rows))
        return operands


def grid_of(plan: Plan, schedule: Schedule, is_backward: bool) -> Grid:
    """The grid of a kernel."""
    # Where blocks lie depends on T, H, K, V, chunk and reverse, which both kinds of plan have.
    return Grid(cast(Any, plan), schedule, is_backward)
