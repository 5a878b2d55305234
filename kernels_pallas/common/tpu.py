"""What the TPU kernels of several ops share: operands by name, where arrays lie, interpret mode."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Shaped

from kernels_pallas.common.mesh import varying_axes

# Of at least 64 MiB on every generation. The default of 16 MiB is too little for 8 heads.
VMEM_LIMIT = 56 * 2**20

# The shape of a register of float32.
SUBLANES = 8
LANES = 128

# What a kernel gets for an array. Its type at run time is `jax.Ref`, which does not declare `at`.
Ref = Any

# What `pallas_call` takes as `interpret`.
Interpret = bool | pltpu.InterpretParams


class Operand(NamedTuple):
    """One array of a kernel, by the name that the kernel knows it by."""

    name: str
    array: Array | jax.ShapeDtypeStruct
    block: tuple[int, ...]
    index: Callable  # (*grid indices, ...) -> block index


def in_hbm(array: Array, interpret: Interpret) -> Array:
    """Keeps XLA from moving a kernel's input to VMEM beforehand.

    Beside another kernel that is bound by HBM that is no gain, and the input is moved twice: 67 MB
    and 80 us of v5e at B4 T4096 H8 K128 V256.
    """
    if interpret:
        return array
    return pltpu.with_memory_space_constraint(array, pltpu.HBM)


def without_float16(x: Array) -> Array:
    """Float16 as float32: Mosaic does not convert to or from float16."""
    return x.astype(jnp.float32) if x.dtype == jnp.float16 else x


def interpret_params(interpret: Interpret, x: Array) -> Interpret:
    """What `pallas_call` takes as `interpret` for inputs that vary as `x` does.

    The plain interpreter is the quicker one, but does not know the varying axes of `shard_map`.
    """
    if interpret is True and varying_axes(x):
        return pltpu.InterpretParams()
    return interpret


def as_column(row: Shaped[Array, "1 R"]) -> Shaped[Array, "R 1"]:
    """A row transposed, inside of a kernel; Mosaic does so for whole registers only."""
    # [1, R] -> [8, R] -> [R, 8] -> [R, 1]
    register = jnp.broadcast_to(row, (SUBLANES, row.shape[1]))
    return jnp.transpose(register)[:, :1]


def sigmoid(x: Array) -> Array:
    """The sigmoid in float32, by tanh.

    tanh is one instruction here. 1 / (1 + exp) is a dozen, and often there is no matrix product
    beside them to hide their time.
    """
    return 0.5 * jnp.tanh(0.5 * x.astype(jnp.float32)) + 0.5
