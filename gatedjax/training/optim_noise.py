"""LANTON (arXiv 2510.14009): rates of layers by the noise of their gradients, over Muon.

H <- b2 H + (1 - b2) |G_t - G_(t-1)|^2 estimates the variance of a matrix's gradient, in the norm
that is dual to Muon's: the nuclear norm, the sum of singular values. With a = alpha / sqrt(alpha^2
+ H) the update of each matrix is multiplied by sqrt(a / the largest a of all): the noisiest moves
least. Each matrix of a stack (layers, experts, a query's and a gate's) is one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, PyTree

from gatedjax.training.muon import (
    Matrices,
    joined_matrices,
    newton_schulz,
    scale_by_muon,
    split_matrices,
)


class NoiseState(NamedTuple):
    """Muon's state, the gradients before, and H of each matrix."""

    muon: Any
    before: PyTree
    noise: PyTree


def scale_by_lanton(matrices: PyTree, b2: float, alpha: float) -> optax.GradientTransformation:
    """Muon's updates, times the factor of each matrix.

    Args:
      matrices: for each parameter its `Matrices`.
      b2: of the running mean of the noise.
      alpha: noise above this slows a matrix down.
    """
    muon = scale_by_muon(matrices)

    def init(params: PyTree) -> NoiseState:
        noise = jax.tree.map(_no_noise, params, matrices)
        return NoiseState(muon.init(params), optax.tree.zeros_like(params), noise)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, NoiseState]:
        grads = updates
        # There is no difference to measure at the first step.
        is_first = state.muon.count == 0

        def noise_of(grad: Array, before: Array, noise: tuple[Array, ...], held: Matrices):
            apart = split_matrices(jnp.where(is_first, 0.0, grad - before), held)
            squares = (nuclear_norm(x) ** 2 for x in apart)
            return tuple(b2 * h + (1.0 - b2) * square for h, square in zip(noise, squares))

        noise = jax.tree.map(noise_of, grads, state.before, state.noise, matrices)
        factors = noise_factors(noise, alpha)
        updates, muon_state = muon.update(grads, state.muon, params)

        def slowed(x: Array, factor: tuple[Array, ...], held: Matrices) -> Array:
            parts = [p * f[:, None, None] for p, f in zip(split_matrices(x, held), factor)]
            return joined_matrices(parts, x.shape, held)

        updates = jax.tree.map(slowed, updates, factors, matrices)
        return updates, NoiseState(muon_state, grads, noise)

    return optax.GradientTransformation(init, update)


def noise_factors(noise: PyTree, alpha: float) -> PyTree:
    """sqrt(a / the largest a), with a = alpha / sqrt(alpha^2 + H)."""
    a = jax.tree.map(lambda h: alpha / jnp.sqrt(alpha**2 + h), noise)
    leaves = jax.tree.leaves(a)
    if not leaves:
        return a
    largest = jnp.max(jnp.stack([jnp.max(x) for x in leaves]))
    return jax.tree.map(lambda x: jnp.sqrt(x / largest), a)


def nuclear_norm(x: Float[Array, "N I O"]) -> Float[Array, " N"]:
    """The sum of singular values of each matrix, as Newton-Schulz sees them.

    <X, U V^T> is the nuclear norm of X = U S V^T. The iteration takes singular values to between
    0.7 and 1.2 in place of 1, so the norm is right to about a fifth, without a decomposition.
    """
    return jnp.sum(x * newton_schulz(x), axis=(1, 2))


def _no_noise(param: Array, held: Matrices) -> tuple[Array, ...]:
    shapes = jax.eval_shape(lambda x: split_matrices(x, held), param)
    return tuple(jnp.zeros(part.shape[0], jnp.float32) for part in shapes)
