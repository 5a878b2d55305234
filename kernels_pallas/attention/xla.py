"""`attention` without Pallas: tiles with an online normalizer, memory linear in T both ways.

Queries are cut into blocks, keys and values too. The outer loop goes over query blocks, the inner one over the key
blocks that some row of the query block may see: its bounds come from `causal` and `window`, so what is fully masked is
never visited. The H / Hk query heads of a key head are rows of one tile, so no head is repeated. The forward pass keeps
the output and a few numbers a row; the backward pass walks the same tiles and recomputes them.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from kernels_pallas.attention import tile
from kernels_pallas.attention.normalizers.base import Normalizer, Row
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.opaque import opaque

OUT_NAME = "attention_out"
STATISTIC_NAME = "attention_lse"

# So few blocks are written out instead of looped over: about a tenth faster on a CPU at T = 256.
UNROLLED_BLOCKS = 4


class Plan(NamedTuple):
    """What of a call is static."""

    normalizer: Normalizer
    causal: bool
    window: int | None
    logits_soft_cap: float | None
    scale: float
    block_q: int
    block_k: int


class Inputs(NamedTuple):
    """The arrays that decide the ungated output. T queries against S keys; query i stands at position first + i."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B S Hk K"]
    v: Float[Array, "B S Hk V"]
    sink_logits: Float[Array, "H"] | None = None
    alibi_slopes: Float[Array, "H"] | None = None
    q_segments: Int[Array, "B T"] | None = None
    k_segments: Int[Array, "B S"] | None = None
    first: Int[Array, ""] | None = None  # 0 if None
    # of keys in no order from a single query, for slopes
    distances: Int[Array, "B S"] | None = None


class Rows(NamedTuple):
    """Query blocks, Nq of them: R = G block_q rows, the G = H / Hk heads of a key head one after another."""

    number: Int[Array, "Nq"]
    q: Float[Array, "Nq B Hk R K"]
    segments: Int[Array, "Nq B 1 R"] | None


class Keys(NamedTuple):
    """Key blocks, Nk of them: C = block_k keys."""

    k: Float[Array, "Nk B Hk C K"]
    v: Float[Array, "Nk B Hk C V"]
    segments: Int[Array, "Nk B 1 C"] | None
    distances: Int[Array, "Nk B 1 C"] | None


class Shared(NamedTuple):
    """What the rows of every query block have in common: a sink and a slope by head, and zeros [B, Hk, R, 1]."""

    zero: Array
    sink: Array | None
    slopes: Array | None


def block_sizes(T: int) -> tuple[int, int]:
    """Queries and keys in a tile, as measured on a CPU: small ones skip more of a short sequence's triangle."""
    block = min(T, 64 if T <= 256 else 128)
    return block, block


def attention(
    q,
    k,
    v,
    gate_logits,
    sink_logits,
    alibi_slopes,
    segment_ids,
    *,
    first=None,
    key_segment_ids=None,
    **options,
) -> Array:
    """As `api.attention`. Any T. For a part of the queries: `first` is the position of its first one."""
    plan = Plan(block_q=block_sizes(q.shape[1])[0], block_k=block_sizes(k.shape[1])[1], **options)
    key_segments = segment_ids if key_segment_ids is None else key_segment_ids
    return _attention(
        plan,
        Inputs(q, k, v, sink_logits, alibi_slopes, segment_ids, key_segments, first),
        gate_logits,
    )


def attention_step(
    q, k_cache, v_cache, gate_logits, sink_logits, alibi_slopes, valid, distances, **options
) -> Array:
    """As `api.attention_step`: one tile, the G query heads of a key head as its rows."""
    plan = Plan(causal=False, window=None, block_q=1, block_k=k_cache.shape[1], **options)
    own, others = jnp.zeros_like(valid[:, :1], jnp.int32), jnp.where(valid, 0, 1)
    inputs = Inputs(
        q[:, None], k_cache, v_cache, sink_logits, alibi_slopes, own, others, None, distances
    )
    return _attention(plan, inputs, None if gate_logits is None else gate_logits[:, None])[:, 0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, inputs: Inputs, gate_logits: Array | None) -> Array:
    outputs, _ = _forward(plan, inputs)
    return _gated(outputs[0], gate_logits).astype(inputs.v.dtype)


