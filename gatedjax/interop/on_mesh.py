"""Tensors of files onto a mesh and off it, slice by slice: no host ever holds a whole model.

A device asks for its part of a parameter; of the mapped files only that part is read. The other
way, one tensor of the disk at a time comes off the devices.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from gatedjax.interop.checkpoint import Part
from gatedjax.interop.links import Link, bounds
from gatedjax.interop.safetensors import MappedFiles, Planned
from gatedjax.layers.tree import Path

Bounds = tuple[tuple[int, int], ...]


def read_parameters(
    parts: Mapping[Path, Sequence[Part]],
    wanted: Mapping[Path, jax.ShapeDtypeStruct],
) -> dict[Path, Array]:
    """The parameters, each where its sharding says, in its own dtype.

    Args:
      parts: of each parameter.
      wanted: their shapes, dtypes and shardings.
    """
    files = MappedFiles()
    given = {}
    for path, parameter in wanted.items():
        given[path] = _placed(parameter, parts[path], files)
        # What was copied need not stay in memory as pages of the file, too.
        files.forget_pages()
    return given


def _placed(
    parameter: jax.ShapeDtypeStruct,
    parts: Sequence[Part],
    files: MappedFiles,
) -> Array:
    assert parameter.sharding is not None
    # Devices that hold copies share one reading.
    read: dict[Bounds, np.ndarray] = {}

    def of_device(index: tuple[slice, ...] | None) -> np.ndarray:
        region = bounds(index or (), parameter.shape)
        if region not in read:
            read[region] = region_of(parameter, parts, region, files)
        return read[region]

    array = jax.make_array_from_callback(parameter.shape, parameter.sharding, of_device)
    return jax.block_until_ready(array)


def region_of(
    parameter: jax.ShapeDtypeStruct,
    parts: Sequence[Part],
    region: Bounds,
    files: MappedFiles,
) -> np.ndarray:
    """A rectangle of a parameter, out of the files.

    Args:
      parameter: shape and dtype of the whole.
      parts: that it is made of.
      region: first and past-the-last index of each axis.
      files: of the checkpoint.
    """
    values = np.zeros([end - begin for begin, end in region], parameter.dtype)
    for link, tensor in parts:
        if tensor is None:
            continue
        to_region = []
        of_part = []
        is_empty = False
        for (begin, end), (first, last) in zip(region, bounds(link.place, parameter.shape)):
            low = max(begin, first)
            high = min(end, last)
            is_empty |= low >= high
            to_region.append(slice(low - begin, high - begin))
            of_part.append(slice(low - first, high - first))
        if not is_empty:
            # Wider dtypes hold the numbers of narrower ones to the bit.
            values[tuple(to_region)] = link.view(files.view(tensor))[tuple(of_part)]
    return values


def tensor_of(
    planned: Planned,
    links: Sequence[Link],
    parameters: Mapping[Path, Array],
) -> np.ndarray:
    """A tensor as the disk has it, on this host, out of parameters on the devices.

    Args:
      planned: its name, dtype and shape.
      links: all that it is part of.
      parameters: by path.
    """
    values = np.empty(planned.shape, planned.dtype)
    covered = 0
    for link in links:
        target = link.view(values)
        assert np.may_share_memory(target, values), f"{planned.name}: a copy, no view"
        part = _fetched(parameters[link.path], link)
        # Written through the view; to bfloat16 numpy rounds to the nearest even, as devices do.
        target[...] = part
        covered += part.size
    assert covered == values.size, f"{planned.name}: {covered} of {values.size} numbers"
    return values


def _fetched(parameter: Array, link: Link) -> np.ndarray:
    """The link's part of a parameter, on this host."""
    if parameter.is_fully_replicated and parameter.is_fully_addressable:
        # On a CPU this is the device's own memory, not a copy.
        shard = parameter.addressable_shards[0].data
        if next(iter(shard.devices())).platform == "cpu":
            return np.asarray(shard)[link.place]
    region = bounds(link.place, parameter.shape)
    starts = [begin for begin, _ in region]
    sizes = tuple(end - begin for begin, end in region)
    return np.asarray(_sliced(parameter, starts, sizes))


def _sliced(
    parameter: Array,
    starts: list[int],
    sizes: tuple[int, ...],
) -> Array:
    """A part of a parameter, copied to every device: of several hosts each can read it."""
    sharding = parameter.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec())
    return _slice_onto(sharding)(parameter, starts, sizes)


@functools.cache
def _slice_onto(sharding: Sharding) -> Callable[..., Array]:
    # One program for all parts of a size, wherever they begin.
    return jax.jit(
        jax.lax.dynamic_slice,
        static_argnums=2,
        out_shardings=sharding,
    )
