"""What experts compute, as pure functions.

MLPs on rows sorted by expert, and experts that cost nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.layers.activations import activated, gated_product
from kernels_pallas.expert_mlp import expert_mlp
from kernels_pallas.grouped_matmul import grouped_matmul, permute_rows, sort_by_group


class Stacks(NamedTuple):
    """The matrices of E MLPs, and what they have in common.

    The biases of the down matrices are not here: `output_bias` adds them, outside of the sorting.
    """

    gate: Float[Array, "E M F"] | None  # None: MLPs without a gate
    up: Float[Array, "E M F"]
    down: Float[Array, "E F M"]
    activation: str
    weight_input: bool  # weights multiply what goes in, not what comes out
    swiglu_limit: float = 0.0  # of activation "clamped_swiglu"
    gate_bias: Float[Array, "E F"] | None = None
    up_bias: Float[Array, "E F"] | None = None

    @property
    def num_experts(self) -> int:
        return self.up.shape[0]

    @property
    def are_fused(self) -> bool:
        """Whether one op computes these MLPs: gated ones, without biases or clamps."""
        has_bias = self.gate_bias is not None or self.up_bias is not None
        is_known = self.activation in ("silu", "gelu")
        return self.gate is not None and is_known and not has_bias


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
    if stacks.gate is None or not stacks.are_fused:
        return _composed_mlp(rows, sizes, stacks, weights)
    return expert_mlp(
        rows,
        stacks.gate,
        stacks.up,
        stacks.down,
        sizes,
        weights,
        activation=stacks.activation,
    )


def _composed_mlp(
    rows: Float[Array, "R M"],
    sizes: Int[Array, " E"],
    stacks: Stacks,
    weights: Float[Array, " R"] | None,
) -> Float[Array, "R M"]:
    """`grouped_mlp` for what `expert_mlp` does not compute."""
    up = grouped_matmul(rows, stacks.up, sizes)
    up = _plus_bias(up, sizes, stacks.up_bias)
    if stacks.gate is None:
        hidden = activated(up, stacks.activation)
    else:
        gate_logits = grouped_matmul(rows, stacks.gate, sizes)
        gate_logits = _plus_bias(gate_logits, sizes, stacks.gate_bias)
        hidden = gated_product(gate_logits, up, stacks.activation, stacks.swiglu_limit)
    if weights is not None:
        # Before the last matrix, which is the same: so the outputs are not kept for the gradient.
        hidden = (hidden.astype(jnp.float32) * weights[:, None]).astype(rows.dtype)
    return grouped_matmul(hidden, stacks.down, sizes)


def _plus_bias(
    rows: Float[Array, "R F"],
    sizes: Int[Array, " E"],
    bias: Float[Array, "E F"] | None,
) -> Float[Array, "R F"]:
    """Rows sorted by expert, each plus the bias of its expert.

    By a matmul with ones and zeros: E is far less than the width of a row, and the gradient of a
    gather, a sum of rows into E places, is slow on a TPU.
    """
    if bias is None:
        return rows
    ends = jnp.cumsum(sizes)
    place = jnp.arange(rows.shape[0])[:, None]
    # [R, E]; rows past the last group have no expert.
    is_of = (place < ends) & (place >= ends - sizes)
    of_row = jnp.matmul(
        is_of.astype(bias.dtype),
        bias,
        precision="highest",
        preferred_element_type=jnp.float32,
    )
    return (rows.astype(jnp.float32) + of_row).astype(rows.dtype)


def output_bias(
    experts: Int[Array, "... k"],
    weights: Float[Array, "... k"],
    bias: Float[Array, "E M"],
) -> Float[Array, "... M"]:
    """What the biases of the down matrices add to each token: `sum_k weight_k bias_k`.

    Args:
      experts: the experts of each token; E and above for a place without a bias.
      weights: what their outputs are weighted by.
      bias: of every expert.

    Returns:
      The weighted sums, float32. No row needs to be sorted for them.
    """
    by_expert = weight_of(experts, weights, 0, bias.shape[0])
    return jnp.einsum(
        "...e,em->...m",
        by_expert,
        bias.astype(jnp.float32),
        precision="highest",
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
    order, inverse, sizes = sort_by_group(by_place(ids), stacks.num_experts)
    rows, row_weights = sorted_inputs(
        x,
        weights,
        order,
        inverse,
        stacks,
    )
    y = grouped_mlp(
        rows,
        sizes,
        stacks,
        row_weights,
    )
    return summed_places(permute_rows(y, inverse, order), len(x))


def by_place(of_places: Array) -> Array:
    """[R, k] -> [k R]: the first places of all tokens, then all second ones, and so on.

    Sums over a token's places are then sums of whole arrays.
    """
    return of_places.T.reshape(-1)


def sorted_inputs(
    x: Float[Array, "R M"],
    weights: Float[Array, "R k"],
    order: Int[Array, " kR"],
    inverse: Int[Array, " kR"],
    stacks: Stacks,
) -> tuple[Float[Array, "kR M"], Float[Array, " kR"] | None]:
    """What goes into the experts, sorted: each token once for each of its k places, and weights.

    Args:
      x: the tokens.
      weights: of their places.
      order: the permutation that sorts the places by expert, as `by_place` numbers them.
      inverse: its inverse.
      stacks: the experts.

    Returns:
      The rows, in x's dtype, and what each one's result is multiplied by; None where
      `stacks.weight_input` has the weights multiply the rows.
    """
    rows = permute_rows(x, order, inverse, copies_first=True)
    row_weights = permute_rows(by_place(weights), order, inverse)
    if not stacks.weight_input:
        return rows, row_weights
    return (rows.astype(jnp.float32) * row_weights[:, None]).astype(rows.dtype), None


def summed_places(y: Float[Array, "kR M"], tokens: int) -> Float[Array, "R M"]:
    """The sum over each token's places, as `by_place` numbers them, float32."""
    return jnp.sum(y.reshape(-1, tokens, y.shape[-1]), axis=0, dtype=jnp.float32)


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
