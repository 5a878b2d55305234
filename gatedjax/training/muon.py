"""Muon (Keller Jordan's; scaled as in arXiv 2502.16982) on parameters of any rank.

An array may hold many matrices: of all layers, of all experts, a query's and a gate's side by side.
Each is orthogonalized by itself, as if it were a parameter of its own.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, PyTree

# Of the momentum.
BETA = 0.95
# Newton-Schulz: the quintic x -> a x + b (x x^T) x + c (x x^T)^2 x, so many times. It takes
# singular values to between about 0.7 and 1.2, not to 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Makes the update of a matrix as large as Adam's, so that one learning rate serves both.
CONSISTENT_RMS = 0.2
# Added to a matrix's norm before it is divided by it.
NORM_EPS = 1e-8


GateChannels = Literal["none", "half", "one"]


@dataclasses.dataclass(frozen=True)
class Matrices:
    """Which matrices an array holds. Axes that are neither input nor output count matrices.

    inputs: the axes that the matrix contracts.
    outputs: those that it produces.
    gate_channels: how much of the last axis, at its end, belongs to another matrix.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    gate_channels: GateChannels = "none"


class MuonState(NamedTuple):
    """Steps so far (int32), and the running mean of the gradients."""

    count: Any
    mu: PyTree


def scale_by_muon(matrices: PyTree) -> optax.GradientTransformation:
    """The orthogonalized momentum of every parameter, to be multiplied by the rate.

    Args:
      matrices: for each parameter its `Matrices`.
    """

    def init(params: PyTree) -> MuonState:
        return MuonState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        grads = updates
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, BETA, 1)
        # Nesterov: the mean as it will be after this gradient has come once more.
        corrected_mu = optax.tree.bias_correction(mu, BETA, optax.safe_increment(count))
        corrected_grads = optax.tree.bias_correction(grads, BETA, count)

        def muon_update(mean: Array, grad: Array, held: Matrices) -> Array:
            return orthogonal_update(BETA * mean + (1.0 - BETA) * grad, held)

        updates = jax.tree.map(muon_update, corrected_mu, corrected_grads, matrices)
        return updates, MuonState(count, mu)

    return optax.GradientTransformation(init, update)


def orthogonal_update(x: Float[Array, "..."], held: Matrices) -> Float[Array, "..."]:
    """Each matrix of `x` orthogonalized, times 0.2 sqrt(max(inputs, outputs))."""
    parts = [_orthogonal(part) for part in split_matrices(x, held)]
    return joined_matrices(parts, x.shape, held)


def _orthogonal(x: Float[Array, "N I O"]) -> Float[Array, "N I O"]:
    scale = CONSISTENT_RMS * math.sqrt(max(x.shape[1:]))
    return scale * newton_schulz(x)


def split_matrices(
    x: Float[Array, "..."],
    held: Matrices,
) -> tuple[Float[Array, "N I O"], ...]:
    """The matrices of an array, stacked; two stacks where a gate's lie beside a query's."""
    flat = []
    for part in _parts(x, held):
        ordered = part.transpose(_order(part.ndim, held))
        fan_in = math.prod(part.shape[axis] for axis in held.inputs)
        fan_out = math.prod(part.shape[axis] for axis in held.outputs)
        flat.append(ordered.reshape(-1, fan_in, fan_out))
    return tuple(flat)


def joined_matrices(
    stacks: Sequence[Float[Array, "N I O"]],
    shape: tuple[int, ...],
    held: Matrices,
) -> Float[Array, "..."]:
    """The array that `split_matrices` took apart.

    Args:
      stacks: of matrices.
      shape: of the array.
      held: which matrices it holds.
    """
    order = _order(len(shape), held)
    inverse = sorted(range(len(shape)), key=order.__getitem__)
    sizes = [shape[-1]]
    if held.gate_channels != "none":
        own = _own_channels(shape[-1], held)
        sizes = [own, shape[-1] - own]
    parts = []
    for flat, size in zip(stacks, sizes):
        of_part = (*shape[:-1], size)
        ordered = [of_part[axis] for axis in order]
        parts.append(flat.reshape(ordered).transpose(inverse))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _parts(x: Float[Array, "..."], held: Matrices) -> list[Array]:
    if held.gate_channels == "none":
        return [x]
    own = _own_channels(x.shape[-1], held)
    return [x[..., :own], x[..., own:]]


def _own_channels(size: int, held: Matrices) -> int:
    """How much of the last axis is not the gate's."""
    return size // 2 if held.gate_channels == "half" else size - 1


def _order(ndim: int, held: Matrices) -> tuple[int, ...]:
    """The axes: those that count matrices, inputs, outputs."""
    stack = [axis for axis in range(ndim) if axis not in (*held.inputs, *held.outputs)]
    return (*stack, *held.inputs, *held.outputs)


def newton_schulz(x: Float[Array, "N I O"]) -> Float[Array, "N I O"]:
    """About U V^T of every matrix U S V^T."""
    a, b, c = NEWTON_SCHULZ
    # The products are taken on the smaller side.
    is_tall = x.shape[1] > x.shape[2]
    if is_tall:
        x = x.mT
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + NORM_EPS)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x
