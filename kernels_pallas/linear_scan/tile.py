"""The mathematics of one chunk of `linear_scan`, as pure functions of arrays.

A chunk of C tokens is four arrays. Each of the functions here computes them from one kind of decay:

    scores  [..., C, C]   s_ij = sum_k q_ik k_jk exp(sum of the logs from the write of j to the
                          read of i) if j < i, else 0
    reads   [..., C, K]   q_i times the decay from the chunk's start:     o_i += reads_i S
    writes  [..., C, K]   k_j times the decay from j to the chunk's end:  S' = total S + writes^T v
    total   [..., K|1]    the decay of the whole chunk

Two logs describe a token. `log_decay` is the decay of the state at the token. `log_read` is the
decay that the token's own read sees: log_decay for inclusive reads (after the update), 0 for
exclusive ones (before it, RWKV-6). A segment start has log_decay = log_read = LOG_ZERO. What a
token reads of its own write, the diagonal of the scores, is `diagonal_scores`.

Every exponent is a sum of logs over exactly the tokens between, never a difference of running sums:
c_i - c_j loses 6 % in float32 once one step of -1e4 lies in both.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from kernels_pallas.common.finite import is_finite, poisoned

# exp(LOG_ZERO) is exactly 0 in float32 and float64, and sums of it stay finite: 0 * LOG_ZERO is 0,
# where 0 * -inf is NaN.
LOG_ZERO = -1000.0
# Multiples of COARSE up to MAX_CHUNK * LOG_ZERO are exact in float32 (below 2**24 steps), and so
# are their running sums.
COARSE = 1 / 32
MAX_CHUNK = 512


class ChunkTerms(NamedTuple):
    """The four arrays of a chunk, as this module's docstring defines them."""

    scores: Float[Array, "... C C"]
    reads: Float[Array, "... C K"]
    writes: Float[Array, "... C K"]
    total: Float[Array, "... K"] | Float[Array, "... 1"]


def undecayed(
    q: Float[Array, "... C K"],
    k: Float[Array, "... C K"],
    precision: str | None = None,
) -> ChunkTerms:
    """Linear attention without decay: a causal mask."""
    scores = jnp.einsum("...ik,...jk->...ij", q, k, precision=precision)
    earlier_scores = jnp.tril(scores, -1)
    total = jnp.ones_like(q[..., 0, :1])
    return ChunkTerms(earlier_scores, reads=q, writes=k, total=total)


# --- scalar decay: one decay per head and token


def scalar_decay(
    q: Float[Array, "... C K"],
    k: Float[Array, "... C K"],
    log_decay: Float[Array, "... C"],
    log_read: Float[Array, "... C"],
    precision: str | None = None,
) -> ChunkTerms:
    """One decay per head and token: the scores are multiplied by one [C, C] mask.

    Args:
      q, k: queries and keys of the chunk.
      log_decay: the decay of the state at each token.
      log_read: the decay that each token's own read sees.
      precision: of the matmul, as `jnp.einsum` takes it.

    Returns:
      The terms of the chunk.
    """
    factors = scalar_factors(log_decay, log_read)
    products = jnp.einsum("...ik,...jk->...ij", q, k, precision=precision)
    # Selected first: the product of tokens that do not see each other may overflow.
    products = jnp.where(factors.mask == 0, 0.0, products)
    return ChunkTerms(
        scores=products * factors.mask,
        reads=q * factors.read[..., None],
        writes=k * factors.write[..., None],
        total=factors.total[..., None],
    )


class ScalarFactors(NamedTuple):
    """Decays between the places of a chunk.

    Attributes:
      mask: from the write of j to the read of i; 0 where j >= i.
      read: from the chunk's start to the read of i.
      write: from the write of j to the chunk's end.
      total: from the chunk's start to its end.
    """

    mask: Float[Array, "... C C"]
    read: Float[Array, "... C"]
    write: Float[Array, "... C"]
    total: Float[Array, "..."]


