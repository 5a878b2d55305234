"""What the learners and gates of adaptive MLPs are taught (arXiv 2312.10193, three stages).

1. Learners: the output of every number of them is to be that of the MLP that they replace.
2. Gates: the number behind which one more learner gains little.
3. All together: the loss of the model, and `learner_losses` of what its gates choose.
"""

import math

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import AdaptiveMLPConfig

# What a layer sows, in the collection of added losses: one-hot choices, 0 for padding.
CHOICES = "learner_choices"


def distance(
    outputs: Float[Array, "... N+1 M"],
    target: Float[Array, "... M"],
) -> Float[Array, "..."]:
    """Mean square over numbers of learners and channels: what learners are taught first."""
    squares = jnp.square(outputs - target[..., None, :])
    return jnp.mean(squares, axis=(-2, -1))


def gate_labels(
    outputs: Float[Array, "... N+1 M"],
    target: Float[Array, "... M"],
    factor: float,
    least: int = 0,
) -> Int[Array, "..."]:
    """How many learners a gate is taught: the k behind the first step that gains less than
    `factor`, error_{k-1} / error_k < factor; N where the first step does, or none.

    As published: a first learner that gains little says nothing about those after it.

    Args:
      outputs: with 0, 1 ... N learners.
      target: the output of the whole MLP.
      factor: 1.2 in the paper.
      least: the smallest number that the gate can choose; labels below it become it.

    Returns:
      Indices among the choices of the gate.
    """
    errors = jnp.linalg.norm(outputs - target[..., None, :], axis=-1)
    # error_{k-1} < factor error_k: with no division, where both may be 0.
    gains_little = errors[..., :-1] < factor * errors[..., 1:]
    first = jnp.argmax(gains_little, axis=-1)
    most = errors.shape[-1] - 1
    label = jnp.where(first == 0, most, first + 1)
    return jnp.maximum(label, least) - least


def learner_losses(
    c: AdaptiveMLPConfig,
    choices: Float[Array, "L B T K"],
) -> dict[str, Float[Array, ""]]:
    """The three losses of all layers of a configuration, before their weights.

    budget: abs(fraction of the learners that are used - budget).
    entropy: minus the mean entropy of a layer's choices within a row, 1 where all are even.
    diversity: minus twice the mean abs(b_i - b_j) over pairs of rows, b the mean number of
      learners of a row over the number of choices.

    Args:
      c: the layers.
      choices: one-hot, 0 for padding.
    """
    numbers = jnp.arange(c.least, c.learners + 1, dtype=jnp.float32)
    by_row = jnp.sum(choices.astype(jnp.float32), axis=2)
    tokens = jnp.sum(by_row, axis=-1)
    has_tokens = tokens > 0
    counts = jnp.where(has_tokens, tokens, 1.0)
    used = jnp.sum(by_row * numbers) / jnp.maximum(jnp.sum(tokens), 1.0)
    budget = jnp.abs(used / c.learners - c.budget)
    histogram = by_row / counts[..., None]
    logs = jnp.log(jnp.where(histogram > 0, histogram, 1.0))
    entropy = -jnp.sum(histogram * logs, axis=-1) / math.log(c.choices)
    rows = jnp.maximum(jnp.sum(has_tokens), 1)
    mean_entropy = jnp.sum(jnp.where(has_tokens, entropy, 0.0)) / rows
    # Rows have as many tokens in every layer.
    of_row = jnp.mean(histogram @ numbers, axis=0) / (c.learners + 1)
    is_pair = has_tokens[0][:, None] & has_tokens[0][None, :]
    distances = jnp.where(is_pair, jnp.abs(of_row[:, None] - of_row[None, :]), 0.0)
    pairs = jnp.maximum(jnp.sum(is_pair), 1)
    return {
        "budget": budget,
        "entropy": -mean_entropy,
        "diversity": -2.0 * jnp.sum(distances) / pairs,
    }


def weighted_losses(
    c: AdaptiveMLPConfig,
    choices: Float[Array, "L B T K"],
) -> Float[Array, ""]:
    """The sum of the three, times their weights."""
    losses = learner_losses(c, choices)
    total = c.budget_loss * losses["budget"]
    total = total + c.entropy_loss * losses["entropy"]
    return total + c.diversity_loss * losses["diversity"]
