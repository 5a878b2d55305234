"""Rotary position embedding (arXiv 2104.09864) on the first channels of a head, and extensions."""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gatedjax.config import GatedAttentionConfig
from gatedjax.layers.norm import RMSNorm
from gatedjax.layers.token_info import Grid
from gatedjax.per_shard import per_shard
from gatedjax.sharding import is_cut
from kernels_pallas.rotary import rotary
from kernels_pallas.rotary.xla import turned

# YaRN's bounds: pairs that make more full rotations than this over the original length are kept,
# those that make fewer than one are slowed.
FAST_ROTATIONS = 32.0
SLOW_ROTATIONS = 1.0
# The frequencies of no pair.
NO_ROTATION = np.zeros(0, np.float32)


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
    norm_scale: Float[Array, " D"] | None = None,
    eps: float = 1e-6,
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
      norm_scale, eps: of an RMS norm of every head, which comes first; None: no norm.

    Returns:
      x, rotated, in its dtype.
    """

    def rotate(x: Array, positions: Array, norm_scale: Array | None) -> Array:
        return rotary(
            x,
            positions,
            frequencies,
            norm_scale,
            eps=eps,
            magnitude=magnitude,
            interleaved=interleaved,
        )

    # Where the ambient mesh cuts the tokens, every device rotates its own.
    if not is_cut("length", x.shape[1]):
        return rotate(x, positions, norm_scale)
    tokens = ("batch", "length")
    heads = (*tokens, "heads", None)
    return per_shard(rotate, (heads, tokens, (None,)), heads)(x, positions, norm_scale)


class NormedRope(RMSNorm):
    """RMSNorm of every head, then `apply_rope`, as one op."""

    axis_name: str = "head_dim"

    def __call__(  # pyrefly: ignore  (of heads, and their positions)
        self,
        x: Float[Array, "B T H D"],
        positions: Int[Array, "B T"],
        frequencies: Float[np.ndarray, " J"],
        magnitude: float = 1.0,
        interleaved: bool = False,
    ) -> Float[Array, "B T H D"]:
        """As `apply_rope` of `RMSNorm`."""
        return apply_rope(
            x,
            positions,
            frequencies,
            magnitude,
            interleaved,
            norm_scale=self.scale_of(x.shape[-1]),
            eps=self.eps,
        )


class NormOfHeads(RMSNorm):
    """RMSNorm of every head, in x's dtype.

    On a TPU by the kernel of `rotary`, which takes and leaves heads as columns: XLA would norm them
    in another layout, and copy into it and back.
    """

    axis_name: str = "head_dim"

    def __call__(self, x: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
        positions = jnp.zeros(x.shape[:2], jnp.int32)
        return apply_rope(
            x,
            positions,
            NO_ROTATION,
            norm_scale=self.scale_of(x.shape[-1]),
            eps=self.eps,
        )


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
    return turned(x, jnp.cos(angle) * magnitude, jnp.sin(angle) * magnitude, interleaved)


def _pair_with_rotations(
    rotations: float,
    rotary_dim: int,
    base: float,
    length: int,
) -> float:
    """The (fractional) index of the pair that makes so many rotations over `length` positions."""
    wavelength = length / (rotations * 2 * math.pi)
    return rotary_dim * math.log(wavelength) / (2 * math.log(base))
