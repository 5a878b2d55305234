"""One decoding step of `delta_scan` on GPU: every state is read once and written once, in place.

Through jax-triton, as the step of `linear_scan`: an extra package
(`pip install gatedjax[gpu-kernels]`), and without it the step runs as plain XLA.
"""

from typing import Any

import jax
from jax import Array

from kernels_pallas.common.mesh import varying_like
from kernels_pallas.common.padding import power_of_two
from kernels_pallas.delta_scan.gpu.tuning import MAX_K
from kernels_pallas.delta_scan.inputs import DeltaStepInputs, DeltaStepOptions
from kernels_pallas.delta_scan.normalize import L2_EPSILON
from kernels_pallas.linear_scan.gpu.step import (
    PTX_VERSION,
    STATE_IN_PROGRAM,
    absent_capability,
    no_kernel,
)


def unsupported(inputs: DeltaStepInputs, *, interpret: bool) -> str | None:
    """Why this backend cannot take one decoding step, or None when it can."""
    K = inputs.q.shape[-1]
    if K > MAX_K:
        return f"takes K up to {MAX_K}, not {K}"
    return no_kernel(inputs, interpret=interpret)


def delta_scan_step(inputs: DeltaStepInputs, options: DeltaStepOptions) -> tuple[Array, Array]:
    """As `api.delta_scan_step`: on a copy of the state that XLA leaves out if it is donated."""
    import jax_triton

    from kernels_pallas.delta_scan.gpu.step_kernel import step_kernel

    q, v, state = inputs.q, inputs.v, inputs.state
    out_type = jax.ShapeDtypeStruct(v.shape, v.dtype)

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
            name="delta_scan_step",
            **launch(inputs, options),
        )
        return o, updated[...]

    o, new_state = step(state, *rows_of(inputs))
    return varying_like(o, q, state), varying_like(new_state, q, state)


def rows_of(inputs: DeltaStepInputs) -> list[Array]:
    """All arrays but the state; where one is missing its pointer is not read, and q serves."""
    # The state is the last of the inputs.
    return [inputs.q if x is None else x for x in inputs[:-1]]


def launch(inputs: DeltaStepInputs, options: DeltaStepOptions) -> dict[str, Any]:
    """The kernel's grid and static arguments."""
    B, Hq, K = inputs.q.shape
    Hk = inputs.k.shape[1]
    H, V = inputs.v.shape[1:]
    # Powers of two, as Triton wants, and at least the 16 rows of a tile.
    block_k = max(16, power_of_two(K))
    block_v = max(16, min(STATE_IN_PROGRAM // block_k, power_of_two(V)))
    decay_kinds = {2: "scalar", 3: "vector"}
    log_decay = inputs.log_decay
    return dict(
        grid=(B * H, -(-V // block_v)),
        num_warps=4,
        num_stages=1,
        scale=options.scale,
        H=H,
        QUERY_GROUP=H // Hq,
        KEY_GROUP=H // Hk,
        K=K,
        V=V,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        DECAY="none" if log_decay is None else decay_kinds[log_decay.ndim],
        BETA=inputs.beta is not None,
        ERASE=inputs.erase is not None,
        WRITE=inputs.write is not None,
        L2_NORM=options.l2_norm,
        EPSILON=L2_EPSILON,
    )
