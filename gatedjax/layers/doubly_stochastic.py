"""Attention whose weights sum to 1 over keys and over queries, as a layer's configuration says."""

from jax import Array
from jaxtyping import Float

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.logit_scale import logit_scale
from gatedjax.layers.pieces import Row
from gatedjax.sharding import is_cut
from kernels_pallas.attention.doubly_stochastic import qr_attention, sinkhorn_attention


def doubly_stochastic(c: GatedAttentionConfig, row: Row) -> Float[Array, "B T H V"]:
    """`config.normalizer`, sinkhorn or qr, on rows of tokens: documents have weights of their own.

    Raises:
      NotImplementedError: a mesh that cuts the tokens of a row.
    """
    if is_cut("length", row.q.shape[1]):
        got = f"{c.normalizer!r} where a mesh cuts tokens"
        raise NotImplementedError(f"normalizer: got {got}, expected one of kernels' normalizers")
    if c.normalizer == "qr":
        return qr_attention(
            row.q,
            row.k,
            row.v,
            segment_ids=row.segment_ids,
            scale=logit_scale(c),
        )
    return sinkhorn_attention(
        row.q,
        row.k,
        row.v,
        iterations=c.sinkhorn_iterations,
        epsilon=c.sinkhorn_epsilon,
        segment_ids=row.segment_ids,
        scale=logit_scale(c),
    )
