"""What the TPU kernels of `linear_scan` are told: the static plan, the arrays, and the way over blocks of tokens.

Arrays are views [B, T, heads * D] of the op's [B, T, heads, D], so that the last axis fills registers. States are
[V, K]: a decay of the keys is then a row. `reverse` and T that ends inside a block are index maps here, and masks in
`tokens.py`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from kernels_pallas.common.tpu import Operand
from kernels_pallas.linear_scan.tpu.tile import Tile


class Schedule(NamedTuple):
    """How a kernel is cut. Only its time depends on this."""

    heads: int  # in a grid step
    chunks: int  # in a grid step
    lag: int | None  # turns between the starts of two heads, see `tile.staggered`
    # where the matrix unit rounds operands: keep them as it will see them
    round_early: bool = False
    stack: bool = False  # see `tile.Tile`
    # backward: the scores' cotangent is transposed rather than multiplied out twice
    transpose: bool = True


class Plan(NamedTuple):
    """What of a call is static. K and V are as the kernel sees them, T is the true length."""

    T: int
    H: int
    Hk: int
    Hv: int
    K: int
    V: int
    decay: str  # "vector", "scalar" or "none"
    inclusive: bool
    reverse: bool
    scale: float
    chunk: int
    rounds: bool  # the matrix unit rounds operands to bfloat16, see `tpu.py`; saved states are kept as it will see them
    out_dtype: jnp.dtype
    return_final_state: bool
    forward: Schedule
    backward: Schedule
    interpret: object  # as pallas_call takes it

    def tile(self, schedule: Schedule) -> Tile:
        early = self.rounds and schedule.round_early
        operand = jnp.dtype(jnp.bfloat16 if early else jnp.float32)
        return Tile(self.rounds, operand, self.inclusive, self.reverse, schedule.stack)


class Inputs(NamedTuple):
    q: Float[Array, "B T H*K"]
    k: Float[Array, "B T Hk*K"]
    v: Float[Array, "B T Hv*V"]
    decay: (
        Float[Array, "B T H*K"] | Float[Array, "#B H N R C"] | None
    )  # logs, or R running sums of logs in N chunks
    starts: (
        Float[Array, "B N 1 C"] | None
    )  # 1 where the state is emptied before the token; vector decays only
    bonus: Float[Array, "1 H*K"] | None
    state: Float[Array, "B H V K"] | None


class Walk(NamedTuple):
    """The way of one kernel over the tokens."""

    plan: Plan
    schedule: Schedule
    backward: bool

    @property
    def step(self) -> int:
        return self.schedule.chunks * self.plan.chunk

    @property
    def steps(self) -> int:
        return -(-self.plan.T // self.step)

    @property
    def downwards(self) -> bool:
        return self.plan.reverse != self.backward

    def block(self, t):
        return self.steps - 1 - t if self.downwards else t

    def chunks(self) -> range:
        order = range(self.schedule.chunks)
        return order[::-1] if self.downwards else order

    def group(self, num_heads: int) -> int:
        """Query heads that share one of `num_heads` heads."""
        return self.plan.H // num_heads

    def slot(self, head: int, num_heads: int) -> int:
        """Which of the block's `num_heads`-kind heads belongs to query head `head` of the block."""
        return head // self.group(num_heads) if self.group(num_heads) <= self.schedule.heads else 0

    def slots(self, num_heads: int) -> int:
        return max(1, self.schedule.heads // self.group(num_heads))

    def tokens(self, name: str, array, num_heads: int, D: int, partial: bool = False) -> Operand:
        """[B, T, heads * D]. `partial`: an output that each block of query heads has its own of."""
        shared = 1 if partial else max(1, self.group(num_heads) // self.schedule.heads)
        block = (1, self.step, self.slots(num_heads) * D)
        return Operand(name, array, block, lambda b, h, t: (b, self.block(t), h // shared))

    def sums(self, name: str, array) -> Operand:
        """[B or 1, H, chunks, R, C]."""
        every = 0 if array.shape[0] == 1 else 1
        block = (1, self.schedule.heads, self.schedule.chunks, *array.shape[3:])
        return Operand(name, array, block, lambda b, h, t: (b * every, h, self.block(t), 0, 0))

    def starts(self, array) -> Operand:
        """[B, chunks, 1, C]."""
        block = (1, self.schedule.chunks, 1, self.plan.chunk)
        return Operand("starts", array, block, lambda b, h, t: (b, self.block(t), 0, 0))

    def state(self, name: str, array) -> Operand:
        """[B, H, V, K]: one block for the whole walk."""
        block = (1, self.schedule.heads, self.plan.V, self.plan.K)
        return Operand(name, array, block, lambda b, h, t: (b, h, 0, 0))

    def states(self, array) -> Operand:
        """[B, H, chunks, V, K]."""
        block = (1, self.schedule.heads, self.schedule.chunks, self.plan.V, self.plan.K)
        return Operand("states", array, block, lambda b, h, t: (b, h, self.block(t), 0, 0))

    def bonus(self, name: str, array) -> Operand:
        """[1 or B, H * K] as [.., 1, H * K]."""
        every = 0 if array.shape[0] == 1 else 1
        block = (1, 1, self.schedule.heads * self.plan.K)
        return Operand(name, array, block, lambda b, h, t: (b * every, 0, h))

    def inputs(self, x: Inputs) -> list[Operand]:
        p = self.plan
        operands = [
            self.tokens("q", x.q, p.H, p.K),
            self.tokens("k", x.k, p.Hk, p.K),
            self.tokens("v", x.v, p.Hv, p.V),
        ]
        if p.decay == "vector":
            operands.append(self.tokens("decay", x.decay, p.H, p.K))
        elif p.decay == "scalar":
            operands.append(self.sums("decay", x.decay))
        if x.starts is not None:
            operands.append(self.starts(x.starts))
        if x.bonus is not None:
            operands.append(self.bonus("bonus", x.bonus[:, None]))
        return operands
