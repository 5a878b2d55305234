"""One decoding step of `attention` on GPU, the cache split over its length: every slot is read once.

A program takes a part of the slots of one key head, with the query heads of its group as the rows of a tile, and leaves
its sums and what the normalizer keeps of a row. These are small beside the cache: XLA merges them, ends the rows and gates.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels_pallas.attention import xla
from kernels_pallas.attention.gpu import plan, tile
from kernels_pallas.attention.gpu.op import matmuls, operands, power_of_two, unsupported_arrays
from kernels_pallas.attention.gpu.plan import Plan
from kernels_pallas.attention.gpu.tuning import STEP, STEP_PROGRAMS, Schedule
from kernels_pallas.attention.gpu.tuning import step as tuning_step
from kernels_pallas.attention.inputs import StepInputs, StepOptions
from kernels_pallas.common.mesh import by_rows_and_heads, like
from kernels_pallas.common.padding import padded


def unsupported(inputs: StepInputs, options: StepOptions) -> str | None:
    """Why this backend cannot take a call of `attention_step`, or None when it can."""
    return unsupported_arrays(inputs.q, inputs.k_cache, inputs.v_cache, options.normalizer)


def attention_step(inputs: StepInputs, options: StepOptions, *, interpret: bool = False) -> Array:
    """As `api.attention_step`, with every default filled in."""
    letters = ("bh.", "b.h.", "b.h.", "bh.", "h", "h", "b.", "b.")
    part = lambda *parts: (_step((options, interpret), parts[:6], parts[6:]),)
    heads = math.gcd(inputs.q.shape[1], inputs.k_cache.shape[2])
    return by_rows_and_heads(part, inputs, letters, ("bh.",), heads)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _step(options: tuple, floats: tuple, slots: tuple) -> Array:
    (normalizer, logits_soft_cap, scale), interpret = options
    q, k, v, gate, sinks, slopes = floats
    (B, H, K), (_, S, Hk, V), (valid, distances) = q.shape, v.shape, slots
    operand, precision = operands(interpret, matmuls(q, k, v))
    wide = power_of_two(K), power_of_two(V)
    cut = tuning_step(*wide)
    plan = Plan(
        normalizer=normalizer,
        causal=False,
        window=None,
        logits_soft_cap=logits_soft_cap,
        scale=scale,
        T=S,
        length=S,
        H=H,
        Hk=Hk,
        K=wide[0],
        V=wide[1],
        gate="none",
        segments=False,
        slopes=slopes is not None,
        operand=operand,
        precision=precision,
        out_dtype=jnp.dtype(v.dtype),
        schedule=Schedule(cut, cut, cut),
        interpret=interpret,
    )
    num_rows = rows(H // Hk)
    by_head = lambda x: (
        None if x is None else padded(x.astype(jnp.float32).reshape(Hk, -1), 1, num_rows)
    )
    queries = padded(padded(q.reshape(B, Hk, -1, K), 2, num_rows), 3, plan.K)
    distances = None if distances is None else distances.astype(jnp.int32)
    o = step(plan, queries, k, v, by_head(sinks), by_head(slopes), valid, distances)
    o = o[:, :, : H // Hk, :V].reshape(B, H, V)
    return (o if gate is None else o * jax.nn.sigmoid(gate.astype(jnp.float32))).astype(v.dtype)


def _step_saving(options: tuple, floats: tuple, slots: tuple):
    return _step(options, floats, slots), (floats, slots)


def _step_backward(options: tuple, residuals, dy: Array):
    """Nobody trains by decoding: the gradients are XLA's."""
    floats, slots = residuals
    again = lambda floats: xla.attention_step(StepInputs(*floats, *slots), options[0])
    return (*jax.vjp(again, floats)[1](dy), None)


_step.defvjp(_step_saving, _step_backward)


