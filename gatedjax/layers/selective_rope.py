"""Selective RoPE (arXiv 2511.17388): rotations by angles that the tokens decide themselves."""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from gatedjax.config import GatedAttentionConfig, GatedLinearAttentionConfig
from gatedjax.layers.conv import causal_conv, uniform
from gatedjax.layers.gate import head_slices
from gatedjax.layers.norm import unit_length
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import TokenInfo

# Of the squared length of the input's slices.
EPS = 1e-6


@struct.dataclass
class RopePhase:
    """Where a row's rotation stands, and what its convolution still needs.

    angle: of the last token, for every key head and pair, between -pi and pi, float32.
    conv_tail: the last inputs of the convolution.
    """

    # Leading axes: the model stacks the caches of a layer over periods.
    angle: Float[Array, "... B Hk J"]
    conv_tail: Float[Array, "... B _ F"]


def accumulated_angles(
    steps: Float[Array, "B T H J"],
    segment_ids: Int[Array, "B T"] | None = None,
    start: Float[Array, "B H J"] | None = None,
) -> Float[Array, "B T H J"]:
    """The sum of a document's steps up to each token, modulo 2 pi, float32.

    Sums of the numbers themselves would lose the angle's bits in long documents. Padding stays at
    the angle that it finds.

    Args:
      steps: radians that each token turns further.
      segment_ids: numbered documents, 0 for padding; None for one document a row.
      start: the angle before the row, of document 1; zeros if None.

    Returns:
      Angles between -pi and pi.
    """
    steps = steps.astype(jnp.float32)
    begins = jnp.zeros(steps.shape[:2], bool)
    if segment_ids is not None:
        is_token = (segment_ids != 0)[..., None, None]
        steps = jnp.where(is_token, steps, 0.0)
        # Without a start, document 1 begins at the row's first token: from zero in any case.
        previous = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=1)
        # Padding is no document: what follows it begins by its own number.
        begins = (segment_ids != previous) & (segment_ids != 0)
    if start is not None:
        first = jnp.where(begins[:, :1, None, None], 0.0, start[:, None])
        steps = steps.at[:, :1].add(first)
    elements = (wrapped(steps), begins[..., None, None])
    angles, _ = lax.associative_scan(_added, elements, axis=1)
    return angles


def wrapped(angle: Float[Array, "..."]) -> Float[Array, "..."]:
    """The angle between -pi and pi; its gradient is 1."""
    turns = jnp.round(angle / (2.0 * math.pi))
    return angle - 2.0 * math.pi * lax.stop_gradient(turns)


