"""What the TPU kernels of several ops share: operands by name, padding, where arrays lie."""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import Array
from jax.experimental.pallas import tpu as pltpu

VMEM_LIMIT = (
    56 * 2**20
)  # of at least 64 MiB on every generation; the default of 16 MiB is too little for 8 heads


class Operand(NamedTuple):
    """One array of a kernel, by the name that the kernel knows it by. index(*grid indices, ...) -> block."""

    name: str
    array: Array | jax.ShapeDtypeStruct
    block: tuple[int, ...]
    index: Callable


def in_hbm(array: Array, interpret) -> Array:
    """Keeps XLA from moving a kernel's input to VMEM beforehand.

    Beside another kernel that is bound by HBM that is no gain, and the input is moved twice: 67 MB and 80 us of v5e at
    B4 T4096 H8 K128 V256.
    """
    return array if interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)
