"""How an op is split over a mesh: the one place that answers which mesh axes split rows and heads.

XLA cannot split a Mosaic kernel, and refuses to compile one whose arguments are split. libtpu
does not know `custom_partitioning`, by which an op could learn how they are. So an op wraps its
kernel in `shard_map`: under plain `jit` on a mesh, every device computes its own rows and heads.
The rules, in order:

1. Without a mesh, on a mesh of one device, or inside a `shard_map` of the caller's, nothing is
   split: the arrays are a device's own already. The mesh is the ambient one (`jax.set_mesh`), or
   else that of the arrays' types.
2. On a mesh with Explicit axes, the types of the arrays say which axes split them. Arrays that are
   split otherwise, over tokens or channels, are moved first.
3. On a mesh with Auto axes, that cannot be known while tracing, so the names of the axes tell. The
   caller gives them by `mesh_axes(rows=..., heads=...)`. Without it, rows are split by axes called
   data, fsdp, expert, batch or replica, and heads by tensor or model.
4. Axes that do not divide the number of rows (or of heads) are not used for it: every device then
   computes all of them.

Names that do not fit cost time, not correctness: XLA moves data to where it has to be.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Int


class MeshAxes(NamedTuple):
    """Names of the mesh axes that split the rows of a batch, and of those that split heads."""

    rows: tuple[str, ...]
    heads: tuple[str, ...]


# Rule 3 of the module's docstring.
DEFAULT_AXES = MeshAxes(
    rows=("data", "fsdp", "expert", "batch", "replica"),
    heads=("tensor", "model"),
)
_auto_axes = ContextVar("auto_axes", default=DEFAULT_AXES)


@contextlib.contextmanager
def mesh_axes(rows: Sequence[str], heads: Sequence[str]) -> Iterator[None]:
    """Names the Auto mesh axes that split rows and heads, for the ops that are traced inside."""
    # A context variable: another thread that traces at the same time keeps its own names.
    token = _auto_axes.set(MeshAxes(tuple(rows), tuple(heads)))
    try:
        yield
    finally:
        _auto_axes.reset(token)


def by_rows_and_heads(
    fn: Callable,
    arrays: Sequence[Array | None],
    inputs: Sequence[str],
    outputs: Sequence[str],
    heads: int,
) -> tuple[Array | None, ...]:
    """`fn(*arrays)`, split over the ambient mesh by rows of the batch and by heads.

    Args:
      fn: returns a tuple; of a part of the arrays as well as of the whole.
      arrays: what `fn` takes. The first one has all rows.
      inputs: the axes of every array, a letter each: "b" rows, "h" heads, "." never split. Axes of
        size 1 are never split.
      outputs: the same for every result of `fn`.
      heads: what a number of parts must divide: the greatest common divisor of all head counts.

    Returns:
      What `fn` returns.
    """
    mesh = _mesh_to_split_over(*arrays)
    if mesh is None:
        return fn(*arrays)
    first = arrays[0]
    first_axes = inputs[0]
    assert first is not None, "the first array tells how the mesh splits all of them"
    axes = _axes_that_split(mesh, first, first_axes)
    num_rows = first.shape[first_axes.index("b")]
    axes_of_letter = {
        "b": _axes_that_divide(mesh, axes.rows, num_rows),
        "h": _axes_that_divide(mesh, axes.heads, heads),
    }

    def spec(letters: str, x: Array | jax.ShapeDtypeStruct | None) -> PartitionSpec | None:
        if x is None:
            return None
        # An axis of size 1 is one that broadcasts.
        entries = [
            axes_of_letter.get(letter) if size > 1 else None
            for letter, size in zip(letters, x.shape)
        ]
        return PartitionSpec(*entries)

    def on_device(*parts: Array | None):
        return fn(*varying_together(parts))

    # The whole results' shapes tell which of their axes are of size 1.
    results = jax.eval_shape(fn, *jax.tree.map(_shape_of, arrays))
    in_specs = tuple(map(spec, inputs, arrays))
    split = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=tuple(map(spec, outputs, results)),
    )
    if AxisType.Explicit not in mesh.axis_types:
        return split(*arrays)

    # Under `jit`, because outside of it a mesh without devices will not do.
    @jax.jit
    def moved_and_split(*arrays: Array | None):
        return split(*_as_specified(mesh, arrays, in_specs))

    return moved_and_split(*arrays)


def by_sorted_rows(
    fn: Callable,
    rows: Sequence[Any],
    whole: Sequence[Any],
    group_sizes: Array,
    summed: bool = False,
) -> Any:
    """`fn(*rows, *whole, group_sizes)`, split over the ambient mesh by rows sorted by group.

    Every device gets the part of each group that lies in its own rows.

    Args:
      fn: returns an array or a pytree of arrays, whose first axis is rows unless `summed`.
      rows: pytrees of arrays with all rows as their first axis.
      whole: pytrees of arrays that every device gets whole.
      group_sizes: how many rows each group has.
      summed: the result has no rows, and every device computes one term of a sum.

    Returns:
      What `fn` returns.
    """
    mesh = _mesh_to_split_over()
    if mesh is None:
        return fn(*rows, *whole, group_sizes)
    first = jax.tree.leaves(rows)[0]
    num_rows = first.shape[0]
    axes = _axes_that_divide(mesh, _axes_that_split(mesh, first, "b.").rows, num_rows)
    rows_of_device = num_rows // _num_parts(mesh, axes)

    def on_device(*arrays):
        *others, sizes = varying_together(arrays)
        # Over several axes the index counts in the order of the spec, as the rows do.
        device = jax.lax.axis_index(axes) if axes else 0
        first_row = device * rows_of_device
        own_sizes = _sizes_within(sizes, num_rows, first_row, rows_of_device)
        out = fn(*others, own_sizes)
        if not summed or axes is None:
            return out
        return jax.tree.map(lambda x: _sum_over_devices(x, axes), out)

    # A spec for each pytree holds for all arrays in it.
    split_rows = PartitionSpec(axes)
    copied = PartitionSpec()
    row_specs = (split_rows,) * len(rows)
    other_specs = (copied,) * (len(whole) + 1)  # group_sizes too
    split = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=row_specs + other_specs,
        out_specs=copied if summed else split_rows,
    )
    arrays = (*rows, *whole, group_sizes)
    return split(*_as_specified(mesh, arrays, row_specs + other_specs))


def on_explicit_axes(*arrays: Array | None) -> bool:
    """Whether the types of arrays say how a mesh, ambient or theirs, splits them (rule 2).

    XLA does not split an op by itself then: every backend has to, by the functions above.
    """
    mesh = _mesh_to_split_over(*arrays)
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def on_auto_axes(fn: Callable, like: Array, *arrays: Array) -> Any:
    """`fn(*arrays)`, which XLA splits as it likes; results are split along rows as `like` is.

    For gathers across devices, where types of arrays cannot say how.
    """
    if not on_explicit_axes():
        return fn(*arrays)
    mesh = jax.sharding.get_abstract_mesh()
    rows = PartitionSpec(*jax.typeof(like).sharding.spec[:1])
    out_sharding = NamedSharding(mesh, rows)
    return jax.sharding.auto_axes(fn, out_sharding=out_sharding)(*arrays)


def _as_specified(
    mesh: AbstractMesh,
    arrays: Sequence[Any],
    specs: Sequence[PartitionSpec | None],
) -> tuple[Any, ...]:
    """The arrays split as `shard_map` wants them, which it does not see to on Explicit axes."""
    if AxisType.Explicit not in mesh.axis_types:
        return tuple(arrays)

    def split(tree: Any, spec: PartitionSpec | None) -> Any:
        # One spec holds for all arrays of a pytree; None where there is none.
        if spec is None:
            return tree
        return jax.tree.map(lambda x: jax.sharding.reshard(x, NamedSharding(mesh, spec)), tree)

    return tuple(map(split, arrays, specs))


def _mesh_to_split_over(*arrays: Array | None) -> AbstractMesh | None:
    """The mesh, or None where nothing is to be split (rule 1)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        meshes = [jax.typeof(x).sharding.mesh for x in arrays if x is not None]
        # Some arrays may have been made without a mesh.
        mesh = next((found for found in meshes if not found.empty), mesh)
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return None
    return mesh


