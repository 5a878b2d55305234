"""Draws docs/pictures/estimators.png: bias and variance of gradients through four random bits.

    python docs/draw_estimators.py

The network is that of tests/gatedjax/layers/test_stochastic_gate.py: its sixteen outcomes give the
exact gradient. Left: how far the mean of n draws is from it. Right: Gumbel-softmax by temperature.
"""

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

# Found through the line above.
from gatedjax.layers import stochastic_gate as gates  # noqa: E402
from gatedjax.reporting.figure import empty_figure  # noqa: E402

DRAWS = 2**17
MEANS_OF = 4 ** np.arange(7)
TEMPERATURES = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
RNG = np.random.default_rng(0)
LOGITS = np.array([-2.0, -0.5, 0.3, 1.5])
W, B, OUT = RNG.normal(size=(4, 6)), RNG.normal(size=6), RNG.normal(size=6)
OUTCOMES = np.array(list(itertools.product([0.0, 1.0], repeat=4)))


def loss(bits: Any, xp: Any = jnp) -> Any:
    """Of each row of bits."""
    return (xp.tanh(bits @ W + B) @ OUT - 1.0) ** 2


def main() -> None:
    p = 1 / (1 + np.exp(-LOGITS))
    chances = np.prod(np.where(OUTCOMES == 1, p, 1 - p), axis=-1)
    losses = loss(OUTCOMES, np)[:, None]
    exact = chances @ ((OUTCOMES - p) * losses)
    squares = (OUTCOMES - p) ** 2
    baseline = (chances @ (squares * losses)) / (chances @ squares)

    figure = empty_figure((9.0, 3.6))
    left, right = figure.subplots(1, 2)
    for name, estimates in by_name(baseline).items():
        left.loglog(MEANS_OF, [error(estimates, n, exact) for n in MEANS_OF], label=name)
    left.set_xlabel("draws in the mean")
    left.set_ylabel("error / exact gradient (RMS)")
    left.legend(fontsize=7)
    for hard in (False, True):
        drawn = [estimated(gumbel_gate(t, hard)) for t in TEMPERATURES]
        kind = "hard" if hard else "soft"
        bias = [error(estimates, len(estimates), exact) for estimates in drawn]
        deviation = [np.sqrt(np.mean(e.var(0)) / np.mean(exact**2)) for e in drawn]
        (line,) = right.loglog(TEMPERATURES, bias, label=f"{kind}: bias")
        color = line.get_color()
        label = f"{kind}: deviation of a draw"
        right.loglog(TEMPERATURES, deviation, "--", color=color, label=label)
    right.set_xlabel("temperature of Gumbel-softmax")
    right.legend(fontsize=7)
    figure.savefig(ROOT / "docs" / "pictures" / "estimators.png")


def by_name(baseline: np.ndarray) -> dict[str, np.ndarray]:
    """Every estimator's gradients, [draws, 4]."""
    key = jax.random.key(0)
    return {
        "straight through, slope 1": estimated(lambda a: gates.bernoulli_gate(key, a, "one")),
        "straight through, slope of the sigmoid": estimated(lambda a: gates.bernoulli_gate(key, a)),
        "stochastic times smooth": estimated(lambda a: gates.stochastic_times_smooth(key, a)),
        "unbiased": estimated(None),
        "unbiased, least variance": estimated(None, baseline),
    }


def estimated(
    gate: Callable[[Array], Array] | None,
    baseline: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Gradients of the loss by the logits, one for each draw.

    Args:
      gate: logits -> bits that have a gradient; None for the likelihood ratio.
      baseline: of the likelihood ratio.
    """

    def total(a: Array) -> Array:
        if gate is not None:
            return jnp.sum(loss(gate(a)))
        bits = jax.lax.stop_gradient(gates.bernoulli_gate(jax.random.key(0), a))
        losses = loss(bits)
        return jnp.sum(losses + gates.likelihood_ratio(bits, a, losses, jnp.asarray(baseline)))

    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (DRAWS, len(LOGITS)))
    return np.asarray(jax.jit(jax.grad(total))(logits), np.float64)


def gumbel_gate(temperature: float, hard: bool) -> Callable[[Array], Array]:
    """Bits as the first of two categories, whose logits are a and 0."""
    key = jax.random.key(1)

    def gate(a: Array) -> Array:
        logits = jnp.stack([a, jnp.zeros_like(a)], axis=-1)
        return gates.gumbel_softmax(key, logits, temperature, hard=hard)[..., 0]

    return gate


def error(estimates: np.ndarray, n: int, exact: np.ndarray) -> float:
    """RMS of means of n draws, less the exact gradient, over the exact gradient's RMS."""
    means = estimates.reshape(-1, n, len(exact)).mean(axis=1)
    return float(np.sqrt(np.mean((means - exact) ** 2) / np.mean(exact**2)))


if __name__ == "__main__":
    main()
