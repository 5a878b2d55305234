"""The leaves of a state: a name for each, and a digest of its bits, computed where it lies."""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree, UInt32

Leaves = dict[
    str, Any
]  # leaf name, such as "params.embed.table" or "opt_state.1.mu.embed.table" -> array or its type

# One name is one folder entry of the array store: nothing that could point out of it.
_LEAF_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


def named_leaves(tree: PyTree) -> Leaves:
    """{dotted key path: leaf}, in the tree's order. ValueError: a leaf is no array, or no name for a file."""
    leaves = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not _LEAF_NAME.fullmatch(name) or name in leaves:
            raise ValueError(
                f"leaf {name!r}: expected a unique name of letters, digits, '_', '-' and single dots"
            )
        if (
            not hasattr(leaf, "shape")
            or jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
            or leaf.dtype.kind == "c"
        ):
            raise ValueError(
                f"leaf {name}: got {type(leaf).__name__}, expected an array of bool, int or float"
            )
        leaves[name] = leaf
    if not leaves:
        raise ValueError("state: got a tree without arrays, expected at least one array")
    return leaves


def describe(x: Any) -> dict[str, Any]:
    """Shape and dtype, as the manifest has them."""
    return {"shape": list(x.shape), "dtype": str(x.dtype)}


def digests_of(arrays: Mapping[str, Array | np.ndarray]) -> dict[str, str]:
    """The digests as 16 hexadecimal digits each, on every process."""
    words = array_digests(arrays)
    meshes = [
        x.sharding.mesh
        for x in arrays.values()
        if isinstance(getattr(x, "sharding", None), NamedSharding)
    ]
    if meshes and jax.process_count() > 1:  # each process must hold the whole of what it reads
        words = jax.jit(lambda w: w, out_shardings=NamedSharding(meshes[0], PartitionSpec()))(words)
    return {name: f"{a:08x}{b:08x}" for name, (a, b) in jax.device_get(words).items()}


@jax.jit
def array_digests(arrays: Mapping[str, Array]) -> dict[str, UInt32[Array, "2"]]:
    """64 bits for each array: two sums mod 2^32, over its elements, of a mix of the element's bits and its position.

    The mixes are one-to-one in the bits, so a change of a single element always shows; any other change, values swapped
    or rows exchanged included, escapes with a probability of about 2^-64. Integer addition has no order, so the digest
    does not depend on the sharding, and no array is gathered: the sums are one all-reduce of two words.
    """
    return {name: _digest(x) for name, x in arrays.items()}


def _digest(x: Array) -> UInt32[Array, "2"]:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    # 64-bit elements become two words along a new last axis; narrower ones are widened.
    unsigned = jnp.dtype(f"uint{min(x.dtype.itemsize * 8, 32)}")
    words = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    position = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(_row_major_strides(words.shape)):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        position = position + index * jnp.uint32(stride % 2**32)
    first = _mix(words ^ _mix(position + jnp.uint32(0x9E3779B9)))
    second = _mix(words * jnp.uint32(0x85EBCA77) + _mix(position ^ jnp.uint32(0xC2B2AE3D)))
    return jnp.stack([jnp.sum(first, dtype=jnp.uint32), jnp.sum(second, dtype=jnp.uint32)])


def _mix(x: Array) -> Array:
    """The finalizer of MurmurHash3 (public domain, A. Appleby): a permutation of uint32 in which each input bit reaches
    every output bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _row_major_strides(shape: tuple[int, ...]) -> list[int]:
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
