"""The matrices of a delta rule of several steps a token, as flash-linear-attention writes them.

Its rows are [steps, heads, channels]; here the steps of a head are side by side, so that heads are
what a mesh cuts.
"""

from collections.abc import Iterator

import numpy as np

from gatedjax.config import DeltaAttentionConfig
from gatedjax.interop.families.parts import KERNEL
from gatedjax.interop.links import Link, convolution, matrix, rows


def projections(c: DeltaAttentionConfig, width: int, tensor: str) -> Iterator[Link]:
    """Queries, keys, values and betas, and the three convolutions.

    Args:
      c: of the layer.
      width: of the model.
      tensor: what stands before the names.
    """
    queries = (c.key_heads, c.key_dim)
    values = (c.num_heads, c.value_dim)
    yield matrix(f"{tensor}q_proj.weight", ("mixer", "query", KERNEL), (width,), queries)
    yield convolution(
        f"{tensor}q_conv1d.weight",
        ("mixer", "conv"),
        c.conv_width,
        c.key_heads * c.key_dim,
    )
    yield from _of_steps(c, width, f"{tensor}k", "key", queries, c.key_heads * c.key_dim)
    first = (1 + c.num_householder) * c.key_heads * c.key_dim
    yield from _of_steps(c, width, f"{tensor}v", "value", values, first)

    def betas(x: np.ndarray) -> np.ndarray:
        return x.reshape(c.num_householder, c.num_heads, width).transpose(2, 1, 0)

    shape = (c.num_householder * c.num_heads, width)
    yield Link(f"{tensor}b_proj.weight", shape, ("mixer", "beta", KERNEL), betas)


def _of_steps(
    c: DeltaAttentionConfig,
    width: int,
    tensor: str,
    name: str,
    heads: tuple[int, int],
    first: int,
) -> Iterator[Link]:
    """Keys or values: the rows of every step, and their columns of the convolution.

    Args:
      c: of the layer.
      width: of the model.
      tensor: what stands before the names.
      name: of the projection here.
      heads: heads and their channels.
      first: column of the convolution here.
    """
    steps = c.num_householder
    count, channels = heads
    total = steps * count * channels
    path = ("mixer", name, KERNEL)
    for i in range(steps):
        row = i * count * channels
        link = rows(f"{tensor}_proj.weight", path, (width,), heads, row, total)
        of_step = slice(i * channels, (i + 1) * channels)
        yield link._replace(place=(slice(None), slice(None), of_step))
        for head in range(count):
            column = first + (head * steps + i) * channels
            yield _columns(
                c, f"{tensor}_conv1d.weight", total, row + head * channels, column, channels
            )


def _columns(
    c: DeltaAttentionConfig,
    tensor: str,
    total: int,
    row: int,
    column: int,
    channels: int,
) -> Link:
    """Some channels of a convolution.

    Args:
      c: of the layer.
      tensor: its name.
      total: its channels.
      row: the first of those channels.
      column: where it is here.
      channels: how many.
    """

    def view(x: np.ndarray) -> np.ndarray:
        return x[row : row + channels, 0, :].T

    place = (slice(None), slice(column, column + channels))
    return Link(tensor, (total, 1, c.conv_width), ("mixer", "conv"), view, place)
