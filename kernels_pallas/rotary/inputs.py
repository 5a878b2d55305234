"""The arrays of a call of `rotary`, what is static, and the angles that follow."""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from kernels_pallas.common.precision import accumulator_dtype


class RotaryInputs(NamedTuple):
    """The arrays of a call."""

    x: Float[Array, "B T H D"]
    # The scale of the norm of every head; None without a norm.
    norm_scale: Float[Array, " D"] | None
    positions: Int[Array, "B T"]


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Which channels of a head are the two coordinates of a pair.

    channels: of a head.
    pairs: the first 2 `pairs` channels are in one.
    interleaved: channel 2 i is paired with 2 i + 1, not i with i + `pairs`.
    """

    channels: int
    pairs: int
    interleaved: bool

    def spread(self, of_pair: Float[np.ndarray, "*_ J"], rest: float) -> Float[np.ndarray, "*_ D"]:
        """The number of its pair for every channel; `rest` for those in none."""
        if self.interleaved:
            rotating = np.repeat(of_pair, 2, axis=-1)
        else:
            rotating = np.concatenate([of_pair, of_pair], axis=-1)
        unrotated = self.channels - 2 * self.pairs
        padding = [(0, 0)] * (of_pair.ndim - 1) + [(0, unrotated)]
        return np.pad(rotating, padding, constant_values=rest)

    def coordinates(self) -> tuple[np.ndarray, np.ndarray]:
        """The channels that are the first and the second coordinates of the pairs."""
        first = np.arange(self.pairs)
        if self.interleaved:
            return 2 * first, 2 * first + 1
        return first, first + self.pairs

    def swapped(self, x: Float[Array, " D"]) -> Float[Array, " D"]:
        """For every channel the number of the other one of its pair; its own for those in none."""
        rotating, rest = x[: 2 * self.pairs], x[2 * self.pairs :]
        # The two coordinates are an axis: of neighbors the last one, of halves the first.
        by_coordinate = (-1, 2) if self.interleaved else (2, -1)
        axis = 1 if self.interleaved else 0
        swapped = jnp.flip(rotating.reshape(by_coordinate), axis).reshape(-1)
        return jnp.concatenate([swapped, rest])

    def quarter_turn(self) -> Float[np.ndarray, "D D"]:
        """The matrix that turns every pair by 90 degrees: (left, right) -> (-right, left)."""
        left, right = self.coordinates()
        matrix = np.zeros((self.channels, self.channels), np.float32)
        matrix[right, left] = -1.0
        matrix[left, right] = 1.0
        return matrix


def quarter_turned(
    x: Float[Array, "*rows D"],
    quarter_turn: Float[Array, "D D"],
) -> Float[Array, "*rows D"]:
    """bfloat16, turned by `Pairs.quarter_turn`: float32.

    Every sum of the matrix product has one term, x or -x: it is exact.
    """
    return lax.dot_general(
        x,
        quarter_turn,
        (((x.ndim - 1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


@dataclasses.dataclass(frozen=True)
class RotaryOptions:
    """What is static in a call.

    pairs: which channels turn together.
    frequencies: radians per position for each pair.
    magnitude: what rotated channels are multiplied by.
    eps: added to the mean square of a head.
    """

    pairs: Pairs
    frequencies: tuple[float, ...]
    magnitude: float
    eps: float


def of_pairs(
    inputs: RotaryInputs,
    options: RotaryOptions,
) -> tuple[Float[Array, "B T J"], Float[Array, "B T J"]]:
    """Cosine and sine of every token's angles, times the magnitude, in float32 or float64."""
    return _cos_and_sin(inputs, *_numbers_of_pairs(options, accumulator_dtype(inputs.x.dtype)))


def of_channels(
    inputs: RotaryInputs,
    options: RotaryOptions,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """`of_pairs` for every channel: 1 and 0 for those that are in no pair."""
    return _cos_and_sin(inputs, *_numbers_of_channels(options, accumulator_dtype(inputs.x.dtype)))


# The same arrays each time: under `jax.checkpoint` XLA takes equal constants for different ones,
# and would compute the cosines of queries and of keys.


@functools.lru_cache
def _numbers_of_pairs(options: RotaryOptions, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Frequency and magnitude of every pair, [1, 1, J]."""
    frequencies = np.asarray(options.frequencies, dtype)[None, None]
    return frequencies, np.full_like(frequencies, options.magnitude)


@functools.lru_cache
def _numbers_of_channels(options: RotaryOptions, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Frequency and magnitude of the pair of every channel, [1, 1, D]; 0 and 1 without one."""
    pairs = options.pairs
    frequencies, magnitudes = _numbers_of_pairs(options, dtype)
    return pairs.spread(frequencies, 0.0), pairs.spread(magnitudes, 1.0)


def _cos_and_sin(
    inputs: RotaryInputs,
    frequencies: np.ndarray,
    magnitudes: np.ndarray,
) -> tuple[Array, Array]:
    angles = inputs.positions[:, :, None].astype(frequencies.dtype) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if (magnitudes == 1).all():
        return cos, sin
    return cos * magnitudes, sin * magnitudes
