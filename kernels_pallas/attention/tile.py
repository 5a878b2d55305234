"""The mathematics of one tile of attention: R query rows against C keys, as pure functions of arrays.

Leading axes (`...`, batch and heads, or none inside a kernel) are carried along. What differs between machines is which
tiles are visited and in what order; the formulas are these. Statistics and accumulators have `statistics_dtype`.

A score ("softmax" is the one known so far) is an entry of `SCORES`: what a tile adds to a row, what a row keeps between
tiles, how it ends, and what the logits' gradient is.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


def statistics_dtype(*inputs: Array) -> jnp.dtype:
    """Float32, or float64 if an input is float64."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*inputs))


def matmul(subscripts: str, x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """An einsum of two operands, accumulated and returned in `dtype`.

    Both go in with the narrower of their dtypes: a 16-bit operand keeps the other at 16 bits, as matmul units want.
    Float32 operands are multiplied in float32 on machines where that is not the default (TF32, one bfloat16 pass).
    """
    narrow = min(x.dtype, y.dtype, key=lambda d: d.itemsize)
    precision = "highest" if narrow.itemsize > 2 else None
    return jnp.einsum(subscripts, x.astype(narrow), y.astype(narrow), precision=precision, preferred_element_type=dtype)


def visible(
    rows: Array, keys: Array, *, length: int, causal: bool, window: int | None, row_segments=None, key_segments=None
) -> Array:
    """bool [..., R, C]: which keys a row may see. Positions rows [R], keys [C]; segments [..., R] and [..., C].

    With `window` w, i sees i-w < j <= i, and |i-j| < w without `causal`. Keys at `length` and beyond are padding.
    """
    distance = rows[:, None] - keys[None, :]
    seen = (keys < length)[None, :]
    if causal:
        seen = seen & (distance >= 0)
    if window is not None:
        seen = seen & (jnp.abs(distance) < window)
    if row_segments is not None:
        seen = seen & (row_segments[..., :, None] == key_segments[..., None, :])
    return seen


def logits(q: Array, k: Array, *, scale: float, soft_cap: float | None, dtype: jnp.dtype) -> Array:
    """[..., R, C]: scale q k^T, then c tanh(. / c) with `soft_cap` c. Before the mask."""
    s = matmul("...rk,...ck->...rc", q, k, dtype) * scale
    return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)


def masked(s: Array, seen: Array) -> Array:
    return jnp.where(seen, s, -jnp.inf)


class Score(NamedTuple):
    """One rule that turns masked logits into weights.

    start(sink [..., R], V): what a row keeps, before any tile. `sink` is -inf where there is none.
    add(row, s [..., R, C], v [..., C, V]): the row after a tile; s is -inf where masked.
    end(row): (o [..., R, V], statistic [..., R]). The statistic is all that the backward pass needs of a row.
    weights(s, statistic): [..., R, C], the final weights of a tile.
    logit_gradient(p, dp, delta): [..., R, C] from weights p, their cotangent dp and delta [..., R] = sum_V do o.
    """

    start: Callable
    add: Callable
    end: Callable
    weights: Callable
    logit_gradient: Callable


class SoftmaxRow(NamedTuple):
    """The online normaliser: running maximum, sum of exp(s - m) and sum of exp(s - m) v (Milakov, arXiv 1805.02867)."""

    m: Array
    l: Array
    acc: Array


def _softmax_start(sink: Array, V: int) -> SoftmaxRow:
    # A sink is a key without a value: it opens the row as its maximum, with weight 1. exp(-inf) = 0: no sink.
    return SoftmaxRow(sink, jnp.isfinite(sink).astype(sink.dtype), jnp.zeros((*sink.shape, V), sink.dtype))


def _softmax_add(row: SoftmaxRow, s: Array, v: Array) -> SoftmaxRow:
    m = jnp.maximum(row.m, jnp.max(s, axis=-1))
    shift = _finite(m)
    p = jnp.exp(s - shift[..., None])
    keep = jnp.exp(row.m - shift)
    acc = keep[..., None] * row.acc + matmul("...rc,...cv->...rv", p, v, s.dtype)
    return SoftmaxRow(m, keep * row.l + jnp.sum(p, axis=-1), acc)


def _softmax_end(row: SoftmaxRow) -> tuple[Array, Array]:
    """o and the logarithm of the normaliser; a row that saw nothing has l = 0 and ends as zeros, with -inf."""
    o = row.acc / jnp.where(row.l == 0, 1, row.l)[..., None]
    return o, row.m + jnp.log(row.l)


def _softmax_weights(s: Array, lse: Array) -> Array:
    return jnp.exp(s - _finite(lse)[..., None])


def _softmax_logit_gradient(p: Array, dp: Array, delta: Array) -> Array:
    return p * (dp - delta[..., None])


def _finite(m: Array) -> Array:
    """0 where a row has seen nothing, so that -inf - m stays -inf and is no NaN."""
    return jnp.where(m == -jnp.inf, 0, m)


SCORES = {"softmax": Score(_softmax_start, _softmax_add, _softmax_end, _softmax_weights, _softmax_logit_gradient)}


def gradients(
    score: Score, q: Array, k: Array, v: Array, do: Array, statistic: Array, delta: Array, seen: Array | None,
    *, scale: float, soft_cap: float | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """What a tile adds to (dq, dk, dv), recomputed from its inputs and the rows' statistic. dq and dk lack `scale`.

    Whoever adds the tiles up multiplies by `scale` once, at the end.
    """
    dtype = statistic.dtype
    dot = partial(matmul, dtype=dtype)
    s = logits(q, k, scale=scale, soft_cap=soft_cap, dtype=dtype)
    p = score.weights(s if seen is None else masked(s, seen), statistic)
    dv = dot("...rc,...rv->...cv", p, do)
    ds = score.logit_gradient(p, dot("...rv,...cv->...rc", do, v), delta)
    if soft_cap is not None:
        ds = ds * (1 - (s / soft_cap) ** 2)
    return dot("...rc,...ck->...rk", ds, k), dot("...rc,...rk->...ck", ds, q), dv
