"""The two TPU kernels of `linear_scan`: what moves between HBM and VMEM, and the order of the work.

The grid walks (batch, blocks of heads, blocks of tokens); the state of a block of heads stays in VMEM scratch while its
tokens pass, and every input and output is moved once. The forward pass can leave the state before each chunk in HBM;
the backward pass walks the other way, reads those, and carries the state's cotangent. All else is recomputed.

Arrays are views [B, T, heads * D] of the op's [B, T, heads, D], so that the last axis fills registers. States are
[V, K]: a decay of the keys is then a row. `reverse` and T that ends inside a block are index maps and masks here.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Float

from kernels_pallas.linear_scan import tile as reference_tile
from kernels_pallas.linear_scan import tpu_tile
from kernels_pallas.linear_scan.tpu_tile import Scored, Sums, Tile

VMEM_LIMIT = 56 * 2**20  # of at least 64 MiB on every generation; the default of 16 MiB is too little for 8 heads


class Schedule(NamedTuple):
    """How a kernel is cut. Only its time depends on this."""

    heads: int  # in a grid step
    chunks: int  # in a grid step
    lag: int | None  # turns between the starts of two heads, see `tpu_tile.staggered`
    round_early: bool = False  # where the matrix unit rounds operands: keep them as it will see them
    stack: bool = False  # see `tpu_tile.Tile`
    transpose: bool = True  # backward: the scores' cotangent is transposed rather than multiplied out twice


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
    decay: Float[Array, "B T H*K"] | Float[Array, "#B H N R C"] | None  # logs, or R running sums of logs in N chunks
    starts: Float[Array, "B N 1 C"] | None  # 1 where the state is emptied before the token; vector decays only
    bonus: Float[Array, "1 H*K"] | None
    state: Float[Array, "B H V K"] | None


class _Operand(NamedTuple):
    """One array of a kernel, by the name that the kernel knows it by."""

    name: str
    array: Array | jax.ShapeDtypeStruct
    block: tuple[int, ...]
    index: Callable


class _Walk(NamedTuple):
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

    def tokens(self, name: str, array, num_heads: int, D: int, partial: bool = False) -> _Operand:
        """[B, T, heads * D]. `partial`: an output that each block of query heads has its own of."""
        shared = 1 if partial else max(1, self.group(num_heads) // self.schedule.heads)
        block = (1, self.step, self.slots(num_heads) * D)
        return _Operand(name, array, block, lambda b, h, t: (b, self.block(t), h // shared))

    def sums(self, name: str, array) -> _Operand:
        """[B or 1, H, chunks, R, C]."""
        every = 0 if array.shape[0] == 1 else 1
        block = (1, self.schedule.heads, self.schedule.chunks, *array.shape[3:])
        return _Operand(name, array, block, lambda b, h, t: (b * every, h, self.block(t), 0, 0))

    def starts(self, array) -> _Operand:
        """[B, chunks, 1, C]."""
        block = (1, self.schedule.chunks, 1, self.plan.chunk)
        return _Operand("starts", array, block, lambda b, h, t: (b, self.block(t), 0, 0))

    def state(self, name: str, array) -> _Operand:
        """[B, H, V, K]: one block for the whole walk."""
        block = (1, self.schedule.heads, self.plan.V, self.plan.K)
        return _Operand(name, array, block, lambda b, h, t: (b, h, 0, 0))

    def states(self, array) -> _Operand:
        """[B, H, chunks, V, K]."""
        block = (1, self.schedule.heads, self.schedule.chunks, self.plan.V, self.plan.K)
        return _Operand("states", array, block, lambda b, h, t: (b, h, self.block(t), 0, 0))

    def bonus(self, name: str, array) -> _Operand:
        """[1 or B, H * K] as [.., 1, H * K]."""
        every = 0 if array.shape[0] == 1 else 1
        block = (1, 1, self.schedule.heads * self.plan.K)
        return _Operand(name, array, block, lambda b, h, t: (b * every, 0, h))

    def inputs(self, x: Inputs) -> list[_Operand]:
        p = self.plan
        operands = [self.tokens("q", x.q, p.H, p.K), self.tokens("k", x.k, p.Hk, p.K), self.tokens("v", x.v, p.Hv, p.V)]
        if p.decay == "vector":
            operands.append(self.tokens("decay", x.decay, p.H, p.K))
        elif p.decay == "scalar":
            operands.append(self.sums("decay", x.decay))
        if x.starts is not None:
            operands.append(self.starts(x.starts))
        if x.bonus is not None:
            operands.append(self.bonus("bonus", x.bonus[:, None]))
        return operands


def forward(plan: Plan, x: Inputs, save: bool) -> dict[str, Array]:
    """o [B, T, H*V]; final_state float32 [B, H, V, K] if asked for; states [B, H, chunks, V, K] if `save`."""
    walk = _Walk(plan, plan.forward, backward=False)
    B = x.q.shape[0]
    ins = walk.inputs(x) + ([] if x.state is None else [walk.state("initial", x.state)])
    outs = [walk.tokens("o", _like(x.q, (B, plan.T, plan.H * plan.V), plan.out_dtype), plan.H, plan.V)]
    if plan.return_final_state:
        outs.append(walk.state("final", _like(x.q, (B, plan.H, plan.V, plan.K), jnp.float32)))
    if save:
        shape = (B, plan.H, walk.steps * walk.schedule.chunks, plan.V, plan.K)
        outs.append(walk.states(_like(x.q, shape, jnp.bfloat16 if plan.rounds else jnp.float32)))
    return _call(walk, _forward_kernel, ins, outs, "linear_scan_forward", B)


def backward(plan: Plan, x: Inputs, states: Array, do: Array, dfinal: Array | None) -> dict[str, Array]:
    """The cotangents dq, dk, dv, ddecay, dbonus, dinitial: as the inputs, but float32 parts where heads are shared.

    dk and dv have one part for each block of query heads, dbonus [B, 1, H*K] one for each row; a scalar ddecay is that
    of the logs, [B, H, N, 1, C].
    """
    walk = _Walk(plan, plan.backward, backward=True)
    p, B = plan, x.q.shape[0]
    ins = [*walk.inputs(x), walk.tokens("do", do, p.H, p.V), walk.states(states)]
    ins += [] if dfinal is None else [walk.state("dfinal", dfinal)]
    outs = [walk.tokens("dq", _like(x.q, x.q.shape, x.q.dtype), p.H, p.K)]
    for name, array, heads, D in (("dk", x.k, p.Hk, p.K), ("dv", x.v, p.Hv, p.V)):
        shared = walk.group(heads) > walk.schedule.heads
        width = p.H // walk.schedule.heads * walk.slots(heads) * D
        like = _like(x.q, (B, p.T, width), jnp.float32 if shared else array.dtype)
        outs.append(walk.tokens(name, like, heads, D, partial=True))
    if p.decay == "vector":
        outs.append(walk.tokens("ddecay", _like(x.q, x.decay.shape, x.decay.dtype), p.H, p.K))
    elif p.decay == "scalar":
        outs.append(walk.sums("ddecay", _like(x.q, (B, p.H, x.decay.shape[2], 1, p.chunk), jnp.float32)))
    if x.bonus is not None:
        outs.append(walk.bonus("dbonus", _like(x.q, (B, 1, p.H * p.K), jnp.float32)))
    if x.state is not None:
        outs.append(walk.state("dinitial", _like(x.q, x.state.shape, jnp.float32)))
    return _call(walk, _backward_kernel, ins, outs, "linear_scan_backward", B)


def _like(x: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes that `x` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _call(walk: _Walk, kernel, ins: list[_Operand], outs: list[_Operand], name: str, B: int) -> dict[str, Array]:
    names = [o.name for o in (*ins, *outs)]

    def body(*refs):
        kernel(walk, dict(zip(names, refs)), refs[-1])

    heads, V, K = walk.schedule.heads, walk.plan.V, walk.plan.K
    spec = lambda o: pl.BlockSpec(o.block, o.index)
    results = pl.pallas_call(
        body,
        grid=(B, walk.plan.H // heads, walk.steps),
        in_specs=[spec(o) for o in ins],
        out_specs=[spec(o) for o in outs],
        out_shape=[o.array for o in outs],
        scratch_shapes=[pltpu.VMEM((heads, V, K), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=_cost(walk, [*ins, *outs], B),
        interpret=walk.plan.interpret,
        name=name,
    )(*(in_hbm(o.array, walk.plan.interpret) for o in ins))
    return dict(zip((o.name for o in outs), results))


def in_hbm(array: Array, interpret) -> Array:
    """Keeps XLA from moving a kernel's input to VMEM beforehand.

    Beside another kernel that is bound by HBM that is no gain, and the input is moved twice: 67 MB and 80 us of v5e at
    B4 T4096 H8 K128 V256.
    """
    return array if interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def _cost(walk: _Walk, operands: list[_Operand], B: int) -> pl.CostEstimate:
    """Every operand moves once. FLOPs as the matrix unit does them, unused halves of scores included."""
    p = walk.plan
    levels = p.chunk.bit_length() - 1 if p.decay == "vector" else 2
    scores, through_scores, through_state = levels * p.chunk * p.K, 2 * p.chunk * p.V, 2 * p.K * p.V
    forward = scores + through_scores + 2 * through_state
    backward = 3 * scores + 2 * through_scores + 5 * through_state
    tokens = B * p.H * p.T
    exponentials = {"vector": p.K, "scalar": p.chunk, "none": 0}[p.decay]
    moved = sum(o.array.size * jnp.dtype(o.array.dtype).itemsize for o in operands)
    return pl.CostEstimate(tokens * (backward if walk.backward else forward), tokens * exponentials, moved)


# --- what runs on the core


def _forward_kernel(walk: _Walk, refs: dict, state_ref) -> None:
    plan, tile = walk.plan, walk.plan.tile(walk.schedule)

    @pl.when(pl.program_id(2) == 0)
    def _():
        state_ref[...] = refs["initial"][0] if "initial" in refs else jnp.zeros_like(state_ref)

    levels = tpu_tile.meeting_levels(plan.chunk, plan.reverse)

    def head(chunk: int, h: int):
        tokens = _Tokens(walk, refs, chunk, h)
        if plan.decay == "vector":
            scored = yield from tpu_tile.vector_scores(tile, levels, *tokens.vector(levels))
        else:
            scored, *_ = yield from tokens.scalar(tile, levels)
        yield
        if "states" in refs:
            refs["states"][0, h, chunk] = state_ref[h].astype(refs["states"].dtype)
        o, state_ref[h] = tpu_tile.read_and_update(tile, scored, tokens.v, state_ref[h])
        tokens.put("o", plan.H, plan.V, o)

    for chunk in walk.chunks():
        tpu_tile.staggered([head(chunk, h) for h in range(walk.schedule.heads)], walk.schedule.lag)
    if "final" in refs:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            refs["final"][0] = state_ref[...]


def _backward_kernel(walk: _Walk, refs: dict, dstate_ref) -> None:
    plan, tile = walk.plan, walk.plan.tile(walk.schedule)

    @pl.when(pl.program_id(2) == 0)
    def _():
        dstate_ref[...] = refs["dfinal"][0] if "dfinal" in refs else jnp.zeros_like(dstate_ref)
        if "dbonus" in refs:
            refs["dbonus"][...] = jnp.zeros_like(refs["dbonus"])

    levels = tpu_tile.meeting_levels(plan.chunk, plan.reverse)
    levels_back = tpu_tile.meeting_levels(plan.chunk, not plan.reverse)

    def head(chunk: int, h: int, shared: dict):
        tokens = _Tokens(walk, refs, chunk, h)
        state, dstate, do = refs["states"][0, h, chunk], dstate_ref[h], tokens.do
        if plan.decay == "vector":
            scored, climbed = yield from tpu_tile.vector_climb(tile, levels, *tokens.vector(levels))
        else:
            scored, mask, read, write = yield from tokens.scalar(tile, levels)
        yield
        d = yield from tpu_tile.from_state(tile, scored, tokens.v, do, state, dstate)
        dstate_ref[h] = d.dstate
        yield
        if plan.decay == "vector":
            transposed = walk.schedule.transpose
            back = jnp.transpose(d.dscores) if transposed else tpu_tile.matmul(tile, tokens.v, do, tpu_tile.NT)
            dreads, dk, ddecay = yield from tpu_tile.vector_descend(
                tile, levels, levels_back, climbed, scored, d.dscores, back, d.dreads, d.dwrites, d.dlog_total
            )
            dq = tokens.dq_of_reads(dreads)
            if plan.inclusive:
                ddecay += dq * tokens.q
            tokens.put("ddecay", plan.H, plan.K, ddecay)
        else:
            dmasked = d.dscores * mask
            dq = tpu_tile.matmul(tile, dmasked, tokens.k) + d.dreads * read
            dk = tpu_tile.matmul(tile, dmasked, tokens.q, tpu_tile.TN) + d.dwrites * write
            if plan.decay == "scalar":
                tokens.put_ddecay(_scalar_ddecay(tile, levels, scored, d))
        dq, dk = tokens.add_own(levels, d.dscores, dq, dk)
        tokens.put("dq", plan.H, plan.K, dq * plan.scale)
        tokens.share("dk", plan.Hk, plan.K, dk, shared)
        tokens.share("dv", plan.Hv, plan.V, d.dv, shared)

    for chunk in walk.chunks():
        shared = {}
        tpu_tile.staggered([head(chunk, h, shared) for h in range(walk.schedule.heads)], walk.schedule.lag)
    if "dinitial" in refs:

        @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
        def _():
            refs["dinitial"][0] = dstate_ref[...]


def _scalar_ddecay(tile: Tile, levels: Array, scored: Scored, d: tpu_tile.FromState) -> Array:
    """[1, C]."""
    over_keys = lambda x, dx: jnp.sum(x * dx, axis=1, keepdims=True)
    met = tpu_tile.straddling_sums(
        tile, levels, d.dscores * scored.scores, over_keys(scored.reads, d.dreads), over_keys(scored.writes, d.dwrites)
    )
    return met + jnp.sum(jnp.sum(d.dlog_total, axis=0, keepdims=True), axis=1, keepdims=True)


class _Tokens:
    """One chunk of one head: float32 [C, D] arrays, masked beyond T, read from the refs when they are asked for."""

    def __init__(self, walk: _Walk, refs: dict, chunk: int, head: int):
        self.walk, self.plan, self.refs, self.chunk, self.head = walk, walk.plan, refs, chunk, head
        self.q = self._get("q", self.plan.H, self.plan.K) * self.plan.scale
        self.k = self._get("k", self.plan.Hk, self.plan.K)

    @property
    def v(self) -> Array:
        return self._get("v", self.plan.Hv, self.plan.V, keep_dtype=True)

    @property
    def do(self) -> Array:
        return self._get("do", self.plan.H, self.plan.V, keep_dtype=True)

    def _where(self, num_heads: int, D: int, head: int | None = None):
        C, slot = self.plan.chunk, self.walk.slot(self.head, num_heads) if head is None else head
        return 0, pl.ds(self.chunk * C, C), pl.ds(slot * D, D)

    def _get(self, name: str, num_heads: int, D: int, keep_dtype: bool = False) -> Array:
        x = self.refs[name][self._where(num_heads, D)]
        if self.plan.T % self.walk.step == 0:
            return x if keep_dtype else x.astype(jnp.float32)
        dtype = x.dtype if keep_dtype else jnp.float32
        # A select, not a product: what lies beyond T may be anything.
        return jnp.where(self._exists(), x.astype(jnp.float32), 0.0).astype(dtype)

    def _exists(self) -> Array:
        start = self.walk.block(pl.program_id(2)) * self.walk.step + self.chunk * self.plan.chunk
        return start + jax.lax.broadcasted_iota(jnp.int32, (self.plan.chunk, 1), 0) < self.plan.T

    def put(self, name: str, num_heads: int, D: int, x: Array) -> None:
        ref = self.refs[name]
        ref[self._where(num_heads, D)] = x.astype(ref.dtype)

    def share(self, name: str, num_heads: int, D: int, x: Array, shared: dict) -> None:
        """Adds up the query heads that share one head, in float32, and writes after the last of this block."""
        slot = self.walk.slot(self.head, num_heads)
        members = [h for h in range(self.walk.schedule.heads) if self.walk.slot(h, num_heads) == slot]
        parts = shared.setdefault((name, slot), [])
        parts.append(x)
        if len(parts) == len(members):
            self.put(name, num_heads, D, sum(parts[1:], parts[0]))

    def put_ddecay(self, row: Array) -> None:
        self.refs["ddecay"][0, self.head, self.chunk] = row

    # own scores: what a token's read has of its own write

    def _bonus(self) -> Array | None:
        if "bonus" not in self.refs:
            return None
        return self.refs["bonus"][0, :, pl.ds(self.head * self.plan.K, self.plan.K)].astype(jnp.float32)

    def own(self) -> Array | None:
        bonus = self._bonus()
        if not self.plan.inclusive and bonus is None:
            return None
        products = self.q * self.k if bonus is None else self.q * bonus * self.k
        return jnp.sum(products, axis=1, keepdims=True)

    def add_own(self, levels: Array, dscores: Array, dq: Array, dk: Array) -> tuple[Array, Array]:
        """dq and dk with the own scores' part; the bonus's gradient adds up in its ref."""
        bonus = self._bonus()
        if bonus is None and (not self.plan.inclusive or self.plan.decay != "vector"):
            return dq, dk  # no own scores, or inside the mask
        down = jnp.sum(jnp.where(levels == 0, dscores, 0.0), axis=1, keepdims=True)
        if bonus is None:
            return dq + down * self.k, dk + down * self.q
        lanes = pl.ds(self.head * self.plan.K, self.plan.K)
        self.refs["dbonus"][0, :, lanes] += jnp.sum(down * self.q * self.k, axis=0, keepdims=True)
        return dq + down * bonus * self.k, dk + down * bonus * self.q

    # decays

    def _starts(self) -> Array | None:
        """bool [C, 1]."""
        if "starts" not in self.refs:
            return None
        return tpu_tile.column(self.refs["starts"][0, self.chunk]) > 0

    def vector(self, levels: Array) -> tuple:
        """What `tpu_tile.vector_scores` takes after the levels."""
        starts, log_decay = self._starts(), self._get("decay", self.plan.H, self.plan.K)
        if starts is not None:
            log_decay = jnp.where(starts, reference_tile.LOG_ZERO, log_decay)
        decay, total = jnp.exp(log_decay), jnp.exp(jnp.sum(log_decay, axis=0, keepdims=True))
        self.met_by_read = decay if self.plan.inclusive else None if starts is None else jnp.where(starts, 0.0, 1.0)
        return self.dq_of_reads(self.q), self.k, decay, total, self.own()

    def dq_of_reads(self, x: Array) -> Array:
        """q -> reads at the leaves, and their cotangents back: the same factor."""
        return x if self.met_by_read is None else x * self.met_by_read

    def scalar(self, tile: Tile, levels: Array):
        """Generator -> (Scored, mask [C, C], what reads and writes are multiplied with)."""
        if self.plan.decay == "none":
            mask = (levels >= 0 if self.plan.inclusive else levels > 0).astype(jnp.float32)
            read, write, total = 1.0, 1.0, 1.0
        else:
            mask, read, write, total = self._scalar_factors(tile, levels)
        yield
        scores = tpu_tile.matmul(tile, self.q, self.k, tpu_tile.NT) * mask
        if "bonus" in self.refs:
            scores = jnp.where(levels == 0, self.own(), scores)
        return Scored(scores, self.q * read, self.k * write, total), mask, read, write

    def _scalar_factors(self, tile: Tile, levels: Array):
        """(mask [C, C], read, write [C, K], total [1, 1]).

        Broadcasting a column over lanes is what this path spends most of its time on: each is made once, before the
        exponentials.
        """
        C = self.plan.chunk
        rows = self.refs["decay"][0, self.head, self.chunk]
        columns = jnp.transpose(jnp.concatenate([rows, jnp.zeros((tpu_tile.ROWS - len(rows), C), rows.dtype)]))
        wide = lambda r, lanes: Sums(*(jnp.broadcast_to(columns[:, i : i + 1], (C, lanes)) for i in (r, r + 1)))
        ends, reads = 0, len(rows) - 2  # inclusive reads meet what the state meets
        mask = tpu_tile.scalar_mask(tile, levels, wide(reads, C), Sums(rows[:1], rows[1:2]))
        last = slice(0, 1) if self.plan.reverse else slice(C - 1, C)
        coarse, fine = (rows[r : r + 1, last] for r in (0, 1))
        read, end = wide(reads, self.plan.K), wide(ends, self.plan.K)
        write = jnp.exp((coarse - end.coarse) + (fine - end.fine))
        return mask, jnp.exp(read.coarse + read.fine), write, jnp.exp(coarse + fine)