def _axes_that_split(
    mesh: AbstractMesh,
    x: Array,
    letters: str,
) -> MeshAxes:
    """The mesh axes over which the rows and heads of `x` lie, as its type says or as named."""
    if AxisType.Explicit not in mesh.axis_types:
        return _auto_axes.get()
    # A spec may be shorter than the array has axes: the others are not split.
    spec = list(jax.typeof(x).sharding.spec)
    spec += [None] * (x.ndim - len(spec))

    def axes_of(letter: str) -> tuple[str, ...]:
        if letter not in letters:
            return ()
        names = spec[letters.index(letter)]
        if names is None:
            return ()
        # An entry is one name, or several that split the axis together.
        if isinstance(names, str):
            return (names,)
        return tuple(names)

    return MeshAxes(rows=axes_of("b"), heads=axes_of("h"))


def _axes_that_divide(
    mesh: AbstractMesh,
    names: Sequence[str],
    size: int,
) -> tuple[str, ...] | None:
    """Those of `names` that the mesh has; None if there are none or they do not divide `size`."""
    known = tuple(name for name in names if name in mesh.axis_names)
    if not known or size % _num_parts(mesh, known) != 0:
        return None
    return known


def _num_parts(mesh: AbstractMesh, axes: Sequence[str] | None) -> int:
    return math.prod(mesh.shape[axis] for axis in axes or ())


