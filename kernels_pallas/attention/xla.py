"""`attention` without Pallas: tiles with an online normaliser, memory linear in T both ways.

Queries are cut into blocks, keys and values too. The outer loop goes over query blocks, the inner one over the key
blocks that some row of the query block may see: its bounds come from `causal` and `window`, so what is fully masked is
never visited. The H / Hk query heads of a key head are rows of one tile, so no head is repeated. The forward pass keeps
the output and one number a row; the backward pass walks the same tiles and recomputes them.
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
from kernels_pallas.manual_axes import varying_like

OUT_NAME = "attention_out"
STATISTIC_NAME = "attention_lse"

# So few blocks are written out instead of looped over: about a tenth faster on a CPU at T = 256.
UNROLLED_BLOCKS = 4


class Plan(NamedTuple):
    """What of a call is static."""

    score: str
    causal: bool
    window: int | None
    soft_cap: float | None
    scale: float
    block_q: int
    block_k: int


class Inputs(NamedTuple):
    """The arrays that decide the ungated output."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T Hk K"]
    v: Float[Array, "B T Hk V"]
    sink_logits: Float[Array, "H"] | None
    segment_ids: Int[Array, "B T"] | None


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


def block_sizes(T: int) -> tuple[int, int]:
    """Queries and keys in a tile, as measured on a CPU: small ones skip more of a short sequence's triangle."""
    block = min(T, 64 if T <= 256 else 128)
    return block, block


def attention(
    q, k, v, gate, sink_logits, segment_ids,
    *, score: str, causal: bool, window: int | None, soft_cap: float | None, scale: float,
) -> Array:  # fmt: skip
    """As `api.attention`. Any T."""
    plan = Plan(score, causal, window, soft_cap, scale, *block_sizes(q.shape[1]))
    return _attention(plan, Inputs(q, k, v, sink_logits, segment_ids), gate)