def _forward_saving(plan: Plan, inputs: Inputs, gate_logits):
    outputs, saved = _forward(plan, inputs)
    outputs = tuple(checkpoint_name(o, OUT_NAME) for o in outputs)
    saved = tuple(checkpoint_name(x, STATISTIC_NAME) for x in saved)
    return _gated(outputs[0], gate_logits).astype(inputs.v.dtype), (
        inputs,
        gate_logits,
        outputs,
        saved,
    )


def _forward(plan: Plan, inputs: Inputs) -> tuple[tuple[Array, ...], Row]:
    """The normalizer's outputs [B, T, H, V], ungated, and what it saves of rows [Nq, B, Hk, R, 1]; not rounded to 16 bits.

    Kept in bfloat16, o would bring most of the error of dq, through deltas, and half of that of the gate's gradient.
    """
    inputs = opaque(inputs)
    normalizer, (T, V) = plan.normalizer, (inputs.q.shape[1], inputs.v.shape[-1])
    rows, keys = _cut(plan, inputs)
    shared = _shared(plan, inputs)

    def query_block(_, block: Rows):
        visits = _visits(plan, inputs.k.shape[1], _first_row(plan, inputs, block.number))
        tile_of = partial(_masked_logits, plan, inputs, shared, block)
        walk = lambda start, add: _loop(
            visits, lambda j, row: add(row, *tile_of(j, _take(keys, j))), start
        )

        def visit(j, carry):
            row, sums = carry
            key = _take(keys, j)
            row, keep, weights = normalizer.add(row, *tile_of(j, key))
            kept = sums if keep is None else [keep * x for x in sums]
            added = [
                tile.matmul("...rc,...cv->...rv", w, key.v, shared.zero.dtype) for w in weights
            ]
            return row, [x + y for x, y in zip(kept, added)]

        row = normalizer.start(shared.zero, normalizer.prepare(walk, shared.zero), shared.sink)
        sums = [jnp.broadcast_to(shared.zero, (*shared.zero.shape[:-1], V))] * normalizer.sums
        outputs, saved = normalizer.finish(*_loop(visits, visit, (row, sums)))
        return None, ([o for n, o in enumerate(outputs) if n == 0 or n in normalizer.deltas], saved)

    _, (outputs, saved) = _scan(query_block, None, rows)
    return tuple(_join(o, plan.block_q, T) for o in outputs), saved


def _backward(plan: Plan, residuals, dy):
    inputs, gate_logits, outputs, saved = residuals
    inputs, dy = opaque((inputs, dy))
    do, dgate = _gate_gradient(dy, gate_logits, outputs[0])
    # With y = o sigmoid(gate_logits), sum(do o) is sum(dy y): nothing is divided by a gate that may be 0.
    # The outputs kept are those of `normalizer.deltas`, after o.
    wanted = outputs if 0 in plan.normalizer.deltas else outputs[1:]
    deltas = [jnp.sum(do * o, axis=-1, keepdims=True) for o in wanted]
    split = partial(_split, kv_heads=inputs.k.shape[2], block=plan.block_q)
    do, deltas = split(do), [split(x) for x in deltas]
    return _tile_gradients(plan, inputs, do, saved, deltas), dgate


_attention.defvjp(_forward_saving, _backward)


