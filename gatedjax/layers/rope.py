"""Rotary position embedding (arXiv 2104.09864), on all or the first channels of a head, and YaRN."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int


def inverse_frequencies(
    rotary_dim: int, base: float, yarn_factor: float = 1.0, yarn_original_length: int = 4096
):
    """Radians per position for each of the rotary_dim / 2 pairs: base^(-2i / rotary_dim), float32.

    With `yarn_factor` s > 1 (YaRN, arXiv 2309.00071, section 3.2): pairs that turn fewer than once over the original
    length are slowed s times, those that turn more than 32 times are kept, those between are blended linearly.
    """
    pairs = np.arange(rotary_dim // 2)
    frequencies = base ** (-2.0 * pairs / rotary_dim)
    if yarn_factor > 1.0:
        fast, slow = (
            _pair_that_turns(n, rotary_dim, base, yarn_original_length) for n in (32.0, 1.0)
        )
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), rotary_dim - 1)
        kept = 1.0 - np.clip((pairs - low) / max(high - low, 1e-3), 0.0, 1.0)
        frequencies = frequencies * kept + frequencies / yarn_factor * (1.0 - kept)
    return frequencies.astype(np.float32)


def yarn_magnitude(yarn_factor: float) -> float:
    """What YaRN multiplies rotated queries and keys with: 0.1 ln(s) + 1 (its equation 22); 1 without extension."""
    return 0.1 * math.log(yarn_factor) + 1.0


def apply_rope(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "B T"],
    frequencies: Float[np.ndarray, " R"],
    magnitude: float = 1.0,
) -> Float[Array, "B T H D"]:
    """Rotates the first 2R channels of each head by position x frequency, in float32; the others pass unchanged.

    Channel i is paired with i + R (the rotate-half layout of Llama and Qwen checkpoints).
    """
    half = len(frequencies)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude
    left, right = x[..., :half].astype(jnp.float32), x[..., half : 2 * half].astype(jnp.float32)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(
        x.dtype
    )
    return jnp.concatenate([rotated, x[..., 2 * half :]], axis=-1)


def _pair_that_turns(turns: float, rotary_dim: int, base: float, length: int) -> float:
    """The (fractional) pair index that makes this many full turns over `length` positions."""
    return rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))
