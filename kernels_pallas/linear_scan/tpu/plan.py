"""What the TPU kernels of `linear_scan` are told: static arguments, arrays, and the grid.

Arrays are views [B, T, heads * D] of the op's [B, T, heads, D], so that the last axis fills
registers. States are [V, K]: a decay of the keys is then a row. `reverse`, and a T that ends inside
a block, are index maps here and masks in `tokens.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.common.mesh import like
from kernels_pallas.common.tpu import LANES, Interpret, Operand
from kernels_pallas.linear_scan.tpu.tile import ROWS, TileOptions

type ArrayOrShape = Array | jax.ShapeDtypeStruct


class Schedule(NamedTuple):
    """How the work of a kernel is divided. Only its time depends on this.

    Attributes:
      heads: query heads in a grid step.
      chunks: chunks in a grid step.
      lag: turns between the starts of two heads, see `tile.interleave`; None for one by one.
      round_early: where the matrix unit rounds operands, keep them as it will see them.
      stack: see `tile.TileOptions`.
      transpose: in the backward pass, whether the scores' cotangent is transposed rather than
        multiplied out twice.
      keep_scores: in the backward pass, whether it reads the scores of vector decays that the
        forward kernel has saved, rather than compute them again.
    """

    heads: int
    chunks: int
    lag: int | None
    round_early: bool = False
    stack: bool = False
    transpose: bool = True
    keep_scores: bool = False


class Plan(NamedTuple):
    """The static arguments of both kernels.

    Attributes:
      T: the length of the arrays.
      K, V: channels, padded to whole registers.
      decay: "vector", "scalar" or "none".
      chunk: tokens in a chunk.
      rounds: whether the matrix unit rounds operands to bfloat16, see `op.py`. The states that are
        saved are then kept in bfloat16, as it will see them.
      forward, backward: the schedules of the two kernels.
      interpret: as `pallas_call` takes it.
    """

    T: int
    H: int
    Hk: int
    Hv: int
    K: int
    V: int
    decay: str
    inclusive: bool
    reverse: bool
    scale: float
    chunk: int
    rounds: bool
    out_dtype: jnp.dtype
    return_final_state: bool
    forward: Schedule
    backward: Schedule
    interpret: Interpret

    @property
    def saves_scores(self) -> bool:
        """Whether the forward kernel saves scores: in bfloat16, as the matrix unit will see them.

        They take as many bytes as queries of `chunk` channels.
        """
        return self.decay == "vector" and self.rounds and self.backward.keep_scores

    def tile_options(self, schedule: Schedule) -> TileOptions:
        """The static arguments of a chunk."""
        # Where matmuls keep all bits there is nothing to round.
        rounds_early = self.rounds and schedule.round_early
        operand = jnp.bfloat16 if rounds_early else jnp.float32
        return TileOptions(
            rounds=self.rounds,
            operand=jnp.dtype(operand),
            inclusive=self.inclusive,
            reverse=self.reverse,
            stack=schedule.stack,
        )


class KernelInputs(NamedTuple):
    """The arrays of a kernel, as views that fill registers.

    Attributes:
      decay: for vector decays logs [B, T, H*K]; for scalar ones R rows of running sums of logs in
        each of N chunks, [B or 1, H, N, R, C].
      starts: 1 where the state is reset before the token; vector decays only.
    """

    q: Float[Array, "B T H*K"]
    k: Float[Array, "B T Hk*K"]
    v: Float[Array, "B T Hv*V"]
    decay: Float[Array, "B T H*K"] | Float[Array, "#B H N R C"] | None
    starts: Float[Array, "B N 1 C"] | None
    bonus: Float[Array, "1 H*K"] | None
    state: Float[Array, "B H V K"] | None


class Saved(NamedTuple):
    """What the forward kernel saves for the backward kernel, beside its inputs.

    Attributes:
      states: the state before each chunk.
      scores: of each chunk, [i, j] for token i's read of the write of token j; None if the backward
        kernel computes them again.
      check: of `Grid.check`.
    """

    states: Float[Array, "B H N V K"]
    scores: Float[Array, "B H N C C"] | None
    check: Float[Array, "B blocks 8 128"]


class Grid(NamedTuple):
    """The grid of one kernel: (B, blocks of heads, blocks of tokens).

    The last axis runs in order, so that the state can stay in fast memory. The methods that return
    an `Operand` say which block of an array a grid step (b, h, t) sees.
    """

    plan: Plan
    schedule: Schedule
    is_backward: bool

    # --- tokens

    @property
    def step_length(self) -> int:
        """Tokens in a grid step."""
        return self.schedule.chunks * self.plan.chunk

    @property
    def num_steps(self) -> int:
        """Grid steps along T; the last may end beyond T."""
        return -(-self.plan.T // self.step_length)

    @property
    def starts_at_end(self) -> bool:
        """Whether the kernel takes the tokens from the last to the first."""
        return self.plan.reverse != self.is_backward

    def token_block(self, t):
        """The block of tokens of grid step t; t may be traced."""
        return self.num_steps - 1 - t if self.starts_at_end else t

    def chunk_order(self) -> range:
        """The chunks of a grid step, in the order in which the kernel takes them."""
        chunks = range(self.schedule.chunks)
        return chunks[::-1] if self.starts_at_end else chunks

    # --- grouped heads: several query heads share one key or value head

    def group_size(self, num_heads: int) -> int:
        """Query heads that share one of `num_heads` heads."""
        return self.plan.H // num_heads

    def slot(self, head: int, num_heads: int) -> int:
        """Where the block holds the head, one of `num_heads`, that query head `head` uses.

        `head` counts from the first query head of the block.
        """
        group_size = self.group_size(num_heads)
        if group_size > self.schedule.heads:
            # All query heads of the block use the same one.
            return 0
        return head // group_size

    def num_slots(self, num_heads: int) -> int:
        """How many of `num_heads` heads a block holds."""
        return max(1, self.schedule.heads // self.group_size(num_heads))

    # --- blocks of arrays

    def tokens(
        self,
        name: str,
        array: ArrayOrShape,
        num_heads: int,
        D: int,
        is_partial: bool = False,
    ) -> Operand:
        """[B, T, heads * D].

        Args:
          name: what the kernel calls it.
          array: the array, or the shape of an output.
          num_heads: heads of the array.
          D: channels of a head.
          is_partial: for an output of which every block of query heads has a part of its own, also
            where these query heads share a head.

        Returns:
          The operand.
        """
        # How many neighboring blocks of query heads see the same block.
        sharing_blocks = 1
        if not is_partial:
            sharing_blocks = max(1, self.group_size(num_heads) // self.schedule.heads)
        # One row, the tokens of a step, and the heads that the step's query heads use.
        block = (1, self.step_length, self.num_slots(num_heads) * D)

        def index(b, h, t):
            # Not jnp's division, which asks for a sign, whose lowering asks for the kind of TPU.
            heads = h if sharing_blocks == 1 else jax.lax.div(h, jnp.int32(sharing_blocks))
            return b, self.token_block(t), heads

        return Operand(name, array, block, index)

    def running_sums(self, name: str, array: ArrayOrShape) -> Operand:
        """[B or 1, H, chunks, R, C]."""
        # Index 0 for every row where the rows share one.
        row_stride = 0 if array.shape[0] == 1 else 1
        # The sums of whole chunks: T is padded, so every block lies inside the array.
        block = (1, self.schedule.heads, self.schedule.chunks, *array.shape[3:])
        return Operand(
            name,
            array,
            block,
            lambda b, h, t: (b * row_stride, h, self.token_block(t), 0, 0),
        )

    def starts(self, array: ArrayOrShape) -> Operand:
        """[B, chunks, 1, C], the same for all heads."""
        block = (1, self.schedule.chunks, 1, self.plan.chunk)
        return Operand(
            "starts",
            array,
            block,
            lambda b, h, t: (b, self.token_block(t), 0, 0),
        )

    def state(self, name: str, array: ArrayOrShape) -> Operand:
        """[B, H, V, K]: one block for all grid steps along T."""
        # The index does not depend on t: it is moved once for each block of heads.
        block = (1, self.schedule.heads, self.plan.V, self.plan.K)
        return Operand(name, array, block, lambda b, h, t: (b, h, 0, 0))

    def of_chunks(self, name: str, array: ArrayOrShape) -> Operand:
        """[B, H, chunks, rows, columns]: what there is of each chunk, as the state before it."""
        block = (1, self.schedule.heads, self.schedule.chunks, *array.shape[3:])
        return Operand(
            name,
            array,
            block,
            lambda b, h, t: (b, h, self.token_block(t), 0, 0),
        )

    def bonus(self, name: str, array: ArrayOrShape) -> Operand:
        """[1 or B, 1, H * K]."""
        row_stride = 0 if array.shape[0] == 1 else 1
        # The same channels for all tokens.
        block = (1, 1, self.schedule.heads * self.plan.K)
        return Operand(
            name,
            array,
            block,
            lambda b, h, t: (b * row_stride, 0, h),
        )

    def check(self, x: KernelInputs) -> Operand:
        """An output [B, blocks of heads, 8, 128]: sums that are finite if everything was."""
        num_head_blocks = self.plan.H // self.schedule.heads
        array = like(x.q, (x.q.shape[0], num_head_blocks, ROWS, LANES), jnp.float32)
        # One register for all grid steps along T.
        return Operand("check", array, (1, 1, ROWS, LANES), lambda b, h, t: (b, h, 0, 0))

    def inputs(self, x: KernelInputs) -> list[Operand]:
        """What both kernels read: all of `x` but the state."""
        plan = self.plan
        # The order of the kernel's arguments; it finds them by name.
        operands = [
            self.tokens("q", x.q, plan.H, plan.K),
            self.tokens("k", x.k, plan.Hk, plan.K),
            self.tokens("v", x.v, plan.Hv, plan.V),
        ]
        if x.decay is not None:
            if plan.decay == "vector":
                operands.append(self.tokens("decay", x.decay, plan.H, plan.K))
            else:
                operands.append(self.running_sums("decay", x.decay))
        if x.starts is not None:
            operands.append(self.starts(x.starts))
        if x.bonus is not None:
            operands.append(self.bonus("bonus", x.bonus[:, None]))
        return operands
