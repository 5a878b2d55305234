"""What the GPU kernels of several ops share."""

import functools
import importlib
import math
from collections.abc import Iterable

import jax
from jax import Array

from kernels_pallas.common.cost import moved as moved
from kernels_pallas.common.device import device_kind

LOG2_E = math.log2(math.e)


@functools.cache
def missing_triton() -> str | None:
    """Why no kernel of Pallas-Triton can be built, or None where this jax has it.

    Pallas-Triton is deprecated since jax 0.11 and may leave any minor release. Only the modules in
    the `gpu` folders import it, and these are imported when a call is for a GPU.
    """
    try:
        importlib.import_module("jax.experimental.pallas.triton")
    except ImportError:
        return f"needs Pallas-Triton, which jax {jax.__version__} lacks (pip install 'jax<0.13')"
    return None


def exp2(x: Array) -> Array:
    """2^x by one instruction. Only a compiled kernel can call it; its twin is `jnp.exp2`."""
    from jax.experimental.pallas import triton as pltriton

    [power] = pltriton.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return power


def chip(names: Iterable[str], default: str) -> str:
    """The first of `names` that the target's device kind contains ("H200" in "NVIDIA H200").

    For tables of measured block sizes. A chip that has no line in the table gets `default`.
    """
    # The first, so a table lists "H200" before a shorter name that is part of it.
    kind = device_kind()
    for name in names:
        if name in kind:
            return name
    return default
