"""Mesh axes, logical rules, state shardings: the only place with physical axis names.

data     rows of the batch; parameters are copies
fsdp     rows of the batch; parameters are cut along the model width
context  the sequence
tensor   heads, hidden width, vocabulary
expert   experts (and rows of the batch)
"""

import bisect
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np
from jax import Array
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gatedjax.config import MeshConfig
from gatedjax.errors import InputError

AXES = ("data", "fsdp", "context", "tensor", "expert")

# A row of the batch lies on one place of these.
BATCH_AXES = ("data", "fsdp", "expert")

# Logical axis -> mesh axes. Parameters use embed, mlp, heads ...; activations batch, length, embed_act.
RULES = (
    ("batch", BATCH_AXES),
    ("length", "context"),
    ("embed_act", None),
    ("embed", ("fsdp", "context")),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("rank", None),
    ("router", None),
    ("router_in", None),
    ("shared_gate", None),
    ("vocab", "tensor"),
    ("embed_vocab", ("fsdp", "context")),
    ("expert", "expert"),
    ("layers", None),
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices, or over those given. `data = 0` takes what the other axes leave.

    TPU slices (and GPU hosts) are joined along the first axes that they divide: data, fsdp, expert, context, tensor.
    The network between them is far slower than a slice's own, and those axes talk the least, in that order.

    Raises:
      InputError: the axes do not divide the devices.
    """
    devices = jax.devices() if devices is None else devices
    others = config.fsdp * config.context * config.tensor * config.expert
    if (
        others < 1
        or len(devices) % others
        or (config.data and config.data * others != len(devices))
    ):
        expected = " x ".join(f"{axis}={getattr(config, axis) or 'rest'}" for axis in AXES)
        raise InputError(
            f"config.mesh: {expected} does not divide the {len(devices)} device(s) of this run"
        )
    shape = (
        config.data or len(devices) // others,
        config.fsdp,
        config.context,
        config.tensor,
        config.expert,
    )
    across = tuple(across_slices(dict(zip(AXES, shape)), devices).values())
    # Split physical axes: 16 x 16 devices lie on a torus of 8 x 8 x 4 only if one of its axes serves two of ours.
    if math.prod(across) == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        inside = tuple(n // outer for n, outer in zip(shape, across))
        grid = mesh_utils.create_hybrid_device_mesh(
            inside, across, devices, allow_split_physical_axes=True
        )
    # Linen's logical constraints need Auto axes.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def across_slices(shape: Mapping[str, int], devices: Sequence[jax.Device]) -> dict[str, int]:
    """For each axis, how many slices it spans. Slices are groups of devices with a fast network of their own."""
    left, across = len({getattr(d, "slice_index", None) for d in devices}), {}
    for axis in ("data", "fsdp", "expert", "context", "tensor"):
        across[axis] = math.gcd(shape[axis], left)
        left //= across[axis]
    return {axis: across[axis] for axis in AXES}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T]: rows over the batch axes, time over context."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, "context"))


@functools.lru_cache
def my_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> tuple[int, ...]:
    """The rows of the global batch that this process (or that one) must supply, ascending.

    Taken from the sharding, not from the process index: processes that share rows (tensor or context peers) must
    hold the same ones. They need not be contiguous: a host of a TPU pod holds a square of chips, and rows go by lines.

    Raises:
      InputError: the batch does not divide over the batch axes.
    """
    ways = math.prod(mesh.shape[a] for a in BATCH_AXES)
    if batch_size % ways:
        expected = f"a multiple of data x fsdp x expert = {ways}"
        raise InputError(f"config.train.batch_size: got {batch_size}, expected {expected}")
    process = jax.process_index() if process is None else process
    places = NamedSharding(mesh, PartitionSpec(BATCH_AXES)).devices_indices_map((batch_size,))
    mine = [
        rows.indices(batch_size)
        for device, (rows,) in places.items()
        if device.process_index == process
    ]
    return tuple(sorted({row for bounds in mine for row in range(*bounds)}))


def global_batch(mesh: Mesh, local, batch_size: int):
    """The global arrays of a batch of which this process holds `my_rows`: a pytree of numpy arrays [my rows, T]."""
    sharding, mine = batch_sharding(mesh), my_rows(mesh, batch_size)

    def put(a: np.ndarray) -> Array:
        def part(index: tuple[slice, slice]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = bisect.bisect_left(mine, start)
            return a[first : first + stop - start, index[1]]

        # Each device asks for its part of the global shape: nothing is left to guess from the number of processes.
        return jax.make_array_from_callback((batch_size, *a.shape[1:]), sharding, part)

    return jax.tree.map(put, local)


def parts(name: str) -> int:
    """Into how many parts the ambient mesh cuts a logical axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in _axes(name))


def is_cut(name: str, size: int) -> bool:
    """Whether `per_shard` cuts a logical axis of this size."""
    mesh = jax.sharding.get_abstract_mesh()
    usable = mesh.size > 1 and set(AXES) <= set(mesh.axis_names) and not mesh.manual_axes
    return usable and parts(name) > 1 and size % parts(name) == 0