def _added(
    left: tuple[Float[Array, "..."], Bool[Array, "..."]],
    right: tuple[Float[Array, "..."], Bool[Array, "..."]],
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Two stretches of a row as one: the sum of their steps since the last document began."""
    left_sum, left_begins = left
    right_sum, right_begins = right
    # Selected before it is added: what is not finite in another document stays there.
    before = jnp.where(right_begins, 0.0, left_sum)
    return wrapped(before + right_sum), left_begins | right_begins


def empty_phase(
    config: GatedAttentionConfig | GatedLinearAttentionConfig,
    batch: int,
    dtype: DTypeLike,
) -> RopePhase | None:
    """Of rows without a token; None where the rotation does not depend on tokens."""
    if config.selective_rope == "none":
        return None
    pairs = config.rotary_dim // 2
    channels = config.kv_heads * pairs
    return RopePhase(
        angle=jnp.zeros((batch, config.kv_heads, pairs), jnp.float32),
        conv_tail=jnp.zeros((batch, config.selective_conv - 1, channels), dtype),
    )


class SelectiveAngles(nn.Module):
    """The angles of every token, for each key head and pair of channels.

    A step is phi / base^(2i/D): phi a linear map of the input, whose slices have length 1, through
    a short convolution. Queries take the angles of their key head: published are as many key heads
    as heads.
    """

    config: GatedAttentionConfig | GatedLinearAttentionConfig
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T M"],
        info: TokenInfo,
        frequencies: Float[np.ndarray, " J"],
        phase: RopePhase | None,
    ) -> tuple[Float[Array, "B T Hk J"], RopePhase]:
        """(angles, the phase after the last token).

        Args:
          x: the layer's input.
          info: about the tokens.
          frequencies: of the pairs.
          phase: before the first token; None without a cache.
        """
        c = self.config
        slices = unit_length(head_slices(x, c.kv_heads), EPS)
        steps = self._steps(slices)
        kernel = parameter(
            self,
            "conv",
            axes=[None, None],
            shape=[c.selective_conv, math.prod(steps.shape[2:])],
            init=partial(uniform, bound=c.selective_conv**-0.5),
        )
        tail = None if phase is None else phase.conv_tail
        flat = steps.reshape(*steps.shape[:2], -1)
        flat, tail = causal_conv(flat, kernel, info.segment_ids, tail)
        phi = flat.astype(jnp.float32).reshape(steps.shape)
        if c.selective_activation == "silu":
            phi = jax.nn.silu(phi)
        if c.selective_bias:
            zeros = nn.initializers.zeros
            bias = parameter(
                self,
                "bias",
                axes=["kv_heads", "head_dim"],
                shape=steps.shape[2:],
                init=zeros,
            )
            phi = phi + jnp.exp(bias)
        if c.selective_gate:
            phi = phi * self._gates(slices)[..., None]
        start = None if phase is None else phase.angle
        angles = accumulated_angles(phi * frequencies, info.segment_ids, start)
        return angles, RopePhase(angles[:, -1], tail)

    def _steps(self, slices: Float[Array, "B T Hk S"]) -> Float[Array, "B T Hk J"]:
        """phi before the convolution."""
        c = self.config
        heads = {"kv_heads": c.kv_heads, "head_dim": c.rotary_dim // 2}
        if c.selective_rope == "low_rank":
            flat = slices.reshape(*slices.shape[:2], -1)
            low = self._projection("down", {"embed": flat.shape[-1]}, {"rank": c.selective_rank})
            up = self._projection("up", {"rank": c.selective_rank}, heads)
            return up(low(flat))
        size = slices.shape[-1]
        weights = parameter(
            self,
            "weights",
            axes=["kv_heads", None, "head_dim"],
            shape=[c.kv_heads, size, c.rotary_dim // 2],
            init=partial(uniform, bound=(6.0 / size) ** 0.5),
        )
        lengths = parameter(
            self,
            "lengths",
            axes=["kv_heads"],
            shape=[c.kv_heads],
            init=nn.initializers.ones,
        )
        # Columns of one learned length a head: only their directions are the weights'.
        square = jnp.sum(weights * weights, axis=1, keepdims=True)
        directions = weights * lax.rsqrt(square + EPS**2)
        kernel = (directions * lengths[:, None, None]).astype(self.dtype)
        return jnp.einsum("bths,hsj->bthj", slices.astype(self.dtype), kernel)

    def _gates(self, slices: Float[Array, "B T Hk S"]) -> Float[Array, "B T Hk"]:
        """How much of its step each head takes."""
        flat = slices.reshape(*slices.shape[:2], -1)
        heads = {"kv_heads": self.config.kv_heads}
        project = self._projection("gate", {"embed": flat.shape[-1]}, heads, has_bias=True)
        return jax.nn.sigmoid(project(flat).astype(jnp.float32))

    def _projection(
        self,
        name: str,
        in_axes: dict[str, int],
        out_axes: dict[str, int],
        has_bias: bool = False,
    ) -> Projection:
        """Started as the published code's maps are, which is PyTorch's own start."""
        (fan_in,) = in_axes.values()
        return Projection(
            in_axes,
            out_axes,
            0.0,
            self.dtype,
            kernel_init=partial(uniform, bound=fan_in**-0.5),
            has_bias=has_bias,
            name=name,
        )


def for_queries(angles: Float[Array, "B T Hk J"], num_heads: int) -> Float[Array, "B T H J"]:
    """The angles of query heads: those of their key heads."""
    return jnp.repeat(angles, num_heads // angles.shape[2], axis=2)


def selective_flops(
    config: GatedAttentionConfig | GatedLinearAttentionConfig,
    width: int,
) -> float:
    """FLOPs of one token's angles: matrices."""
    pairs = config.kv_heads * (config.rotary_dim // 2)
    gates = width * config.kv_heads if config.selective_gate else 0
    if config.selective_rope == "none":
        return 0.0
    if config.selective_rope == "low_rank":
        return 2.0 * (config.selective_rank * (width + pairs) + gates)
    # Every head multiplies its own slice.
    return 2.0 * (width // config.kv_heads * pairs + gates)