def step(p: Plan, q, k_cache, v_cache, sinks, slopes, valid, distances) -> Array:
    """The ungated o [B, Hk, R, V] float32, R rows of which the group's heads are the first.

    q [B, Hk, R, K], sinks and slopes [Hk, R] or None, valid bool [B, S], distances int [B, S]. p: p.T is S.
    """
    (B, Hk, R, K), (V, S) = q.shape, (v_cache.shape[3], p.T)
    cut, normalizer = p.schedule.forward, p.normalizer
    parts, blocks = split(B * Hk, -(-S // cut.other))
    slots = lambda a: (a, None if a is None else plan.by_batch(a))
    heads = lambda a: (a, None if a is None else plan.whole(a))
    cache = lambda a: (a, pl.BlockSpec((None, S, None, a.shape[3]), lambda n, h, b: (b, 0, h, 0)))
    ins = {
        "q": (q, pl.BlockSpec((None, None, R, K), lambda n, h, b: (b, h, 0, 0))),
        "k": cache(k_cache),
        "v": cache(v_cache),
        "valid": slots(valid.astype(jnp.int32)),
        "sinks": heads(sinks),
        "slopes": heads(slopes),
        "distances": slots(distances),
    }

    def part(*shape):
        spec = pl.BlockSpec(
            (None, None, None, *shape), lambda n, h, b: (b, h, n, *[0] * len(shape))
        )
        return like(q, (B, Hk, parts, *shape), jnp.float32), spec

    kept = len(jax.eval_shape(normalizer.start, jax.ShapeDtypeStruct((R, 1), jnp.float32)))
    outs = {f"sum{n}": part(R, p.V) for n in range(normalizer.sums)} | {
        f"row{n}": part(R) for n in range(kept)
    }
    cost = dict(
        flops=2 * B * p.H * S * (k_cache.shape[3] + normalizer.sums * V), exponentials=B * p.H * S
    )
    kernel = partial(_kernel, p, blocks)
    out = plan.call(p, kernel, cut, (parts, Hk, B), ins, outs, "attention_step", **cost)
    first = lambda name: jnp.moveaxis(out[name], 2, 0)
    row = tuple(first(f"row{n}")[..., None] for n in range(kept))
    outputs, _ = normalizer.finish(
        *normalizer.merge(row, [first(f"sum{n}") for n in range(normalizer.sums)])
    )
    return outputs[0]


def split(heads: int, blocks: int) -> tuple[int, int]:
    """(parts of a cache, blocks of slots in each): as many parts as fill the chip, with `heads` programs a part."""
    each = -(-blocks // min(blocks, max(1, STEP_PROGRAMS // heads)))
    return -(-blocks // each), each


def rows(group: int) -> int:
    """Of a tile."""
    return max(STEP.own, 1 << (group - 1).bit_length())


def _kernel(
    p: Plan, blocks: int, q, k, v, valid, sinks=None, slopes=None, distances=None, **parts
) -> None:
    normalizer, C, (R, _) = p.normalizer, p.schedule.forward.other, q.shape
    n, h = pl.program_id(0), pl.program_id(1)
    row, zero = lax.iota(jnp.int32, R), jnp.zeros((R, 1), jnp.float32)
    queries = plan.load(q, row, p.K)
    of_rows = lambda ref: pltriton.load(ref.at[h, row])[:, None]
    slope = None if slopes is None else of_rows(slopes)

    def visit(j, carry):
        kept, sums = carry
        at = plan.block(j, C)
        inside = at < p.T
        seen = pltriton.load(valid.at[at], mask=inside, other=0)[None, :] != 0
        apart = (
            None
            if distances is None
            else pltriton.load(distances.at[at], mask=inside, other=0)[None, :]
        )
        s = tile.logits(p, queries, _slots(k, at, inside, p.K), slope, apart).s
        kept, keep, weights = normalizer.add(kept, s, seen, at[None, :])
        values = _slots(v, at, inside, p.V)
        sums = sums if keep is None else [keep * x for x in sums]
        return kept, [x + tile.matmul(p, w, values) for x, w in zip(sums, weights)]

    # A sink has its place in one part only.
    sink = None if sinks is None else jnp.where(n == 0, of_rows(sinks), -jnp.inf)
    start = normalizer.start(zero, (), sink), [jnp.zeros((R, p.V), jnp.float32)] * normalizer.sums
    end = jnp.minimum((n + 1) * blocks, -(-p.T // C))
    kept, sums = lax.fori_loop(n * blocks, end, visit, start)
    for i, x in enumerate(sums):
        plan.store(parts[f"sum{i}"], row, x)
    for i, x in enumerate(kept):
        pltriton.store(parts[f"row{i}"].at[row], x.reshape(R))


def _slots(ref, at: Array, inside: Array, width: int) -> Array:
    """[slots, width] of a cache as it lies in memory: nothing of it is copied to be padded."""
    S, D = ref.shape
    column = lax.iota(jnp.int32, width)
    place = ref.at[at[:, None], column[None, :]]
    if S % len(at) == 0 and width == D:
        return pltriton.load(place)
    return pltriton.load(place, mask=inside[:, None] & (column < D)[None, :], other=0)
