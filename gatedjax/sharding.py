"""Mesh axes, logical rules, state shardings: where logical axes become axes of the mesh.

Nothing else in gatedjax names an axis of the mesh, but `MeshConfig`, whose keys they are. (The ops
know the usual names of other projects too: `kernels_pallas/common/mesh.py`.)

data     rows of the batch; parameters are copies
fsdp     rows of the batch; parameters are cut along the model width
context  the sequence
tensor   heads, hidden width, vocabulary
expert   experts (and rows of the batch)
"""

import bisect
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gatedjax.config import MeshConfig
from gatedjax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor", "expert")

# Every device along these has rows of its own.
BATCH_AXES = ("data", "fsdp", "expert")

# From the axes that talk the least to those that talk the most.
AXES_BY_TRAFFIC = ("data", "fsdp", "expert", "context", "tensor")

# Logical axis -> mesh axes. Parameters use embed, mlp, heads ...; activations batch, length,
# embed_act.
RULES = (
    ("batch", BATCH_AXES),
    ("length", "context"),
    ("embed_act", None),
    ("embed", ("fsdp", "context")),
    ("patch", None),
    ("mlp", "tensor"),
    ("mlp_bias", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("groups", None),
    ("head_dim", None),
    ("query_and_gate", None),
    ("query_and_headwise_gate", None),
    ("rank", None),
    ("tokens", None),
    ("gates", None),
    ("router", None),
    ("router_in", None),
    ("shared_gate", None),
    ("vocab", "tensor"),
    ("embed_vocab", ("fsdp", "context")),
    ("expert", "expert"),
    ("constant_expert", None),
    ("layers", None),
)

# The logical names of an array's axes; None for an axis that is never cut.
Names = tuple[str | None, ...]


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, or over those given. `data = 0` takes what the other axes leave.

    TPU slices (and GPU hosts) are joined along the first axes that they divide: data, fsdp, expert,
    context, tensor. The network between them is far slower than a slice's own, and those axes talk
    the least, in that order.

    Raises:
      InputError: the axes do not divide the devices.
    """
    devices = jax.devices() if devices is None else devices
    others = config.fsdp * config.context * config.tensor * config.expert
    divides = others >= 1 and len(devices) % others == 0
    if not divides or (config.data and config.data * others != len(devices)):
        sizes = " x ".join(f"{axis}={getattr(config, axis) or 'rest'}" for axis in AXES)
        raise InputError(
            f"config.mesh: {sizes} does not divide the {len(devices)} device(s) of this run"
        )
    shape = {axis: getattr(config, axis) for axis in AXES}
    shape["data"] = config.data or len(devices) // others
    across = across_slices(shape, devices)
    # Split physical axes: 16 x 16 devices lie on a torus of 8 x 8 x 4 only if one of its axes
    # serves two of ours.
    if math.prod(across.values()) == 1:
        grid = mesh_utils.create_device_mesh(
            tuple(shape.values()),
            devices,
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            tuple(shape[axis] // across[axis] for axis in AXES),
            tuple(across.values()),
            devices,
            allow_split_physical_axes=True,
        )
    # Linen's logical constraints need Auto axes.
    return Mesh(
        grid,
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
    )


# Channels that a TPU's vector has side by side.
TPU_LANES = 128


def narrow_shards(width: int, shape: Mapping[str, int]) -> str | None:
    """A warning where a mesh cuts the model's width finer than a TPU's lanes; None where not.

    XLA writes such a shard into an array of zeros and all-reduces it, where it would gather:
    counted in a compiled step of width 2048 on 64 chips, 14.4 bytes sent per parameter for 8.8, and
    all of them before the next layer starts.

    Args:
      width: of the model.
      shape: of the mesh.
    """
    shards = shape["fsdp"] * shape["context"]
    if shape["fsdp"] == 1 or width >= TPU_LANES * shards:
        return None
    wide_enough = [
        fsdp
        for fsdp in range(1, shape["fsdp"])
        if shape["fsdp"] % fsdp == 0 and width >= TPU_LANES * fsdp * shape["context"]
    ]
    fsdp = max(wide_enough, default=1)
    data = shape["data"] * shape["fsdp"] // fsdp
    return (
        f"mesh: {width} channels over fsdp {shape['fsdp']} x context {shape['context']} are "
        f"{width / shards:g} a chip, fewer than a TPU's {TPU_LANES} lanes: parameters are "
        f"all-reduced whole in place of gathered; --config.mesh.fsdp={fsdp} "
        f"--config.mesh.data={data} sends less"
    )


def mesh_of_text(text: str | None) -> MeshConfig | None:
    """The mesh that a flag --mesh names, such as `fsdp=8,tensor=2`; None where it is not given.

    Raises:
      InputError: an unknown axis, or a size that is none.
    """
    if text is None:
        return None
    axes: dict[str, Any] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdigit():
            raise InputError(
                f"--mesh: got {part!r}, expected AXIS=DEVICES with an axis of {', '.join(AXES)}"
            )
        axes[axis] = int(size)
    try:
        return MeshConfig(**axes)
    except InputError as error:
        raise InputError(f"--mesh: {error}") from None


def across_slices(shape: Mapping[str, int], devices: Sequence[jax.Device]) -> dict[str, int]:
    """For each axis, how many slices it spans.

    Slices are groups of devices with a fast network of their own.
    """
    slices = {getattr(device, "slice_index", None) for device in devices}
    left = len(slices)
    across = {}
    for axis in AXES_BY_TRAFFIC:
        across[axis] = math.gcd(shape[axis], left)
        left //= across[axis]
    return {axis: across[axis] for axis in AXES}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T]: rows over the batch axes, time over context."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context"))


@functools.lru_cache
def my_rows(
    mesh: Mesh,
    batch_size: int,
    process: int | None = None,
) -> tuple[int, ...]:
    """The rows of the global batch that this process (or that one) must supply, ascending.

    Taken from the sharding, not from the process index: processes with the same rows (tensor or
    context peers) must hold the same ones. They need not be contiguous: a host of a TPU pod holds a
    square of chips, and rows go by lines.

    Raises:
      InputError: the batch does not divide over the batch axes.
    """
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % ways:
        expected = f"a multiple of data x fsdp x expert = {ways}"
        raise InputError(f"config.train.batch_size: got {batch_size}, expected {expected}")
    if process is None:
        process = jax.process_index()
    by_rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    mine = set()
    for device, (rows,) in by_rows.devices_indices_map((batch_size,)).items():
        if device.process_index == process:
            mine.update(range(*rows.indices(batch_size)))
    return tuple(sorted(mine))


def global_batch(
    mesh: Mesh,
    local: Any,
    batch_size: int,
) -> Any:
    """The global arrays of a batch of which this process holds `my_rows`.

    A pytree of numpy arrays [my rows, T].
    """
    sharding = batch_sharding(mesh)
    mine = my_rows(mesh, batch_size)

    def put(a: np.ndarray) -> Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            rows, *others = index
            start, stop, _ = rows.indices(batch_size)
            # The rows of one device are neighbors; `a` holds them from `first` on.
            first = bisect.bisect_left(mine, start)
            return a[(slice(first, first + stop - start), *others)]

        # Each device asks for its part of the global shape: nothing is left to guess from the
        # number of processes.
        return jax.make_array_from_callback((batch_size, *a.shape[1:]), sharding, part)

    return jax.tree.map(put, local)


def parts(name: str) -> int:
    """Into how many parts the ambient mesh cuts a logical axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in mesh_axes(name))


