"""One decoding step of `linear_scan` on GPU: every state is read once and written once, in place.

Through jax-triton, jax's official way to Triton: Pallas' own Triton back end will be removed. It is
an extra package (`pip install gatedjax[gpu-kernels]`), and without it the step runs as plain XLA.
So it does with an older Triton, which torch may pin: that is said once.
"""

import functools
import importlib.util
import re
import warnings
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.common.device import absent_device_kind, target_platform
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.linear_scan.inputs import StepInputs, StepOptions
from kernels_pallas.linear_scan.normalize import append_ones, divide_by_last

MAX_K = 512
# Elements of a state in one program: 64 registers of each of its 128 threads.
STATE_IN_PROGRAM = 8192
# The first that jax-triton compiles with.
OLDEST_TRITON = (3, 7)
# Newer ones than the driver's assembler knows are refused. 8.6 came with CUDA 12.7.
PTX_VERSION = 86


def unsupported(inputs: StepInputs, options: StepOptions, *, interpret: bool) -> str | None:
    """Why this backend cannot take one decoding step, or None when it can."""
    K = inputs.q.shape[-1]
    if K > MAX_K:
        return f"takes K up to {MAX_K}, not {K}"
    return no_kernel(inputs, interpret=interpret)


def no_kernel(arrays: Iterable[Array | None], *, interpret: bool) -> str | None:
    """Why no kernel by jax-triton can run on these arrays, or None when one can."""
    if interpret:
        return "cannot be interpreted inside jax: Triton's interpreter runs it in the tests"
    if any(x is not None and x.dtype == jnp.float64 for x in arrays):
        return "does not compute in float64"
    if importlib.util.find_spec("jax_triton") is None:
        return "needs jax-triton (pip install 'gatedjax[gpu-kernels]')"
    refusal = _unusable_triton()
    if refusal is not None and target_platform(*arrays) == "gpu":
        _warn(refusal)
    return refusal


def _unusable_triton() -> str | None:
    """Why jax-triton cannot compile a kernel with the Triton that is installed, or None."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        version = "none"
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers >= OLDEST_TRITON:
        return None
    return f"needs triton 3.7 or newer for jax-triton, got {version}"


@functools.cache
def _warn(refusal: str) -> None:
    """Once: who has installed jax-triton expects the kernel."""
    warnings.warn(
        f"decoding steps of scans: the gpu kernel {refusal}; without one they run as plain XLA",
        stacklevel=2,
    )


def linear_scan_step(inputs: StepInputs, options: StepOptions) -> tuple[Array, Array]:
    """As `api.linear_scan_step`. Returns o [B, H, V] in v's dtype, and the new state."""
    out_dtype = inputs.v.dtype
    if options.normalize:
        # The two halves of a fraction keep float32 until they are divided, which cancels the scale.
        inputs = inputs._replace(v=append_ones(inputs.v.astype(jnp.float32)))
        options = options._replace(scale=1.0)
    o, new_state = _call(inputs, options)
    if options.normalize:
        o = divide_by_last(o)
    return o.astype(out_dtype), new_state


def _call(inputs: StepInputs, options: StepOptions) -> tuple[Array, Array]:
    """Runs the kernel on a copy of the state that XLA can leave out if the caller donates it."""
    import jax_triton

    from kernels_pallas.linear_scan.gpu.step_kernel import step_kernel

    q, k, v, log_decay, bonus, state = inputs
    out_type = jax.ShapeDtypeStruct((*q.shape[:2], v.shape[-1]), v.dtype)

    # jax-triton has no batching rule.
    @jax.custom_batching.sequential_vmap
    def step(state, *rows):
        updated = jax.new_ref(state)
        o = jax_triton.triton_call(
            updated,
            *rows,
            kernel=step_kernel,
            out_type=out_type,
            compute_capability=absent_capability(),
            backend_options={"ptx_version": PTX_VERSION},
            name="linear_scan_step",
            **launch(inputs, options),
        )
        return o, updated[...]

    # A pointer is wanted even where nothing is read through it: q serves.
    decay_pointer = q if log_decay is None else log_decay
    bonus_pointer = q if bonus is None else bonus
    o, new_state = step(state, q, k, v, decay_pointer, bonus_pointer)
    return varying_like(o, q, state), varying_like(new_state, q, state)


def launch(inputs: StepInputs, options: StepOptions) -> dict[str, Any]:
    """The kernel's grid and static arguments."""
    q, k, v, log_decay, bonus, _ = inputs
    B, H, K = q.shape
    V = v.shape[-1]
    # Powers of two, as Triton wants, and at least the 16 rows of a tile.
    block_k = max(16, 1 << (K - 1).bit_length())
    whole_v = 1 << (V - 1).bit_length()
    block_v = max(16, min(STATE_IN_PROGRAM // block_k, whole_v))
    if log_decay is None:
        decay = "none"
    elif log_decay.ndim == 2:
        decay = "scalar"
    else:
        decay = "vector"
    return dict(
        grid=(B * H, -(-V // block_v)),
        num_warps=4,
        num_stages=1,
        scale=options.scale,
        H=H,
        KEY_GROUP=H // k.shape[1],
        VALUE_GROUP=H // v.shape[1],
        K=K,
        V=V,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        DECAY=decay,
        DECAY_ROWS=1 if log_decay is None else len(log_decay),
        INCLUSIVE=options.inclusive,
        BONUS=bonus is not None,
    )


def absent_capability() -> int | None:
    """The compute capability of a chip that is not here; None where jax-triton asks the device."""
    kind = absent_device_kind()
    if kind is None:
        return None
    return 80 if "A100" in kind else 90
