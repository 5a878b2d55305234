"""How the parameters of RWKV-7 and RWKV-6 start in their published code: by channel, and by depth.

Source: RWKV-LM, RWKV-v7 and RWKV-v5 (x060), and arXiv 2503.14456, appendix.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from gatedjax.layers.depth import Depth

Initializer = Callable[..., Array]


def from_zero_to_one(depth: Depth) -> Array:
    """0 for the first layer, 1 for the last."""
    return jnp.asarray(depth.index / max(depth.num_layers - 1, 1), jnp.float32)


def from_one_to_almost_zero(depth: Depth) -> Array:
    """1 for the first layer, 1 / num_layers for the last."""
    return jnp.asarray(1.0 - depth.index / depth.num_layers, jnp.float32)


def along(shape: tuple[int, ...]) -> Float[Array, "..."]:
    """From -0.5 at the first of all channels to 0.5 at the last."""
    size = math.prod(shape)
    place = jnp.arange(size, dtype=jnp.float32) / max(size - 1, 1)
    return place.reshape(shape) - 0.5


def zigzag(head_dim: int) -> Float[Array, " K"]:
    """From -1 at the first channel of a head to 1 at its last, squared with its sign."""
    middle = (head_dim - 1) / 2
    ramp = (jnp.arange(head_dim, dtype=jnp.float32) - middle) / max(middle, 0.5)
    return ramp * jnp.abs(ramp)


def constant(value: float | Array) -> Initializer:
    """A parameter that starts from one value, or from the array itself."""

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        return jnp.broadcast_to(jnp.asarray(value, dtype), shape)

    return init


def shift(power: float | Array) -> Initializer:
    """The part of the token before in each channel: 1 at the first one, less and less after it."""

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        (width,) = shape
        place = jnp.arange(width, dtype=dtype) / width
        return 1.0 - place ** jnp.asarray(power, dtype)

    return init


def shifts(powers: Sequence[float | Array], less: Sequence[float | Array]) -> Initializer:
    """Several shifts in rows: those of these powers, less these numbers."""

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        _, width = shape
        rows = [shift(power)(key, (width,), dtype) - off for power, off in zip(powers, less)]
        return jnp.stack(rows).astype(dtype)

    return init


def decay_bias(depth: Depth) -> Initializer:
    """Decays between slow channels and fast ones, steeper in the deeper layers."""
    power = 1.0 + from_zero_to_one(depth) ** 0.3

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        ramp = -6.0 + 6.0 * (along(shape) + 0.5) ** power
        return (ramp + 0.5 + 2.5 * zigzag(shape[-1])).astype(dtype)

    return init


def rwkv6_decay_bias(depth: Depth) -> Initializer:
    """RWKV-6's, from slow decays to fast ones over the channels of all heads."""
    power = 0.7 + 1.3 * from_zero_to_one(depth)

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        return (-6.0 + 5.0 * (along(shape) + 0.5) ** power).astype(dtype)

    return init


def rwkv6_bonus(depth: Depth) -> Initializer:
    """RWKV-6's: three values by turns, and more in the first channels of the deeper layers."""

    def init(key: Array, shape: tuple[int, ...], dtype) -> Array:
        place = jnp.arange(math.prod(shape)).reshape(shape)
        by_turns = 0.1 * ((place + 1) % 3 - 1)
        return (from_zero_to_one(depth) * (0.5 - along(shape)) + by_turns).astype(dtype)

    return init


def rate_bias(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Of the in-context learning rate."""
    return (-0.19 + 0.3 * zigzag(shape[-1]) + 0.4 * along(shape)).astype(dtype)


def value_bias(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """Of the gate between a layer's own values and the first layer's."""
    return (0.73 - 0.4 * along(shape)).astype(dtype)


def removal_scale(key: Array, shape: tuple[int, ...], dtype) -> Array:
    """What keys are multiplied by to become removal keys."""
    return (0.71 - 0.1 * along(shape)).astype(dtype)


def norm_scale(depth: Depth) -> Initializer:
    """Deeper layers add more to the residual stream."""
    return constant(jnp.asarray((depth.index + 1) / depth.num_layers) ** 0.7)


def orthogonal(gain: float, num_in: int = 1) -> Initializer:
    """An orthogonal matrix times `gain`, from the first `num_in` axes to the others."""
    return partial(_orthogonal, gain=gain, num_in=num_in)


def _orthogonal(
    key: Array,
    shape: tuple[int, ...],
    dtype,
    gain: float,
    num_in: int,
) -> Array:
    rows = math.prod(shape[:num_in])
    matrix = jax.nn.initializers.orthogonal(gain)(key, (rows, math.prod(shape) // rows), dtype)
    return matrix.reshape(shape)
