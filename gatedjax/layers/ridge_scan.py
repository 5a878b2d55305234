"""Gated KalmaNet's scan (arXiv 2511.21016): queries solve a ridge regression on the keys so far.

    H_t = e^{g_t} H_{t-1} + k_t^T k_t          U_t = e^{g_t} U_{t-1} + k_t^T v_t
    x_t = (H_t + lambda_t I)^-1 q_t            lambda_t = ridge |H_t|, by the Frobenius norm
    o_t = scale (q_t + alpha_t (x_t - q_t)) U_t

H and U are one state [H | U] of K + V columns. Tokens are taken a chunk at a time, and no H_t is
ever made: what the solver needs of it is its product with x_t,

    x_t H_t = e^{c_t} x_t H_0 + sum_{j <= t} e^{c_t - c_j} (x_t k_j) k_j

with c the sum of g within the chunk: two matrix products for all tokens of the chunk. The solver is
Chebyshev's iteration, as eigenvalues lie between lambda and lambda + |H|. Its backward pass is one
more solution with the same matrix (implicit differentiation), not the way back through the
iterations.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from kernels_pallas.linear_scan.reference import segment_starts

# Below it a state holds nothing, and what a query makes of it does not matter.
_LEAST_NORM = 1e-12


class Chunk(NamedTuple):
    """What one step of the scan takes: C tokens, heads before tokens."""

    q: Float[Array, "B H C K"]
    k: Float[Array, "B H C K"]
    v: Float[Array, "B H C V"]
    log_decay: Float[Array, "B H C"]
    alpha: Float[Array, "B H C"]
    starts: Bool[Array, "B 1 C"]


def ridge_scan(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    log_decay: Float[Array, "B T H"],
    alpha: Float[Array, "B T H"],
    *,
    ridge: float = 0.02,
    iterations: int = 30,
    scale: float | None = None,
    initial_state: Float[Array, "B H K _"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K _"]]:
    """Reads a decaying memory with queries that solve a ridge regression.

    Time and memory are linear in T. Differentiable in every float input.

    Args:
      q, k, v: queries, keys and values.
      log_decay: g, natural logs, 0 or less.
      alpha: what of the solution is read in place of the query.
      ridge: lambda over |H|.
      iterations: of Chebyshev. The error falls by 0.75 at each with a ridge of 0.02.
      scale: of the outputs; K^-0.5 if None.
      initial_state: [H | U] before the first token; zeros if None.
      segment_ids: documents packed in a row: states begin anew where the id changes.
      chunk_size: tokens at a time. The result does not depend on it.

    Returns:
      (o, the state after the last token): o in v's dtype, the state in float32 or better.
    """
    out_dtype = v.dtype
    B, T, H, K = q.shape
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    scale = K**-0.5 if scale is None else scale
    if initial_state is None:
        initial_state = jnp.zeros((B, H, K, K + v.shape[-1]), dtype)
    C = min(chunk_size, T)
    # What is added at the end has no key, no decay and no start: the state passes it unchanged.
    num_chunks = -(-T // C)
    padding = num_chunks * C - T

    def chunks(x: Array) -> Array:
        """[B, T, H, *] to [chunks, B, H, C, *]."""
        padded = jnp.pad(x, ((0, 0), (0, padding), *[(0, 0)] * (x.ndim - 2)))
        split = padded.reshape(B, num_chunks, C, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(split, 1, 0), 3, 2)

    starts = jnp.zeros((B, T), bool)
    if segment_ids is not None:
        starts = segment_starts(segment_ids, reverse=False)
    tokens = Chunk(
        q=chunks(q.astype(dtype)),
        k=chunks(k.astype(dtype)),
        v=chunks(v.astype(dtype)),
        log_decay=chunks(log_decay.astype(dtype)),
        alpha=chunks(alpha.astype(dtype)),
        starts=chunks(starts[..., None]),
    )

    # A chunk is computed again in the backward pass: between chunks only states are kept.
    @jax.checkpoint
    def step(state: Array, chunk: Chunk) -> tuple[Array, Array]:
        return _one_chunk(state, chunk, ridge, iterations)

    state, o = jax.lax.scan(step, initial_state.astype(dtype), tokens)
    o = jnp.moveaxis(jnp.moveaxis(o, 2, 3), 0, 1).reshape(B, num_chunks * C, H, -1)
    return (scale * o[:, :T]).astype(out_dtype), state


def _one_chunk(
    state: Float[Array, "B H K _"],
    chunk: Chunk,
    ridge: float,
    iterations: int,
) -> tuple[Float[Array, "B H K _"], Float[Array, "B H C V"]]:
    """(the state after the chunk, its outputs before they are scaled)."""
    q, k, v, log_decay, alpha, starts = chunk
    K = k.shape[-1]
    # What is left of the first state, and of an earlier token, where a token stands.
    sums = jnp.cumsum(log_decay, axis=-1)
    documents = jnp.cumsum(starts, axis=-1)
    of_state = jnp.where(documents == 0, jnp.exp(sums), 0.0)
    is_earlier = jnp.tril(jnp.ones((k.shape[2], k.shape[2]), bool))
    is_seen = is_earlier & (documents[..., :, None] == documents[..., None, :])
    differences = sums[..., :, None] - sums[..., None, :]
    # Selected before it is exponentiated: a later token's difference may overflow.
    of_tokens = jnp.where(is_seen, jnp.exp(jnp.where(is_seen, differences, 0.0)), 0.0)

    norm = _frobenius_norms(state[..., :K], k, of_state, of_tokens)
    x = ridge_solution(
        q,
        k,
        state[..., :K],
        of_state,
        of_tokens,
        norm,
        ridge=ridge,
        iterations=iterations,
    )
    read = q + alpha[..., None] * (x - q)
    from_state = of_state[..., None] * jnp.matmul(read, state[..., K:], precision="highest")
    scores = jnp.einsum("bhik,bhjk->bhij", read, k, precision="highest") * of_tokens
    o = from_state + jnp.matmul(scores, v, precision="highest")

    written = jnp.concatenate([k, v], axis=-1)
    kept = of_tokens[..., -1, :, None] * k
    new_state = of_state[..., -1, None, None] * state
    new_state = new_state + jnp.einsum("bhjk,bhjv->bhkv", kept, written, precision="highest")
    return new_state, o


def _frobenius_norms(
    state: Float[Array, "B H K K"],
    k: Float[Array, "B H C K"],
    of_state: Float[Array, "B H C"],
    of_tokens: Float[Array, "B H C C"],
) -> Float[Array, "B H C"]:
    """|H_t| of every token of a chunk, from products of keys.

    With m_tj what is left of token j at t: |H_t|^2 = sum_ij m_ti m_tj (k_i k_j)^2
    + 2 e^{c_t} sum_j m_tj k_j H_0 k_j + e^{2 c_t} |H_0|^2.
    """
    products = jnp.einsum("bhik,bhjk->bhij", k, k, precision="highest")
    among_tokens = jnp.matmul(of_tokens, products**2, precision="highest")
    with_state = jnp.sum(k * jnp.matmul(k, state, precision="highest"), axis=-1)
    square = (
        jnp.sum(among_tokens * of_tokens, axis=-1)
        + 2.0 * of_state * jnp.einsum("bhij,bhj->bhi", of_tokens, with_state, precision="highest")
        + of_state**2 * jnp.sum(state**2, axis=(-2, -1))[..., None]
    )
    # The root of 0 has no derivative.
    is_empty = square < _LEAST_NORM**2
    return jnp.where(is_empty, _LEAST_NORM, jnp.sqrt(jnp.where(is_empty, 1.0, square)))


def ridge_solution(
    q: Float[Array, "B H C K"],
    k: Float[Array, "B H C K"],
    state: Float[Array, "B H K K"],
    of_state: Float[Array, "B H C"],
    of_tokens: Float[Array, "B H C C"],
    norm: Float[Array, "B H C"],
    *,
    ridge: float,
    iterations: int,
) -> Float[Array, "B H C K"]:
    """x_t = (H_t + ridge |H_t| I)^-1 q_t for the tokens of a chunk.

    Both sides are divided by |H_t|, so that the solver sees eigenvalues between ridge and
    ridge + 1 whatever the size of the keys.

    Args:
      q, k: queries and keys.
      state: H_0, before the chunk.
      of_state, of_tokens: what is left of it and of each token, where a token stands.
      norm: |H_t|.
      ridge, iterations: as of `ridge_scan`.
    """
    norm = norm[..., None]

    def product(x: Array) -> Array:
        """x_t (H_t / |H_t| + ridge I)."""
        from_state = of_state[..., None] * jnp.matmul(x, state, precision="highest")
        scores = jnp.einsum("bhik,bhjk->bhij", x, k, precision="highest") * of_tokens
        from_tokens = jnp.matmul(scores, k, precision="highest")
        return (from_state + from_tokens) / norm + ridge * x

    def solve(matvec, right: Array) -> Array:
        return chebyshev(matvec, right, low=ridge, high=ridge + 1.0, iterations=iterations)

    # Symmetric: the backward pass solves the same system for the gradient of x, and what it finds
    # is the gradient of q; those of keys, state, decays and norm are products of the two solutions.
    return jax.lax.custom_linear_solve(product, q / norm, solve, symmetric=True)


def chebyshev(
    matvec,
    right: Float[Array, "..."],
    *,
    low: float,
    high: float,
    iterations: int,
) -> Float[Array, "..."]:
    """x with matvec(x) = right, for a symmetric matrix with eigenvalues from low to high.

    Args:
      matvec: the product with the matrix.
      right: the right side.
      low, high: between which eigenvalues lie; low above 0.
      iterations: how many products.
    """
    step = 2.0 / (low + high)
    # A quarter of the square of (condition - 1) / (condition + 1).
    quarter = ((high - low) / (high + low) / 2.0) ** 2

    def iterate(carry: tuple[Array, Array, Array], _: None):
        x, previous, weight = carry
        weight = 1.0 / (1.0 - quarter * weight)
        residual = matvec(x) - right
        following = weight * x - weight * step * residual - (weight - 1.0) * previous
        return (following, x, weight), None

    start = step * right
    first_weight = jnp.asarray(2.0, right.dtype)
    carry = (start, jnp.zeros_like(start), first_weight)
    (x, _, _), _ = jax.lax.scan(iterate, carry, None, length=iterations)
    return x
