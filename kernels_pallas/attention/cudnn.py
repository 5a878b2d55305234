"""`attention` by cuDNN's flash attention, through `jax.nn.dot_product_attention`.

It covers softmax, causal with or without a window, or full; the output gate is multiplied behind
it. Only by name: it has not been measured against the kernels of `gpu/` yet. What cuDNN makes of
NaN or infinities at tokens that no query sees is not known.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kernels_pallas.attention.inputs import AttentionInputs, AttentionOptions, Outputs
from kernels_pallas.attention.kernels import over_mesh
from kernels_pallas.attention.plain_softmax import unsupported_beside_softmax
from kernels_pallas.common.device import target_platform
from kernels_pallas.common.precision import not_in_one_pass

# Of a head. Chips before Hopper take 128: jax knows which one is there, and refuses.
MAX_D = 256


def unsupported(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    """Why this backend cannot take a call of `attention`, or None when it can."""
    refusal = _unsupported_options(inputs, options)
    if refusal is not None:
        return refusal
    refusal = not_in_one_pass(inputs.q, inputs.k, inputs.v)
    if refusal is not None:
        return refusal
    K = inputs.q.shape[-1]
    V = inputs.v.shape[-1]
    if K != V or K > MAX_D or K % 8 != 0:
        return f"takes K = V, a multiple of 8 up to {MAX_D}, not {K} and {V}"
    platform = target_platform()
    if platform not in ("gpu", "cuda"):
        return f"runs on NVIDIA GPUs, not on platform {platform!r}"
    return None


def _unsupported_options(inputs: AttentionInputs, options: AttentionOptions) -> str | None:
    refusal = unsupported_beside_softmax(inputs, options)
    if refusal is not None:
        return refusal
    if options.logits_soft_cap is not None:
        return "takes no logits_soft_cap"
    if options.window is not None and not options.causal:
        return "takes a window only where attention is causal"
    return None


def attention(inputs: AttentionInputs, options: AttentionOptions) -> Outputs:
    """As `api.attention`, with every default filled in.

    Raises:
      NotImplementedError: cuDNN is not installed, or refuses the call on this chip.
    """

    def attend(part: AttentionInputs) -> Array:
        return _attend(part, options)

    return over_mesh(attend, inputs)


def _attend(inputs: AttentionInputs, options: AttentionOptions) -> Array:
    """y [B, T, H, V] of the rows and heads of one device."""
    window = None
    if options.window is not None:
        # Tokens before a query that it sees, and after.
        window = (options.window - 1, 0)
    try:
        output = jax.nn.dot_product_attention(
            inputs.q,
            inputs.k,
            inputs.v,
            scale=options.scale,
            is_causal=options.causal,
            local_window_size=window,
            implementation="cudnn",
        )
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).rstrip(".")
        raise NotImplementedError(f"attention: implementation='cudnn': {reason}") from None
    if inputs.gate_logits is None:
        return output
    gate = jax.nn.sigmoid(inputs.gate_logits.astype(jnp.float32))
    return (output * gate).astype(output.dtype)