def mesh_axis(name: str) -> str:
    """The one mesh axis of a logical axis."""
    (axis,) = _axes(name)
    return axis


def per_shard(
    fn: Callable,
    in_axes: Sequence[tuple],
    out_axes: tuple | list[tuple],
    gathered: Sequence[str] = (),
    summed: str | None = None,
) -> Callable:
    """`fn`, run by each device of the ambient mesh on its own part of the arrays; `fn` itself where there is no mesh.

    For what XLA cannot cut by itself (a Pallas kernel), or would cut badly: sorting rows by expert, which every device
    can do with its own tokens.

    Args:
      in_axes: for every argument (an array or None), the logical name of each axis; None hands over the whole axis.
      out_axes: the same for the result; a list for several results.
      gathered: names of which each device gathers the whole before `fn`; their gradients are reduced and scattered.
      summed: the name along which the result, or the first of several, is a partial sum.

    A name whose size the mesh does not divide (one row, at the start or when sampling) is handed over whole.
    """

    def call(*args):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size == 1 or not set(AXES) <= set(mesh.axis_names) or mesh.manual_axes:
            return fn(*args)
        given = [(arg.shape, names) for arg, names in zip(args, in_axes) if arg is not None]
        named = {name: size for shape, names in given for name, size in zip(names, shape) if name}
        ways = {name: math.prod(mesh.shape[a] for a in _axes(name)) for name in named}
        cut = {name: _axes(name) for name, size in named.items() if size % ways[name] == 0}
        # Gathered by hand, an array counts as different on every device: only right if the result is cut likewise.
        several = isinstance(out_axes, list)
        results = out_axes if several else [out_axes]
        whole = (
            set(gathered)
            if any(name and name not in cut for names in results for name in names)
            else set()
        )
        spec = lambda names: PartitionSpec(
            *(cut.get(name) if name not in whole else None for name in names)
        )

        def body(*parts):
            by_hand = set(gathered) & cut.keys() - whole
            y = fn(*(_gathered(x, names, by_hand) for x, names in zip(parts, in_axes)))
            if not cut.get(summed):
                return y
            return (
                (jax.lax.psum(y[0], cut[summed]), *y[1:])
                if several
                else jax.lax.psum(y, cut[summed])
            )

        out = tuple(map(spec, results)) if several else spec(out_axes)
        return jax.shard_map(body, mesh=mesh, in_specs=tuple(map(spec, in_axes)), out_specs=out)(
            *args
        )

    return call


def manual_axes(name: str) -> tuple[str, ...]:
    """Inside `per_shard`: the mesh axes of a logical axis; empty where there is no mesh."""
    return tuple(a for a in _axes(name) if a in jax.sharding.get_abstract_mesh().manual_axes)


def _gathered(x: Array, names: tuple, gathered: set[str]) -> Array:
    for i, name in enumerate(names):
        if name in gathered:
            x = jax.lax.all_gather(x, _axes(name), axis=i, tiled=True)
    return x


def _axes(name: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis."""
    axes = nn.logical_to_mesh_axes((name,), RULES)[0]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def check_divides(mesh: Mesh, abstract_params) -> None:
    """Raises InputError naming the first parameter whose axes the mesh does not divide."""
    specs = nn.logical_to_mesh(nn.get_partition_spec(abstract_params), RULES)
    leaves = jax.tree_util.tree_leaves_with_path(nn.meta.unbox(abstract_params))
    for (path, leaf), spec in zip(
        leaves, jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    ):
        for size, axes in zip(leaf.shape, spec):
            ways = math.prod(mesh.shape[a] for a in np.atleast_1d(axes) if a)
            if size % ways:
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise InputError(
                    f"config.mesh: {axes} = {ways} does not divide an axis of {size} of parameter {name}"
                )


def param_shardings(mesh: Mesh, abstract_params):
    """A NamedSharding for every parameter, from the logical names that the layers gave them."""
    return nn.logical_to_mesh_sharding(nn.get_partition_spec(abstract_params), mesh, RULES)


def optimizer_shardings(mesh: Mesh, opt_state, params, shardings):
    """Optimizer state sits where its parameters sit; everything else (counts) is replicated.

    A leaf belongs to the parameter whose path ends its own and whose shape it has: so it is in every optax state. jit
    does not infer this (`zeros_like` depends on no value, so the state would land on one device), and optax's own
    map over parameters fails inside Muon's partition.

    Args:
      opt_state, params: trees of anything with shapes.
      shardings: of the parameters.
    """
    placed = jax.tree_util.tree_leaves_with_path(params)
    of_path = {path: (p.shape, s) for (path, p), s in zip(placed, jax.tree.leaves(shardings))}
    replicated = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        found = (of_path.get(path[i:]) for i in range(len(path)))
        return next((s for shape, s in filter(None, found) if shape == leaf.shape), replicated)

    return jax.tree_util.tree_map_with_path(place, opt_state)
