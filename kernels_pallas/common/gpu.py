"""What the GPU kernels of several ops share."""

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import Array
from jax.experimental import pallas as pl

from kernels_pallas.common.cost import moved as moved
from kernels_pallas.common.device import device_kind

LOG2_E = math.log2(math.e)

# name -> (array or its shape, the block of it that a program gets)
Operands = dict[str, tuple[Any, pl.BlockSpec]]


def kernel_call(
    kernel: Callable,
    grid: tuple[int, ...],
    inputs: Operands,
    outputs: Operands,
    *,
    warps: int,
    stages: int = 1,
    flops: int,
    exponentials: int,
    interpret: bool,
    name: str,
) -> dict[str, Array]:
    """Runs `kernel(**refs)`, whose references have the names of `inputs` and `outputs`.

    Args:
      kernel: returns nothing; it writes to the references of the outputs.
      grid: its programs.
      inputs, outputs: arrays, or the shapes of results, by name.
      warps: of a program.
      stages: iterations of a loop whose loads are in flight together.
      flops, exponentials: declared to XLA, beside the bytes of all arrays.
      interpret: whether it runs in interpret mode.
      name: of the kernel in profiles.

    Returns:
      The results, by name.
    """
    from jax.experimental.pallas import triton as pltriton

    names = [*inputs, *outputs]
    arrays = [array for array, _ in inputs.values()]
    results = [array for array, _ in outputs.values()]

    def body(*refs: Any) -> None:
        kernel(**dict(zip(names, refs)))

    made = pl.pallas_call(
        body,
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=results,
        compiler_params=pltriton.CompilerParams(num_warps=warps, num_stages=stages),
        cost_estimate=pl.CostEstimate(flops, exponentials, moved([*arrays, *results])),
        interpret=interpret,
        name=name,
    )(*arrays)
    return dict(zip(outputs, made))


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
