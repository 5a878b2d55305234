"""Experts that are hash grids of different resolutions (Switch-NeRF++, arXiv 2505.02005).

    G(x) = softmax(MLP(hash(x)))                 a hash grid of its own says which expert
    y = G_i(x) f_i(hash_i(x)),  i = argmax G(x)

A hash grid (2201.05989) has features at the corners of cubes, level by level from coarse to fine;
corners share the rows of a table by a hash of their coordinates, and a point gets what is between
its eight corners. Experts of coarse grids have few collisions and no detail, those of fine ones the
opposite; the gate learns where each belongs.
"""

import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from gatedjax.errors import require
from gatedjax.layers.parameters import parameter
from gatedjax.layers.projection import Projection

# Of the three coordinates, by which they are multiplied before they are joined.
PRIMES = (1, 2_654_435_761, 805_459_861)
# From 0 to 1 in each coordinate; what a corner's offsets are.
CORNERS = np.asarray(list(itertools.product((0, 1), repeat=3)))


def resolutions(coarsest: int, finest: int, levels: int) -> list[int]:
    """Cells along a side, level by level, in equal ratios."""
    if levels == 1:
        return [coarsest]
    ratio = math.log(finest / coarsest) / (levels - 1)
    return [round(coarsest * math.exp(ratio * level)) for level in range(levels)]


def hashed(corners: Int[Array, "... 3"], rows: int) -> Int[Array, "..."]:
    """The row of a table for each corner: its coordinates times primes, joined by exclusive or."""
    product = corners.astype(jnp.uint32) * jnp.asarray(PRIMES, jnp.uint32)
    joined = product[..., 0] ^ product[..., 1] ^ product[..., 2]
    return (joined % jnp.uint32(rows)).astype(jnp.int32)


def interpolated(
    points: Float[Array, "N 3"],
    table: Float[Array, "rows F"],
    resolution: int,
) -> Float[Array, "N F"]:
    """Features of one level: those of a point's eight corners, trilinearly.

    Args:
      points: from 0 to 1.
      table: features by hash.
      resolution: cells along a side.
    """
    scaled = points * resolution
    low = jnp.floor(scaled)
    inside = (scaled - low)[:, None]
    rows = hashed(low[:, None].astype(jnp.int32) + CORNERS, table.shape[0])
    weights = jnp.prod(jnp.where(CORNERS == 1, inside, 1 - inside), axis=-1)
    return jnp.einsum("nc,ncf->nf", weights, table[rows])


class HashGrid(nn.Module):
    """All levels of a hash grid, side by side, and a small MLP on them.

    Attributes:
      sides: cells along a side, of every level.
      outputs: of the MLP.
      rows: of the table of each level.
      features: of a corner.
      hidden: of the MLP.
    """

    sides: tuple[int, ...]
    outputs: int
    rows: int = 2**12
    features: int = 2
    hidden: int = 32

    @nn.compact
    def __call__(self, points: Float[Array, "N 3"]) -> Float[Array, "N _"]:
        def start(key: Array, shape: tuple[int, ...], dtype) -> Array:
            return jax.random.uniform(key, shape, dtype, -1e-4, 1e-4)

        levels = []
        for level, resolution in enumerate(self.sides):
            shape = [self.rows, self.features]
            table = parameter(self, f"table_{level}", [None, None], shape, start)
            levels.append(interpolated(points, table, resolution))
        h = jnp.concatenate(levels, axis=-1)
        h = jax.nn.relu(self._dense(h, "hidden", self.hidden))
        return self._dense(h, "out", self.outputs)

    def _dense(self, x: Array, name: str, width: int) -> Array:
        return Projection(
            {"embed": x.shape[-1]},
            {"mlp": width},
            0.0,
            jnp.float32,
            kernel_init=nn.initializers.xavier_uniform(),
            has_bias=True,
            name=name,
        )(x)


class HashExperts(nn.Module):
    """Values of points in a cube, each by one expert.

    Attributes:
      experts: of each its coarsest and finest cells along a side.
      gate: the same of the grid that chooses.
      outputs: numbers of a point.
      levels: of every grid.
    """

    experts: tuple[tuple[int, int], ...] = ((2, 16), (4, 32), (8, 64))
    gate: tuple[int, int] = (2, 16)
    outputs: int = 1
    levels: int = 4

    @nn.compact
    def __call__(self, points: Float[Array, "N 3"]) -> tuple[Array, Float[Array, "N E"]]:
        """(values [N, outputs], gate probabilities). Points are from 0 to 1."""
        require(
            len(self.experts) > 0 and min(map(min, (*self.experts, self.gate))) > 0,
            "experts",
            self.experts,
            "cells along a side, coarsest and finest, from 1 on",
        )

        def sides(grid: tuple[int, int]) -> tuple[int, ...]:
            return tuple(resolutions(*grid, self.levels))

        logits = HashGrid(sides(self.gate), len(self.experts), name="gate")(points)
        probs = jax.nn.softmax(logits, axis=-1)
        chosen = jnp.argmax(probs, axis=-1)
        # All experts see all points: the toy's scenes are small.
        values = jnp.stack(
            [
                HashGrid(sides(grid), self.outputs, name=f"expert_{i}")(points)
                for i, grid in enumerate(self.experts)
            ],
            axis=1,
        )
        of_chosen = jnp.take_along_axis(values, chosen[:, None, None], axis=1)[:, 0]
        return of_chosen * jnp.take_along_axis(probs, chosen[:, None], axis=1), probs


def balance_loss(probs: Float[Array, "N E"]) -> Float[Array, ""]:
    """Switch's: E times the sum of each expert's fraction of points and its mean probability."""
    E = probs.shape[1]
    chosen = jax.nn.one_hot(jnp.argmax(probs, axis=-1), E)
    return E * jnp.sum(jnp.mean(chosen, axis=0) * jnp.mean(probs, axis=0))
