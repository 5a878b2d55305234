"""Kernels on a mesh under plain `jit`: every device computes its own rows and heads.

XLA cannot cut a Mosaic kernel and refuses to compile one whose arguments are cut; libtpu does not know
`custom_partitioning`, by which an op could learn how they are. So an op wraps itself in `shard_map` where the ambient
mesh (`jax.set_mesh`) has more than one device. How arguments are cut is known while tracing for Explicit mesh axes
only; for Auto ones their names tell: those of `mesh_axes`. Where the names mislead, results are right and XLA moves
data to where it has to be. Inside a `shard_map` of the caller's nothing is done.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, Mesh, PartitionSpec

_ROWS, _HEADS = ("data", "fsdp", "expert", "batch", "replica"), ("tensor", "model")
_names: list[tuple[tuple[str, ...], tuple[str, ...]]] = [(_ROWS, _HEADS)]


@contextlib.contextmanager
def mesh_axes(rows: Sequence[str], heads: Sequence[str]) -> Iterator[None]:
    """While an op is traced: the names of Auto mesh axes that cut the rows of a batch, and of those that cut heads.

    Without it rows are cut by axes called data, fsdp, expert, batch or replica, heads by tensor or model.
    """
    _names.append((tuple(rows), tuple(heads)))
    try:
        yield
    finally:
        _names.pop()


def by_rows_and_heads(
    fn: Callable,
    arrays: Sequence[Array | None],
    inputs: Sequence[str],
    outputs: Sequence[str],
    heads: int,
) -> tuple[Array | None, ...]:
    """`fn(*arrays)`, cut over the ambient mesh.

    Args:
      fn: returns a tuple; of parts as well as of the whole.
      inputs, outputs: the axes of every array, a letter each: "b" rows, "h" heads, "." never cut. Axes of size 1 are
        never cut. The first array has all rows.
      heads: what a number of parts must divide: the greatest common divisor of all numbers of heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return fn(*arrays)
    q, axes = arrays[0], inputs[0]
    rows_by, heads_by = _axes_of(mesh, q, axes)
    cut = {
        "b": _dividing(mesh, rows_by, q.shape[axes.index("b")]),
        "h": _dividing(mesh, heads_by, heads),
    }
    spec = lambda letters, shape: PartitionSpec(
        *(cut.get(a) if n > 1 else None for a, n in zip(letters, shape))
    )
    in_specs = tuple(None if x is None else spec(a, x.shape) for a, x in zip(inputs, arrays))
    shapes = jax.eval_shape(
        fn, *(None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
    )

    def part(*parts):
        given = [x for x in parts if x is not None]
        return fn(*(None if x is None else varying_like(x, *given) for x in parts))

    out_specs = tuple(None if x is None else spec(a, x.shape) for a, x in zip(outputs, shapes))
    return jax.shard_map(part, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(*arrays)


def by_sorted_rows(
    fn: Callable,
    rows: Sequence[Array],
    whole: Sequence[Array],
    group_sizes: Array,
    summed: bool = False,
):
    """`fn(*rows, *whole, group_sizes)`, one array or several, cut over the ambient mesh by rows, which are sorted.

    Every device gets the part of each group that lies in its own rows. `summed`: the result is one of groups, not of
    rows, and every device holds a part of the sum.
    """
    mesh, num_rows = jax.sharding.get_abstract_mesh(), rows[0].shape[0]
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return fn(*rows, *whole, group_sizes)
    axes = _dividing(mesh, _axes_of(mesh, rows[0], "b.")[0], num_rows)
    parts = math.prod(mesh.shape[a] for a in axes or ())

    def part(*arrays):
        *arrays, sizes = [varying_like(x, *arrays) for x in arrays]
        first = jax.lax.axis_index(axes) * (num_rows // parts) if axes else 0
        ends = jnp.minimum(jnp.cumsum(sizes), num_rows)
        edge = lambda row: jnp.clip(row - first, 0, num_rows // parts)
        out = fn(*arrays, edge(ends) - edge(jnp.pad(ends[:-1], (1, 0))))
        total = lambda x: jax.lax.psum(x.astype(jnp.float32), axes).astype(x.dtype)
        return jax.tree.map(total, out) if summed and axes else out

    specs = *[PartitionSpec(axes)] * len(rows), *[PartitionSpec()] * (len(whole) + 1)
    out_spec = PartitionSpec() if summed else PartitionSpec(axes)
    return jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=out_spec)(
        *rows, *whole, group_sizes
    )


def _axes_of(mesh: Mesh, x: Array, axes: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if AxisType.Explicit not in mesh.axis_types:
        return _names[-1]
    spec = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)
    named = lambda names: names if isinstance(names, tuple) else () if names is None else (names,)
    by = lambda letter: named(spec[axes.index(letter)]) if letter in axes else ()
    return by("b"), by("h")


def _dividing(mesh: Mesh, names: Sequence[str], size: int) -> tuple[str, ...] | None:
    """Those of `names` that the mesh has, or None where they do not divide `size`."""
    names = tuple(n for n in names if n in mesh.axis_names)
    return names if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None


# Values born inside `shard_map(check_vma=True)`, such as a scan's zero carry, must vary like the data they are used with.


def varying_axes(*arrays: Array) -> frozenset[str]:
    """The manual mesh axes over which any of `arrays` varies; empty outside `shard_map`."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def varying_like(x: Array, *arrays: Array) -> Array:
    """`x`, marked as varying over every manual mesh axis that any of `arrays` varies over. The values do not change."""
    missing = varying_axes(*arrays) - varying_axes(x)
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def like(x: Array, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """An output that varies over the mesh axes that `x` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.typeof(x).manual_axis_type)
