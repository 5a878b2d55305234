"""Links: which numbers of a tensor on disk are which numbers of a parameter here.

A link is a rectangle of a parameter and a view of a tensor, of the same shape. The view is numpy's:
slices, reshapes and transposes that copy nothing. Read through, it gives the parameter's numbers;
written through, it puts them where they stand on disk. So one table serves both ways, and of a
mapped file only the pages are read that hold what a device needs.

Disk matrices are [out, in], parameters [*in, *out] (`layers.projection`). Where a family keeps
several projections in one matrix, or one projection in several, there is a link for each part.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gatedjax.config import BlockConfig, ModelConfig
from gatedjax.layers.tree import Path

View = Callable[[np.ndarray], np.ndarray]
Place = tuple[slice, ...]
Shape = tuple[int, ...]


def whole(tensor: np.ndarray) -> np.ndarray:
    """The tensor as it is."""
    return tensor


class Link(NamedTuple):
    """A part of a tensor on disk, and the part of a parameter that it is.

    tensor: its name on disk.
    shape: of the whole tensor.
    path: of the parameter.
    view: from the tensor to the part, of the shape that `place` cuts out of the parameter.
    place: of the part within the parameter; axes that are left out are whole.
    also: other names of the tensor, in other versions of the checkpoint.
    is_absent: no tensor holds this part, because nothing depends on it. It is zeros here.
    """

    tensor: str
    shape: Shape
    path: Path
    view: View = whole
    place: Place = ()
    also: tuple[str, ...] = ()
    is_absent: bool = False


def vector(
    tensor: str,
    path: Path,
    shape: Shape,
    disk_shape: Shape | None = None,
) -> Link:
    """A norm, a bias, one number a head: the same numbers in the same order.

    Args:
      tensor: its name.
      path: of the parameter.
      shape: of the parameter.
      disk_shape: of the tensor; None for one axis.
    """

    def view(x: np.ndarray) -> np.ndarray:
        return x.reshape(shape)

    return Link(tensor, disk_shape or (math.prod(shape),), path, view)


def matrix(
    tensor: str,
    path: Path,
    inputs: Shape,
    outputs: Shape,
) -> Link:
    """A projection: [out, in] on disk, [*in, *out] here."""
    shape = (math.prod(outputs), math.prod(inputs))
    return Link(tensor, shape, path, _transposed(inputs, outputs))


def rows(
    tensor: str,
    path: Path,
    inputs: Shape,
    outputs: Shape,
    first: int,
    total: int,
) -> Link:
    """A projection that is some rows of a matrix on disk.

    Args:
      tensor: its name.
      path: of the parameter.
      inputs: axes of the parameter.
      outputs: axes of the parameter.
      first: row of the matrix.
      total: rows of the whole matrix.
    """
    count = math.prod(outputs)
    transposed = _transposed(inputs, outputs)

    def view(x: np.ndarray) -> np.ndarray:
        return transposed(x[first : first + count])

    return Link(tensor, (total, math.prod(inputs)), path, view)


def _transposed(inputs: Shape, outputs: Shape) -> View:
    """From [prod(out), prod(in)] to [*in, *out]."""
    in_axes = range(len(outputs), len(outputs) + len(inputs))
    order = (*in_axes, *range(len(outputs)))

    def view(x: np.ndarray) -> np.ndarray:
        return x.reshape(*outputs, *inputs).transpose(order)

    return view


def convolution(
    tensor: str,
    path: Path,
    width: int,
    channels: int,
    first: int = 0,
) -> Link:
    """A depthwise convolution: [F, 1, W] on disk, columns of [W, all channels] here.

    Args:
      tensor: its name.
      path: of the parameter.
      width: taps, oldest first on both sides.
      channels: of the tensor.
      first: column of the parameter.
    """

    def view(x: np.ndarray) -> np.ndarray:
        return x[:, 0, :].T

    place = (slice(None), slice(first, first + channels))
    return Link(tensor, (channels, 1, width), path, view, place)


def at(link: Link, axis: int, index: int) -> Link:
    """The link to one entry of an axis that the parameter has and the tensor has not."""

    def view(x: np.ndarray) -> np.ndarray:
        return np.expand_dims(link.view(x), axis)

    before = [*link.place[:axis], *[slice(None)] * max(0, axis - len(link.place))]
    place = (*before, slice(index, index + 1), *link.place[axis:])
    return link._replace(view=view, place=place)


def under(
    links: Iterable[Link],
    tensor: str,
    path: Path,
) -> Iterator[Link]:
    """The links with a beginning before the names of tensors, and before the paths."""
    for link in links:
        also = tuple(tensor + name for name in link.also)
        yield link._replace(tensor=tensor + link.tensor, path=path + link.path, also=also)


def in_blocks(
    model: ModelConfig,
    of_layer: Callable[[BlockConfig, int], Iterable[Link]],
    tensor: str = "model.layers.",
) -> Iterator[Link]:
    """The links of all layers. The parameters of a block in the period are stacked over periods.

    Args:
      model: which knows its blocks.
      of_layer: the links of a layer, with paths within its block.
      tensor: what stands before the number of a layer.
    """
    for block in model.blocks:
        for place, i in enumerate(block.layers):
            for link in under(of_layer(block, i), f"{tensor}{i}.", block.path):
                yield at(link, 0, place) if block.is_repeated else link


def bounds(place: Place, shape: Shape) -> tuple[tuple[int, int], ...]:
    """The first and the past-the-last index of each axis."""
    slices = itertools.chain(place, itertools.repeat(slice(None)))
    return tuple(part.indices(size)[:2] for part, size in zip(slices, shape))


def part_shape(link: Link, shape: Shape) -> Shape:
    """The shape of the link's part of a parameter of this shape."""
    return tuple(end - begin for begin, end in bounds(link.place, shape))