def _sizes_within(
    group_sizes: Int[Array, "G"],
    num_rows: int,
    first_row: Int[Array, ""] | int,
    rows_of_device: int,
) -> Int[Array, "G"]:
    """How many rows of each group lie among the device's, which begin with `first_row`."""
    ends = jnp.minimum(jnp.cumsum(group_sizes), num_rows)
    starts = jnp.pad(ends[:-1], (1, 0))
    # Clipped to the device's rows, a group that lies elsewhere is an empty one.
    own_ends = jnp.clip(ends - first_row, 0, rows_of_device)
    own_starts = jnp.clip(starts - first_row, 0, rows_of_device)
    return own_ends - own_starts


def _sum_over_devices(x: Array, axes: tuple[str, ...]) -> Array:
    """The sum of every device's term, taken in float32."""
    total = jax.lax.psum(x.astype(jnp.float32), axes)
    return total.astype(x.dtype)


def _shape_of(x: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


# Values that are made inside `shard_map(check_vma=True)`, such as a scan's zero carry, must vary
# over the same mesh axes as the data that they are used with.


def varying_axes(*arrays: Array) -> frozenset[str]:
    """The manual mesh axes over which any of `arrays` varies; empty outside `shard_map`."""
    types = [jax.typeof(x).manual_axis_type for x in arrays]
    return frozenset().union(*(axis_type.varying for axis_type in types))


def varying_like(x: Array, *arrays: Array) -> Array:
    """`x`, marked as varying over every manual mesh axis that any of `arrays` varies over.

    The values do not change.
    """
    # pcast refuses axes over which x varies already.
    missing = varying_axes(*arrays) - varying_axes(x)
    if not missing:
        return x
    return jax.lax.pcast(x, tuple(sorted(missing)), to="varying")


def varying_together[Tree](arrays: Tree) -> Tree:
    """Inside `shard_map`, every array of a pytree varying over what any of them varies over.

    A replicated input, such as sinks, must vary before it enters a custom_vjp: the transpose of
    that cast is the sum of its gradient over the mesh axis.
    """
    leaves = jax.tree.leaves(arrays)
    return jax.tree.map(lambda x: varying_like(x, *leaves), arrays)


def like(
    x: Array,
    shape: tuple[int, ...],
    dtype: DTypeLike,
) -> jax.ShapeDtypeStruct:
    """A kernel's output of this shape, which varies over the mesh axes that `x` varies over."""
    manual_axis_type = jax.typeof(x).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual_axis_type)
