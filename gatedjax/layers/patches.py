"""From the patches of an image to vectors of tokens, and from those of the last layer to one."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from gatedjax.config import PatchConfig
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection
from gatedjax.layers.token_info import Grid, TokenInfo, default_info

# Of the slowest of the sines and cosines.
TEMPERATURE = 10_000.0


class PatchEmbedding(nn.Module):
    """Patches times a matrix, plus a vector for their place; before them the class token.

    Attributes:
      config: of the images.
      width: M.
      init_std: of the normal distribution that the matrix and learned vectors start from.
      dtype: of the result; parameters are float32.
    """

    config: PatchConfig
    width: int
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, patches: Float[Array, "B T P"]) -> Float[Array, "B T M"]:
        """The tokens. Where there is a class token, what stands at the first place is not seen."""
        c = self.config
        project = Projection(
            {"patch": c.size},
            {"embed": self.width},
            self.init_std,
            self.dtype,
            has_bias=True,
            name="projection",
        )
        x = project(patches)
        init = nn.initializers.normal(self.init_std)
        if c.extra_tokens:
            token = self._vectors("class_token", (), init)
            is_first = jnp.arange(x.shape[1])[:, None] == 0
            x = jnp.where(is_first, token.astype(x.dtype), x)
        if c.positions == "learned":
            x = x + self._vectors("positions", (c.num_tokens,), init).astype(x.dtype)
        if c.positions == "sincos":
            x = x + jnp.asarray(sines_and_cosines(c, self.width), x.dtype)
        return x

    def _vectors(
        self,
        name: str,
        shape: tuple[int, ...],
        init: Callable[..., Array],
    ) -> Float[Array, "*shape M"]:
        return parameter(
            self,
            name,
            axes=[*[None] * len(shape), "embed_act"],
            shape=[*shape, self.width],
            init=init,
        )


def sines_and_cosines(config: PatchConfig, width: int) -> Float[np.ndarray, "T M"]:
    """[sin x, cos x, sin y, cos y] of column x and row y, at M / 4 frequencies (arXiv 2205.01580).

    The frequencies fall from 1 to 1 / 10,000. The class token has zeros.
    """
    rows, columns = config.grid
    y, x = np.divmod(np.arange(rows * columns), columns)
    count = width // 4
    frequencies = TEMPERATURE ** -(np.arange(count) / max(count - 1, 1))
    of_x = x[:, None] * frequencies
    of_y = y[:, None] * frequencies
    waves = [np.sin(of_x), np.cos(of_x), np.sin(of_y), np.cos(of_y)]
    of_patches = np.concatenate(waves, axis=1)
    return np.pad(of_patches, ((config.extra_tokens, 0), (0, 0))).astype(np.float32)


def image_info(config: PatchConfig, x: Float[Array, "B T M"]) -> TokenInfo:
    """What layers are told about the tokens of images: every row is one image."""
    rows, columns = config.grid
    grid = Grid(rows, columns, config.extra_tokens)
    return dataclasses.replace(default_info(x), grid=grid)


def pooled(config: PatchConfig, x: Float[Array, "B T M"]) -> Float[Array, "B 1 M"]:
    """What is classified of an image: the class token, or the mean of the patches."""
    if config.pooling == "class_token":
        return x[:, :1]
    return jnp.mean(x.astype(jnp.float32), axis=1, keepdims=True).astype(x.dtype)
