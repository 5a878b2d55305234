"""Adaptive memory momentum (arXiv 2510.04988): a momentum whose coefficient is chosen at each step.

The loss is modelled by two planes, that of the gradient g at x and that of the memory d of earlier
gradients, which passes through the step before. A proximal step on their maximum, held to the
memory's own step by lambda, mixes them, and the best beta in [0, 1] has a closed form. With a
preconditioner P (Adam's; the identity for SGD), A = 1 / (P (1 + lambda P)), and u the step before
over the rate of this one (so that x_before - x = rate u):

  beta = (<g, u> - <d - g, A (g + lambda P d)>) / <d - g, A (d - g)>, then clipped,
  d    = ((1 - beta) g + (beta + lambda P) d) / (1 + lambda P).

For SGD this is the paper's formula, ((1 + l) <g, d> - <d - g, g + l d>) / |d - g|^2.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, PyTree

LAMBDA = 0.1
# The largest beta, of SGD and of Adam.
MOST_BETA = 0.9
MOST_BETA_OF_ADAM = MOST_BETA - 0.1 * LAMBDA
# Of a square that is divided by.
TINY = 1e-30


class MemoryState(NamedTuple):
    """Steps so far, and the memory of gradients."""

    count: Any
    memory: PyTree


def scale_by_memory() -> optax.GradientTransformation:
    """AM-MSGD's direction, to be multiplied by the rate. One beta for all parameters."""

    def init(params: PyTree) -> MemoryState:
        return MemoryState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MemoryState]:
        del params
        is_first = state.count == 0
        # The memory starts as the first gradient.
        memory = jax.tree.map(
            lambda d, g: jnp.where(is_first, g, d),
            state.memory,
            updates,
        )
        beta = memory_beta(updates, memory)
        memory = jax.tree.map(
            lambda d, g: ((beta + LAMBDA) * d + (1.0 - beta) * g) / (1.0 + LAMBDA),
            memory,
            updates,
        )
        return memory, MemoryState(optax.safe_increment(state.count), memory)

    return optax.GradientTransformation(init, update)


def memory_beta(grads: PyTree, memory: PyTree) -> Float[Array, ""]:
    """beta of AM-MSGD: inner products are over all parameters."""
    dot = optax.tree.vdot(grads, memory)
    grads_square = optax.tree.vdot(grads, grads)
    memory_square = optax.tree.vdot(memory, memory)
    # <d - g, g + l d>, multiplied out.
    crossed = dot + LAMBDA * memory_square - grads_square - LAMBDA * dot
    apart = memory_square - 2.0 * dot + grads_square
    beta = ((1.0 + LAMBDA) * dot - crossed) / jnp.maximum(apart, TINY)
    return jnp.clip(beta, 0.0, MOST_BETA)


class AdamMemoryState(NamedTuple):
    """Of AM-Adam.

    memory, second: the memory, and the mean of squared gradients.
    step: the direction of the step before, its weight decay included.
    product: of the betas so far, for each parameter.
    """

    count: Any
    memory: PyTree
    second: PyTree
    step: PyTree
    product: PyTree


def scale_by_adam_memory(
    b2: float,
    eps: float,
    rate: optax.Schedule,
    decay: PyTree,
    stacked: PyTree,
) -> optax.GradientTransformation:
    """AM-AdamW's direction with its weight decay, to be multiplied by the rate.

    P is (1 - most x product of betas) (sqrt(v) + eps), with the bias of both means corrected.

    Args:
      b2: of the mean of squared gradients.
      eps: added to its root.
      rate: the schedule: a step before a warm-up's next one was shorter.
      decay: the weight decay of each parameter.
      stacked: for each parameter the axes that count tensors; each has a beta of its own.
    """

    def init(params: PyTree) -> AdamMemoryState:
        zeros = optax.tree.zeros_like(params)
        product = jax.tree.map(_one_each, params, stacked)
        return AdamMemoryState(jnp.zeros([], jnp.int32), zeros, zeros, zeros, product)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdamMemoryState]:
        count = optax.safe_increment(state.count)
        second = optax.tree.update_moment_per_elem_norm(updates, state.second, b2, 2)
        corrected = optax.tree.bias_correction(second, b2, count)
        rates = rate(state.count - 1) / jnp.maximum(rate(state.count), TINY)
        before = jnp.where(state.count == 0, 0.0, rates)

        def new(g: Array, d: Array, v: Array, u: Array, product: Array, x: Array, wd: float, axes):
            p = (1.0 - MOST_BETA_OF_ADAM * product) * (jnp.sqrt(v) + eps)
            memory, beta = adam_memory(g, d, p, before * u, axes)
            return memory, memory / p + wd * x, product * beta

        made = jax.tree.map(
            new,
            updates,
            state.memory,
            corrected,
            state.step,
            state.product,
            params,
            decay,
            stacked,
        )
        memory, step, product = (_part(made, updates, i) for i in range(3))
        return step, AdamMemoryState(count, memory, second, step, product)

    return optax.GradientTransformation(init, update)


def adam_memory(
    grad: Float[Array, "..."],
    memory: Float[Array, "..."],
    p: Float[Array, "..."],
    step: Float[Array, "..."],
    stacked: tuple[int, ...] = (),
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """(the new memory, beta) of a parameter: the formulas above.

    Args:
      grad: g.
      memory: d.
      p: the preconditioner, a diagonal.
      step: u, the step before over this one's rate.
      stacked: axes along which tensors are stacked.
    """
    axes = tuple(axis for axis in range(grad.ndim) if axis not in stacked)
    held = 1.0 + LAMBDA * p
    weight = 1.0 / (p * held)
    apart = memory - grad
    gap = jnp.sum(grad * step, axis=axes, keepdims=True)
    crossed = jnp.sum(apart * weight * (grad + LAMBDA * p * memory), axis=axes, keepdims=True)
    square = jnp.sum(apart * weight * apart, axis=axes, keepdims=True)
    beta = jnp.clip((gap - crossed) / jnp.maximum(square, TINY), 0.0, MOST_BETA_OF_ADAM)
    new = ((1.0 - beta) * grad + (beta + LAMBDA * p) * memory) / held
    return new, beta


def _one_each(param: Array, stacked: tuple[int, ...]) -> Array:
    """A 1 for each tensor of a parameter."""
    shape = [size if axis in stacked else 1 for axis, size in enumerate(param.shape)]
    return jnp.ones(shape, jnp.float32)


def _part(made: Any, like: PyTree, index: int) -> PyTree:
    """One of the values that were made of each leaf of `like`."""
    treedef = jax.tree.structure(like)
    return treedef.unflatten([values[index] for values in treedef.flatten_up_to(made)])
