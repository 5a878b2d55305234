"""Linear attention without causality, on sums over keys, and what its weights are divided by.

With features q_i, k_j and a document of n tokens, a_ij = s q_i k_j and z_i = sum_j a_ij / n:

    none      o_i = sum_j a_ij v_j
    length    o_i = sum_j a_ij v_j / n                          Galerkin, Fourier
    sum       o_i = sum_j a_ij v_j / sum_j a_ij                 linear attention, LINA, NaLaFormer
    mala      o_i = (1 + 1 / z_i) sum_j a_ij v_j / n - z_i mean v   MALA
    inline    o_i = sum_j a_ij v_j / n + (1 - z_i) mean v       InLine

The weights of a row of `sum`, `mala` and `inline` sum to 1; those of the last two may be negative.
A z_i that is divided by is 1e-6 away from 0 at least, on its own side of it.
Everything is in float32 or better: LINA's authors found NaN without it.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.errors import require
from gatedjax.layers.bidirectional.scans import both_directions
from kernels_pallas.linear_scan.normalize import away_from_zero

Normalization = Literal["none", "length", "sum", "mala", "inline"]
NORMALIZATIONS = ("none", "length", "sum", "mala", "inline")
# Those whose weights are scaled by K^-0.5: with the others the scale is divided out, or none.
SCALED = ("mala", "inline")


def linear_attention(
    q: Float[Array, "B T H F"],
    k: Float[Array, "B T Hk F"],
    v: Float[Array, "B T Hk V"],
    *,
    normalization: Normalization = "sum",
    scale: float = 1.0,
    rotated: tuple[Float[Array, "B T H F"], Float[Array, "B T Hk F"]] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T H V"]:
    """Every token sees every token of its document. Time and memory are linear in T.

    Args:
      q, k: features of queries and keys.
      v: values. Hk divides H.
      normalization: see above.
      scale: s.
      rotated: features in their rotated form. Where they are given, a_ij of the sums over values is
        of these, z_i of q and k (MALA, NaLaFormer).
      segment_ids: documents packed in a row: the sums are then scans of both directions.

    Returns:
      o, in v's dtype.

    Raises:
      InputError: no such normalization.
    """
    is_known = normalization in NORMALIZATIONS
    require(is_known, "normalization", normalization, f"one of {', '.join(NORMALIZATIONS)}")
    out_dtype = v.dtype
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    q, k, v = q.astype(dtype) * scale, k.astype(dtype), v.astype(dtype)
    for_values = (q, k)
    if rotated is not None:
        for_values = (rotated[0].astype(dtype) * scale, rotated[1].astype(dtype))
    if normalization == "none":
        return _sums_over_values(*for_values, v, segment_ids).astype(out_dtype)
    count = document_sum(jnp.ones_like(v[..., :1, :1]), segment_ids)
    o = _sums_over_values(*for_values, v, segment_ids) / count
    if normalization == "length":
        return o.astype(out_dtype)
    z = _with_heads(q, document_sum(k, segment_ids) / count)
    if normalization == "sum":
        return (o / away_from_zero(z)).astype(out_dtype)
    mean_v = _repeated(document_sum(v, segment_ids) / count, q.shape[2])
    if normalization == "mala":
        o = o * (1.0 + 1.0 / away_from_zero(z)) - z * mean_v
    else:
        o = o + (1.0 - z) * mean_v
    return o.astype(out_dtype)


def document_sum(
    x: Float[Array, "B T Hk D"],
    segment_ids: Int[Array, "B T"] | None,
) -> Float[Array, "B _ Hk D"]:
    """For every token the sum over its document; without documents one for the row, of length 1.

    Args:
      x: one vector a token and head.
      segment_ids: numbered, in ascending order; at most one number a token.
    """
    if segment_ids is None:
        return jnp.sum(x, axis=1, keepdims=True)

    def of_row(x: Array, ids: Array) -> Array:
        sums = jax.ops.segment_sum(x, ids, num_segments=x.shape[0] + 1)
        return sums[ids]

    return jax.vmap(of_row)(x, segment_ids)


def _sums_over_values(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array | None,
) -> Float[Array, "B T H V"]:
    """sum_j q_i k_j v_j over the document."""
    if segment_ids is not None:
        return both_directions(q, k, v, None, segment_ids=segment_ids)
    B, T, H, F = q.shape
    Hk = k.shape[2]
    kv = jnp.einsum("bthf,bthv->bhfv", k, v, precision="highest")
    # Query heads of a group share the sums.
    grouped = q.reshape(B, T, Hk, H // Hk, F)
    o = jnp.einsum("bthgf,bhfv->bthgv", grouped, kv, precision="highest")
    return o.reshape(B, T, H, -1)


def _with_heads(q: Array, k: Float[Array, "B _ Hk F"]) -> Float[Array, "B T H 1"]:
    """q_i times one key a token or one for all."""
    return jnp.sum(q * _repeated(k, q.shape[2]), axis=-1, keepdims=True)


def _repeated(x: Float[Array, "B _ Hk D"], num_heads: int) -> Float[Array, "B _ H D"]:
    return jnp.repeat(x, num_heads // x.shape[2], axis=2)
