"""One decoding step of `linear_scan` on GPU: every state is read once, written once, in place.

Through jax-triton, jax's official way to Triton: Pallas' own Triton back end will be removed. It is
an extra package (`pip install gatedjax[gpu]`), and without it the step runs as plain XLA.
"""

import importlib.util

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.common.device import absent_device_kind
from kernels_pallas.common.mesh import varying_like
from kernels_pallas.linear_scan.xla import _ratio, _with_ones

MAX_K = 512
STATE_IN_PROGRAM = 8192  # elements: 64 registers of each of 128 threads
# newer ones than the driver's assembler knows are refused; 8.6 came with CUDA 12.7
PTX_VERSION = 86


def unsupported(q, k, v, state, log_decay, bonus, interpret: bool) -> str | None:
    """Why this room cannot take one decoding step, or None when it can."""
    if interpret:
        return "cannot be interpreted inside jax: Triton's interpreter runs it in the tests"
    if any(x is not None and x.dtype == jnp.float64 for x in (q, k, v, state, log_decay, bonus)):
        return "does not compute in float64"
    if q.shape[-1] > MAX_K:
        return f"takes K up to {MAX_K}, not {q.shape[-1]}"
    if importlib.util.find_spec("jax_triton") is None:
        return "needs jax-triton (pip install 'gatedjax[gpu]')"
    return None


def linear_scan_step(
    q, k, v, log_decay, bonus, state, *, inclusive: bool, scale: float, normalize: bool
) -> tuple[Array, Array]:
    """One token: q [B, H, K], k [B, Hk, K], v [B, Hv, V], state [B, H, K, V]. Returns (o [B, H, V],
    new state).
    """
    out_dtype = v.dtype
    if normalize:
        v, scale = _with_ones(v.astype(jnp.float32)), 1.0
    o, new_state = _call(q, k, v, log_decay, bonus, state, inclusive, scale)
    return (_ratio(o) if normalize else o).astype(out_dtype), new_state


def _call(q, k, v, log_decay, bonus, state, inclusive: bool, scale: float) -> tuple[Array, Array]:
    import jax_triton

    from kernels_pallas.linear_scan.gpu.step_kernel import step_kernel

    @jax.custom_batching.sequential_vmap  # jax-triton has no batching rule
    def step(state, *rows):
        updated = jax.new_ref(state)
        o = jax_triton.triton_call(
            updated,
            *rows,
            kernel=step_kernel,
            out_type=jax.ShapeDtypeStruct((*q.shape[:2], v.shape[-1]), v.dtype),
            compute_capability=_absent_capability(),
            backend_options={"ptx_version": PTX_VERSION},
            name="linear_scan_step",
            **launch(q, k, v, log_decay, bonus, inclusive, scale),
        )
        return o, updated[...]

    # A pointer is wanted even where nothing is read through it.
    rows = (q, k, v, q if log_decay is None else log_decay, q if bonus is None else bonus)
    return tuple(varying_like(x, q, state) for x in step(state, *rows))


def launch(q, k, v, log_decay, bonus, inclusive: bool, scale: float) -> dict:
    """The kernel's grid and static arguments."""
    (B, H, K), V = q.shape, v.shape[-1]
    block_k = max(16, 1 << (K - 1).bit_length())
    block_v = max(16, min(STATE_IN_PROGRAM // block_k, 1 << (V - 1).bit_length()))
    decay = "none" if log_decay is None else "scalar" if log_decay.ndim == 2 else "vector"
    return dict(
        grid=(B * H, -(-V // block_v)),
        num_warps=4,
        num_stages=1,
        scale=scale,
        H=H,
        KEY_GROUP=H // k.shape[1],
        VALUE_GROUP=H // v.shape[1],
        K=K,
        V=V,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        DECAY=decay,
        DECAY_ROWS=1 if log_decay is None else len(log_decay),
        INCLUSIVE=inclusive,
        BONUS=bonus is not None,
    )


def _absent_capability() -> int | None:
    """The compute capability of a chip that is not here; None where jax-triton can ask the
    device.
    """
    kind = absent_device_kind()
    return None if kind is None else 80 if "A100" in kind else 90
