"""What the compiler is told beside a program: about a CPU's faults, a TPU's collectives and VMEM.

**Evaluations and sampling on a CPU** whose XLA breaks some fusions. The ops hide from XLA what its
broken fusions need (`kernels_pallas.common.opaque`). This is the second protection, for programs
whose result is a number that people read: of the "YNN" fusions, only those of a single matrix
product are left, which are right. The training step is compiled without this: it would be 3 %
slower (benchmarks/NOTES.md), and wrong arithmetic would show in its loss.

The fault is described in docs/notes/xla_cpu_ynn_broadcast.md.

**The first state and the training step on a CPU** are compiled at level 1 of LLVM, unless XLA_FLAGS
names a level. A step compiles in 72 to 86 % of the CPU time and runs as fast, the first state in
half (benchmarks/NOTES.md). The first state is the same to the bit; a step's sums may differ in
their last digits.

**Training steps on TPUs.** By default libtpu lets a chip wait for each collective. The SparseCores
of v5p, v6e and v7x can run them while the chip computes (`ASYNCHRONOUS_COLLECTIVES`). In long runs
products may take more VMEM there than by default (`aot/larger_products.py`).
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jaxlib.version import __version_info__ as JAXLIB_VERSION

from kernels_pallas.common.device import target_platform

# Both are known to be wrong. A later XLA may be right, and may no longer know the option.
FIRST_AFFECTED = (0, 11, 2)
LAST_AFFECTED = (0, 12, 0, 1)
SINGLE_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}

# Of libtpu 0.0.48 to 0.0.50: collectives run on SparseCores. The first six say which; an all-gather
# is to stay one, in place of an all-reduce of zeros and a shard.
ASYNCHRONOUS_COLLECTIVES = dict.fromkeys(
    (
        "xla_tpu_enable_sparse_core_collective_offload_all_gather",
        "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather",
        "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather",
        "xla_tpu_enable_sparse_core_collective_offload_all_reduce",
        "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter",
        "xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter",
        "xla_tpu_enable_sparse_core_reduce_scatter_v2",
        "xla_tpu_prefer_async_allgather_to_allreduce",
        "xla_tpu_use_tc_device_shape_on_sc",
        "xla_sc_disable_megacore_partitioning",
    ),
    "true",
) | {
    # These fuse a gather into the product that needs it, which then waits for it.
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "false",
}

OPTIMIZATION_LEVEL = "xla_backend_optimization_level"


def quick_on_cpus(mesh: Mesh) -> dict[str, str]:
    """The `compiler_options` of what a run compiles once: its first state, its training step."""
    is_set = OPTIMIZATION_LEVEL in os.environ.get("XLA_FLAGS", "")
    if mesh.devices.flat[0].platform != "cpu" or is_set:
        return {}
    return {OPTIMIZATION_LEVEL: "1"}


def for_training(mesh: Mesh, is_asynchronous: bool) -> dict[str, str]:
    """The `compiler_options` of every training step on this mesh.

    Args:
      mesh: of the devices that it is compiled for.
      is_asynchronous: whether collectives are to run while the devices compute
        (`MeshConfig.async_collectives`).
    """
    options = quick_on_cpus(mesh)
    is_possible = mesh.size > 1 and has_sparse_cores(mesh.devices.flat[0])
    if is_asynchronous and is_possible:
        options |= ASYNCHRONOUS_COLLECTIVES
    return options


def has_sparse_cores(device: jax.Device) -> bool:
    """Whether it is a TPU whose SparseCores can run collectives: v5p, v6e or v7x."""
    kind = device.device_kind
    return kind == "TPU v5" or kind.startswith(("TPU v5p", "TPU v6", "TPU7"))


def for_this_backend() -> dict[str, str]:
    """The `compiler_options` of `jax.jit`. Not for import time: this starts the backend."""
    is_affected = FIRST_AFFECTED <= JAXLIB_VERSION <= LAST_AFFECTED
    if is_affected and target_platform() == "cpu":
        return SINGLE_PRODUCTS
    return {}


def careful_jit(function: Callable, **options: Any) -> Callable:
    """`jax.jit(function, **options)` with this backend's compiler options, made at the first call.

    A decorator of module-level functions: nothing starts a backend at import.
    """

    @functools.cache
    def compiled():
        return jax.jit(function, compiler_options=for_this_backend(), **options)

    @functools.wraps(function)
    def call(*args, **kwargs):
        return compiled()(*args, **kwargs)

    return call
