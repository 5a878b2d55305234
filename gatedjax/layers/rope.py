"""Rotary position embedding (arXiv 2104.09864) on the first channels of a head, and extensions."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.token_info import Grid
from kernels_pallas.common.device import target_platform

# YaRN's bounds: pairs that make more full rotations than this over the original length are kept,
# those that make fewer than one are slowed.
FAST_ROTATIONS = 32.0
SLOW_ROTATIONS = 1.0


def inverse_frequencies(
    rotary_dim: int,
    base: float,
    yarn_factor: float = 1.0,
    yarn_original_length: int = 4096,
    yarn_truncate: bool = True,
) -> Float[np.ndarray, " J"]:
    """Radians per position for each pair of rotated channels: base^(-2i / rotary_dim), float32.

    Args:
      rotary_dim: the number of channels that rotate.
      base: the base of the frequencies.
      yarn_factor: s of YaRN (arXiv 2309.00071, section 3.2). Above 1, pairs that rotate fewer than
        once over the original length are slowed s times, those that rotate more than 32 times are
        kept, those between are blended linearly.
      yarn_original_length: the length that the model was trained with, before its extension.
      yarn_truncate: the blend begins and ends at whole pairs.

    Returns:
      rotary_dim / 2 frequencies.
    """
    pairs = np.arange(rotary_dim // 2)
    frequencies = base ** (-2.0 * pairs / rotary_dim)
    if yarn_factor > 1.0:
        fast = _pair_with_rotations(
            FAST_ROTATIONS,
            rotary_dim,
            base,
            yarn_original_length,
        )
        slow = _pair_with_rotations(
            SLOW_ROTATIONS,
            rotary_dim,
            base,
            yarn_original_length,
        )
        if yarn_truncate:
            fast = math.floor(fast)
            slow = math.ceil(slow)
        low = max(fast, 0)
        high = min(slow, rotary_dim - 1)
        # 1 up to pair `low`, 0 from pair `high` on, a straight line between.
        kept = 1.0 - np.clip((pairs - low) / max(high - low, 1e-3), 0.0, 1.0)
        frequencies = frequencies * kept + frequencies / yarn_factor * (1.0 - kept)
    return frequencies.astype(np.float32)


def llama3_frequencies(
    frequencies: Float[np.ndarray, " J"],
    factor: float,
    low: float,
    high: float,
    original_length: int,
) -> Float[np.ndarray, " J"]:
    """Llama 3.1's extension of the context: slow pairs are slowed further, fast ones are kept.

    Args:
      frequencies: of the pairs, before.
      factor: how many times slower pairs become that rotate fewer than `low` times.
      low: rotations over the original length.
      high: pairs that rotate more often are kept; between the two is a straight line.
      original_length: that the model was trained with, before its extension.

    Returns:
      The frequencies after, float32.
    """
    rotations = original_length * frequencies.astype(np.float64) / (2 * math.pi)
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    scaled = frequencies * kept + frequencies / factor * (1.0 - kept)
    return scaled.astype(np.float32)


def frequencies_of(config: GatedAttentionConfig) -> Float[np.ndarray, " J"]:
    """Radians per position for each pair of channels, with the layer's extension of the context."""
    frequencies = inverse_frequencies(
        config.rotary_dim,
        config.rope_base,
        config.yarn_factor,
        config.yarn_original_length,
        config.yarn_truncate,
    )
    if config.llama3_factor > 1:
        frequencies = llama3_frequencies(
            frequencies,
            config.llama3_factor,
            config.llama3_low,
            config.llama3_high,
            config.llama3_original_length,
        )
    return frequencies


def yarn_magnitude(yarn_factor: float, mscale: float = 1.0) -> float:
    """What YaRN multiplies rotated queries and keys with: 0.1 m ln(s) + 1 (its equation 22, m = 1).

    1 without extension.
    """
    return 0.1 * mscale * math.log(yarn_factor) + 1.0


def apply_rope(
    x: Float[Array, "B T H D"],
    positions: Int[Array, "B T"],
    frequencies: Float[np.ndarray, " J"],
    magnitude: float = 1.0,
    interleaved: bool = False,
) -> Float[Array, "B T H D"]:
    """Rotates the first channels of each head by position x frequency, in float32.

    The others pass unchanged.

    Args:
      x: queries or keys.
      positions: of the tokens, within their documents.
      frequencies: J of them, for 2 J channels. Channel i is paired with i + J (the rotate-half
        layout of Llama and Qwen checkpoints).
      magnitude: what rotated channels are multiplied by.
      interleaved: channel 2 i is paired with 2 i + 1 instead (GPT-J, DeepSeek).

    Returns:
      x, rotated, in its dtype.
    """
    # A TPU moves half a head along the lanes slowly, in passes of their own, and multiplies by a
    # matrix of 16-bit numbers in passing.
    if x.dtype == jnp.bfloat16 and target_platform(x) == "tpu":
        partners = Partners(x.shape[-1], len(frequencies), interleaved)
        # What does not rotate has the angle 0, and no magnitude.
        angle = positions[:, :, None, None].astype(jnp.float32) * partners.spread(frequencies, 0.0)
        magnitudes = partners.spread(np.full_like(frequencies, magnitude), 1.0)
        return _rotated(x, jnp.cos(angle) * magnitudes, jnp.sin(angle) * magnitudes, partners)
    # One angle for every token and pair, the same in all heads.
    angle = positions[:, :, None, None].astype(jnp.float32) * frequencies
    return rotate(
        x,
        angle,
        magnitude,
        interleaved,
    )


