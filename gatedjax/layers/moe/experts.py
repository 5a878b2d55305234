"""What experts compute, as pure functions.

Gated MLPs on rows sorted by expert, and experts that cost nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.expert_mlp import expert_mlp
from kernels_pallas.grouped_matmul import permute_rows, sort_by_group


class Stacks(NamedTuple):
    """The matrices of E gated MLPs, and what they have in common."""

    gate: Float[Array, "E M F"]
    up: Float[Array, "E M F"]
    down: Float[Array, "E F M"]
    activation: str
    weight_input: bool  # weights multiply what goes in, not what comes out

    @property
    def num_experts(self) -> int:
        return self.gate.shape[0]


def grouped_mlp(
    rows: Float[Array, "R M"],
    sizes: Int[Array, " E"],
    stacks: Stacks,
    weights: Float[Array, " R"] | None = None,
) -> Float[Array, "R M"]:
    """Rows sorted by expert, through their experts' MLPs.

    Args:
      rows: the rows of the first expert, of the second, and so on.
      sizes: the number of rows of each.
      stacks: the experts.
      weights: what each row's result is multiplied by; None for 1.

    Returns:
      The results, in the order of the rows. Rows beyond the last group give 0.
    """
    return expert_mlp(
        rows,
        stacks.gate,
        stacks.up,
        stacks.down,
        sizes,
        weights,
        activation=stacks.activation,
    )


def mixture(
    x: Float[Array, "R M"],
    experts: Int[Array, "R k"],
    weights: Float[Array, "R k"],
    stacks: Stacks,
    first: Array | int = 0,
) -> Float[Array, "R M"]:
    """`sum_k weight_k * expert_k(x)`, of the experts of `stacks` only.

    Rows go to their experts and back by gathers; none is dropped, none is padded, places of other
    experts cost nothing. Weights go along, into the experts: outputs are not needed again for the
    weights' gradient, and not kept.

    Args:
      x: the tokens.
      experts: the experts of each token.
      weights: what their outputs are weighted by.
      stacks: the experts that compute here.
      first: the id of the first of them.

    Returns:
      The weighted sums, float32.
    """
    local = experts - first
    is_local = (local >= 0) & (local < stacks.num_experts)
    # The id past the last expert is an empty place: it is sorted behind all groups.
    ids = jnp.where(is_local, local, stacks.num_experts)
    # A weight of another device's experts may be NaN; selected, it stays out of the sums here.
    weights = jnp.where(is_local, weights, 0.0)
    order, inverse, sizes = sort_by_group(ids.reshape(-1), stacks.num_experts)
    rows = sorted_inputs(
        x,
        weights,
        order,
        inverse,
        stacks,
    )
    row_weights = None
    if not stacks.weight_input:
        row_weights = permute_rows(weights.reshape(-1), order, inverse)
    y = grouped_mlp(
        rows,
        sizes,
        stacks,
        row_weights,
    )
    y = permute_rows(y, inverse, order)
    return jnp.sum(y.reshape(*weights.shape, -1), axis=1, dtype=jnp.float32)


def sorted_inputs(
    x: Float[Array, "R M"],
    weights: Float[Array, "R k"],
    order: Int[Array, " Rk"],
    inverse: Int[Array, " Rk"],
    stacks: Stacks,
) -> Float[Array, "Rk M"]:
    """The rows that go into the experts, sorted: each token once for each of its k places.

    Args:
      x: the tokens.
      weights: of their places; they multiply the rows where `stacks.weight_input` is true.
      order: the permutation that sorts the places by expert.
      inverse: its inverse.
      stacks: the experts.

    Returns:
      The R k rows, in x's dtype.
    """
    rows = permute_rows(x, order, inverse)
    if not stacks.weight_input:
        return rows
    row_weights = permute_rows(weights.reshape(-1, 1), order, inverse)
    return (rows.astype(jnp.float32) * row_weights).astype(rows.dtype)


def combine(
    y: Float[Array, "Rk M"],
    weights: Float[Array, "R k"],
    stacks: Stacks,
) -> Float[Array, "R M"]:
    """The weighted sum over each token's places, float32.

    Weights that went in do not come out again.
    """
    y = y.reshape(*weights.shape, y.shape[-1]).astype(jnp.float32)
    if stacks.weight_input:
        return jnp.sum(y, axis=1)
    return jnp.einsum("rk,rkm->rm", weights, y)


def weight_of(
    experts: Int[Array, "... k"],
    weights: Float[Array, "... k"],
    first: int,
    count: int,
) -> Float[Array, "... E"]:
    """The weight of each of `count` experts from id `first` on, 0 where it was not chosen.

    Args:
      experts: the experts of each token.
      weights: their weights.
      first: the first id that is asked for.
      count: how many are.

    Returns:
      A weight for every token and expert.
    """
    # [..., k, E]: place against expert. k is small.
    hit = experts[..., None] == first + jnp.arange(count)
    return jnp.sum(jnp.where(hit, weights[..., None], 0.0), axis=-2)


def constant_experts(
    x: Float[Array, "... M"],
    weights: Float[Array, "... E"],
    mixer: Float[Array, "M E 2"],
    vectors: Float[Array, "E M"],
) -> Float[Array, "... M"]:
    """`sum_i weight_i (a1 x + a2 v_i)`, `(a1, a2) = softmax(x W_i)`.

    MoE++, arXiv 2410.07348, eq. 5.

    Args:
      x: the tokens.
      weights: of every constant expert, 0 where it was not chosen.
      mixer: the W_i.
      vectors: the v_i.

    Returns:
      The weighted sum, float32.
    """
    x32 = x.astype(jnp.float32)
    logits = jnp.einsum("...m,mec->...ec", x32, mixer)
    coefficients = weights[..., None] * jax.nn.softmax(logits, axis=-1)
    of_input = jnp.sum(coefficients[..., 0], axis=-1, keepdims=True) * x32
    of_vectors = jnp.einsum("...e,em->...m", coefficients[..., 1], vectors)
    return of_input + of_vectors
