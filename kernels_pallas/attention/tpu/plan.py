"""What of a call the TPU kernels of `attention` know while they are compiled: the plan, and which tiles they visit."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.attention.normalizers.base import Normalizer

LANES = 128

# What a visit computes. Only MASKED looks at positions in every part of its tile.
FULL, DIAGONAL, MASKED, NOTHING = range(4)
FIRST, LAST, FLUSH = (
    4,
    8,
    16,
)  # bits: of the visits of a row block; of a key block, whose sums are complete then


class Schedule(NamedTuple):
    """How a kernel is cut. Only its time and memory depend on this."""

    block: int  # queries, and keys, in a grid step
    rows: int  # of a block that are worked on together: queries forward, keys backward
    lag: int = 1  # how many such groups the matrix unit is ahead, in program order
    span: int = 1 << 30  # backward: keys whose gradients are summed up in VMEM

    def fitted(self, T: int) -> "Schedule":
        """Blocks that cover T with as little padding as their groups allow."""
        rows = min(self.rows, _up(T, LANES))
        count = -(-T // max(self.block, rows))
        block = _up(-(-T // count), rows)
        return self._replace(block=block, rows=rows, span=max(1, self.span // block) * block)


class Plan(NamedTuple):
    """What of a call is static. K and V are as the kernels see them, T is the true length."""

    normalizer: Normalizer
    causal: bool
    window: int | None
    logits_soft_cap: float | None
    scale: float
    T: int
    H: int
    Hk: int
    K: int
    V: int
    gate: str  # "none", "head" or "element"
    segments: bool
    slopes: bool
    rounds: bool  # matmuls are one pass of bfloat16
    out_dtype: jnp.dtype
    forward: Schedule
    backward: Schedule
    interpret: object  # as pallas_call takes it

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.H // self.Hk

    @property
    def keeps_o(self) -> bool:
        """Whether the backward pass needs the ungated output."""
        return self.gate != "none" or 0 in self.normalizer.deltas


class Inputs(NamedTuple):
    """The arrays of a call. The last axis fills registers; rows of numbers run along it."""

    q: Float[Array, "B T H*K"]
    k: Float[Array, "B T Hk*K"]
    v: Float[Array, "B T Hk*V"]
    gate: Float[Array, "B T H*V"] | Float[Array, "B H 1 T"] | None
    sinks: Float[Array, "H"] | None
    slopes: Float[Array, "H"] | None
    segments: Int[Array, "B 1 T"] | None


class Visits(NamedTuple):
    """The tiles that a kernel visits, in order; those of the backward pass, span after span."""

    rows: Int[np.ndarray, "N"]
    keys: Int[np.ndarray, "N"]
    what: Int[np.ndarray, "N"]


def kinds(plan: Plan, block: int) -> Int[np.ndarray, "Nq Nk"]:
    """What there is to compute in every tile."""
    n = -(-plan.T // block)
    i, j = np.arange(n)[:, None] * block, np.arange(n)[None, :] * block
    nearest, farthest = (
        i - (j + block - 1),
        i + block - 1 - j,
    )  # the least and the largest distance row - key
    some, all_of_it = np.full((n, n), True), np.broadcast_to(j + block <= plan.T, (n, n))
    if plan.causal:
        some, all_of_it = some & (farthest >= 0), nearest >= 0
    if plan.window is not None:
        some &= (nearest < plan.window) & (farthest > -plan.window)
        all_of_it = all_of_it & (farthest < plan.window) & (nearest > -plan.window)
    if (
        plan.slopes and plan.T % block
    ):  # rows of padding would weigh keys by a slope alone, which may be negative
        all_of_it = all_of_it & (i + block <= plan.T)
    found = np.where(some, np.where(all_of_it, FULL, MASKED), NOTHING)
    if plan.causal and (plan.window is None or plan.window >= block):
        np.fill_diagonal(found, DIAGONAL)
    return found


def forward_visits(plan: Plan) -> Visits:
    """Row block after row block."""
    found = kinds(plan, plan.forward.block)
    visits = []
    for i, row in enumerate(found):
        keys = np.flatnonzero(row != NOTHING)
        for j in keys:
            visits.append((i, j, row[j] | FIRST * (j == keys[0]) | LAST * (j == keys[-1])))
    return Visits(*np.array(visits, np.int32).T)


def backward_visits(plan: Plan) -> tuple[Visits, int, int]:
    """The visits of every span of key blocks, as many for each; how many, and the blocks of a span.

    In every span every row block is visited, if only to write zeros, and the last one meets every key block.
    """
    found = kinds(plan, plan.backward.block)
    n = len(found)
    length = min(n, plan.backward.span // plan.backward.block)
    spans = []
    for start in range(0, n, length):
        visits, inside = [], range(start, min(start + length, n))
        for i in range(n):
            keys = [j for j in inside if found[i, j] != NOTHING or i == n - 1] or [start]
            for j in keys:
                flags = FIRST * (j == keys[0]) | LAST * (j == keys[-1]) | FLUSH * (i == n - 1)
                visits.append((i, j, found[i, j] | flags))
        spans.append(visits)
    most = max(map(len, spans))
    idle = lambda visits: [(visits[-1][0], visits[-1][1], NOTHING)] * (most - len(visits))
    every = [v for visits in spans for v in (*visits, *idle(visits))]
    return Visits(*np.array(every, np.int32).T), most, length


def pairs(plan: Plan) -> int:
    """Pairs of a query and a key that the mask lets meet, without segments."""
    i = np.arange(plan.T)
    least = np.zeros_like(i) if plan.window is None else np.maximum(i - plan.window + 1, 0)
    most = i + 1 if plan.causal else np.full_like(i, plan.T)
    if plan.window is not None and not plan.causal:
        most = np.minimum(i + plan.window, plan.T)
    return int(np.sum(most - least))


def exact_scale(scale: float) -> bool:
    """Whether multiplying by it rounds nothing."""
    return math.frexp(scale)[0] in (0.5, -0.5)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
