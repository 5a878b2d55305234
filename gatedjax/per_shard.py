"""What each device of a mesh does with its own part of the arrays: functions under `shard_map`."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, PartitionSpec

from gatedjax.sharding import Names, is_ours, mesh_axes


def per_shard(
    fn: Callable,
    in_axes: Sequence[Names],
    out_axes: Names | list[Names],
    gathered: Sequence[str] = (),
    summed: str | None = None,
) -> Callable:
    """`fn`, run by each device of the ambient mesh on its own part of the arrays.

    Without a mesh it is `fn` itself. For what XLA cannot cut by itself (a Pallas kernel), or would
    cut badly: sorting rows by expert, which every device can do with its own tokens. A name whose
    size the mesh does not divide (one row, at the start or when sampling) is handed over whole.

    Args:
      fn: a function of arrays.
      in_axes: for every argument (an array or None), the logical name of each axis; None hands over
        the whole axis.
      out_axes: the same for the result; a list for several results.
      gathered: names of which each device gathers the whole before `fn`; their gradients are
        reduced and scattered.
      summed: the name along which the result, or the first of several, is a partial sum.

    Returns:
      A function of the whole arrays.
    """

    def call(*args):
        mesh = jax.sharding.get_abstract_mesh()
        if not is_ours(mesh):
            return fn(*args)
        cut = _cut_axes(mesh, args, in_axes)
        several = isinstance(out_axes, list)
        results = out_axes if several else [out_axes]
        whole = set()
        # Gathered by hand, an array counts as different on every device: only right if the result
        # is cut likewise. Where it is not, `shard_map` itself hands over the whole.
        if any(name and name not in cut for names in results for name in names):
            whole = set(gathered)
        by_hand = {
            name: axes for name, axes in cut.items() if name in gathered and name not in whole
        }
        specs = {name: axes for name, axes in cut.items() if name not in whole}

        def body(*shards):
            inputs = [_gathered(x, names, by_hand) for x, names in zip(shards, in_axes)]
            y = fn(*inputs)
            if summed not in cut or not cut[summed]:
                return y
            if several:
                partial, *others = y
                return jax.lax.psum(partial, cut[summed]), *others
            return jax.lax.psum(y, cut[summed])

        in_specs = tuple(_spec(names, specs) for names in in_axes)
        out_specs = tuple(_spec(names, specs) for names in results)
        if not several:
            (out_specs,) = out_specs
        return jax.shard_map(
            body,
            mesh=mesh,
            in_specs=in_specs,
            out_specs=out_specs,
        )(*args)

    return call


def _cut_axes(
    mesh: AbstractMesh,
    args: Iterable[Array | None],
    in_axes: Iterable[Names],
) -> dict[str, tuple[str, ...]]:
    """The mesh axes of every logical name whose size the mesh divides.

    Those of one device are left out: an array that is cut along them counts as one that differs.
    """
    size_of = {}
    for arg, names in zip(args, in_axes):
        if arg is not None:
            size_of |= dict(zip(names, arg.shape))
    cut = {}
    for name, size in size_of.items():
        if name is None:
            continue
        axes = mesh_axes(name)
        ways = math.prod(mesh.shape[axis] for axis in axes)
        if size % ways == 0:
            cut[name] = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return cut


def _spec(names: Names, axes_of: Mapping[str, tuple[str, ...]]) -> PartitionSpec:
    """The partition of an array whose axes have these logical names."""
    return PartitionSpec(*(None if name is None else axes_of.get(name) or None for name in names))


def _gathered(
    x: Array | None,
    names: Names,
    gathered: Mapping[str, tuple[str, ...]],
) -> Array | None:
    """A device's part, made whole along the axes of `gathered`, which are cut over those there."""
    if x is None:
        return None
    for i, name in enumerate(names):
        axes = gathered.get(name) if name is not None else None
        if axes:
            x = jax.lax.all_gather(x, axes, axis=i, tiled=True)
    return x


def manual_axes(name: str) -> tuple[str, ...]:
    """Inside `per_shard`: the mesh axes of a logical axis; empty where there is no mesh."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in mesh_axes(name) if axis in manual)


def sum_of_parts(x: Array, names: Names) -> Array:
    """The sum over the first axis of `x`, of which each device of "batch" holds one entry.

    Every device gets its own part of the sum, cut along the last axis; left to XLA, it would get
    the whole and drop the rest. The parts come to lie one after the other first: a TPU does not
    scatter along the axis that is the fastest in memory.

    Args:
      x: [P, X, M], with P = parts("batch").
      names: of X and M; no axis of the mesh cuts both M and the sequence.
    """
    mesh = jax.sharding.get_abstract_mesh()
    summed = _axes_of_several(mesh, "batch")
    first, last = names
    assert first is not None and last is not None
    scattered = _axes_of_several(mesh, last)
    whole = tuple(axis for axis in summed if axis not in scattered)

    ways = math.prod(mesh.shape[axis] for axis in scattered)

    def body(part: Array) -> Array:
        length, width = part.shape[1:]
        pieces = jnp.swapaxes(part.reshape(length, ways, width // ways), 0, 1)
        total = jax.lax.psum_scatter(pieces, scattered, scatter_dimension=0)
        return jax.lax.psum(total, whole) if whole else total

    rows = _axes_of_several(mesh, first) or None
    return jax.shard_map(
        body,
        mesh=mesh,
        in_specs=PartitionSpec(summed, rows, None),
        out_specs=PartitionSpec(rows, scattered),
    )(x)


def _axes_of_several(mesh: AbstractMesh, name: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis that have more than one device."""
    return tuple(axis for axis in mesh_axes(name) if mesh.shape[axis] > 1)