@jax.custom_vjp
def scalar_factors(
    log_decay: Float[Array, "... C"],
    log_read: Float[Array, "... C"],
) -> ScalarFactors:
    """The decays of a chunk with one decay per token. See `running_sums` for the two parts.

    The derivative adds up what contains each log, and takes no difference: what one token sends to
    the logs that it sees leaves all others as they are, to the bit.
    """
    at_reads, at_ends = running_sums(log_decay, log_read)
    # Row i, column j: the logs after the write of j, up to the read of i.
    between = at_reads[..., :, None] - at_ends[..., None, :]
    C = log_decay.shape[-1]
    is_earlier = jnp.tril(jnp.ones((C, C), bool), -1)
    # Select before the exponential: where j >= i the difference may be large and positive.
    log_mask = jnp.where(is_earlier, between[0] + between[1], LOG_ZERO)
    last = at_ends[..., -1:]
    return ScalarFactors(
        mask=jnp.exp(log_mask),
        read=jnp.exp(at_reads[0] + at_reads[1]),
        write=jnp.exp((last - at_ends).sum(0)),
        total=jnp.exp(last.sum(0))[..., 0],
    )


def _scalar_factors_forward(log_decay: Array, log_read: Array):
    factors = scalar_factors(log_decay, log_read)
    return factors, factors


def _scalar_factors_backward(
    factors: ScalarFactors,
    cotangents: ScalarFactors,
) -> tuple[Array, Array]:
    # d/dlog of an exponential is the exponential itself.
    of_pairs, of_reads, of_writes, of_total = jax.tree.map(jnp.multiply, factors, cotangents)
    dlog_read = jnp.sum(of_pairs, -1) + of_reads

    C = of_reads.shape[-1]
    i = jax.lax.broadcasted_iota(jnp.int32, (C, C), 0)
    t = jax.lax.broadcasted_iota(jnp.int32, (C, C), 1)
    is_after_row = t > i
    # Row i, column t: the pairs (i, j) with t after j, and the read of i ...
    received = _sums_over_earlier(of_pairs, is_after_row) + of_reads[..., None]
    # ... count if t comes before i. The log of i itself is log_read.
    received = jnp.where(t < i, received, 0.0)
    # The write of row j contains the logs of the tokens t after it.
    received = received + jnp.where(is_after_row, of_writes[..., None], 0.0)
    # Every log is part of the chunk's total.
    return jnp.sum(received, -2) + of_total[..., None], dlog_read


def _sums_over_earlier(
    pairs: Float[Array, "... C C"],
    is_after_row: Bool[Array, "C C"],
) -> Float[Array, "... C C"]:
    """Row i, column t: the sum of the pairs (i, j) with j before t, and of no other pair."""
    ones = is_after_row.astype(pairs.dtype)

    def sums(x: Array) -> Array:
        return jnp.einsum("...ij,jt->...it", x, ones, precision="highest")

    is_bad = ~is_finite(pairs)

    def with_nan(total: Array) -> Array:
        return poisoned(sums(is_bad.astype(pairs.dtype)) > 0, total)

    # A product of gradients may have overflowed: 0 times that is not 0.
    total = sums(jnp.where(is_bad, 0.0, pairs))
    return jax.lax.cond(jnp.any(is_bad), with_nan, lambda total: total, total)


scalar_factors.defvjp(_scalar_factors_forward, _scalar_factors_backward)


def running_sums(
    log_decay: Float[Array, "... C"],
    log_read: Float[Array, "... C"],
    reverse: bool = False,
) -> tuple[Float[Array, "2 ... C"], Float[Array, "2 ... C"]]:
    """Logs accumulated from the chunk's start to each token's read, and to the state after it.

    The logs are split into a coarse part, a multiple of 1/32 whose running sums and their
    differences are exact, and a remainder below 1/64 a token, whose running sum stays below C/64.
    So a difference of running sums is safe here, part by part.
    """
    coarse = _coarse_part(log_decay)
    coarse_read = _coarse_part(log_read)
    parts = jnp.stack([coarse, log_decay - coarse])
    read_parts = jnp.stack([coarse_read, log_read - coarse_read])
    # A triangular matmul: XLA's cumsum is slower on CPU, and there is none inside a TPU kernel.
    C = log_decay.shape[-1]
    ones = jnp.ones((C, C), parts.dtype)
    up_to_token = jnp.triu(ones) if reverse else jnp.tril(ones)
    at_ends = jnp.einsum(
        "...j,ij->...i",
        parts,
        up_to_token,
        precision="highest",
    )
    # A read sees log_read of its own token in place of log_decay.
    at_reads = at_ends - parts + read_parts
    return at_reads, at_ends


def _coarse_part(logs: Array) -> Array:
    """The nearest multiple of COARSE. All of the gradient goes through the remainder."""
    return jax.lax.stop_gradient(jnp.round(logs / COARSE) * COARSE)


# --- vector decay: one decay per key channel and token


