"""A scene of two halves, fine waves and a smooth hill, by experts of different resolutions
(Switch-NeRF++, arXiv 2505.02005): values of points in space, without rendering.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.layers.hash_experts import HashExperts, balance_loss
from gatedjax.toys.fit import fitted

BATCH = 2048


def scene(points: Float[Array, "N 3"]) -> Float[Array, "N 1"]:
    """Waves where x < 1/2, a hill elsewhere."""
    waves = jnp.prod(jnp.sin(12 * jnp.pi * points), axis=-1, keepdims=True)
    away = jnp.sum((points - 0.75) ** 2, axis=-1, keepdims=True)
    return jnp.where(points[:, :1] < 0.5, waves, jnp.exp(-4 * away))


def run(steps: int) -> list[str]:
    """Trains the mixture, and grids of one resolution each; lines for people."""
    test = jax.random.uniform(jax.random.key(10_000), (8192, 3))
    wanted = scene(test)
    models = {
        "coarse alone": HashExperts(experts=((2, 8),)),
        "fine alone": HashExperts(experts=((16, 64),)),
        "coarse and fine": HashExperts(experts=((2, 8), (16, 64))),
    }
    lines = []
    for name, model in models.items():
        params = model.init(jax.random.key(1), test[:2])

        def loss(params, points, model=model):
            outputs: Any = model.apply(params, points)
            values, probs = outputs
            return jnp.mean((values - scene(points)) ** 2) + 5e-4 * balance_loss(probs)

        def batch(key: Array) -> Float[Array, "N 3"]:
            return jax.random.uniform(key, (BATCH, 3))

        params = fitted(loss, params, batch, steps=steps, rate=1e-2)
        outputs: Any = model.apply(params, test)
        values, probs = outputs
        error = float(jnp.sqrt(jnp.mean((values - wanted) ** 2)))
        line = f"{name}: RMS error {error:.4f}"
        if probs.shape[1] > 1:
            is_fine = jnp.argmax(probs, axis=-1) == probs.shape[1] - 1
            in_waves = test[:, 0] < 0.5
            parts = [float(jnp.mean(is_fine, where=half)) for half in (in_waves, ~in_waves)]
            line += f"; fine expert: {parts[0]:.0%} of the waves, {parts[1]:.0%} of the hill"
        lines.append(line)
    return lines
