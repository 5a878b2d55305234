"""How evaluations and sampling are compiled on a CPU whose XLA breaks some fusions.

The ops hide from XLA what its broken fusions need (`kernels_pallas.common.opaque`). This is the
second protection, for programs whose result is a number that people read: of the "YNN" fusions,
only those of a single matrix product are left, which are right. The training step is compiled
without this: it would be 3 % slower (benchmarks/NOTES.md), and wrong arithmetic would show in its
loss.

The fault is described in docs/notes/xla_cpu_ynn_broadcast.md.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jaxlib.version import __version_info__ as JAXLIB_VERSION

from kernels_pallas.common.device import target_platform

# Both are known to be wrong. A later XLA may be right, and may no longer know the option.
FIRST_AFFECTED = (0, 11, 2)
LAST_AFFECTED = (0, 12, 0, 1)
SINGLE_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}


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
