"""The mathematics of one chunk of `linear_scan`, as pure functions of arrays; machines differ only in the schedule.

A chunk of C tokens is four arrays, which each of the functions here computes from its own kind of decay:

    scores  [..., C, C]   s_ij = sum_k q_ik k_jk exp(sum of the logs met from writing j to reading i) if j < i, else 0
    reads   [..., C, K]   q_i times the decay from the chunk's start:         o_i += reads_i S
    writes  [..., C, K]   k_j times the decay from j to the chunk's end:      S' = total S + writes^T v
    total   [..., K|1]    the decay of the whole chunk

Two logs describe a token: `log_decay`, which the state meets as it passes the token, and `log_read`, which the
token's own read meets. Inclusive reads (after the update) have log_read = log_decay; exclusive reads (before it,
RWKV-6) have 0. A segment start has log_decay = log_read = LOG_ZERO. A token's read of itself is `own_scores`.

Every exponent is a sum of logs over exactly the tokens between, never a difference of running sums: c_i - c_j loses 6 %
in float32 once one step of -1e4 lies in both.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

# exp(LOG_ZERO) is exactly 0 in float32 and float64, and its sums stay finite: 0 * LOG_ZERO is 0, where 0 * -inf is NaN.
LOG_ZERO = -1000.0
# Multiples of COARSE up to MAX_CHUNK * LOG_ZERO are exact in float32 (below 2**24 steps): so are their running sums.
COARSE = 1 / 32
MAX_CHUNK = 512


def undecayed(q: Float[Array, "... C K"], k: Float[Array, "... C K"], precision=None):
    """Linear attention without decay: a causal mask. Returns (scores, reads, writes, total)."""
    scores = jnp.einsum("...ik,...jk->...ij", q, k, precision=precision)
    return jnp.tril(scores, -1), q, k, jnp.ones_like(q[..., 0, :1])


def scalar_decay(
    q: Float[Array, "... C K"],
    k: Float[Array, "... C K"],
    log_decay: Float[Array, "... C"],
    log_read: Float[Array, "... C"],
    precision=None,
):
    """One decay per head and token: one [C, C] mask. Returns (scores, reads, writes, total)."""
    mask, read, write, total = scalar_factors(log_decay, log_read)
    scores = jnp.einsum("...ik,...jk->...ij", q, k, precision=precision) * mask
    return scores, q * read[..., None], k * write[..., None], total[..., None]


def scalar_factors(log_decay: Float[Array, "... C"], log_read: Float[Array, "... C"]):
    """The decays j -> i [..., C, C] (0 where j >= i), start -> i, j -> end, and start -> end."""
    reads, ends = running_sums(log_decay, log_read)
    C = log_decay.shape[-1]
    last = ends[..., -1:]
    between = reads[..., :, None] - ends[..., None, :]
    earlier = jnp.tril(jnp.ones((C, C), bool), -1)
    mask = jnp.exp(jnp.where(earlier, between[0] + between[1], LOG_ZERO))
    return (
        mask,
        jnp.exp(reads[0] + reads[1]),
        jnp.exp((last - ends).sum(0)),
        jnp.exp(last.sum(0))[..., 0],
    )


def running_sums(
    log_decay: Float[Array, "... C"], log_read: Float[Array, "... C"], reverse: bool = False
):
    """What a token's read has met since the chunk's start, and what the state has after the token: [2, ..., C] each.

    The logs are split into a coarse part, a multiple of 1/32 whose running sums and their differences are exact, and a
    remainder below 1/64 a token, whose running sum stays below C/64. So a difference of running sums is safe here.
    """
    C = log_decay.shape[-1]
    coarse = jax.lax.stop_gradient(jnp.round(log_decay / COARSE) * COARSE)
    coarse_read = jax.lax.stop_gradient(jnp.round(log_read / COARSE) * COARSE)
    parts = jnp.stack([coarse, log_decay - coarse])
    read_parts = jnp.stack([coarse_read, log_read - coarse_read])
    # A triangular matmul: XLA's cumsum is slower on CPU, and there is none inside a TPU kernel.
    met = (
        jnp.triu(jnp.ones((C, C), parts.dtype))
        if reverse
        else jnp.tril(jnp.ones((C, C), parts.dtype))
    )
    ends = jnp.einsum("...j,ij->...i", parts, met, precision="highest")
    return ends - parts + read_parts, ends


def vector_decay(
    q: Float[Array, "... C K"],
    k: Float[Array, "... C K"],
    log_decay: Float[Array, "... C K"],
    log_read: Float[Array, "... C K"],
    precision=None,
):
    """One decay per key channel: multiplicative halving. Returns (scores, reads, writes, total).

    Blocks of h = 1, 2, 4, ... tokens are merged in pairs, left L and right R. While a block is whole, `reads` holds
    q times the decay from its block's start and `writes` k times the decay to its block's end, so that a merge is

        scores[R, L] = reads[R] writes[L]^T;  reads[R] *= total[L];  writes[L] *= total[R];  total = total[L] total[R].

    Every factor is <= 1: nothing overflows for any decay, and a decay of 0 is an exact segment start.
    """
    reads, writes, total = q * jnp.exp(log_read), k, jnp.exp(log_decay)
    scores = jnp.zeros((*q.shape[:-1], 1, 1), q.dtype)
    while total.shape[-2] > 1:
        scores, reads, writes, total = _merge(scores, reads, writes, total, precision)
    # The state meets this factor in every chunk that it lives through: rounded once, not C times, it is 60 to 160 times
    # closer to the truth after 16k tokens with decays of 1e-4.
    return scores[..., 0, :, :], reads, writes, jnp.exp(log_decay.sum(-2))


def _merge(scores, reads, writes, total, precision):
    """Neighboring blocks in pairs: scores [..., n, h, h] -> [..., n/2, 2h, 2h], reads and writes [..., C, K] stay."""
    *batch, C, K = reads.shape
    h = scores.shape[-1]
    pairs = (*batch, C // (2 * h), 2)
    left_scores, right_scores = _halves(scores.reshape(*pairs, h, h))
    left_reads, right_reads = _halves(reads.reshape(*pairs, h, K))
    left_writes, right_writes = _halves(writes.reshape(*pairs, h, K))
    left_total, right_total = _halves(total.reshape(*pairs, 1, K))
    if h == 1:  # a batch of single dot products is slow as a matmul
        cross = jnp.sum(right_reads * left_writes, -1, keepdims=True)
    else:
        cross = jnp.einsum("...ik,...jk->...ij", right_reads, left_writes, precision=precision)
    upper = jnp.concatenate([left_scores, jnp.zeros_like(cross)], -1)
    lower = jnp.concatenate([cross, right_scores], -1)
    reads = jnp.stack([left_reads, right_reads * left_total], -3)
    writes = jnp.stack([left_writes * right_total, right_writes], -3)
    total = (left_total * right_total)[..., 0, :]
    return (
        jnp.concatenate([upper, lower], -2),
        reads.reshape(*batch, C, K),
        writes.reshape(*batch, C, K),
        total,
    )


def _halves(x: Array) -> tuple[Array, Array]:
    return x[..., 0, :, :], x[..., 1, :, :]


def own_scores(
    q: Float[Array, "... C K"], k: Float[Array, "... C K"], weight: Float[Array, "... 1 K"] | None
):
    """q_i (weight k_i), a token's read of its own write. weight: None for inclusive reads, else the bonus."""
    return jnp.sum(q * k if weight is None else q * weight * k, axis=-1)
