"""What experts compute, as pure functions: gated MLPs on rows sorted by expert, and experts that cost nothing."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from kernels_pallas.ops import expert_mlp, permute_rows, sort_by_group


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
    sizes: Int[Array, "E"],
    stacks: Stacks,
    weights: Float[Array, "R"] | None = None,
) -> Float[Array, "R M"]:
    """Rows sorted by expert, `sizes` rows for each, through their experts' MLPs. Rows beyond the last group give 0."""
    return expert_mlp(
        rows, stacks.gate, stacks.up, stacks.down, sizes, weights, activation=stacks.activation
    )


def mixture(
    x: Float[Array, "R M"],
    experts: Int[Array, "R k"],
    weights: Float[Array, "R k"],
    stacks: Stacks,
    first: Array | int = 0,
) -> Float[Array, "R M"]:
    """`sum_k weight_k * expert_k(x)`, float32. Of experts `first`, `first + 1`, ... only, those of `stacks`.

    Rows go to their experts and back by gathers; none is dropped, none is padded, places of other experts cost nothing.
    Weights go along, into the experts: outputs are not needed again for the weights' gradient, and not kept.
    """
    own = experts - first
    ids = jnp.where((own >= 0) & (own < stacks.num_experts), own, stacks.num_experts)
    order, inverse, sizes = sort_by_group(ids.reshape(-1), stacks.num_experts)
    rows = sorted_inputs(x, weights, order, inverse, stacks)
    scale = None if stacks.weight_input else permute_rows(weights.reshape(-1), order, inverse)
    y = permute_rows(grouped_mlp(rows, sizes, stacks, scale), inverse, order)
    return jnp.sum(y.reshape(*weights.shape, -1), axis=1, dtype=jnp.float32)


def sorted_inputs(
    x: Float[Array, "R M"],
    weights: Float[Array, "R k"],
    order: Array,
    inverse: Array,
    stacks: Stacks,
):
    """The rows [R k, M] that go into the experts, sorted."""
    rows = permute_rows(x, order, inverse)
    if not stacks.weight_input:
        return rows
    scale = permute_rows(weights.reshape(-1, 1), order, inverse)
    return (rows.astype(jnp.float32) * scale).astype(rows.dtype)


def combine(
    y: Float[Array, "Rk M"], weights: Float[Array, "R k"], stacks: Stacks
) -> Float[Array, "R M"]:
    """The weighted sum over each token's places, float32. Weights that went in do not come out again."""
    y = y.reshape(*weights.shape, y.shape[-1]).astype(jnp.float32)
    return jnp.sum(y, axis=1) if stacks.weight_input else jnp.einsum("rk,rkm->rm", weights, y)


def weight_of(
    experts: Int[Array, "... k"], weights: Float[Array, "... k"], first: int, count: int
) -> Float[Array, "... n"]:
    """The weight of each of `count` experts from id `first` on, 0 where it was not chosen."""
    hit = experts[..., None] == first + jnp.arange(count)
    return jnp.sum(jnp.where(hit, weights[..., None], 0.0), axis=-2)


def constant_experts(
    x: Float[Array, "... M"],
    weights: Float[Array, "... n"],
    mixer: Float[Array, "M n 2"],
    vectors: Float[Array, "n M"],
) -> Float[Array, "... M"]:
    """`sum_i weight_i (a1 x + a2 v_i)`, `(a1, a2) = softmax(x W_i)`, float32 (MoE++, arXiv 2410.07348, eq. 5)."""
    x32 = x.astype(jnp.float32)
    share = weights[..., None] * jax.nn.softmax(jnp.einsum("...m,mnc->...nc", x32, mixer), axis=-1)
    return jnp.sum(share[..., 0], axis=-1, keepdims=True) * x32 + jnp.einsum(
        "...n,nm->...m", share[..., 1], vectors
    )