def is_cut(name: str, size: int) -> bool:
    """Whether `per_shard` cuts a logical axis of this size."""
    if not _is_ours(jax.sharding.get_abstract_mesh()):
        return False
    return parts(name) > 1 and size % parts(name) == 0


def placed(x: Array, names: Names) -> Array:
    """`x`, cut over the ambient mesh as the rules say; `x` itself without a mesh of ours.

    Unlike Linen's constraint it needs no rules around it: a backward pass is traced outside of
    them.
    """
    if not _is_ours(jax.sharding.get_abstract_mesh()):
        return x
    spec = nn.logical_to_mesh_axes(names, RULES)
    return jax.lax.with_sharding_constraint(x, spec)


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


def mesh_axis(name: str) -> str:
    """The one mesh axis of a logical axis."""
    (axis,) = mesh_axes(name)
    return axis


def mesh_axes(name: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis."""
    spec = nn.logical_to_mesh_axes((name,), RULES)
    assert spec is not None
    (axes,) = spec
    if isinstance(axes, str):
        return (axes,)
    return tuple(axes or ())


def manual_axes(name: str) -> tuple[str, ...]:
    """Inside `per_shard`: the mesh axes of a logical axis; empty where there is no mesh."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in mesh_axes(name) if axis in manual)


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
        if not _is_ours(mesh):
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


def _is_ours(mesh: AbstractMesh) -> bool:
    """Whether arrays can be cut over this mesh.

    Several devices, our axes, and outside of a `shard_map`.
    """
    return mesh.size > 1 and set(AXES) <= set(mesh.axis_names) and not mesh.manual_axes


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


def check_divides(mesh: Mesh, abstract_params: Any) -> None:
    """Raises InputError naming the first parameter whose axes the mesh does not divide."""
    specs = nn.logical_to_mesh(nn.get_partition_spec(abstract_params), RULES)
    specs = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(abstract_params))
    for (path, leaf), spec in zip(leaves, specs):
        for size, axes in zip(leaf.shape, spec):
            ways = math.prod(mesh.shape[axis] for axis in np.atleast_1d(axes) if axis)
            if size % ways:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                what = f"an axis of {size} of parameter {name}"
                raise InputError(f"config.mesh: {axes} = {ways} does not divide {what}")


def param_shardings(mesh: Mesh, abstract_params: Any) -> Any:
    """A NamedSharding for every parameter, from the logical names that the layers gave them."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_params), mesh, RULES)


def optimizer_shardings(
    mesh: Mesh,
    opt_state: Any,
    params: Any,
    shardings: Any,
) -> Any:
    """Optimizer state is placed as its parameters are; everything else (counts) is replicated.

    A leaf belongs to the parameter whose path ends its own and whose shape it has: so it is in
    every optax state. jit does not infer this (`zeros_like` depends on no value, so the state would
    land on one device), and optax's own map over parameters fails inside Muon's partition.

    Args:
      mesh: of the devices.
      opt_state: a tree of anything with shapes.
      params: the parameters, likewise.
      shardings: of the parameters.

    Returns:
      A sharding for every leaf of `opt_state`.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    of_path = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings)):
        of_path[path] = (leaf.shape, sharding)

    def place(path: tuple, leaf: Any) -> NamedSharding:
        for i in range(len(path)):
            shape, sharding = of_path.get(path[i:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(place, opt_state)
