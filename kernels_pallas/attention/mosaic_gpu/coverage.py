"""Which calls of `attention` the Mosaic GPU kernel takes."""

import math

from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions
from kernels_pallas.attention.mosaic_gpu.plan import MAX_D, padded_channels
from kernels_pallas.attention.plain_softmax import unsupported_beside_softmax
from kernels_pallas.common.device import device_kind, target_platform
from kernels_pallas.common.precision import not_in_one_pass

# Parts of `jax.Device.device_kind` of the chips of compute capability 9.0: matrix instructions of a
# warp group (wgmma) came with it, and went with the next.
HOPPER = ("H100", "H200", "H800", "H20")


def unsupported_call(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why the kernel cannot take a call of `attention`, or None when it can."""
    refusal = unsupported_beside_softmax(inputs, options)
    if refusal is not None:
        return refusal
    refusal = not_in_one_pass(inputs.q, inputs.k, inputs.v)
    if refusal is not None:
        return refusal
    K = inputs.q.shape[-1]
    V = inputs.v.shape[-1]
    if max(K, V) > MAX_D:
        return f"takes K and V up to {MAX_D}, not {K} and {V}"
    # Offsets into arrays are 32-bit integers, as in gpu/.
    elements = math.prod(inputs.q.shape[:-1]) * padded_channels(max(K, V))
    if elements >= 2**31:
        return f"takes arrays below 2**31 elements, not {elements}"
    if target_platform() not in ("gpu", "cuda"):
        # Not known before the call is lowered, or interpreted: see `dispatch.for_its_platform`.
        return None
    kind = device_kind()
    if not any(name in kind for name in HOPPER):
        return f"runs on Hopper GPUs ({', '.join(HOPPER)}), not on {kind!r}"
    return None
