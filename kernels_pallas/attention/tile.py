"""The mathematics of one tile of attention: R query rows against C keys, as pure functions of arrays.

Leading axes (`...`, batch and heads, or none inside a kernel) are carried along. What differs between machines is which
tiles are visited and in what order; the formulas are these, and those that turn logits into weights: `normalizers/base.py`.
Statistics and accumulators have `statistics_dtype`.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention.normalizers.base import Normalizer, Row


def statistics_dtype(*inputs: Array) -> jnp.dtype:
    """Float32, or float64 if an input is float64."""
    return jnp.promote_types(jnp.float32, jnp.result_type(*inputs))


def matmul(subscripts: str, x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """An einsum of two operands, accumulated and returned in `dtype`.

    Two of 16 bits are multiplied as such. One of 16 bits with one of 32 takes part in float32 at the machine's default
    precision: exact on a CPU, TF32 on a GPU, rounded to bfloat16 by a TPU. Two of 32 bits are multiplied in float32
    everywhere.
    """
    precision = "highest" if min(x.dtype.itemsize, y.dtype.itemsize) > 2 else None
    if x.dtype != y.dtype:
        x, y = (z.astype(jnp.promote_types(x.dtype, y.dtype)) for z in (x, y))
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=dtype)


def visible(
    rows: Array,
    keys: Array,
    *,
    length: int,
    causal: bool,
    window: int | None,
    row_segments=None,
    key_segments=None,
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


def distance(rows: Array, keys: Array, dtype: jnp.dtype) -> Array:
    """[..., R, C]: |i - j| of positions [..., R] and [..., C], for `slopes`."""
    return jnp.abs(rows[..., :, None] - keys[..., None, :]).astype(dtype)


class Logits(NamedTuple):
    """A tile of logits before the mask, and what it was before slopes were added, which a soft cap's gradient needs."""

    s: Array
    capped: Array


def logits(
    q: Array,
    k: Array,
    *,
    scale: float,
    logits_soft_cap: float | None,
    dtype: jnp.dtype,
    slopes=None,
    distances=None,
) -> Logits:
    """[..., R, C]: scale q k^T; with `logits_soft_cap` c, c tanh(. / c); with `slopes` [..., R, 1], less slope * distance."""
    s = matmul("...rk,...ck->...rc", q, k, dtype) * scale
    capped = s if logits_soft_cap is None else logits_soft_cap * jnp.tanh(s / logits_soft_cap)
    return Logits(capped if slopes is None else capped - slopes * distances, capped)


class TileGradients(NamedTuple):
    """What a tile adds to each gradient. dq and dk lack `scale`: who adds the tiles up multiplies once, at the end."""

    dq: Array
    dk: Array
    dv: Array
    dslopes: Array | None  # [..., R, 1]


def gradients(
    normalizer: Normalizer,
    q: Array,
    k: Array,
    v: Array,
    do: Array,
    saved: Row,
    deltas: Sequence[Array],
    seen: Array | None,
    keys: Array,
    *,
    scale: float,
    logits_soft_cap: float | None,
    dtype: jnp.dtype,
    slopes=None,
    distances=None,
) -> TileGradients:
    """A tile of the backward pass, recomputed from its inputs and what the forward pass saved of its rows."""
    dot = partial(matmul, dtype=dtype)
    s = logits(
        q,
        k,
        scale=scale,
        logits_soft_cap=logits_soft_cap,
        dtype=dtype,
        slopes=slopes,
        distances=distances,
    )
    weights, ds = normalizer.gradient(
        s.s, seen, keys, dot("...rv,...cv->...rc", do, v), deltas, saved
    )
    dv = dot("...rc,...rv->...cv", weights, do)
    dslopes = None if slopes is None else -jnp.sum(ds * distances, axis=-1, keepdims=True)
    if logits_soft_cap is not None:
        ds = ds * (1 - (s.capped / logits_soft_cap) ** 2)
    return TileGradients(
        dot("...rc,...ck->...rk", ds, k), dot("...rc,...rk->...ck", ds, q), dv, dslopes
    )