def vector_decay(
    q: Float[Array, "... C K"],
    k: Float[Array, "... C K"],
    log_decay: Float[Array, "... C K"],
    log_read: Float[Array, "... C K"],
    precision: str | None = None,
) -> ChunkTerms:
    """One decay per key channel, by multiplicative halving.

    Blocks of h = 1, 2, 4, ... tokens are merged in pairs, left L and right R. Before a merge,
    `reads` holds q times the decay from its block's start and `writes` k times the decay to its
    block's end, so that a merge is

        scores[R, L] = reads[R] writes[L]^T
        reads[R] *= total[L]
        writes[L] *= total[R]
        total = total[L] total[R]

    Every factor is <= 1: nothing overflows for any decay, and a decay of 0 is an exact segment
    start.

    Args:
      q, k: queries and keys of the chunk; C is a power of two.
      log_decay: the decay of the state at each token.
      log_read: the decay that each token's own read sees.
      precision: of the matmuls, as `jnp.einsum` takes it.

    Returns:
      The terms of the chunk.
    """
    reads = q * jnp.exp(log_read)
    writes = k
    total = jnp.exp(log_decay)
    scores = jnp.zeros((*q.shape[:-1], 1, 1), q.dtype)
    while total.shape[-2] > 1:
        scores, reads, writes, total = _merge(
            scores,
            reads,
            writes,
            total,
            precision,
        )
    # The state is multiplied by this factor in every chunk that it lives through. Rounded once, not
    # C times, it is 60 to 160 times closer to the truth after 16k tokens with decays of 1e-4.
    chunk_total = jnp.exp(log_decay.sum(-2))
    return ChunkTerms(scores[..., 0, :, :], reads, writes, chunk_total)


def _merge(
    scores: Float[Array, "*batch n h h"],
    reads: Float[Array, "*batch C K"],
    writes: Float[Array, "*batch C K"],
    total: Float[Array, "*batch n K"],
    precision: str | None,
) -> tuple[Array, Array, Array, Array]:
    """Merges neighboring blocks in pairs: scores become [..., n/2, 2h, 2h], total [..., n/2, K]."""
    *batch, C, K = reads.shape
    h = scores.shape[-1]
    pairs = (*batch, C // (2 * h), 2)
    left_scores, right_scores = _halves(scores.reshape(*pairs, h, h))
    left_reads, right_reads = _halves(reads.reshape(*pairs, h, K))
    left_writes, right_writes = _halves(writes.reshape(*pairs, h, K))
    left_total, right_total = _halves(total.reshape(*pairs, 1, K))

    # Tokens on the right read what tokens on the left wrote, never the other way round.
    if h == 1:
        # A batch of single dot products is slow as a matmul.
        cross = jnp.sum(right_reads * left_writes, -1, keepdims=True)
    else:
        cross = jnp.einsum(
            "...ik,...jk->...ij",
            right_reads,
            left_writes,
            precision=precision,
        )
    upper = jnp.concatenate([left_scores, jnp.zeros_like(cross)], -1)
    lower = jnp.concatenate([cross, right_scores], -1)
    merged_scores = jnp.concatenate([upper, lower], -2)

    # Reads now count from the start of the pair, writes to its end.
    merged_reads = jnp.stack([left_reads, right_reads * left_total], -3)
    merged_writes = jnp.stack([left_writes * right_total, right_writes], -3)
    merged_total = (left_total * right_total)[..., 0, :]
    return (
        merged_scores,
        merged_reads.reshape(*batch, C, K),
        merged_writes.reshape(*batch, C, K),
        merged_total,
    )


def _halves(x: Array) -> tuple[Array, Array]:
    """[..., 2, a, b] -> the two [..., a, b]."""
    # Not two slices: the gradient of those is a sum of two arrays that are half zeros.
    left, right = jnp.split(x, 2, axis=-3)
    return left[..., 0, :, :], right[..., 0, :, :]


# --- any decay


def diagonal_scores(
    q: Float[Array, "... C K"],
    k: Float[Array, "... C K"],
    weight: Float[Array, "... K"] | None,
) -> Float[Array, "... C"]:
    """q_i (weight k_i), a token's read of its own write.

    weight is None for inclusive reads, else the bonus, in a shape that broadcasts over q.
    """
    if weight is None:
        return jnp.sum(q * k, axis=-1)
    # As many axes as q has.
    weight = jnp.expand_dims(weight, tuple(range(q.ndim - weight.ndim)))
    return jnp.sum(q * weight * k, axis=-1)
