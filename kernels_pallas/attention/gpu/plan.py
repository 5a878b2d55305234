"""What the GPU kernels of `attention` share: the plan of a call, its arrays, and which tiles a program visits."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Float, Int

from kernels_pallas.attention.gpu.tuning import Cut, Schedule
from kernels_pallas.attention.normalizers.base import Normalizer
from kernels_pallas.common.gpu import moved


class Plan(NamedTuple):
    """What of a call is static. T is the true number of tokens; arrays have `length` of them, whole blocks."""

    normalizer: Normalizer
    causal: bool
    window: int | None
    logits_soft_cap: float | None
    scale: float
    T: int
    length: int
    H: int
    Hk: int
    K: int
    V: int
    gate: str  # "none", "head" or "element"
    segments: bool
    slopes: bool
    operand: jnp.dtype  # what products are rounded to before they are multiplied again
    precision: object  # of matmuls of float32 operands
    out_dtype: jnp.dtype
    schedule: Schedule
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return self.H // self.Hk

    @property
    def kept_outputs(self) -> list[int]:
        """Which outputs of the normalizer the backward pass needs; not o where y is o, unrounded."""
        wanted = sorted({*self.normalizer.deltas, *([] if self.gate == "none" else [0])})
        return [n for n in wanted if n or not self.y_is_o]

    @property
    def y_is_o(self) -> bool:
        return self.gate == "none" and self.out_dtype == jnp.float32

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that the mask lets meet, about, and without segments."""
        reach = self.T if self.window is None else min(self.window, self.T)
        before = reach * (self.T - reach) + reach * (reach + 1) // 2
        return before if self.causal else 2 * before - self.T


class Inputs(NamedTuple):
    """The arrays of a call, padded to whole blocks and to powers of two."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hk V"]
    gate: Float[Array, "B T H V"] | Float[Array, "B H T"] | None
    sinks: Float[Array, "H"] | None
    slopes: Float[Array, "H"] | None
    segments: Int[Array, "B T"] | None


# --- which tiles


class Reach(NamedTuple):
    """How far a token looks along the sequence, in tokens: a query at keys, or a key at the queries that see it."""

    before: int
    after: int

    def turned(self) -> "Reach":
        return Reach(self.after, self.before)


def of_queries(p: Plan) -> Reach:
    far = p.length if p.window is None else min(p.window - 1, p.length)
    return Reach(far, 0 if p.causal else far)


def visits(p: Plan, reach: Reach, n, size: int, other: int, limits: tuple | None) -> list[tuple]:
    """The blocks of `other` tokens that block n of `size` tokens meets: ranges (first, end, whether it needs masks).

    No range is of tiles that the mask hides entirely. `limits`: (first, end) of blocks that share a segment with this
    one.
    """
    start, last = n * size, n * size + size - 1
    floor = lambda position: lax.div(jnp.int32(position), jnp.int32(other))
    first = floor(jnp.maximum(start - reach.before, 0))
    end = floor(jnp.minimum(last + reach.after + 1, p.T) + other - 1)
    if limits is not None:
        first, end = jnp.maximum(first, limits[0]), jnp.minimum(end, limits[1])
    end = jnp.maximum(first, end)
    # In between, every token of this block meets every token of the other.
    full_first = floor(jnp.maximum(last - reach.before, 0) + other - 1)
    full_end = floor(jnp.minimum(start + reach.after + 1, p.T))
    full_first = jnp.clip(full_first, first, end)
    full_end = jnp.clip(full_end, full_first, end)
    ranges = [(full_first, full_end, False), (full_end, end, True)]
    return ranges if reach.before >= p.length else [(first, full_first, True), *ranges]


def walked(ranges: list[tuple], visit: Callable, carry, heads: int = 1):
    """carry = visit(masks, head, block, carry) for every block of every range, for each of `heads` heads.

    Heads and blocks are one loop: a nested one costs registers, and loads run ahead from one head into the next.
    """
    for first, end, masks in ranges:
        count = end - first

        def turn(t, carry, first=first, count=count, masks=masks):
            head = lax.div(t, count) if heads > 1 else jnp.int32(0)
            return visit(masks, head, first + t - head * count, carry)

        carry = lax.fori_loop(0, heads * count, turn, carry)
    return carry


def shared_segments(ids: Array, size: int, other: int) -> Int[Array, "B N 2"]:
    """For every block of `size` tokens the first block of `other` that may share a segment, and one after the last.

    By the least and the largest id of blocks: exact where ids never fall, as in packed documents; else it is more.
    """
    bounds = lambda n: (lambda x: (x.min(2), x.max(2)))(ids.reshape(ids.shape[0], -1, n))
    (least, most), (other_least, other_most) = bounds(size), bounds(other)
    meet = (least[:, :, None] <= other_most[:, None, :]) & (
        other_least[:, None, :] <= most[:, :, None]
    )
    end = meet.shape[2] - jnp.argmax(jnp.flip(meet, 2), 2)
    return jnp.stack([jnp.argmax(meet, 2), end], 2).astype(jnp.int32)


def limits(spans, n) -> tuple | None:
    """Block n's row of `shared_segments`, for `visits`."""
    return (
        None if spans is None else tuple(pltriton.load(spans.at[n, jnp.int32(i)]) for i in (0, 1))
    )


# --- where a program finds its own


def tokens(p: Plan, heads: int, of: Callable, width: int) -> pl.BlockSpec:
    """Of [B, T, heads, width]: all tokens of a program's head, by `of`(its second grid index)."""
    return pl.BlockSpec((None, p.length, None, width), lambda n, h, b: (b, 0, of(h), 0))


def numbers(p: Plan) -> pl.BlockSpec:
    """Of [B, H, T]: those of a program's head."""
    return pl.BlockSpec((None, None, p.length), lambda n, h, b: (b, h, 0))


def by_batch(a: Array) -> pl.BlockSpec:
    return pl.BlockSpec((None, *a.shape[1:]), lambda n, h, b: (b, *[0] * (a.ndim - 1)))


def whole(a: Array) -> pl.BlockSpec:
    return pl.BlockSpec(a.shape, lambda n, h, b: (0,) * a.ndim)


def block(n, size: int) -> Array:
    """The tokens of a block, [size]."""
    return n * size + lax.iota(jnp.int32, size)


def load(ref, rows: Array, width: int) -> Array:
    """[rows, width]."""
    return pltriton.load(ref.at[rows[:, None], lax.iota(jnp.int32, width)[None, :]])


def store(ref, rows: Array, x: Array) -> None:
    pltriton.store(
        ref.at[rows[:, None], lax.iota(jnp.int32, x.shape[1])[None, :]], x.astype(ref.dtype)
    )


def call(
    p: Plan,
    kernel: Callable,
    cut: Cut,
    grid,
    ins: dict,
    outs: dict,
    name: str,
    *,
    flops: int,
    exponentials: int,
) -> dict[str, Array]:
    """Runs kernel(**refs by name). ins and outs: name -> (array, spec); what is None is left out."""
    ins = {n: x for n, x in ins.items() if x[0] is not None}
    arrays = [a for a, _ in ins.values()]
    shapes = [a for a, _ in outs.values()]

    def body(*refs):
        kernel(**dict(zip([*ins, *outs], refs)))

    results = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in ins.values()],
        out_specs=[spec for _, spec in outs.values()],
        out_shape=shapes,
        compiler_params=pltriton.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        cost_estimate=pl.CostEstimate(flops, exponentials, moved([*arrays, *shapes])),
        interpret=p.interpret,
        name=name,
    )(*arrays)
    return dict(zip(outs, results))