@dataclasses.dataclass(frozen=True)
class Partners:
    """Which channels of a head are the two coordinates of a pair.

    channels: of a head.
    pairs: the first 2 `pairs` channels are in one.
    interleaved: as in `apply_rope`.
    """

    channels: int
    pairs: int
    interleaved: bool

    def spread(self, of_pair: Float[np.ndarray, " J"], rest: float) -> Float[np.ndarray, " D"]:
        """The number of its pair for every channel; `rest` for those in none."""
        if self.interleaved:
            rotating = np.repeat(of_pair, 2)
        else:
            rotating = np.tile(of_pair, 2)
        unrotated = np.full(self.channels - 2 * self.pairs, rest, np.float32)
        return np.concatenate([rotating, unrotated])

    def quarter_turn(self) -> Float[np.ndarray, "D D"]:
        """The matrix that turns every pair by 90 degrees: (left, right) -> (-right, left)."""
        first = np.arange(self.pairs)
        if self.interleaved:
            left, right = 2 * first, 2 * first + 1
        else:
            left, right = first, first + self.pairs
        matrix = np.zeros((self.channels, self.channels), np.float32)
        matrix[right, left] = -1.0
        matrix[left, right] = 1.0
        return matrix


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotated(
    x: Float[Array, "B T H D"],
    cos: Float[Array, "B T 1 D"],
    sin: Float[Array, "B T 1 D"],
    partners: Partners,
) -> Float[Array, "B T H D"]:
    """`x cos + (x turned by 90 degrees) sin`, in float32: the gradient is a rotation back.

    Every sum of the matrix product has one term, x or -x: it is exact.

    Args:
      x: queries or keys, bfloat16.
      cos, sin: of every token and channel, constants of the gradient.
      partners: which channels are a pair.
    """
    matrix = jnp.asarray(partners.quarter_turn(), x.dtype)
    last_of_x = (x.ndim - 1,)
    turned = lax.dot_general(
        x,
        matrix,
        ((last_of_x, (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def _rotated_forward(x: Array, cos: Array, sin: Array, partners: Partners):
    return _rotated(x, cos, sin, partners), (cos, sin)


def _rotated_backward(
    partners: Partners,
    residuals: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, None, None]:
    cos, sin = residuals
    return _rotated(dy, cos, -sin, partners), None, None


_rotated.defvjp(_rotated_forward, _rotated_backward)


def grid_angles(
    grid: Grid | None,
    rotary_dim: int,
    base: float,
) -> Float[np.ndarray, "1 T 1 J"]:
    """Angles of patches on a grid: those of the row, then those of the column. Others have zeros.

    Args:
      grid: of the patches.
      rotary_dim: the number of channels that rotate, a multiple of 4.
      base: of the frequencies of either half.

    Raises:
      ValueError: there is no grid.
    """
    if grid is None:
        raise ValueError("info.grid: got None, expected that of images with rope_grid")
    row, column = np.divmod(np.arange(grid.rows * grid.columns), grid.columns)
    frequencies = inverse_frequencies(rotary_dim // 2, base)
    angles = np.concatenate([row[:, None] * frequencies, column[:, None] * frequencies], axis=1)
    padded = np.pad(angles, ((grid.extra, 0), (0, 0)))
    return padded[None, :, None].astype(np.float32)


def rotate(
    x: Float[Array, "B T H D"],
    angle: Float[Array, "B T #H J"],
    magnitude: float = 1.0,
    interleaved: bool = False,
) -> Float[Array, "B T H D"]:
    """`apply_rope` by angles of the caller's.

    Args:
      x: queries or keys.
      angle: of every token and pair of channels, radians, float32.
      magnitude: what rotated channels are multiplied by.
      interleaved: which channels are a pair, as in `apply_rope`.

    Returns:
      x, rotated, in its dtype.
    """
    half = angle.shape[-1]
    cos = jnp.cos(angle) * magnitude
    sin = jnp.sin(angle) * magnitude
    rotating = x[..., : 2 * half]
    # The coordinates of the pairs are the two halves of the rotated channels, or neighbors. Cut
    # first: all channels in float32 would be an array in memory.
    if interleaved:
        left, right = rotating[..., 0::2], rotating[..., 1::2]
    else:
        left, right = rotating[..., :half], rotating[..., half:]
    left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    turned = [left * cos - right * sin, right * cos + left * sin]
    if interleaved:
        rotated = jnp.stack(turned, axis=-1).reshape(rotating.shape)
    else:
        rotated = jnp.concatenate(turned, axis=-1)
    if 2 * half == x.shape[-1]:
        return rotated.astype(x.dtype)
    unrotated = x[..., 2 * half :]
    return jnp.concatenate([rotated.astype(x.dtype), unrotated], axis=-1)


def _pair_with_rotations(
    rotations: float,
    rotary_dim: int,
    base: float,
    length: int,
) -> float:
    """The (fractional) index of the pair that makes so many rotations over `length` positions."""
    wavelength = length / (rotations * 2 * math.pi)
    return rotary_dim * math.log(wavelength) / (2 * math.log(base))
