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
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
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
# embed_act; rows that are looked up in a table lookup_batch: they are cut as it is, until they are
# the stream.
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
    ("lookup_batch", ("data", "expert")),
    ("expert", "expert"),
    ("constant_expert", None),
    ("layers", None),
)

# The logical names of an array's axes; None for an axis that is never cut.
Names = tuple[str | None, ...]

# Channels that a TPU's vector has side by side.
TPU_LANES = 128


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


def parts(name: str | None) -> int:
    """Into how many parts the ambient mesh cuts a logical axis; 1 without a mesh or a name."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape.get(axis, 1) for axis in mesh_axes(name))


def is_cut(name: str, size: int) -> bool:
    """Whether `per_shard.per_shard` cuts a logical axis of this size."""
    if not is_ours(jax.sharding.get_abstract_mesh()):
        return False
    return parts(name) > 1 and size % parts(name) == 0


def placed(x: Array, names: Names) -> Array:
    """`x`, cut over the ambient mesh as the rules say; `x` itself without a mesh of ours.

    Unlike Linen's constraint it needs no rules around it: a backward pass is traced outside of
    them.
    """
    if not is_ours(jax.sharding.get_abstract_mesh()):
        return x
    spec = nn.logical_to_mesh_axes(names, RULES)
    return jax.lax.with_sharding_constraint(x, spec)


def is_ours(mesh: AbstractMesh) -> bool:
    """Whether arrays can be cut over this mesh.

    Several devices, our axes, and outside of a `shard_map`.
    """
    return mesh.size > 1 and set(AXES) <= set(mesh.axis_names) and not mesh.manual_axes


def mesh_axis(name: str) -> str:
    """The one mesh axis of a logical axis."""
    (axis,) = mesh_axes(name)
    return axis


def mesh_axes(name: str | None) -> tuple[str, ...]:
    """The mesh axes of a logical axis."""
    spec = nn.logical_to_mesh_axes((name,), RULES)
    assert spec is not None
    (axes,) = spec
    if isinstance(axes, str):
        return (axes,)
    return tuple(axes or ())


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