def attention_step(q, k_cache, v_cache, gate, sink_logits, valid, *, soft_cap: float | None, scale: float) -> Array:
    """As `api.attention_step`: one tile, the G query heads of a key head as its rows."""
    (B, H, K), kv_heads = q.shape, k_cache.shape[2]
    score, dtype = tile.SCORES["softmax"], tile.statistics_dtype(q, k_cache, v_cache)
    k, v = jnp.moveaxis(k_cache, 2, 1), jnp.moveaxis(v_cache, 2, 1)
    s = tile.logits(q.reshape(B, kv_heads, -1, K), k, scale=scale, soft_cap=soft_cap, dtype=dtype)
    sink = jnp.full(H, -jnp.inf) if sink_logits is None else sink_logits
    sink = jnp.broadcast_to(sink.astype(dtype).reshape(kv_heads, -1), s.shape[:3])
    o, _ = score.end(score.add(score.start(sink, v.shape[-1]), tile.masked(s, valid[:, None, None]), v))
    return _gated(o.reshape(B, H, -1), gate).astype(v_cache.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(plan: Plan, inputs: Inputs, gate: Array | None) -> Array:
    o, _ = _forward(plan, inputs)
    return _gated(o, gate)


def _forward_saving(plan: Plan, inputs: Inputs, gate):
    o, statistic = _forward(plan, inputs)
    o, statistic = checkpoint_name(o, OUT_NAME), checkpoint_name(statistic, STATISTIC_NAME)
    return _gated(o, gate), (inputs, gate, o, statistic)


def _forward(plan: Plan, inputs: Inputs) -> tuple[Array, Array]:
    """The ungated output [B, T, H, V] in v's dtype, and the rows' statistic [Nq, B, Hk, R]."""
    score, dtype = tile.SCORES[plan.score], tile.statistics_dtype(*inputs[:3])
    T, V = inputs.q.shape[1], inputs.v.shape[-1]
    rows, keys = _cut(plan, inputs)
    sink = varying_like(_sink(plan, inputs, dtype), inputs.q)
    start = jax.tree.map(lambda x: varying_like(x, inputs.q), score.start(sink, V))

    def query_block(_, block: Rows):
        def visit(j, row):
            key = _take(keys, j)
            s = tile.logits(block.q, key.k, scale=plan.scale, soft_cap=plan.soft_cap, dtype=dtype)
            return score.add(row, tile.masked(s, _seen(plan, T, block, j, key)), key.v)

        o, statistic = score.end(_loop(_visits(plan, T, block.number), visit, start))
        return None, (o.astype(inputs.v.dtype), statistic)

    _, (o, statistic) = _scan(query_block, None, rows)
    return _join(o, plan.block_q, T), statistic


def _backward(plan: Plan, residuals, dy):
    inputs, gate, o, statistic = residuals
    do, dgate = _gate_gradient(dy, gate, o)
    # With y = o sigmoid(gate) this is sum(dy y) too: nothing is divided by a gate that may be 0. It is taken from do as
    # rounded for the matmuls, or else do v - delta has an error that does not cancel.
    do = do.astype(inputs.v.dtype)
    delta = jnp.sum(do.astype(statistic.dtype) * o, axis=-1, keepdims=True)
    split = partial(_split, kv_heads=inputs.k.shape[2], block=plan.block_q)
    do, delta = split(do), split(delta)[..., 0]
    dq, dk, dv = _tile_gradients(plan, inputs, do, statistic, delta)
    dsink = None if inputs.sink_logits is None else _sink_gradient(plan, inputs, statistic, delta)
    return Inputs(dq, dk, dv, dsink, None), dgate


_attention.defvjp(_forward_saving, _backward)


def _tile_gradients(plan: Plan, inputs: Inputs, do: Array, statistic: Array, delta: Array) -> tuple[Array, ...]:
    """(dq, dk, dv), as q, k and v are. Each tile is visited once; dk and dv are added up in place."""
    score, dtype, T = tile.SCORES[plan.score], statistic.dtype, inputs.q.shape[1]
    rows, keys = _cut(plan, inputs)

    zeros = lambda x: varying_like(jnp.zeros(x.shape, dtype), x)

    def query_block(dkv, xs):
        block, do, statistic, delta = xs

        def visit(j, carry):
            dq, dk, dv = carry
            key = _take(keys, j)
            dq_j, dk_j, dv_j = tile.gradients(
                score, block.q, key.k, key.v, do, statistic, delta, _seen(plan, T, block, j, key),
                scale=plan.scale, soft_cap=plan.soft_cap,
            )  # fmt: skip
            return dq + dq_j, _add_at(dk, j, dk_j), _add_at(dv, j, dv_j)

        dq, *dkv = _loop(_visits(plan, T, block.number), visit, (zeros(block.q), *dkv))
        return tuple(dkv), (plan.scale * dq).astype(block.q.dtype)

    (dk, dv), dq = _scan(query_block, (zeros(keys.k), zeros(keys.v)), (rows, do, statistic, delta))
    dk, dv = (_join(x, plan.block_k, T) for x in (plan.scale * dk, dv))
    return _join(dq, plan.block_q, T), dk.astype(inputs.k.dtype), dv.astype(inputs.v.dtype)


def _sink_gradient(plan: Plan, inputs: Inputs, statistic: Array, delta: Array) -> Array:
    """[H]. A sink is a key whose value is 0, so its dp is 0: db = -sum over rows of exp(b - lse) delta."""
    score, sink = tile.SCORES[plan.score], _sink(plan, inputs, statistic.dtype)
    p = score.weights(sink[..., None], statistic)[..., 0]
    ds = score.logit_gradient(p[..., None], jnp.zeros_like(p)[..., None], delta)[..., 0]
    ds = ds.reshape(*ds.shape[:3], -1, plan.block_q)
    return jnp.sum(ds, axis=(0, 1, 4)).reshape(-1).astype(inputs.sink_logits.dtype)


def _gated(o: Array, gate: Array | None) -> Array:
    return o if gate is None else (o * _open(gate)).astype(o.dtype)


def _gate_gradient(dy: Array, gate: Array | None, o: Array) -> tuple[Array, Array | None]:
    """do, in the statistics' dtype, and dgate = dy o g (1 - g), summed over V for a head-wise gate."""
    dy = dy.astype(tile.statistics_dtype(dy))
    if gate is None:
        return dy, None
    g = _open(gate)
    dgate = dy * o * g * (1 - g)
    dgate = dgate if gate.shape == o.shape else jnp.sum(dgate, axis=-1, keepdims=True)
    return dy * g, dgate.astype(gate.dtype)


def _open(gate: Array) -> Array:
    """The sigmoid, in float32."""
    return jax.nn.sigmoid(gate.astype(tile.statistics_dtype(gate)))


def _cut(plan: Plan, inputs: Inputs) -> tuple[Rows, Keys]:
    q, k, v, _, segments = inputs
    kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    row_segments = key_segments = None
    if segments is not None:
        row_segments, key_segments = (
            _split(segments[..., None, None], 1, block)[..., 0] for block in (plan.block_q, plan.block_k)
        )
        row_segments = jnp.tile(row_segments, group)
    q, k, v = _split(q, kv_heads, plan.block_q), _split(k, kv_heads, plan.block_k), _split(v, kv_heads, plan.block_k)
    return Rows(np.arange(q.shape[0], dtype=np.int32), q, row_segments), Keys(k, v, key_segments)


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


def _sink(plan: Plan, inputs: Inputs, dtype) -> Float[Array, "B Hk R"]:
    """The sink logit of every row of a tile; -inf without sinks."""
    B, _, H, _ = inputs.q.shape
    sink = jnp.full(H, -jnp.inf) if inputs.sink_logits is None else inputs.sink_logits
    sink = jnp.repeat(sink.astype(dtype).reshape(inputs.k.shape[2], -1), plan.block_q, axis=1)
    return jnp.broadcast_to(sink, (B, *sink.shape))


def _visits(plan: Plan, T: int, number) -> tuple:
    """The first key block of which query block `number` sees something, and the one after the last."""
    larger, smaller = (max, min) if isinstance(number, int) else (jnp.maximum, jnp.minimum)
    first, end = number * plan.block_q, (number + 1) * plan.block_q  # of the block's rows
    least, most = 0, T  # of the keys that they see
    if plan.window is not None:
        least, most = larger(first - plan.window + 1, 0), smaller(end + plan.window - 1, T)
    if plan.causal:
        most = smaller(end, T)
    return least // plan.block_k, -(-most // plan.block_k)


def _seen(plan: Plan, T: int, rows: Rows, j, keys: Keys) -> Bool[Array, "*B_1 R C"]:
    """The mask of a tile: one query block against key block `j`."""
    queries = rows.number * plan.block_q + jnp.arange(rows.q.shape[-2]) % plan.block_q
    positions = j * plan.block_k + jnp.arange(plan.block_k)
    return tile.visible(
        queries, positions, length=T, causal=plan.causal, window=plan.window,
        row_segments=rows.segments, key_segments=keys.segments,
    )  # fmt: skip


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
