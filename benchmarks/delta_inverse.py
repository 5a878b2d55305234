"""How wrong (I + A)^-1 of the delta rule becomes on correlated keys, by three methods, in float32.

    python benchmarks/delta_inverse.py

Prints the rows of the table in docs/ops/delta_scan.md. No accelerator and no timing.
"""

import jax.numpy as jnp
import numpy as np

from kernels_pallas.delta_scan import tile

NUM_KEYS = 64
CHANNELS = 128
CASES = ((0.0, 1.0), (0.5, 1.0), (0.9, 1.0), (0.9, 2.0), (1.0, 2.0))


def scores_of_keys(cosine: float, beta: float) -> np.ndarray:
    """A, float64, of keys of length one with this mean cosine."""
    rng = np.random.default_rng(0)
    common = rng.normal(size=CHANNELS)
    common /= np.linalg.norm(common)
    own = rng.normal(size=(NUM_KEYS, CHANNELS))
    own /= np.linalg.norm(own, axis=-1, keepdims=True)
    keys = np.sqrt(cosine) * common + np.sqrt(1 - cosine) * own
    keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
    return np.tril(beta * keys @ keys.T, -1)


def by_powers(scores: jnp.ndarray) -> jnp.ndarray:
    """(I - A)(I + A^2)(I + A^4) ...: the whole Neumann series."""
    identity = jnp.eye(NUM_KEYS)
    result = identity - scores
    power = scores
    for _ in range(5):
        power = power @ power
        result = result @ (identity + power)
    return result


def by_newton(scores: jnp.ndarray) -> jnp.ndarray:
    """X <- X (2 I - (I + A) X) from X = I - A, six times: exact on paper."""
    identity = jnp.eye(NUM_KEYS)
    matrix = identity + scores
    result = identity - scores
    for _ in range(6):
        result = result @ (2 * identity - matrix @ result)
    return result


def relative_error(actual: jnp.ndarray, expected: np.ndarray) -> str:
    error = np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max()
    return f"{error:.0e}"


def main() -> None:
    for cosine, beta in CASES:
        scores = scores_of_keys(cosine, beta)
        expected = np.linalg.inv(np.eye(NUM_KEYS) + scores)
        single = jnp.asarray(scores, jnp.float32)
        methods = (tile.inverse(single, "highest"), by_powers(single), by_newton(single))
        errors = [relative_error(actual, expected) for actual in methods]
        print(f"| {cosine:g}, {beta:g} | {' | '.join(errors)} |")


if __name__ == "__main__":
    main()