def _tile_gradients(
    plan: Plan, inputs: Inputs, do: Array, saved: Row, deltas: list[Array]
) -> Inputs:
    """The gradients of `inputs`. Each tile is visited once; dk and dv are added up in place."""
    shared = _shared(plan, inputs)
    dtype = shared.zero.dtype
    rows, keys = _cut(plan, inputs)
    zeros = lambda x: varying_like(jnp.zeros(x.shape, dtype), x)
    no_slopes = None if shared.slopes is None else shared.zero

    def query_block(dkv, xs):
        block, do, saved, deltas = xs

        def visit(j, carry):
            dq, dslopes, dk, dv = carry
            key = _take(keys, j)
            seen, positions, distances = _mask(plan, inputs, block, j, key)
            new = tile.gradients(
                plan.normalizer,
                block.q,
                key.k,
                key.v,
                do,
                saved,
                deltas,
                seen,
                positions,
                scale=plan.scale,
                logits_soft_cap=plan.logits_soft_cap,
                dtype=dtype,
                slopes=shared.slopes,
                distances=distances,
            )
            dslopes = None if dslopes is None else dslopes + new.dslopes
            return dq + new.dq, dslopes, _add_at(dk, j, new.dk), _add_at(dv, j, new.dv)

        visits = _visits(plan, inputs.k.shape[1], _first_row(plan, inputs, block.number))
        dq, dslopes, *dkv = _loop(visits, visit, (zeros(block.q), no_slopes, *dkv))
        return tuple(dkv), ((plan.scale * dq).astype(block.q.dtype), dslopes)

    (dk, dv), (dq, dslopes) = _scan(
        query_block, (zeros(keys.k), zeros(keys.v)), (rows, do, saved, deltas)
    )
    dk, dv = (_join(x, plan.block_k, inputs.k.shape[1]) for x in (plan.scale * dk, dv))
    dsink = (
        None if shared.sink is None else plan.normalizer.sink_gradient(shared.sink, deltas, saved)
    )
    by_head = lambda x, like: (
        None if x is None else _sum_by_head(x, plan.block_q).astype(like.dtype)
    )
    return Inputs(
        _join(dq, plan.block_q, inputs.q.shape[1]),
        dk.astype(inputs.k.dtype),
        dv.astype(inputs.v.dtype),
        by_head(dsink, inputs.sink_logits),
        by_head(dslopes, inputs.alibi_slopes),
    )


def _gated(o: Array, gate_logits: Array | None) -> Array:
    return o if gate_logits is None else o * _open(gate_logits)


def _gate_gradient(dy: Array, gate_logits: Array | None, o: Array) -> tuple[Array, Array | None]:
    """do, in the statistics' dtype, and dgate = dy o g (1 - g), summed over V for a head-wise gate."""
    dy = dy.astype(tile.statistics_dtype(dy))
    if gate_logits is None:
        return dy, None
    g = _open(gate_logits)
    dgate = dy * o * g * (1 - g)
    dgate = dgate if gate_logits.shape == o.shape else jnp.sum(dgate, axis=-1, keepdims=True)
    return dy * g, dgate.astype(gate_logits.dtype)


def _open(gate_logits: Array) -> Array:
    """The sigmoid, in float32."""
    return jax.nn.sigmoid(gate_logits.astype(tile.statistics_dtype(gate_logits)))


def _cut(plan: Plan, inputs: Inputs) -> tuple[Rows, Keys]:
    q, k, v, kv_heads, group = (
        *inputs[:3],
        inputs.k.shape[2],
        inputs.q.shape[2] // inputs.k.shape[2],
    )
    cut = lambda x, block: None if x is None else _split(x[..., None, None], 1, block)[..., 0]
    row_segments, key_segments = (
        cut(inputs.q_segments, plan.block_q),
        cut(inputs.k_segments, plan.block_k),
    )
    if row_segments is not None:
        row_segments = jnp.tile(row_segments, group)
    q, k, v = (
        _split(q, kv_heads, plan.block_q),
        _split(k, kv_heads, plan.block_k),
        _split(v, kv_heads, plan.block_k),
    )
    rows = Rows(np.arange(q.shape[0], dtype=np.int32), q, row_segments)
    return rows, Keys(k, v, key_segments, cut(inputs.distances, plan.block_k))


