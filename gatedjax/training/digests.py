"""The leaves of a state: a name for each, and a digest of its bits, computed where it lies."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree, Shaped, UInt32

# Leaf name, such as "params.embed.table" or "opt_state.1.mu.embed.table" -> array or its type.
Leaves = dict[str, Any]

# One name is one folder entry of the array store: nothing that could point out of it.
_LEAF_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


def named_leaves(tree: PyTree) -> Leaves:
    """{dotted key path: leaf}, in the tree's order.

    Raises:
      ValueError: a leaf is not an array, or its name is not one for a file.
    """
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not _LEAF_NAME.fullmatch(name) or name in leaves:
            expected = "a unique name of letters, digits, '_', '-' and single dots"
            raise ValueError(f"leaf {name!r}: expected {expected}")
        if not _is_plain_array(leaf):
            expected = "an array of bool, int or float"
            raise ValueError(f"leaf {name}: got {type(leaf).__name__}, expected {expected}")
        leaves[name] = leaf
    if not leaves:
        raise ValueError("state: got a tree without arrays, expected at least one array")
    return leaves


def _is_plain_array(leaf: Any) -> bool:
    """Whether it is an array of numbers; not of random keys (extended) or of complex numbers."""
    if not hasattr(leaf, "shape"):
        return False
    return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended) and leaf.dtype.kind != "c"


def describe(x: Any) -> dict[str, Any]:
    """Shape and dtype, as the manifest has them."""
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def digests_of(arrays: Mapping[str, Array | np.ndarray]) -> dict[str, str]:
    """The digests as 16 hexadecimal digits each, on every process."""
    words = array_digests(arrays)
    mesh = _mesh_of(arrays)
    if mesh is not None and jax.process_count() > 1:
        # Each process must hold the whole of what it reads.
        replicated = NamedSharding(mesh, PartitionSpec())
        words = jax.jit(lambda x: x, out_shardings=replicated)(words)
    on_host = jax.device_get(words)
    return {name: f"{first:08x}{second:08x}" for name, (first, second) in on_host.items()}


def _mesh_of(arrays: Mapping[str, Any]) -> Mesh | AbstractMesh | None:
    """The mesh that some of the arrays are placed on."""
    for x in arrays.values():
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh
    return None


@jax.jit
def array_digests(
    arrays: Mapping[str, Shaped[Array | np.ndarray, "..."]],
) -> dict[str, UInt32[Array, "2"]]:
    """64 bits for each array: two sums mod 2^32 over its elements.

    What is summed is a mix of an element's bits and its position. The mixes are one-to-one in the
    bits, so a change of a single element always shows; any other change, values swapped or rows
    exchanged included, escapes with a probability of about 2^-64. Integer addition has no order, so
    the digest does not depend on the sharding, and no array is gathered: the sums are one
    all-reduce of two words.
    """
    return {name: _digest(x) for name, x in arrays.items()}


def _digest(x: Shaped[Array | np.ndarray, "..."]) -> UInt32[Array, "2"]:
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # 64-bit elements become two words along a new last axis; narrower ones are widened.
    bits = min(x.dtype.itemsize * 8, 32)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    words = words.astype(jnp.uint32)
    position = _row_major_position(words.shape)
    # Two mixes with different constants, so that what escapes one sum does not escape the other.
    mixed_position = _mix(position + jnp.uint32(0x9E3779B9))
    first = _mix(words ^ mixed_position)
    mixed_position = _mix(position ^ jnp.uint32(0xC2B2AE3D))
    second = _mix(words * jnp.uint32(0x85EBCA77) + mixed_position)
    # Both sums by one reduction: XLA for CPUs fuses the mixes into it. Two separate sums would hold
    # both mixes of every array at once, twice the memory of the whole state.
    zero = jnp.uint32(0)
    sums = jax.lax.reduce((first, second), (zero, zero), _added, tuple(range(words.ndim)))
    return jnp.stack(sums)


def _added(
    one: tuple[UInt32[Array, ""], UInt32[Array, ""]],
    other: tuple[UInt32[Array, ""], UInt32[Array, ""]],
) -> tuple[UInt32[Array, ""], UInt32[Array, ""]]:
    return one[0] + other[0], one[1] + other[1]


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The finalizer of MurmurHash3 (public domain, A. Appleby).

    A permutation of uint32 in which each input bit reaches every output bit.
    """
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x85EBCA6B)
    x = x ^ (x >> 13)
    x = x * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _row_major_position(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """For each element its position in row-major order, mod 2^32."""
    position = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        position = position + index * jnp.uint32(stride)
    return position