def _split(x: Array, kv_heads: int, block: int) -> Array:
    """[B, T, H, D] -> [N, B, Hk, G block, D], zeros at the end."""
    B, T, H, D = x.shape
    x = jnp.pad(x, ((0, 0), (0, -T % block), (0, 0), (0, 0)))
    x = x.reshape(B, -1, block, kv_heads, H // kv_heads, D).transpose(1, 0, 3, 4, 2, 5)
    return x.reshape(*x.shape[:3], -1, D)


def _join(x: Array, block: int, T: int) -> Array:
    """[N, B, Hk, G block, D] -> [B, T, H, D]."""
    N, B, kv_heads, _, D = x.shape
    x = x.reshape(N, B, kv_heads, -1, block, D).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(B, N * block, -1, D)[:, :T]


def _shared(plan: Plan, inputs: Inputs) -> Shared:
    (B, _, H, _), kv_heads = inputs.q.shape, inputs.k.shape[2]
    dtype, R = tile.statistics_dtype(*inputs[:3]), plan.block_q * H // kv_heads
    varying = lambda x: varying_like(jnp.broadcast_to(x, (B, kv_heads, R, 1)), inputs.q)
    by_row = lambda x: jnp.repeat(x.astype(dtype).reshape(kv_heads, -1), plan.block_q, axis=1)[
        ..., None
    ]
    of_heads = lambda x: None if x is None else varying(by_row(x))
    return Shared(
        varying(jnp.zeros((), dtype)), of_heads(inputs.sink_logits), of_heads(inputs.alibi_slopes)
    )


def _sum_by_head(x: Float[Array, "Nq B Hk R 1"], block_q: int) -> Float[Array, "H"]:
    return jnp.sum(x.reshape(*x.shape[:3], -1, block_q), axis=(0, 1, 4)).reshape(-1)


def _first_row(plan: Plan, inputs: Inputs, number):
    """The position of a query block's first row; a Python number where the block's is."""
    return number * plan.block_q if inputs.first is None else inputs.first + number * plan.block_q


def _visits(plan: Plan, length: int, first) -> tuple:
    """The first key block (of `length` keys) that a query block from row `first` on sees; and one after the last."""
    larger, smaller = (max, min) if isinstance(first, int) else (jnp.maximum, jnp.minimum)
    end, least, most = first + plan.block_q, 0, length
    if plan.window is not None:
        least, most = larger(first - plan.window + 1, 0), smaller(end + plan.window - 1, length)
    if plan.causal:
        most = smaller(end, length)
    return least // plan.block_k, -(-most // plan.block_k)


def _masked_logits(
    plan: Plan, inputs: Inputs, shared: Shared, rows: Rows, j, keys: Keys
) -> tuple[Array, ...]:
    """(s, seen, positions) of a tile: what a normalizer is told."""
    seen, positions, distances = _mask(plan, inputs, rows, j, keys)
    s, _ = tile.logits(
        rows.q,
        keys.k,
        scale=plan.scale,
        logits_soft_cap=plan.logits_soft_cap,
        dtype=shared.zero.dtype,
        slopes=shared.slopes,
        distances=distances,
    )
    return s, seen, positions


def _mask(
    plan: Plan, inputs: Inputs, rows: Rows, j, keys: Keys
) -> tuple[Bool[Array, "*B_1 R C"], Array, Array]:
    """One query block against key block `j`: the mask, the keys' positions [1, C], distances."""
    queries = _first_row(plan, inputs, rows.number) + jnp.arange(rows.q.shape[-2]) % plan.block_q
    positions = j * plan.block_k + jnp.arange(plan.block_k)
    seen = tile.visible(
        queries,
        positions,
        length=inputs.k.shape[1],
        causal=plan.causal,
        window=plan.window,
        row_segments=rows.segments,
        key_segments=keys.segments,
    )
    distances = None
    if inputs.alibi_slopes is not None:
        dtype = tile.statistics_dtype(rows.q)
        apart = (
            tile.distance(queries, positions, dtype)
            if keys.distances is None
            else keys.distances[..., None, :]
        )
        distances = apart.astype(dtype)
    return seen, positions[None, :], distances


def _scan(body: Callable, carry, xs):
    """`lax.scan`; a few blocks are written out, with Python numbers as their indices."""
    blocks = jax.tree.leaves(xs)[0].shape[0]
    if blocks > UNROLLED_BLOCKS:
        return jax.lax.scan(body, carry, xs)
    ys = []
    for i in range(blocks):
        carry, y = body(carry, _take(xs, i))
        ys.append(y)
    return carry, jax.tree.map(lambda *y: jnp.stack(y), *ys)


def _loop(visits: tuple, body: Callable, carry):
    """body(j, carry) for each j of the visits; written out where they are Python numbers."""
    first, end = visits
    if not (isinstance(first, int) and isinstance(end, int) and end - first <= UNROLLED_BLOCKS):
        return jax.lax.fori_loop(first, end, body, carry)
    for j in range(first, end):
        carry = body(j, carry)
    return carry


def _take(blocks, i):
    """Block `i` of every array; the block numbers, which numpy holds, stay static where `i` is."""
    take = lambda x: int(x[i]) if isinstance(x, np.ndarray) else x[i]
    return jax.tree.map(take, blocks)


def _add_at(x: Array, i, y: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, x[i] + y, i, 0)
